"""Proves that bad input ends a command in one line and an exit code. Whatever else ends it, its output is whole or says
that it is not, and --resume completes it: kills at random moments, signals, no room, a reader that leaves or stalls.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from builders import (
    official_slide_state,
    recipe,
    slide_encoder,
    slide_table,
    tiny_llama,
    tiny_model,
)
from files import write_file, write_lines, write_rows
from processes import contents, invoke, kill_and_resume, refused, wait_for

from longnet_cli import LongNet
from longnet_cli.basics.errors import CheckpointError, DataError
from longnet_cli.cli.output import say_what_is_kept
from longnet_cli.data.input_documents import Inputs
from longnet_cli.data.row_writer import ShardWriter
from longnet_cli.data.shards import ShardFolder
from longnet_cli.data.tokenizer import Tokenizer

SIZES = {"dim": 32, "num_layers": 4, "num_heads": 4, "ffn_dim": 64, "position": "rope"}
SIZES |= {"segment_lengths": (64, 1024), "dilation_rates": (1, 4)}
TOO_LONG = "train longnet-125m --data x.parquet --seq-len 4Mi --chunk 4Mi --steps 1 --set train.batch_tokens=4Mi -o run"
ONE_STAGE = {"train.stages": [{"seq_len": 32, "steps": 5}]}
EMPTY = "every document is empty or left out"
NO_TEMPLATE = (
    "no chat template (chat_template.jinja, or chat_template in tokenizer_config.json) for chats"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bad inputs of the table."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"id": 7, "doc": {"body": "one"}, "n": 1, "text": "first"}]
    ends = pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array(["x"]))
    days = pa.array([pa.MonthDayNano([1, 2, 3])], pa.month_day_nano_interval())
    write_file(
        folder / "types.arrow", pa.table({"text": ["one"], "ends": ends, "days": days, "span": [1]})
    )
    for name in ("x.arrow", "x.stream", "x.parquet", "x.jsonl"):
        write_rows(folder / name, rows)
    write_lines(folder / "chat.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    (folder / "empty.jsonl").write_text('{"text": ""}\n')
    (folder / "empty.txt").touch()
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    (folder / "taken/file").mkdir(parents=True)
    (folder / "half").mkdir()
    (folder / "half/config.json").touch()
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    tiny_model(folder / "model")
    tiny_model(folder / "encoder", causal=False, position="rope")
    slide_encoder().save_pretrained(folder / "slide")
    write_file(folder / "slide.arrow", slide_table(40))
    state = official_slide_state()
    torch.save(state, folder / "slide.pth")
    torch.save(
        {name: x for name, x in state.items() if name.startswith("encoder.")},
        folder / "encoder.pth",
    )
    torch.save(state | {"norm.weight": torch.full((32,), torch.nan)}, folder / "nan.pth")
    Tokenizer.train([["some text and more text"] * 9], 265).save(folder / "large.json")
    Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))).save(
        folder / "no-end.json"
    )
    (folder / "small.json").write_text(recipe(Path("x.parquet"), **ONE_STAGE).model_dump_json())
    (folder / "bad.gz").write_bytes(gzip.compress(b"unreadable " * 1000)[:-4])
    (folder / "long.txt").write_text("x" * 65)
    sizes = {
        "vocab_size": 257,
        "dim": 8,
        "num_layers": 1,
        "num_heads": 1,
        "ffn_dim": 8,
        "position": "rope",
    }
    shared = {"model": sizes | {"pattern": "window:16,chosen=2x16"}, "parallel": {"sp": 1}}
    shared |= {
        "data": {"train": "x.parquet", "tokenizer": "bytes"},
        "train": {"stages": [{"seq_len": 64, "steps": 1}]},
    }
    (folder / "chosen-run").mkdir()
    (folder / "chosen-run/recipe.json").write_text(json.dumps(shared))
    ids = pa.table({"input_ids": [[1] * 5, [1] * 60, [1] * 70, [1, 300]], "doc_id": [*"abcd"]})
    pq.write_table(ids, folder / "ids.parquet")
    write_file(folder / "ids.arrow", ids)
    pq.write_table(ids[2:3], folder / "too-long.parquet")
    return folder


SLIDE, SET = "encode slide.arrow -m ./slide -o out.arrow", "train small.json -o run --set"
LINES, IDS = (f"encode given.{form} -m ./model -o out.arrow" for form in ("jsonl", "arrow"))
NO_ID = "line 2: 'ids' holds something that is not a token id"
FAILURES = [  # command, exit code, a part of its line; and what the file holds that is named first
    ("score none.txt", 3, "none.txt: no such file"),
    ("score picture.png", 3, "picture.png: neither Arrow, Parquet nor UTF-8 text"),
    ("score a.pdf", 3, "the byte at offset 9 is 0xe2: pdftotext makes text of a PDF", "%PDF-1.4\n\udce2"),
    ("score empty.txt --format json", 3, "no token could be scored: every document is empty"),
    ("score ids.parquet -m ./model", 3, "row 3, offset 1: token id 300 does not fit a vocabulary of 257"),
    ("score x.parquet --column body", 2, "there is no column 'body'; its columns are id: int64"),
    ("score x.parquet -m ./model --tokenizer large.json", 2, "large.json: not the tokenizer of the model"),
    (
        "score x.parquet -m ./model --tokenizer large.json --tokenizer-differs", 2,
        "the tokenizer has 265 ids and the model 257",
    ),
    ("score x.parquet -m no-such-model.gguf", 2, "unknown model 'no-such-model.gguf'"),
    ("score x.parquet --max-length 64", 2, "there is no --max-length here: it is --context"),
    ("generate x --max-length=64", 2, "there is no --max-length here: it is --max-tokens"),
    ("generate x --max-new-tokens 64", 2, "there is no --max-new-tokens here: it is --max-tokens"),
    ("encode x.parquet --batch-size 8", 2, "there is no --batch-size here: batches are made by --chunk"),
    ("score x.parquet -o v.npy", 2, "-o v.npy: .npy is not written: the name of a file ends in .arrow, .feather"),
    ("tokenize x.parquet -o v.npy", 2, "an array of NumPy (.npy) holds one vector for each row"),
    ("tokenize x.parquet --resume -o -", 2, "only a folder of shards can be resumed"),
    ("encode x.parquet --resume -o out.arrow", 2, "out.arrow: only a folder of shards can be resumed"),
    ("encode too-long.parquet -m ./llama -o vectors", 2, "71 tokens, and the model was trained on 64: encode it in"),
    ("encode x.parquet -o taken", 2, "taken exists and is not an empty folder"),
    ("train longnet-tiny --data x.parquet -o x.parquet", 2, "x.parquet is a file, and -o names the folder of a run"),
    ("train longnet-tiny --data x.parquet -o x.parquet/run", 2, "x.parquet is a file, and -o names the folder"),
    ("train longnet-tiny --data x.parquet --output=", 2, "--output is empty"),
    ("train --data x.parquet --steps 5 -o run", 2, "--steps and --seq-len make one stage together: give both"),
    (
        "train --data x.parquet --seq-len 256 --steps 5 --pattern window:8 -o run", 2,
        "there is no model: give a RECIPE (longnet-1m,",
    ),
    ("train none", 2, "longnet-tiny; a path ends in .toml"),
    ("train other/my.toml", 2, "no recipe 'other/my.toml': no such file. Shipped recipes: "),
    ("train -o run", 2, "there is no run in run"),
    (
        "train longnet-tiny --pattern window:8 --data x.parquet --seq-len 32 --steps 1 -o run --nproc 1k", 2,
        "1000 ranks cannot share a window of 32 tokens: --sp 32 or less would fit",
    ),
    (
        "train longnet-tiny --pattern window:8 --data x.parquet --seq-len 32 --steps 1 -o run --nproc 4 --sp 3", 2,
        "dp x sp is 1 x 3, which needs 3 processes, and there are 4: 4 x 1, 2 x 2, 1 x 4 would fit",
    ),
    ("train longnet-tiny --data x.parquet -o run --set lora.rank=4", 2, "lora is for a Hugging Face model (init)"),
    (TOO_LONG, 5, "the largest part for activations, and "),
    (f"{TOO_LONG} --set model.num_layers=9999", 5, "no chunk fits: choose shorter windows, a smaller model"),
    ("train small.json -o run --dry-run --dp 3", 2, "which 3 groups of ranks cannot share equally: --dp 1 would"),
    ("generate x -m ./model --save-state new/state --state nonsense", 2, "nonsense"),
    ("tokenize x.parquet --shard-tokens 9 -o out.arrow", 2, "--shard-tokens is for a folder of shards"),
    ("score x.parquet --token-logprobs -", 2, "--token-logprobs needs a file"),
    ("score x.parquet --token-logprobs v.jsonl.gz", 2, "--token-logprobs v.jsonl.gz: .gz is not written"),
    ("score x.parquet --resume", 2, "--resume is for a folder of rows"),
    ("score x.parquet -o y.parquet --resume", 2, "--resume is for a folder of shards"),
    ("score x.parquet -o y --token-logprobs z.arrow", 2, "--token-logprobs is for scores that are printed"),
    ("score x.parquet -o y --format json", 2, "--format is for scores that are printed"),
    ("score x.parquet -o x.parquet", 2, "x.parquet, which this command reads"),
    (
        "score x.parquet -o v.csv", 2,
        "-o v.csv: .csv is not written: the name of a file ends in .arrow, .feather, .parquet or .jsonl",
    ),
    ("score x.parquet --sample 5", 2, "--sample is for --dry-run"),
    ("score x.parquet --dry-run --sample 1", 2, "--sample needs 2 texts or more"),
    ("score x.parquet --dry-run --format jsonl", 2, "give --format text or json"),
    ("score x.parquet -m ./model --pattern windw:1Ki", 2, "--pattern: unknown pattern 'windw': did you mean 'window'?"),
    ("bench --impl flex --direction backward", 2, "--impl flex has no backward pass on a CPU: leave out --direction"),
    ("bench --pattern windw:1Ki", 2, "--pattern: unknown pattern 'windw': did you mean 'window'?"),
    ("train --pattern windw:1Ki -o run", 2, "--pattern: unknown pattern 'windw': did you mean 'window'?"),
    ("encode x.parquet -m ./encoder --prefix x -o y.arrow", 2, "nothing before a document: leave out --prefix"),
    ("encode x.parquet -m ./encoder --dims 33 -o y.arrow", 2, "--dims 33: a vector of this model has 1 to 16 numbers"),
    ("score x.parquet --token-logprobs y.arrow --dp 2", 2, "leave out --dp"),
    ("score - --dp 2", 2, "stdin can be read by one process"),
    ("convert longnet-tiny -o y", 2, "give the type"),
    ("convert longnet-nosuch --dtype bf16 -o y", 4, "no such file"),
    ("convert ./llama --dtype bf16 -o y", 2, "already a Hugging Face model folder"),
    ("generate", 3, "stdin: nothing came"),
    (
        "train --init longnet-tiny --pattern finding --data x.parquet --seq-len 64 --steps 1 -o run --nproc 2", 2,
        "chosen blocks have no gradient: train with a window (model.pattern)",
    ),
    ("train small.json -o run --dry-run --spill none", 2, "--spill none: no such folder"),
    ("train -o chosen-run --dry-run", 2, "chosen blocks have no gradient"),  # by its recipe
    ("score ids.parquet -m ./model --sp 1e18", 2, "1000000000000000000 processes, and this machine has"),
    ("encode ids.parquet --span sentence -o out.arrow", 2, "ids.parquet, row 0: this is no text with a sentence"),
    ("generate - -i y.txt", 2, "PROMPT - is stdin, and --input is given"),
    ("generate x --top-p 0.9", 2, "--top-p needs a temperature above 0"),
    ("generate x --seed -1", 2, "--seed -1 is not a number from 0"),
    ("generate x --chat", 2, "no chat template"),
    ("generate -i missing.txt", 3, "missing.txt"),
    ("ask x.jsonl long.txt -m ./model", 2, "long.txt: name files, folders or -, and write the question last"),
    ("ask first -m ./model", 2, "first: name files, folders or -, and write the question last, in quotes"),
    ("ask x.jsonl first\udcff -m ./model", 2, "the question is not UTF-8: save it as a UTF-8 file of JSON Lines"),
    ("ask x.jsonl first -m ./model --passages 0", 2, "the passages must be 1 or more, not 0"),
    ("ask x.jsonl first -m ./model --index long.txt", 2, "long.txt: no index of passages that this version has made"),
    ("ask x.jsonl first -m ./model --top-p 0.5", 2, "--top-p needs a temperature above 0"),
    ("ask x.jsonl xyzzy -m ./model", 1, "no passage has a word of 1 of 1 question"),
    ("ask ids.parquet first -m ./model", 2, "no column named text with text: choose one (--column)"),
    ("ask x.jsonl -m ./model --questions x.parquet", 2, "there is no column 'question'; its columns are id: int64"),
    ("ask x.jsonl first -m ./encoder", 2, "it cannot generate"),
    ("pattern finding:exact=128", 2, "finding has no option 'exact'"),
    ("pattern windw:1Ki", 2, "unknown pattern 'windw': did you mean 'window'?"),
    ("pattern window:1Ki,sinks=2Ki", 2, "window:1Ki,sinks=2Ki: sinks must be from 0 to the first segment length"),
    ("pattern 1Ki/1,4Ki/4,queries=all", 2, '1Ki/1,4Ki/4,queries=all: queries="all" needs overlap="once"'),
    ("pattern paper --seq 2e18", 2, "paper, 2000000000000000000 tokens: nothing is described beyond 2^60 tokens"),
    ("pattern 1Ki/1,1Gi/4,overlap=once", 2, "overlap=once: its segments see each other in 1048577 parts"),
    ("pattern window:8,look_back=1e9", 2, "window:8,look_back=1G: its segments see each other in 1000000001 parts"),
    ("pattern paper -o x.txt", 2, "x.txt: a picture's name ends in .png, .svg, .pdf"),
    ("score bad.jsonl -o out.arrow", 3, "bad.jsonl, line 2: 'text' is not text"),
    ("tokenize bad.jsonl -o out.arrow", 3, "bad.jsonl, line 2: 'text' is not text"),
    ("tokenize bad.gz -o out.arrow", 3, "bad.gz: the gzip data is damaged or truncated ("),
    ("tokenize none bad.gz --skip-bad -o out.arrow", 3, "nothing to tokenize: every document is left out"),
    ("encode empty.jsonl -o out.arrow", 3, f"there is nothing to encode: {EMPTY}"),
    ("score none --skip-bad", 3, EMPTY),
    ("score @- -", 2, "stdin (-) can be read only once"),
    *(
        (f"score {name} --keep n,{key} --skip-bad -o out.arrow", 2, f"{name}: there is no column '{key}'; its columns")
        for name in ("x.arrow", "x.stream", "x.parquet", "x.jsonl")
        for key in ("titel", "doc.titel")
    ),
    ("score x.parquet --keep n", 2, "--keep carries columns to rows: give -o, or --format"),
    ("score types.arrow --keep ppl --format json", 2, "--keep ppl: the output has a column of this name"),
    ("encode types.arrow --keep span -o out.arrow", 2, "--keep span: the output has a column of this name"),
    ("encode types.arrow --keep ends -o out.parquet", 2, "out.parquet: Parquet does not hold a column (Unhandled type"),
    ("encode types.arrow --keep days -o out.parquet", 2, "out.parquet: Parquet does not hold a column (Unhandled type"),
    ("tokenize chat.jsonl -o out.arrow", 2, "'messages' holds chats, which need the chat template of a tokenizer: "),
    ("tokenize chat.jsonl --tokenizer longnet-tiny -o out.arrow", 2, NO_TEMPLATE),
    ("tokenize chat.jsonl --train-vocab 300 -o out.arrow", 2, "no column named text with text: choose one (--column)"),
    (
        "score long.txt -m ./llama", 2,
        "65 tokens, and the model was trained on 64: score it in windows (--context 64 --stride 32), or give --pattern "
        "window:32,sinks=4 (a window and 4 sinks) or --pattern dense (farther than trained); --skip-bad leaves such "
        "documents out",
    ),
    ("encode long.txt -m ./llama -o out.arrow", 2, "66 tokens"),  # here the last token is read as well
    ("score ids.parquet -m ./llama --chunk 8 --format jsonl", 2, "ids.parquet, row 2: 70 tokens"),  # before work starts
    ("score ids.arrow -m ./llama --chunk 8 --format jsonl", 2, "ids.arrow, row 2: 70 tokens"),
    ("encode ids.parquet -m ./llama -o out.arrow", 2, "ids.parquet, row 2: 71 tokens"),
    ("score ids.parquet -m ./llama --context 8", 3, "ids.parquet, row 3, offset 1: token id 300 does not fit"),
    ("score too-long.parquet -m ./llama --skip-bad", 3, EMPTY),
    ("score x.parquet --context 8,8", 2, "each context may be given once"),
    ("score x.parquet --context 8,4 --stride 6", 2, "a stride of 6 tokens needs a context of 6 or more, not 4"),
    ("score x.parquet -m ./model --pattern 8/1,12/1", 2, 'use position="rope"'),
    ("score x.parquet -m ./encoder", 2, "bidirectional"),
    ("score x.parquet -m ./llama --nproc 2", 2, "in one process"),
    ("data inspect x.parquet --tokenizer nope.json", 2, "nope.json"),
    ("convert longnet-tiny -o out --dtype fp32 --heads 4", 2, "--heads: only for a checkpoint"),
    ("score x.parquet -m longnet-tny", 2, "unknown model 'longnet-tny': shipped with weights: longnet-tiny"),
    ("score x.parquet -m longnet-125m", 2, "unknown model 'longnet-125m': shipped with weights: longnet-tiny"),
    *((f"score x.parquet -m {name}", 2, "unknown model") for name in (".", "..")),
    ("score x.parquet -m ./none", 4, "no such folder"),
    ("score x.parquet -m ./long.txt", 4, "not a folder"),
    ("score x.parquet -m ./taken", 4, "config.json and model.safetensors missing"),
    ("score x.parquet -m ./half", 4, "not a complete model, model.safetensors missing"),
    *(
        (f"{words} https://x/a.toml", 2, "https://x/a.toml: web addresses are not read: download it first, or `curl")
        for words in ("score", "plot", "train", "score x.parquet -m", "score x.parquet --tokenizer")
    ),
    ("score HTTP://x", 2, "web addresses are not read"),
    ("score list.txt @list.txt", 2, "web addresses are not read", "http://x\n"),
    ("score *.csv", 3, "no file matches"),
    ("score taken", 3, "nothing readable"),
    ("score @none.txt", 3, "cannot read the list"),
    ("score -", 3, "nothing came"),
    ("score given.arrow", 3, "empty", ""),
    (IDS, 3, "0 rows", pa.table({"ids": pa.array([], pa.list_(pa.int32()))})),
    (IDS, 3, "given.arrow, row 1", pa.table({"ids": [[1], None]})),
    (IDS, 3, "given.arrow, row 1, offset 1", pa.table({"ids": [[1], [2, None]]})),
    (IDS, 3, "given.arrow, row 1", pa.table({"ids": pa.array([[1, 2], None], pa.list_(pa.int32(), 2))})),
    (IDS, 3, "given.arrow, row 1", pa.table({"ids": [1, None]})),
    (IDS, 3, "given.arrow, row 1: the value is null", pa.table({"text": ["a", None]})),
    (IDS, 3, "given.arrow, row 0: the value is null", pa.table({"text": [None, "b"]})),
    (IDS, 3, "row 1: the value is null", pa.table({"text": pa.array(["a", None]).dictionary_encode()})),
    (IDS, 3, "row 1, offset 1: token id 300 does not fit a vocabulary of 257", pa.table({"ids": [[1], [2, 300]]})),
    (IDS, 3, "row 2, offset 1: token id -1 is negative", pa.table({"ids": [[1], [], [2, -1]]})),
    (IDS, 3, "row 2, offset 0: token id 257", pa.table({"ids": [1, 2, 257]})),
    (IDS, 3, "row 0, doc_id: the value is null", pa.table({"text": ["a", "b"], "doc_id": [None, "b"]})),
    (
        IDS, 3, "given.arrow: doc_id has type double: text or whole numbers are needed",
        pa.table({"text": ["x", "y"], "doc_id": [0.5, 0.5]}),
    ),
    (IDS, 2, "its columns are body: string, n: int64", pa.table({"body": ["a"], "n": [1]})),
    (IDS, 2, "its columns are input_ids: ", pa.table({"input_ids": [[1]], "tokens": [[1]]})),
    (IDS, 2, "its columns are text: string, ids: int64", pa.table({"text": ["a"], "ids": [1]})),
    (IDS, 2, "its columns are input_ids: list", pa.table({"input_ids": [["a"]]})),
    (f"{IDS} --column nope", 2, "its columns are text: string", pa.table({"text": ["a"]})),
    (f"{IDS} --column x", 2, "its columns are text: string, x: double", pa.table({"text": ["a"], "x": [1.5]})),
    (
        f"{IDS} --keep n", 2,
        "'ids' is one stream of ids, in which a document has no row for 'n'", pa.table({"ids": [1, 256], "n": [1, 2]}),
    ),
    ("encode long.txt --keep n -o out.arrow", 2, "column 'n' is asked for, and this is plain text"),
    (LINES, 3, "line 2: 'text' is not text", '{"text": "a"}\n{"text": 1}\n'),
    (LINES, 3, "line 2: there is no 'text'", '{"text": "a"}\n{"txt": "a"}\n'),
    (LINES, 3, "line 2: 'text' is null", '{"text": "a"}\n{"text": null}\n'),
    (LINES, 3, "line 6: 'text' is not text", '{"text": "a"}\n\n \n{"text": "b"}\n\n{"text": 1}\n'),
    (LINES, 3, "(the last line is not whole", '{"text": "a"}\n{"text": "b'),
    (LINES, 3, "line 2: not a JSON object", '{"text": "a"}\n["b"]\n'),
    (LINES, 3, "line 2: 'text' holds half of a surrogate pair at character 0", '{"text": "a"}\n{"text": "\\ud800"}\n'),
    (LINES, 3, "line 2: 'id' is not text or an integer", '{"text": "a", "id": 1}\n{"text": "a", "id": 1.5}\n'),
    *(
        (LINES, 3, NO_ID, f'{{"ids": [1]}}\n{{"ids": [{ids}]}}\n')
        for ids in ("1, 2.0", "true, 1", '"1"', "1e99", 10**30)
    ),
    (LINES, 3, "line 2, offset 1: the token id is null", '{"ids": [1]}\n{"ids": [2, null]}\n'),
    (LINES, 3, "line 2, offset 2: token id -4 is negative", '{"ids": [1]}\n{"ids": [2, 3, -4]}\n'),
    (LINES, 3, "line 2, offset 0: token id 257 does not fit", '{"ids": [1]}\n{"ids": [257]}\n'),
    (LINES, 3, "line 2: not JSON", '{"ids": [1]}\n' + "[" * 100_000),
    (
        LINES, 3, "no key text, input_ids, tokens, token_ids, ids; its keys are body, n: choose one (--column)",
        '{"body": "a", "n": 1}\n',
    ),
    (LINES, 3, "line 2: not UTF-8: byte 10 is 0xff", '{"text": "a"}\n{"text": "\udcff"}\n'),
    (LINES, 3, "given.jsonl, line 1: not JSON Lines of documents: not JSON", "hello"),
    (LINES, 3, "given.jsonl, line 1: not JSON Lines of documents: 'text' is null", '{"text": null}\n'),
    (LINES, 3, "given.jsonl, line 1: 'text' is null", '{"text": null}\n{"text": "a"}\n'),
    ("score a.fa", 3, "a.fa: FASTA is not read: make JSON Lines of it", ">x\nACGT\n"),
    ("tokenize - --train-vocab 300 -o out", 2, "stdin"),
    ("tokenize x.parquet --train-vocab 300 --tokenizer longnet-tiny -o out", 2, "not both"),
    ("tokenize x.parquet --train-vocab 300 --tokenizer bytes -o out", 2, "not both"),
    ("encode x.parquet --span word -o out", 2, "span must be a size, or one of sentence, paragraph, passage, not"),
    ("tokenize x.parquet --tokenizer no-end.json --eos -o out", 2, "--eos"),
    ("tokenize ids.parquet -o out", 2, "input_ids"),
    (f"{SLIDE} --tile-size 32", 3, "is outside the grid of 50 x 50 of 32 pixels"),
    (f"{SLIDE} --eos 0", 2, "reads vectors, which have no tokens: leave out --eos"),
    (f"{SLIDE} --bos 0 --tokenizer bytes", 2, "leave out --tokenizer, --bos"),
    (f"{SLIDE} --tokenizer bytes --tokenizer-differs", 2, "leave out --tokenizer, --tokenizer-differs"),
    (f"{SLIDE} --span 8 --pool cls", 2, "a span has no CLS of its own"),
    (f"{SLIDE} --column coords", 2, "column 'coords' does not hold vectors"),
    (
        SLIDE.replace("slide", "given", 1), 3, "row 0: document 's' has no coordinates, which the model needs",
        slide_table(9).drop_columns(["coords"]),
    ),
    (SLIDE.replace("slide", "given", 1), 3, "have 5 numbers, and the model reads 6", slide_table(9, width=5)),
    ("encode slide.arrow -o out.arrow", 2, "no column named input_ids"),
    ("encode long.txt -o out.arrow --pool cls", 2, "this model has no CLS"),
    ("encode long.txt -o out.arrow --tile-size 8", 2, "this model has no grid of tiles"),
    ("encode long.txt -m ./slide -o out.arrow", 3, "this is text, and the model reads vectors"),
    ("score long.txt -m ./slide", 2, "it reads vectors, not tokens"),
    ("generate text -m ./slide", 2, "it reads vectors, not tokens"),
    ("convert slide.pth -o out --heads 5", 2, "dim 32 is not divisible by num_heads 5"),
    ("convert slide.pth -o out --segment-lengths 8,16", 2, "dilation_rates"),
    ("convert encoder.pth -o out --heads 16", 2, "give --segment-lengths, --dilation-rates"),
    ("convert nan.pth -o out", 4, "norm.weight has numbers that are NaN"),
    (
        "convert given.pth -o out", 4, "it has no layers.0.self_attn.q_proj.weight, but the tensor a",
        {"a": torch.zeros(2)},
    ),
    ("convert given.pth -o out", 4, "a is of type int", {"model": {"a": 3}}),
    ("convert given.pth -o out", 4, "it holds list, not tensors by name", [torch.zeros(2)]),
    ("plot given.json", 3, "row 2: not JSON", '{"step": 1}\nnonsense\n{"step": 2}\n'),
    ("plot given.json", 3, "row 2: not a line of metrics", '{"step": 1}\n[2]\n'),
    ("plot given.json", 3, "row 1: not a line of metrics", '{"loss": 1}\n'),
    ("plot given.json", 3, "row 1: not a line of metrics", '{"step": "1"}\n'),
    ("plot given.json", 3, "no line of metrics yet", ""),
    ("plot given.json", 3, "no line of metrics yet", '{"step"'),
    ("plot given.json", 3, "not UTF-8", "\udcff"),
    ("plot none.json", 3, "No such file"),
    ("plot given.json", 3, "row 3: not JSON", '{\n "total": {\n'),
    ("plot given.json", 3, "row 1: not a score", '{"total": 3}\n'),
    ("plot given.json", 3, "row 1: not a score", '{"totals": [{"by_position": [3]}], "total": {}}\n'),
    ("plot given.json", 3, "row 1: not a score", '{"total": {"by_position": {"a": 1}}}\n'),
    ("plot given.json", 3, "nothing to draw", '{"kind": "document"}\n'),
    ("plot given.json", 3, "several contexts, or --by-position", '{"total": {"ppl": 3.0, "context": null}}\n'),
    ("plot given.json", 3, "row 1: not a row of bench", '{"impl": "dense"}\n'),
    ("plot given.json", 3, "row 2: not a row of bench", '{"impl": "dense", "seq": 1}\n{"step": 1}\n'),
    ("plot given.json", 3, "row 1: not a line of metrics, nor of bench or score", '{"other": 1}\n'),
    ("plot given.json", 3, "the metrics of a run, `bench --format jsonl` or `score --format json`", "| op | impl |\n"),
    ("plot given.json", 3, "nothing to draw", '{"impl": "x", "seq": 1, "seconds": 1' + "0" * 400 + "}\n"),
    (
        "plot given.json --show second", 2, "no 'second' to draw: did you mean seconds",
        '{"impl": "x", "seq": 1, "seconds": 1}\n',
    ),
    ("train given.json -o run", 2, "given.json: not a recipe, which is a table of keys and values", "[]"),
    ("train ./given.py -o run", 2, "given.py: not TOML: ", "import os"),
    ("train given.json -o run", 2, "given.json: not JSON: ", "{"),
    (
        "train given.toml -o run", 2, "given.toml: model, data, train and optimizer are tables",
        "data = 3\n[train]\n[model]\n",
    ),
    ("train small.json -o run --column words", 2, "there is no column 'words'"),
    (
        "train small.json -o run --steps 5", 2,
        "--steps and --seq-len make one stage together: give both (the recipe's --seq-len is 32)",
    ),
    ("train small.json -o run --seq-len 64", 2, "give both (the recipe's --steps is 5)"),
    ("train small.json -o model --init ./model", 2, "already holds a model"),
    (f"{SET} optimizer.ler=1", 2, "unknown key 'optimizer.ler': did you mean 'optimizer.lr'?"),
    (f"{SET} train.seq_len=1", 2, "unknown key 'train.seq_len'"),
    (f"{SET} train.objective=contrast", 2, "train.objective: Input should be 'causal' or 'masked' (got 'contrast')"),
    (f"{SET} model.dim=15", 2, "not divisible"),
    (f"{SET} model.causal=false --set model.position=rope", 2, 'set train.objective = "masked"'),
    (f"{SET} train.objective=masked", 2, 'set train.objective = "causal"'),
    (f"{SET} train.stages=[]", 2, "train.stages"),
    (f"{SET} data.train=[x.parquet]", 2, "data.train=[x.parquet]: texts in a list or a table have quotes: ['a', 'b']"),
    (f"{SET} data.train=[]", 2, "data.train"),
    (f"{SET} data.eos=nothing", 2, "data.eos: "),
    (f"{SET} data.tokenizer=./nothing", 2, "data.tokenizer: "),
    ("train given.json -o run", 2, "data.tokenizer: ", '{"model": {}, "data": {"tokenizer": "./nothing"}}'),
    ("train --init ./nothing --data x.parquet --seq-len 32 --steps 1 -o run", 4, "init: nothing: "),
    (f"{SET} data.train=long.txt --set data.held_out=empty.jsonl", 3, "data.held_out, empty.jsonl: every"),
    (f"{SET} model.vocab_size=256", 2, "model.vocab_size = 256 is less than the tokenizer needs, 257"),
    (f"{SET} optimizer.lr.x=1", 2, "is a value, not a table"),
    (f"{SET} optimizer.lr=inf", 2, "optimizer.lr: Input should be a finite number"),
    (f"{SET} train.loss_jump=nan", 2, "train.loss_jump"),
    (f"{SET} optimizer.betas=[2,0.9]", 2, "optimizer.betas.0: Input should be less than 1"),
    (f"{SET} model.dim=1099511627776", 2, "model.dim: Input should be less than or equal to 16777216"),
    (f"{SET} model.num_layers=1000000000000", 2, "model.num_layers: Input should be less than or equal to 10000"),
    (f"{SET} model.rope_theta=inf", 2, "model.rope_theta: Input should be a finite number"),
    (f"{SET} model.vocab_size=0", 2, "model.vocab_size = 0"),
    (f"{SET} schedule.decay=cosin", 2, "schedule.decay"),
    (f"{SET} train.seed={2**64}", 2, "train.seed"),
    (f"{SET} train.chunk=32kb", 2, "train.chunk: '32kb' is not a size"),
    (f"{SET} train.batch_tokens=0", 2, "train.batch_tokens: Input should be greater than 0"),
    ("score long.txt --dp 1k", 2, "1000 processes, and this machine has"),
    (
        f"{SET} model.causal=false --set model.position=rope --set train.objective=masked --sp 2", 2,
        "a bidirectional net over several ranks cannot keep the documents of a window apart",
    ),
    ("tokenize long.txt -o loop", 2, "loop: cannot write: Too many levels of symbolic links"),
    ("encode long.txt -o loop", 2, "loop: cannot write: Too many levels of symbolic links"),
    ("tokenize given.parquet -o v", 3, "Parquet with an encrypted footer is not read", "PARE\udcff"),
    ("tokenize given.arrow -o v", 3, "given.arrow: truncated: it has only the first 6 bytes of a table", "ARROW1"),
    ("tokenize given.feather -o v", 3, "given.feather: truncated: it has only the first 2 bytes", "AR"),
    ("tokenize given.pq -o v", 3, "given.pq: truncated: it has only the first 3 bytes of a table", "PAR"),
    (f"{SET} schedule.power=2", 2, 'schedule.power is of decay = "polynomial", not of "cosine"'),
]  # fmt: skip


@pytest.mark.parametrize("row", FAILURES, ids=[words[:60] for words, *_ in FAILURES])
def test_bad_input_is_one_line_and_an_exit_code(
    row: tuple, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    words, code, line, *content = row
    if content:
        write_given(Path(words.split()[1]), *content)
    if "./llama" in words and not Path("llama").exists():
        pytest.importorskip(
            "transformers", reason="transformers is not installed: pip install '.[hf]'"
        )
        tiny_llama(inputs / "llama", vocab_size=260, max_position_embeddings=64, bos_token_id=7)
    before = {*inputs.iterdir()}
    error = refused(*words.split())
    assert (error.exit_code, {*inputs.iterdir()}) == (code, before)
    assert line in str(error)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not read a file")
@pytest.mark.parametrize("kind", ["native", "llama"])
def test_weights_that_one_may_not_read_are_not_called_damaged(kind: str) -> None:
    folder = Path(tempfile.mkdtemp())  # not below the folder of pytest, which is root's alone
    try:
        (tiny_model if kind == "native" else tiny_llama)(folder / "model")
        for path in (folder, folder / "model"):
            path.chmod(0o755)
        (folder / "model/model.safetensors").chmod(0o600)
        load = LongNet.from_pretrained
        if kind == "llama":
            from longnet_cli.models.hf.pretrained_net import load_transformers

            settings = json.loads((folder / "model/config.json").read_text())
            load = partial(load_transformers, settings=settings)
        os.seteuid(65534)
        try:
            with pytest.raises(
                CheckpointError, match="safetensors: cannot read: Permission denied"
            ):
                load(folder / "model")
        finally:
            os.seteuid(0)
    finally:
        shutil.rmtree(folder)


def write_given(path: Path, content: object) -> None:
    """Write a text, with bytes that are no UTF-8 as surrogates; a table, a row at a time; or what torch saves."""
    if isinstance(content, str):
        path.write_text(content, errors="surrogateescape")
    elif isinstance(content, pa.Table):
        write_file(path, content, rows=1)
    else:
        torch.save(content, path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """60 documents of 0.1 to 20 kB."""
    chance = random.Random(0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(60):
        (folder / f"{index}.txt").write_text(
            "".join(chance.choices("abc déf\n", k=chance.randint(100, 20_000)))
        )
    return folder


@pytest.mark.parametrize("command", ["tokenize", pytest.param("encode", marks=pytest.mark.ci)])
def test_killed_and_resumed_the_shards_are_the_same(command, start, corpus, tmp_path):
    model = f"{tiny_model(tmp_path / 'model', **SIZES)}/"
    words = {
        "tokenize": ["tokenize", corpus, "--shard-tokens", "10000", "--eos"],
        "encode": [
            "encode",
            *sorted(corpus.iterdir())[:9],
            "-m",
            model,
            "--span",
            "50",
            "--shard-rows",
            "100",
        ],
    }
    kill_and_resume(start, words[command], tmp_path, kills=3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_finished_shards_and_no_others(
    start, run_longnet, corpus, tmp_path, number, code
):
    command = ["tokenize", corpus, "--shard-tokens", "10000", "-o"]
    process = start(*command, "out")
    wait_for(lambda: (tmp_path / "out" / "shard-00003.arrow").exists())
    process.send_signal(number)
    assert process.communicate()[1] == b""
    assert process.returncode == code
    names = sorted(os.listdir(tmp_path / "out"))
    assert names[0] == "_unfinished.json"
    assert names[1:] == [f"shard-{index:05d}.arrow" for index in range(len(names) - 1)]
    assert run_longnet(*command, "out", "--resume").returncode == 0
    assert run_longnet(*command, "whole").returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def unread(pipe: IO[bytes]) -> int:
    """How many bytes wait in a pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.mark.parametrize("output", ["out", "out.arrow", "-"])
def test_a_signal_ends_a_wait_for_input(start, tmp_path, output):
    process = start("tokenize - -o", output, stdin=subprocess.PIPE)
    process.stdin.write(b"a line\n")
    process.stdin.flush()
    wait_for(lambda: unread(process.stdin) == 0)  # and now it waits for more
    for _ in range(
        10
    ):  # Python learns of a signal right before a call that waits only from the next one
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(2)
            break
    assert process.returncode == 143
    assert not process.stdout.read().endswith(b"\xff\xff\xff\xff\0\0\0\0")
    assert sorted(os.listdir(tmp_path)) in ([], ["out"])


def test_a_signal_ends_a_wait_for_a_reader_that_stalls(start, corpus):
    process = start("tokenize", corpus, "-o", "-")
    assert process.stdout.read(1)
    size = fcntl.fcntl(process.stdout, fcntl.F_GETPIPE_SZ)
    wait_for(
        lambda: unread(process.stdout) >= size - 2 * mmap.PAGESIZE
    )  # its last pages may be full in part
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert process.stderr.read() == b""


@pytest.mark.parametrize("ending", ["kill", "fail"])
def test_a_cut_stream_is_refused(start, corpus, tmp_path, ending):
    if ending == "fail":
        (corpus / "bad.txt").write_bytes(b"\xff")
    with open(tmp_path / "cut.arrow", "wb") as file:
        process = start(
            "tokenize",
            corpus,
            "-" if ending == "kill" else corpus,
            "-o",
            "-",
            stdin=subprocess.PIPE,
            stdout=file,
        )
        if ending == "kill":
            wait_for(lambda: (tmp_path / "cut.arrow").stat().st_size > 100_000)
            process.kill()
        assert process.wait(30) == (-9 if ending == "kill" else 3)
    with pytest.raises(DataError, match="truncated"):
        list(Inputs([tmp_path / "cut.arrow"]).documents())
    if ending == "fail":  # others take the end of the data for the end of the stream
        with pytest.raises(pa.ArrowInvalid, match="Expected to read 8 metadata bytes"):
            pa.ipc.open_stream(tmp_path / "cut.arrow").read_all()


def test_a_shard_too_large_for_the_file_system_is_one_line(
    run_longnet, longnet, corpus, tmp_path, command_env
):
    """The limit on file sizes, which any user may set, does as a full disk does."""
    (corpus / "30.txt").write_text("x" * 1_000_000)
    command = ["tokenize", corpus, "--shard-tokens", "20000", "-o"]
    assert run_longnet(*command, "whole").returncode == 0
    limited = ["bash", "-c", f'ulimit -f 500; exec {longnet} "$@"', "bash"]
    words = [*limited, *map(str, command), str(tmp_path / "out")]
    process = subprocess.Popen(
        words, env=command_env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, whole = tmp_path / "out", contents(tmp_path / "whole")
    said = process.communicate()[1].decode()
    assert (process.returncode, said.count("\n"), said[:16]) == (1, 1, "longnet: error: ")
    assert f"{out}/" in said
    assert "cannot write: File too large" in said
    found = contents(out)
    assert {
        "_unfinished.json",
        *(f"shard-{index:05d}.arrow" for index in range(len(found) - 1)),
    } == found.keys()
    assert len(found) > 5
    assert all(found[name] == whole[name] for name in found if name != "_unfinished.json")
    assert run_longnet(*command, out, "--resume").returncode == 0
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.ci
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_spilled_encode(
    kind: signal.Signals, tmp_path: Path, command_env: dict[str, str]
) -> None:
    """Of a bidirectional net: it leaves no half output, and nothing on the disk."""
    model = tiny_model(tmp_path / "model", **SIZES, causal=False)
    text, spill, out = tmp_path / "long.txt", tmp_path / "spill", tmp_path / "out"
    text.write_text("the quick brown fox " * 20_000)
    spill.mkdir()
    arguments = [
        "encode",
        text,
        "-m",
        f"{model}/",
        "--chunk",
        "512",
        "--spill",
        spill,
        "-o",
        out / "vectors.arrow",
    ]
    words = [sys.executable, "-m", "longnet_cli", *map(str, arguments)]
    with subprocess.Popen(words, env=command_env, stderr=subprocess.PIPE) as job:
        wait_for(
            lambda: (
                job.poll() is not None or str(spill) in Path(f"/proc/{job.pid}/maps").read_text()
            )
        )
        assert job.poll() is None
        job.send_signal(kind)
        job.communicate(timeout=60)
    assert job.returncode in (-kind, 128 + kind)
    assert list(spill.iterdir()) == []
    assert not (out / "vectors.arrow").exists()


@pytest.mark.parametrize("command", ["score", "encode"])
def test_a_stopped_command_says_what_is_kept(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = f"{tiny_model(tmp_path / 'model')}/"
    texts = [tmp_path / f"{name}.txt" for name in "abcd"]
    for path in texts:
        path.write_text("some text " * 3)
    shards = ["--shard-tokens", "20"] if command == "score" else ["--shard-rows", "1"]
    end_shard, ended = ShardFolder.end_shard, []

    def stop(self: ShardFolder) -> None:
        ended.append(end_shard(self))
        if len(ended) % 2 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(ShardFolder, "end_shard", stop)
    folder = [command, *texts, "-m", model, *shards, "-o", tmp_path / "out"]
    said = (
        f"stopped: {tmp_path / 'out'} keeps 2 documents: the same command with --resume goes on\n"
    )
    assert said in invoke(*folder).stderr
    assert "keeps 4 documents" in invoke(*folder, "--resume").stderr
    assert invoke(*folder[:-1], tmp_path / "other", "-q").stderr.strip() in (
        "",
        "Aborted!",
        "Aborted.",
    )

    def stop_at_once(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # while the first texts are read
        patch.setattr(ShardFolder, "__enter__", stop_at_once)
        begun = invoke(command, *texts, "-m", model, "-o", tmp_path / "new")
    assert (
        f"stopped: nothing is kept in {tmp_path / 'new'}, in which no shard was begun"
        in begun.stderr
    )
    monkeypatch.setattr(ShardWriter, "write", stop_at_once)
    alone = invoke(command, *texts, "-m", model, "-o", tmp_path / "rows.arrow")
    assert (
        f"stopped: nothing is kept in {tmp_path / 'rows.arrow'}, which is written whole"
        in alone.stderr
    )


@pytest.mark.parametrize(
    ("stop", "world", "said"), [(143, 1, True), (143, 2, False), (None, 2, True)]
)
def test_a_rank_that_another_one_ends_says_nothing(
    stop: int | None,
    world: int,
    said: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises((SystemExit, KeyboardInterrupt)), say_what_is_kept("-", quiet=False):
        raise SystemExit(stop) if stop else KeyboardInterrupt
    assert capsys.readouterr().err.startswith("stopped: ") == said
