#!/usr/bin/env bash
# What longnet does, on real text, with the model that ships: about a minute on two CPU cores. `make demo` runs it.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

bold='' plain=''
[[ -t 1 && -z ${NO_COLOR:-} ]] && bold=$'\033[1m' plain=$'\033[0m'
say() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
show() { printf '$ %s\n' "$*"; "$@"; }

# Files of this machine's own Python that longnet-tiny was not trained on: held out by a hash of their path.
cd "$work"
ln -s "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" python
ln -s "$repo/README.md" "$repo/examples" .
held_out=()
for name in ast calendar pydoc random sysconfig stat http/server json/encoder json/tool tkinter/filedialog \
  multiprocessing/__init__ encodings/idna idlelib/pyparse; do
  if [[ -f python/$name.py ]]; then held_out+=("python/$name.py"); fi
done
five=("${held_out[@]:0:5}")

say "1. How well does longnet-tiny (4 million parameters) predict Python that it has never seen?"
show longnet score --ppl --quiet "${five[@]}"
bytes=$(cat "${five[@]}" | wc -c)
zipped=$(cat "${five[@]}" | gzip -9 | wc -c)
echo "bpb is bits per byte, lower is better: plain text has 8, and gzip -9 gets these files to" \
  "$(awk -v z="$zipped" -v n="$bytes" 'BEGIN { printf "%.2f", z * 8 / n }')."

say "2. What does long context buy? The same tokens, in windows of 512:"
show longnet score --ppl --quiet --context 512 "${five[@]}"

say "3. English is not Python, and it shows:"
show longnet score --ppl --quiet README.md

say "4. A vector for every file, and each file's nearest neighbours:"
show longnet encode --quiet "${held_out[@]}" -o vectors.arrow
show python examples/nearest.py vectors.arrow

say "5. Why it scales: the paper's dilated attention beside dense attention, on this machine, now."
show longnet bench --quiet --seq 4Ki,8Ki,16Ki --repeats 1

say "Next: longnet score --ppl YOUR_FILE, longnet --help, and the README."
