#!/usr/bin/env bash
# Print a hash of what each of ten commands writes: tests/real/ten_commands.sh CHECKOUT
#
# A change that only moves code must print the lines that the checkout before it prints. The commands read files, a model
# and a recipe of one old commit, so that nothing but the code of CHECKOUT differs. What may differ between two runs, or
# by the text of a version, is left out: seconds, dates, memory, versions, digests and the notation of patterns.
set -euo pipefail
checkout=$(cd "$1" && pwd)
export PYTHONPATH=$checkout OMP_NUM_THREADS=1
python=$checkout/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git -C "$checkout" archive 147b472c docs/ask.md docs/finding.md docs/score.md examples/nearest.py examples/small.toml \
  longnet_cli/data/files/arrow.py longnet_cli/jobs/pooling.py longnet_cli/nets/positions.py models/longnet-tiny | tar -x -C "$work"
cd "$work"
mkdir texts code
cp docs/*.md texts
cp longnet_cli/*/*.py examples/nearest.py code

cat >clean.py <<'END'
"""Print the rows of files without what differs between two runs."""
import json
import re
import sys

LEFT_OUT = re.compile(
    r"seconds|tokens_per_second|flops_per_second|mfu|peak.*|date|machine|kernel"
    r"|pattern|chosen|compared|metadata|version|.*sha256|.*digest"
)


def clean(value):
    if isinstance(value, dict):
        return {key: clean(value[key]) for key in sorted(value) if not LEFT_OUT.fullmatch(key)}
    return [clean(item) for item in value] if isinstance(value, list) else value


def rows(path):
    if path.endswith(".arrow"):
        import pyarrow as pa

        with pa.memory_map(path) as file:
            table = pa.ipc.open_file(file).read_all()
        yield [f"{field.name}: {field.type}" for field in table.schema]
        yield from table.to_pylist()
    elif path.endswith(".safetensors"):
        from safetensors.torch import load_file

        for name, tensor in sorted(load_file(path).items()):
            yield name, tensor.double().sum().item(), tensor.double().square().sum().item()
    else:
        text = open(path).read()
        try:
            yield json.loads(text)
        except ValueError:
            yield from (json.loads(line) if line[:1] == "{" else line for line in text.splitlines())


keys_only = "--keys" in sys.argv
for path in [name for name in sys.argv[1:] if name != "--keys"]:
    for row in rows(path):
        print(json.dumps(sorted(row) if keys_only else clean(row), default=str))
END

longnet() { "$python" -m longnet_cli "$@" 2>>errors || { code=$?; cat errors >&2; echo "exit $code: longnet $*" >&2; }; }
row() {
  name=$1
  shift
  "$python" clean.py "$@" >cleaned
  [ -s cleaned ]
  if [ -n "${KEEP:-}" ]; then cp cleaned "$KEEP/${name//[ \/]/_}"; fi
  echo "$(sha256sum <cleaned | cut -c1-64)  $name"
}

longnet score code texts --model ./models/longnet-tiny --context 256,1Ki --format json >score.json
row "score --context --format json" score.json
longnet score code --model ./models/longnet-tiny --last 300 --format jsonl >last.jsonl
row "score --last" last.jsonl
longnet score code texts --model ./models/longnet-tiny --context 512,2Ki --stride 128 -o rows.arrow
row "score -o" rows.arrow
longnet score code --model ./models/longnet-tiny --token-logprobs places.arrow --top 1 >/dev/null
row "score --token-logprobs --top" places.arrow
longnet encode code texts --model ./models/longnet-tiny -o vectors.arrow
row "encode" vectors.arrow
longnet encode texts --model ./models/longnet-tiny --span paragraph -o spans.arrow
row "encode --span" spans.arrow
longnet tokenize code texts -o tokens.arrow --train-vocab 320
row "tokenize --train-vocab" tokens.arrow tokens.arrow.tokenizer.json
longnet tokenize code -o folder --tokenizer ./models/longnet-tiny --eos --shard-tokens 4Ki
row "tokenize to a folder" folder/*.arrow
longnet train examples/small.toml --data folder --tokenizer folder --seq-len 128 --steps 3 -o run >/dev/null
row "train" run/metrics.jsonl run/model.safetensors
longnet generate "def mean(values):" --model ./models/longnet-tiny -n 40 >text
longnet generate --input code --model ./models/longnet-tiny -n 20 --temperature 0.8 --seed 5 --format jsonl >>text
row "generate" text
longnet data inspect folder --format json >inspect.json
row "data inspect" inspect.json
longnet pattern paper --format json >pattern.json
row "pattern" pattern.json
longnet bench --seq 512,1Ki --heads 2 --head-dim 16 --repeats 1 --format jsonl >bench.jsonl
row "keys of bench" --keys bench.jsonl
