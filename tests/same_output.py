"""Prove that a change of the code changed nothing for a user: run many commands with two checkouts, and compare.

    python tests/same_output.py ../before                 # the checkout before the change; this one is after it
    python tests/same_output.py ../before -o runs/same    # keep inputs and outputs in this folder
    python tests/same_output.py ../before --only 'train|resume'    # only cases of these names

Each case is a line of shell, run in a folder of its own by either checkout. What it prints, its exit code and every
file that it writes are compared byte by byte; in text, what MASKS name is left out first. Inputs are made once, models
and folders of interrupted runs by the other checkout, which both then read and continue. It needs one core, four to
five minutes of it, and the extras hf, lora, gguf and h5. Exit codes: 0, all is the same; 1, something differs: a line
for each file says what.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from places import ROOT, imported

FOLDERS = {"in", "work", "before", "after"}  # inputs; where cases run; what they left
TIMEOUT = 180  # seconds of one case

# What is measured, and so differs from run to run: patterns in text, and what is left of each.
MEASURED = "tokens_per_second|flops_per_second|matmul_peak|mfu|seconds|reading_seconds|peak_memory_bytes|peak_bytes"
MASKS = tuple(
    (re.compile(pattern, re.MULTILINE), instead)
    for pattern, instead in (
        (rf'"({MEASURED}|free_bytes|program)": ?(null|[\d.e+-]+)', r'"\1": 0'),  # speed and memory, in JSON
        (r'"(sha256|digest)": "\w{64}"', r'"\1": ""'),  # in a checkpoint's state.json, of files that `content` sorts
        (r", [\d.]+ (us|ms|s) each \(", ", TIME each ("),  # the end of `generate`
        (r"^(program|peak memory|free) +[\d.]+ .iB", r"\1 SIZE"),  # `--dry-run`, whose program is measured
        (r"  #+$", "  BAR"),  # its shares of the peak
        (r"and [\d.]+ .iB are free", "and SIZE are free"),  # its refusal
        (r"^time +\S.*?  at ", "time TIME  at "),  # its time, from a rate and a batch that are measured
        (r"(at|of) [\d.]+[kMGT]? FLOP/s \(measured", r"\1 RATE FLOP/s (measured"),
        (r"a forward of [\d,]+ x", "a forward of ROWS x"),
    )
)

# Lines of shell, with these variables; a line that is indented continues the one before.
WORDS = {"in": "../../in", "data": "--data ../../in/tokens --tokenizer ../../in/tokens"}  # inputs; tokens for `train`
CASES = r"""
version: python -m longnet_cli --version
help: longnet --help; longnet; longnet data --help; longnet nothing
help-commands: for name in tokenize pattern convert train plot score encode generate bench 'data inspect';
    do longnet $name --help; done

tokenize-folder: longnet tokenize $in/texts -o tokens --train-vocab 400 --eos
tokenize-shards: longnet tokenize $in/rows.jsonl -o tokens --tokenizer longnet-tiny --shard-tokens 300
    --shard-format parquet --id-column title
tokenize-stream: longnet tokenize $in/texts --tokenizer longnet-tiny -o -
tokenize-files: for end in arrow parquet jsonl; do longnet tokenize $in/rows.parquet -o tokens.$end; done
tokenize-list: cd $in && longnet tokenize @list.txt -q -o - | longnet data inspect - --format json
tokenize-chats: longnet tokenize $in/chats.jsonl -o chats.jsonl --tokenizer $in/llama --eos '<|im_end|>'
tokenize-compressed: longnet tokenize $in/rows.jsonl.gz $in/rows.jsonl $in/rows.jsonl -o tokens.arrow --column body.text
tokenize-skip-bad: longnet tokenize $in/bad.jsonl $in/missing.txt $in/texts -o tokens --skip-bad
tokenize-bad: longnet tokenize $in/bad.jsonl -o tokens --shard-tokens 20;
    longnet tokenize $in/bad.jsonl -o tokens --shard-tokens 20 --resume --skip-bad
tokenize-ranks: longnet tokenize $in/many.jsonl -o tokens --dp 2 --shard-tokens 2k

inspect: for name in texts rows.jsonl rows.parquet ids.arrow ids.stream tokens flat.parquet vectors.arrow;
    do longnet data inspect $in/$name; done; longnet data inspect $in/flat.parquet --eos 0
inspect-json: for name in tokens ids.arrow bad.jsonl bad-ids.arrow;
    do longnet data inspect $in/$name --tokenizer longnet-tiny --format json; done
inspect-bad: longnet data inspect $in/bad.jsonl $in/bad-ids.arrow $in/cut.arrow --tokenizer $in/tokens

encode-folder: longnet encode $in/texts -o vectors
encode-shards: longnet encode $in/rows.jsonl -o vectors --keep title,year,body.note --shard-rows 3
    --shard-format parquet
encode-files: for end in arrow parquet jsonl; do longnet encode $in/rows.parquet -o vectors.$end --keep year; done
encode-stream: longnet encode $in/ids.stream -o - --span 100 --eos 0
encode-pipe: longnet tokenize $in/texts --tokenizer longnet-tiny -o - -q | longnet encode - --embedding-dtype float16
encode-pools: for pool in mean last first;
    do longnet encode $in/ids.arrow --model $in/native --pool $pool --no-normalize -o $pool.arrow; done
encode-cls: longnet encode $in/ids.arrow --model $in/native --pool cls -o vectors.arrow
encode-layers: longnet encode $in/ids.arrow --model $in/native --all-layers --chunk 50 -o layers.parquet;
    longnet encode $in/ids.arrow --all-layers --span 64 -o refused.arrow
encode-flat: longnet encode $in/flat.parquet --model $in/native --eos 0 -o vectors.arrow
encode-skip-bad: longnet encode $in/bad.jsonl $in/bad-ids.arrow $in/cut.arrow -o vectors --skip-bad
encode-bad: longnet encode $in/bad-ids.arrow -o vectors.arrow
encode-both-ways: longnet encode $in/texts --model $in/encoder -o vectors.arrow --span 50 --chunk 100 --spill .
encode-pattern: longnet encode $in/texts --model $in/native --pattern window:32,sinks=2 --bos none -o vectors.jsonl
encode-llama: longnet encode $in/rows.jsonl --model $in/llama -o vectors.arrow --keep year --span 32
encode-llama-window: longnet encode $in/texts --model $in/llama --pattern window:32,sinks=4 -o vectors
    --chunk 100
encode-llama-skip: longnet encode $in/rows.jsonl $in/texts --model $in/llama -o vectors --skip-bad
encode-slides: longnet encode $in/made/slides.parquet --model $in/made/encoder --pool mean -o slides.parquet
encode-slides-layers: longnet encode $in/made/slides.parquet --model $in/made/encoder --all-layers --chunk 256
    --no-normalize -o slides
encode-slides-span: longnet encode $in/slide.h5 --model $in/made/encoder --span 100 --pool mean -o -
encode-slides-tiles: longnet encode $in/slide.h5 --model $in/made/encoder --tile-size 8192 -o slides.jsonl
encode-book: longnet encode $in/texts --model $in/native --span 16 -o chunks.arrow &&
    longnet encode chunks.arrow --model $in/reader --pool mean -o books.jsonl
encode-slides-bad: longnet encode $in/bad-tiles.parquet --model $in/made/encoder -o one;
    longnet encode $in/bad-tiles.parquet --model $in/made/encoder -o two --skip-bad
encode-ranks: longnet encode $in/many.jsonl -o vectors --dp 2 --shard-rows 16 --model $in/native
encode-sequence-ranks: longnet encode $in/texts -o vectors.arrow --sp 2 --chunk 100 --model $in/native

score: longnet score $in/texts $in/rows.jsonl
score-json: longnet score $in/texts --format json
score-jsonl: longnet score $in/rows.jsonl --format jsonl --keep title,year,body.note
score-stdin: longnet score - --format jsonl < $in/texts/readme.md
score-contexts: longnet score $in/texts --context 32,128 --model $in/native
score-contexts-jsonl: longnet score $in/rows.jsonl --context 16,64 --stride 8 --format jsonl --model $in/native
    --by-position
score-by: longnet score $in/texts --by-position --model $in/native
score-by-json: longnet score $in/texts --context 64,256 --by-position --format json > scores.json &&
    longnet plot scores.json
score-last: longnet score $in/texts --context 64,256 --last 100 --format json --model $in/native
score-logprobs: longnet score $in/rows.jsonl --token-logprobs tokens.arrow --chunk 64 --bos 5
score-logprobs-parquet: longnet score $in/ids.arrow --token-logprobs tokens.parquet --bos none --ppl
score-pattern: longnet score $in/texts --pattern 64/1,256/4 --format json;
    longnet score $in/texts --pattern 64/1,256/2
score-dtype: longnet score $in/texts --dtype bf16 --model $in/native --format json
score-ids: longnet score $in/ids.stream $in/tokens;
    for name in ids.stream tokens split.parquet; do longnet score $in/$name --model $in/native --format jsonl; done
score-flat: longnet score $in/flat.parquet --eos 0 --column input_ids --format jsonl
score-skip-bad: longnet score $in/bad.jsonl $in/bad-ids.arrow $in/cut.arrow $in/texts --skip-bad --format json
score-bad: longnet score $in/bad.jsonl
score-folder: longnet score $in/rows.jsonl -o gains --context 16,64 --keep title,body.note --shard-tokens 200
score-folder-parquet: longnet score $in/texts -o gains.parquet --context 64,256; longnet score $in/texts -o gains.arrow
score-stream: longnet score $in/rows.parquet -o - --keep year --context 16,32 --model $in/native
score-lines: longnet score $in/bad.jsonl -o gains.jsonl --skip-bad --context 16,32
score-llama: longnet score $in/rows.jsonl --model $in/llama --format jsonl
score-llama-long: longnet score $in/texts --model $in/llama
score-llama-contexts: longnet score $in/texts --model $in/llama --context 64,128 --by-position
score-llama-skip: longnet score $in/texts $in/rows.jsonl --model $in/llama --skip-bad
score-llama-pretrained: longnet score $in/texts --model $in/llama --pattern pretrained --format json
score-llama-window: longnet score $in/texts --model $in/llama --pattern window:32,sinks=4 --chunk 64
    --token-logprobs t.arrow
score-llama-dense: longnet score $in/texts --model $in/llama --pattern dense -o gains --context 64,256
score-gguf: longnet score $in/texts/nearest.py --model $in/model.gguf --pattern window:32,sinks=4
score-ranks: longnet score $in/texts --sp 2 --chunk 100 --format json --model $in/native
score-dealt: longnet score $in/many.jsonl --dp 2 -o gains --context 16,64 --model $in/native

generate: longnet generate 'def read_lines(path):' --max-tokens 20
generate-seed: longnet generate -i $in/prompts.jsonl -n 16 --temperature 0.8 --top-p 0.9 --seed 1 --format jsonl
generate-prompts: longnet generate -i $in/prompts.jsonl -n 12 --model $in/native --temperature 1.5 --seed 7 --stop e
generate-pattern: head -c 900 $in/texts/tiles.py | longnet generate - -n 8 --pattern window:64,sinks=2
    --chunk 50 --bos none --format jsonl
generate-llama: longnet generate 'import os' --model $in/llama -n 16 --format jsonl --temperature 1 --seed 3
generate-llama-window: longnet generate -i $in/prompts.jsonl --model $in/llama -n 8 --pattern window:16,sinks=2
generate-chat: longnet generate 'What is a cache?' --chat --model $in/llama -n 8 --format jsonl
generate-chat-native: longnet generate 'What is a cache?' --chat --model $in/native
generate-long: longnet generate - --model $in/llama -n 4 < $in/texts/readme.md

train: longnet train $in/recipe.toml $data -o run --steps 3 --seq-len 128 && longnet plot run --show loss,lr
train-stages: longnet train $in/recipe.toml $data -o run --pattern window:32,sinks=2
    --set 'data.held_out=["../../in/texts/tiles.py"]' --set train.evaluate_every=2 --set train.chunk=64
    --set optimizer.name=muon --set train.seed=3
train-masked: longnet train $in/masked.toml --data $in/rows.jsonl -o run
train-mix: longnet train $in/recipe.toml --tokenizer $in/tokens -o run --steps 2 --seq-len 64
    --set 'data.mix=[{inputs=["../../in/tokens"],weight=2},{inputs=["../../in/rows.jsonl"],weight=1}]'
train-init: longnet train $in/recipe.toml --init $in/native $data -o run --steps 2
    --seq-len 128 --set train.chunk=64 --spill .
train-llama: longnet train --init $in/llama --data $in/rows.jsonl --pattern window:32,sinks=4 -o run --seq-len 96
    --steps 3 --set optimizer.lr=1e-3 --set train.chunk=48 --set train.batch_tokens=192
train-llama-dense: longnet train --init $in/llama --data $in/texts -o run --seq-len 64 --steps 2
    --set train.batch_tokens=128 && longnet score $in/rows.jsonl --model ./run
train-lora: longnet train --init $in/llama --data $in/rows.jsonl --pattern window:32,sinks=4 -o run --seq-len 64
    --steps 2 --set train.batch_tokens=128 --set lora.rank=4 --set train.log_every=1
train-again: longnet train $in/recipe.toml $data -o run --steps 2 --seq-len 64;
    longnet train $in/recipe.toml $data -o run --steps 4 --seq-len 64;
    longnet train -o run; longnet train $in/recipe.toml --no-resume -o run; longnet score $in/rows.jsonl --model ./run
train-from: for rate in 0.01 1; do longnet train -o run-$rate
    --resume $in/run $data --set optimizer.lr=$rate; done
train-ranks: longnet train $in/recipe.toml $data -o run --nproc 2 --steps 2 --seq-len 128
    --shard full

dry-train: longnet train $in/recipe.toml $data --dry-run
dry-train-json: longnet train longnet-tiny $data --dry-run --format json --chunk 1Ki
dry-train-large: longnet train longnet-2.7b --data $in/texts --dry-run
dry-train-llama: longnet train --init $in/llama --data $in/rows.jsonl --pattern window:32,sinks=4 --seq-len 96
    --steps 3 --dry-run
dry-train-lora: longnet train --init $in/llama --data $in/rows.jsonl --seq-len 64 --steps 3 --set lora.rank=4 --dry-run
dry-score: longnet score $in/texts --dry-run; longnet score $in/texts --dry-run --context 64,1Ki -o gains --format json
dry-score-sample: longnet score $in/many.jsonl --dry-run --sample 30 -o gains.arrow --skip-bad
dry-score-llama: longnet score $in/rows.jsonl $in/texts --model $in/llama --dry-run --skip-bad
dry-encode: longnet encode $in/texts --dry-run -o vectors; longnet encode $in/tokens --dry-run --format json -o v.arrow
    --model $in/native
dry-encode-slides: longnet encode $in/made/slides.parquet --model $in/made/encoder --dry-run -o slides
dry-encode-llama: longnet encode $in/texts --model $in/llama --pattern window:32,sinks=4 --dry-run --chunk 128

pattern: longnet pattern paper window:1Ki,sinks=4 geometric:64Ki dense
pattern-models: longnet pattern longnet-tiny $in/native $in/recipe.toml $in/made/encoder longnet-125m;
    longnet pattern $in/llama
pattern-json: longnet pattern 64/1,256/4,look_back=1,overlap=once,queries=all,sinks=2 pretrained
    --format json --seq 4Ki --heads 4
pattern-both-ways: longnet pattern 64/1,256/4,head_offsets=grouped --bidirectional
pattern-picture: longnet pattern paper window:1Ki -o patterns.png
convert: longnet convert $in/native -o half --dtype bf16 && longnet score $in/texts/nearest.py --model ./half
convert-tiny: longnet convert longnet-tiny -o tiny --dtype fp32
convert-slides: longnet convert $in/slide_encoder.pth -o slides; longnet convert $in/cut.pth -o cut
convert-gguf: longnet convert $in/model.gguf -o llama

wrong-words: longnet scor; longnet score --no-such-option $in/texts; longnet score https://example.org/a.txt
wrong-model: longnet score $in/texts --model no-such-model; longnet score $in/texts --model ./no-such-model
wrong-input: longnet score $in/no-such-file; longnet score $in/texts/empty.txt; longnet encode $in/nothing-*
wrong-recipe: for words in 'recipe.toml --set optimizer.learning_rate=1' 'recipe.toml --set optimizer.lr=-1'
    texts/readme.md; do longnet train $in/$words -o run; done
wrong-pattern: longnet pattern 64/3/1; longnet pattern window:1Ki,sinks=-1; longnet score $in/texts --pattern nonsense
wrong-tokenizer: longnet score $in/texts --tokenizer $in/tokens;
    longnet score $in/prompts.jsonl --tokenizer bytes --tokenizer-differs
wrong-size: longnet score $in/texts --chunk 12Q; longnet score $in/texts --context 0
wrong-column: longnet score $in/rows.parquet --column nothing; longnet encode $in/rows.jsonl --keep nothing -o v.arrow
wrong-output: longnet encode $in/texts -o v.csv; cp $in/rows.parquet .; longnet encode rows.parquet -o rows.parquet
wrong-folder: longnet tokenize $in/texts -o tokens -q; longnet tokenize $in/texts -o tokens;
    longnet encode $in/texts -o tokens; longnet tokenize $in/rows.jsonl -o tokens --resume
wrong-weights: longnet score $in/texts --model $in/damaged; longnet score $in/texts --model $in/edited
wrong-llama: longnet score $in/texts --model $in/surplus; longnet score $in/rows.jsonl --model $in/llama --sp 2
wrong-data: longnet score $in/cut.arrow; longnet score $in/bad-ids.arrow;
    longnet train $in/recipe.toml --data $in/bad.jsonl
wrong-vectors: longnet encode $in/texts --model $in/made/encoder -o v.arrow;
    longnet score $in/texts --model $in/made/encoder;
    longnet encode $in/made/slides.parquet --model $in/made/encoder --bos 1 -o v.arrow
wrong-options: longnet score $in/texts --sample 30; longnet score $in/texts --keep a; longnet score $in/texts --resume;
    longnet generate a --top-p 0.5; longnet encode $in/texts -o v.arrow --shard-rows 2; longnet train
examples: longnet encode $in/texts --model $in/native -o v.arrow && python "$checkout/examples/nearest.py" v.arrow
imports: python -c 'from longnet_cli import DilatedAttention, LongNet, LongNetConfig, Pattern, SlideConfig;
    from longnet_cli import SlideEncoder, Tokenizer, dilated_attention, from_torchscale, generate, to_torchscale;
    from longnet_cli.integrations.transformers import LongNetCache, use_dilated_attention, use_own_attention'
closed-pipe: longnet encode $in/many.jsonl --model $in/native --span 2 -o - | head -c 100
full-disk: longnet score $in/rows.jsonl --model $in/native > /dev/full
stopped: for signal in INT TERM; do sleep 2 | timeout -s $signal --preserve-status 1.5 longnet score -; echo $?; done
bench: longnet bench --op nothing; longnet bench --impl nothing
"""

# Commands that the other checkout starts and that are killed when the file named first appears; both continue them.
RESUMED = r"""
tokens/shard-00003.arrow: longnet tokenize $in/more.jsonl -o tokens --shard-tokens 5000
vectors/vectors-00002.arrow: longnet encode $in/many.jsonl -o vectors --shard-rows 6 --span 20
    --model $in/native
gains/gains-00002.arrow: longnet score $in/many.jsonl -o gains --context 16,64 --shard-tokens 300
    --model $in/native
run/checkpoints/step-00000003: longnet train $in/resumed.toml $data -o run
"""

# What the other checkout makes of the inputs, in their folder: a tokenizer, models, and a run that has ended.
PREPARED = r"""
longnet tokenize texts -o tokens --train-vocab 400 --eos
longnet train recipe.toml --data tokens --tokenizer tokens -o run
longnet convert ./run -o native --dtype fp32
longnet train masked.toml --data rows.jsonl -o encoder
python "$checkout/examples/tiles.py" made
cp -r native damaged && truncate -s -500 damaged/model.safetensors
cp -r native edited && sed -i 's/"num_layers": 2/"num_layers": 1/' edited/config.json
"""

# Imported before the first fork, because it takes seconds; the first process ends without what its libraries say then.
PRELOADED = """
import atexit, os, peft, transformers.models.llama.modeling_llama
atexit.register(os._exit, 0)
"""

CHAT = """{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

RECIPE = """
[model]
dim = 32
num_layers = 2
num_heads = 4
ffn_dim = 64
{model}

[data]
{data}

[optimizer]
lr = 1e-2

[schedule]
warmup_steps = 1

[train]
batch_tokens = 512
log_every = 1
save_every = 1
{train}
"""
CAUSAL = 'pattern = "32/1,128/4,look_back=1"\nposition = "rope"'
RECIPES = {
    "recipe": (CAUSAL, "", "stages = [{ seq_len = 64, steps = 2 }, { seq_len = 128, steps = 2 }]"),
    "resumed": (CAUSAL, "", "stages = [{ seq_len = 128, steps = 12 }]\nkeep = 2"),
    "masked": (
        'segment_lengths = [32, 128]\ndilation_rates = [1, 2]\ncausal = false\nposition = "rope"',
        'tokenizer = "longnet-tiny"',
        'objective = "masked"\nstages = [{ seq_len = 128, steps = 3 }]',
    ),
}


def make_texts(place: Path) -> list[dict[str, Any]]:
    """Make the inputs that are text: files, JSON Lines, recipes; return the rows of the JSON Lines."""
    texts = place / "texts"
    texts.mkdir()
    (texts / "readme.md").write_text((ROOT / "README.md").read_text()[:1600])
    for name in ("nearest.py", "spark_encode.py", "tiles.py"):
        (texts / name).write_text((ROOT / "examples" / name).read_text()[:1200])
    (texts / "empty.txt").write_text("")
    (place / "list.txt").write_text("texts/nearest.py\ntexts/spark_encode.py\n")
    for name, (model, data, train) in RECIPES.items():
        (place / f"{name}.toml").write_text(RECIPE.format(model=model, data=data, train=train))
    words = (ROOT / "README.md").read_text().split("\n\n")[:12]
    rows: list[dict[str, Any]] = [
        {"id": f"row {n}", "text": text[:600], "year": 1990 + n if n % 3 else None, "title": f"Größe {n // 2}"}
        | {"body": {"text": text[:80].upper(), "note": [n, str(n)][n % 2] if n > 20 else n * 0.5}}
        for n, text in enumerate(words)
    ]
    rows.insert(4, rows[4] | {"id": "empty", "text": ""})
    lines = [json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(rows)]
    write_lines(place / "rows.jsonl", lines)
    (place / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    bad = ["not JSON", '{"id": "null", "text": null}', '{"id": "number", "text": 3}', '{"id": "none"}', "[1, 2]"]
    write_lines(place / "bad.jsonl", [line for pair in zip(lines, bad, strict=False) for line in pair] + lines[5:8])
    source = (ROOT / "README.md").read_text()
    many = [{"id": n, "text": source[n * 70 : n * 70 + 100 + n * 3]} for n in range(60)]
    write_lines(place / "many.jsonl", [json.dumps(row) for row in many])
    write_lines(place / "more.jsonl", [json.dumps(row | {"id": f"{n} {row['id']}"}) for n in range(20) for row in many])
    write_lines(place / "prompts.jsonl", [json.dumps({"id": row["id"], "text": row["text"][:60]}) for row in rows[:4]])
    chats = [[("user", "Hi"), ("assistant", "Hello, <|im_end|> you")], [("system", "wörld")]]
    messages = [[{"role": role, "content": text} for role, text in chat] for chat in chats]
    write_lines(place / "chats.jsonl", [json.dumps({"id": n, "messages": chat}) for n, chat in enumerate(messages)])
    return rows


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def make_tables(place: Path, rows: list[dict[str, Any]]) -> None:
    """Make the inputs that are Arrow, Parquet and HDF5: ids, text, vectors, and what is wrong with them."""
    import h5py
    import numpy as np
    import pyarrow as pa
    import pyarrow.ipc as ipc
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    flat = pa.table({key: [row[key] for row in rows] for key in ("id", "text", "year", "title")})
    pq.write_table(flat, place / "rows.parquet")
    documents = [random.integers(1, 400, size).tolist() for size in (120, 1, 0, 300, 77)]
    ids = pa.table({"doc_id": [f"d{n}" for n in range(5)], "input_ids": pa.array(documents, pa.list_(pa.int32()))})
    with ipc.new_file(place / "ids.arrow", ids.schema) as writer:
        writer.write_table(ids, max_chunksize=2)
    with ipc.new_stream(place / "ids.stream", ids.schema) as writer:
        writer.write_table(ids)
    (place / "cut.arrow").write_bytes((place / "ids.arrow").read_bytes()[:-300])
    parts = [(f"d{n}", part, ids[part * 50 : part * 50 + 50]) for n, ids in enumerate(documents) for part in range(3)]
    columns = dict(zip(("doc_id", "part", "input_ids"), map(list, zip(*parts, strict=True)), strict=True))
    pq.write_table(pa.table(columns), place / "split.parquet")
    pq.write_table(pa.table({"input_ids": [*documents[0], 0, *documents[3], 0, 5]}), place / "flat.parquet")
    wrong = pa.table({"id": ["high", "null", "good"], "input_ids": [[1, 2, 99999], None, [1, 2, 3]]})
    with ipc.new_file(place / "bad-ids.arrow", wrong.schema) as writer:
        writer.write_table(wrong)
    tiles = random.normal(size=(250, 16)).astype(np.float32)
    coords = np.stack([np.arange(250) // 16, np.arange(250) % 16], 1) * 512
    with h5py.File(place / "slide.h5", "w") as file:
        file["features"], file["coords"] = tiles, coords
        file["coords"].attrs["patch_size_level0"] = 512
    damaged = tiles[:90].copy()
    damaged[40, 3] = np.nan
    names = [f"slide {n // 30}" for n in range(90)]
    table = pa.table({"slide_id": names, "features": list(damaged), "coords": list(coords[:90])})
    pq.write_table(table, place / "bad-tiles.parquet")
    vectors = pa.table({"doc_id": names, "embedding": list(tiles[:90])})
    with ipc.new_file(place / "vectors.arrow", vectors.schema) as writer:
        writer.write_table(vectors)


def make_models(place: Path, other: Path) -> None:
    """Make the models that no command makes, with the other checkout and its tests' helpers."""
    import torch
    import transformers

    sys.path[:0] = [str(other), str(other / "tests")]
    from longnet_cli import nets as model

    torch.manual_seed(0)
    sizes = {"vocab_size": 4100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256}
    config = transformers.LlamaConfig(**sizes, initializer_range=0.2, bos_token_id=0, eos_token_id=0)
    transformers.utils.logging.disable_progress_bar()
    transformers.LlamaForCausalLM(config).save_pretrained(place / "llama")
    words = json.loads((other / "models/longnet-tiny/tokenizer.json").read_text())
    like = words["added_tokens"][0]
    words["added_tokens"] += [
        like | {"id": 4096 + n, "content": f"<|im_{word}|>"} for n, word in enumerate(("start", "end"))
    ]
    (place / "llama/tokenizer.json").write_text(json.dumps(words))
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": CHAT}
    (place / "llama/tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copytree(place / "llama", place / "surplus")
    facts = json.loads((place / "llama/config.json").read_text())
    (place / "surplus/config.json").write_text(json.dumps(facts | {"num_hidden_layers": 1}))
    levels: dict[str, Any] = {"segment_lengths": (16, 64), "dilation_rates": (1, 4)}
    levels |= {"in_features": 32, "grid": 0, "position": "rope", "padding": "exact"}
    slides = model.SlideConfig(**levels, dim=32, num_layers=2, num_heads=4, ffn_dim=64)
    model.SlideEncoder(slides).save_pretrained(place / "reader")
    write_gguf, random_llama, official_slide_state = (
        helper(other, name) for name in ("write_gguf", "random_llama", "official_slide_state")
    )
    write_gguf(place / "model.gguf", random_llama())
    torch.save({"model": official_slide_state()}, place / "slide_encoder.pth")
    (place / "cut.pth").write_bytes((place / "slide_encoder.pth").read_bytes()[:5000])


def helper(other: Path, name: str) -> Callable[..., Any]:
    """Return a function of the other checkout's tests, whichever of their files it is in."""
    path = next(path for path in (other / "tests").rglob("*.py") if f"\ndef {name}(" in path.read_text())
    sys.path.insert(0, str(path.parent))
    return getattr(importlib.import_module(path.stem), name)


def parse(text: str) -> dict[str, str]:
    """Return lines of shell by name."""
    joined = re.sub(r"\n +", " ", text).strip().splitlines()
    return dict(line.split(": ", 1) for line in joined if line)


class Checkout:
    """The commands of one checkout, forked from a process that has imported its code and what models need."""

    def __init__(self, place: Path, temporary: Path) -> None:
        self.place, self.module = place, imported(place / "tests/forked.py")
        hidden = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "LONGNET_TRACEBACK", "LONGNET_KERNEL")
        self.env = {name: value for name, value in os.environ.items() if name not in hidden}
        self.env |= {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        self.env |= {"PYTHONHASHSEED": "0"}  # peft writes a set of names in its order
        self.env |= {"checkout": str(place), **WORDS}
        temporary.mkdir()
        (temporary / "sitecustomize.py").write_text(PRELOADED)
        asked = [sys.executable, "-c", "import longnet_cli; print(longnet_cli.__file__)"]
        found = subprocess.run(asked, cwd=temporary, env=self.env, capture_output=True, text=True).stdout
        if not Path(found).is_relative_to(place):
            raise RuntimeError(f"commands of {place} would run {found or 'nothing'}")
        first = self.env | {"PYTHONPATH": os.pathsep.join([str(temporary), str(place)])}
        self.forked = self.module.Forked(temporary, first)
        self.env["PATH"] = os.pathsep.join([str(temporary), str(Path(sys.executable).parent), os.environ["PATH"]])

    def __enter__(self) -> Checkout:
        self.forked.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.forked.__exit__(*error)

    def run(self, line: str, folder: Path) -> None:
        """Run a line of shell in a folder, and leave there what it printed and the exit code of each command."""
        record = 'longnet() { command longnet "$@"; local code=$?; echo "$1: $code" >> "$codes"; return $code; }'
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                ["bash", "-o", "pipefail", "-c", f"{record}\n{line}"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                env=self.env | {"codes": str(folder / "codes")},
                start_new_session=True,
            )
            try:
                code: object = process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = f"killed after {TIMEOUT} s"
        said = (folder / "stderr").read_bytes()
        (folder / "stderr").write_bytes(said.replace(os.fsencode(self.place), b"CHECKOUT"))
        with (folder / "codes").open("a") as file:
            print(f"all: {code}", file=file)

    def prepare(self, place: Path) -> None:
        """Make what PREPARED says. Raises RuntimeError if a command fails."""
        for line in PREPARED.strip().splitlines():
            done = subprocess.run(["bash", "-c", line], cwd=place, env=self.env, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{line}: {done.stderr}")

    def interrupt(self, line: str, sign: str, folder: Path) -> None:
        """Start a command in a folder, and kill it when a file named `sign` is there; again if it ended first."""
        for name, words in WORDS.items():
            line = line.replace(f"${name}", words)
        command = [self.forked.longnet, *shlex.split(line)[1:]]
        output = folder / sign.partition("/")[0]
        for _ in range(10):
            process = self.module.Command(
                command, cwd=folder, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            while process.poll() is None and not (folder / sign).exists():
                time.sleep(0.001)
            process.kill()
            _, said = process.communicate()
            if not list(output.glob("_manifest.*")) and not (output / "model.safetensors").exists():
                if (folder / sign).exists():
                    return
                raise RuntimeError(f"{line}: {said.decode()}")
            shutil.rmtree(output)
        raise RuntimeError(f"{line}: it ended ten times before it could be killed")


def run_all(cases: dict[str, str], checkout: Checkout, output: Path, name: str) -> None:
    """Run all cases in the folder `work`, so that paths are the same for both, and rename it to `name`."""
    work, began = output / "work", time.monotonic()
    for number, (case, line) in enumerate(cases.items(), 1):
        show(f"{name}: {number} of {len(cases)}, {case}")
        (work / case).mkdir(parents=True)
        checkout.run(line, work / case)
    work.rename(output / name)
    show(f"{name}: {len(cases)} cases in {time.monotonic() - began:.0f} s\n")


def show(line: str) -> None:
    if sys.stderr.isatty() or line.endswith("\n"):
        print(f"\r\033[K{line}" if sys.stderr.isatty() else line, end="", file=sys.stderr, flush=True)


def differences(before: Path, after: Path) -> Iterator[str]:
    """Yield `FILE: what differs` for two folders of a case."""
    found = [{str(path.relative_to(place)): path for path in place.rglob("*")} for place in (before, after)]
    for side, more, less in (("before", found[0], found[1]), ("after", found[1], found[0])):
        if alone := sorted(more.keys() - less.keys()):
            yield f"{alone[0]}: only {side}{f', and {len(alone) - 1} more files' if alone[1:] else ''}"
    for name in sorted(found[0].keys() & found[1].keys()):
        old, new = found[0][name], found[1][name]
        if old.is_file() and new.is_file():
            if difference := compare(*(content(path) for path in (old, new))):
                yield f"{name}: {difference}"
        elif old.is_file() != new.is_file():
            yield f"{name}: a folder and a file"


def content(path: Path) -> bytes:
    """Return the bytes of a file, but the tensors and metadata of a checkpoint by name: they are in no fixed order."""
    data = path.read_bytes()
    if path.suffix != ".safetensors" or path.parents[1].name != "checkpoints":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    facts = json.loads(data[8:end])
    more = facts.pop("__metadata__")
    more["DCP_SHARDING_INFO"] = json.loads(more["DCP_SHARDING_INFO"])
    tensors = {name: tensor.pop("data_offsets") for name, tensor in facts.items()}
    found = [data[end + first : end + last] for _, (first, last) in sorted(tensors.items())]
    return b"".join([json.dumps([facts, more], sort_keys=True).encode(), *found])


def compare(old: bytes, new: bytes) -> str | None:
    """Return the first difference of two files, None if there is none."""
    if old == new:
        return None
    try:
        texts = [mask(data.decode()) for data in (old, new)]
    except UnicodeDecodeError:
        return f"byte {first_difference(old, new)}, of {len(old)} and {len(new)} bytes"
    if texts[0] == texts[1]:
        return None
    values = [value_of(text) for text in texts]
    if None not in values:
        return key_that_differs(*values)
    lines = zip_longest(*(text.splitlines(keepends=True) for text in texts), fillvalue="")
    number, pair = next((number, pair) for number, pair in enumerate(lines, 1) if len(set(pair)) > 1)
    values = [value_of(line) for line in pair]
    return f"line {number}: {shorten(*pair) if None in values else key_that_differs(*values)}"


def first_difference(old: Sequence[object], new: Sequence[object]) -> int:
    return next(
        (n for n, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), min(len(old), len(new))
    )


def mask(text: str) -> str:
    for pattern, instead in MASKS:
        text = re.sub(pattern, instead, text)
    return text


def value_of(text: str) -> Any:
    """Return the JSON object or list of a text, None if it is something else."""
    try:
        return json.loads(text) if text[:1] in ("{", "[") else None
    except ValueError:
        return None


def key_that_differs(old: Any, new: Any, key: str = "") -> str:
    """Return the place of the first difference of two unequal JSON values, and both values there."""
    if isinstance(old, dict) and isinstance(new, dict):
        if list(old) != list(new):
            return f"keys of {key or 'the object'}: {shorten(list(old), list(new))}"
        return next(key_that_differs(old[name], new[name], f"{key}.{name}") for name in old if old[name] != new[name])
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return next(
            key_that_differs(a, b, f"{key}[{n}]") for n, (a, b) in enumerate(zip(old, new, strict=True)) if a != b
        )
    return f"{key}: {shorten(old, new)}"


def shorten(old: object, new: object) -> str:
    """Return two values with the first place where they differ, at most some 80 characters of each."""
    a, b = str(old), str(new)
    start = max(0, first_difference(a, b) - 30)
    return " -> ".join(repr(("..." if start else "") + text[start : start + 80]) for text in (a, b))


def interrupt_all(resumed: dict[str, tuple[str, str]], before: Checkout, output: Path) -> None:
    """Run the commands to resume in in/whole, and start and kill them in in/interrupted, in folders of their names."""
    work = output / "work"
    for name, (sign, line) in resumed.items():
        for kind in ("whole", "interrupted"):
            (work / name).mkdir(parents=True)
            if kind == "whole":
                before.run(line, work / name)
            else:
                before.interrupt(line, sign, work / name)
            (output / "in" / kind).mkdir(exist_ok=True)
            (work / name).rename(output / "in" / kind / name)
        work.rmdir()


def compare_checkouts(other: Path, output: Path, only: str) -> list[str]:
    """Run the cases whose names match `only` with both checkouts, and return what differs, a line each."""
    cases = {name: line for name, line in parse(CASES).items() if re.search(only, name)}
    resumed = {f"resume-{sign.partition('/')[0]}": (sign, line) for sign, line in parse(RESUMED).items()}
    resumed = {name: command for name, command in resumed.items() if re.search(only, name)}
    cases |= {name: f"cp -a $in/interrupted/{name}/. . && {line} --resume" for name, (_, line) in resumed.items()}
    inputs = output / "in"
    inputs.mkdir(parents=True)
    make_tables(inputs, make_texts(inputs))
    maker = multiprocessing.get_context("fork").Process(target=make_models, args=(inputs, other))
    maker.start()  # a process of its own, which ends with all that it imports
    maker.join()
    if maker.exitcode:
        raise RuntimeError("the models could not be made")
    with tempfile.TemporaryDirectory() as temporary:
        with Checkout(other, Path(temporary) / "before") as before:
            before.prepare(inputs)
            interrupt_all(resumed, before, output)
            run_all(cases, before, output, "before")
        with Checkout(ROOT, Path(temporary) / "after") as after:
            run_all(cases, after, output, "after")
    found = [
        f"{case}: {line}" for case in cases for line in differences(output / "before" / case, output / "after" / case)
    ]
    for case, (sign, _) in resumed.items():
        whole, again = (output / place / case / sign.partition("/")[0] for place in ("in/whole", "after"))
        found += [f"{case}, uninterrupted and resumed: {line}" for line in differences(whole, again)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("-o", "--output", type=Path, help="keep inputs and outputs here (default: only if they differ)")
    parser.add_argument("--only", default="", metavar="REGEX", help="run only cases whose names match")
    args = parser.parse_args()
    output = (args.output or Path(tempfile.mkdtemp(prefix="same-output-"))).resolve()
    if output.exists() and not FOLDERS.issuperset(os.listdir(output)):
        parser.error(f"{output} holds something else: name another folder")
    shutil.rmtree(output, ignore_errors=True)
    found = compare_checkouts(args.other.resolve(), output, args.only)
    print("\n".join(found) or "all is the same")
    if not found and not args.output:
        shutil.rmtree(output)
    else:
        show(f"before and after are in {output}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
