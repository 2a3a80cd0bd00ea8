"""Texts at the size that people have: tokenized, counted, streamed, cut off and killed, beside the libraries."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
import tokenizers
from processes import contents, environment, kill_and_resume
from real_files import Run
from tokenizers import models, pre_tokenizers, trainers


def ids_of(folder: Path) -> np.ndarray:
    tables = [ipc.open_file(path).read_all() for path in sorted(folder.glob("*.arrow")) if path.name[0] != "_"]
    return np.concatenate([np.asarray(row) for table in tables for row in table["input_ids"].to_numpy()])


def test_a_vocabulary_of_a_text_of_megabytes_is_that_of_the_library(run: Run, book: str, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    run("tokenize", "book.txt", "-o", "tokens.arrow", "--train-vocab", 4096, mib=400)
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator([book], trainer)
    ours = json.loads((tmp_path / "tokens.arrow.tokenizer.json").read_text())
    assert ours["model"] == json.loads(theirs.to_str())["model"]
    assert np.array_equal(ids_of(tmp_path), theirs.encode(book).ids)


@pytest.mark.slow
def test_tokens_of_a_folder_are_those_of_the_library(run: Run, library: list[Path], tmp_path: Path) -> None:
    (tmp_path / "files.txt").write_text("\n".join(map(str, library)))
    run("tokenize", "@files.txt", "-o", "tokens", "--tokenizer", "longnet-tiny", "--shard-tokens", "500k", mib=300)
    theirs = tokenizers.Tokenizer.from_file("models/longnet-tiny/tokenizer.json")
    texts = [path.read_bytes().decode("utf-8-sig") for path in library]
    whole = [np.array(each.ids) for each in theirs.encode_batch(texts, add_special_tokens=False)]
    assert np.array_equal(ids_of(tmp_path / "tokens"), np.concatenate(whole))
    counted = run("data", "inspect", "tokens", "--format", "json", mib=250).stdout
    assert sum(map(len, whole)) == json.loads(counted)["tokens"]


def test_nested_columns_of_compressed_lines(run: Run, lines: Path, tmp_path: Path) -> None:
    words = ("--column", "doc.body", "--tokenizer", "longnet-tiny", "-q")
    run("tokenize", lines, "-o", "t.parquet", *words, mib=300)
    with pa.CompressedInputStream(str(lines), "zstd") as file:
        texts = [json.loads(line)["doc"]["body"] for line in file.read().splitlines()]
    theirs = tokenizers.Tokenizer.from_file("models/longnet-tiny/tokenizer.json")
    expected = [each.ids for each in theirs.encode_batch(texts, add_special_tokens=False)]
    assert pq.read_table(tmp_path / "t.parquet")["input_ids"].to_pylist() == expected


@pytest.mark.slow
def test_a_killed_run_completes_to_the_same_bytes(start, library: list[Path], tmp_path: Path) -> None:
    (tmp_path / "files.txt").write_text("\n".join(map(str, library)))
    words = ("tokenize", "@files.txt", "--tokenizer", "longnet-tiny", "--shard-tokens", "200k", "-q")
    kill_and_resume(start, list(words), tmp_path, kills=6)


@pytest.mark.parametrize("command", ["score", "encode"])
@pytest.mark.parametrize("named", [False, True], ids=["nameless", "named"])
def test_a_stream_is_answered_line_by_line(command: str, named: bool, library: list[Path]) -> None:
    """The next line is sent only when the result of the one before has come."""
    output = ["-o", "-"] if command == "encode" else ["--format", "jsonl"]
    words = [sys.executable, "-m", "longnet_cli", command, "-", "-q", *output]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())
    hung = threading.Timer(120, process.kill)
    hung.start()
    with process:
        rows = None
        for number, path in enumerate(library[:6]):
            row = {"text": path.read_text(encoding="utf-8")[:3000] or "x"} | ({"id": path.name} if named else {})
            process.stdin.write(json.dumps(row).encode() + b"\n")
            process.stdin.flush()
            if command == "score":
                line = process.stdout.readline()
                assert line, "no answer before the next line"
                got = json.loads(line)["doc_id"]
            else:
                rows = rows or ipc.open_stream(process.stdout)
                got = rows.read_next_batch()["doc_id"][0].as_py()
            assert got == (path.name if named else f"stdin:{number}")
        process.stdin.close()
        process.stdout.read()
    hung.cancel()
    assert process.returncode == 0


def test_a_cut_file_is_one_line_and_no_abort(tmp_path: Path) -> None:
    """The process may end while a thread of pyarrow still reads: on a busy machine, it aborted one time in three."""
    batch = pa.record_batch({"text": ["a text of some words"] * 1000})
    with ipc.new_file(str(tmp_path / "cut.arrow"), batch.schema) as writer:
        for _ in range(2):
            writer.write_batch(batch)
    whole = (tmp_path / "cut.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(whole[:-8])
    words = [sys.executable, "-m", "longnet_cli", "data", "inspect", "cut.arrow"]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        for _ in range(12):
            done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment(), check=False)
            assert done.returncode == 3, done.stderr
            assert "terminate" not in done.stderr
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_shards_of_a_resumed_folder_are_its_shards(run: Run, half_megabyte: Path, tmp_path: Path) -> None:
    words = ("tokenize", half_megabyte, "-o", "tokens", "--tokenizer", "longnet-tiny", "--shard-tokens", "20k")
    run(*words, mib=250)
    whole = contents(tmp_path / "tokens")
    run(*words, "--resume", mib=250)
    assert contents(tmp_path / "tokens") == whole
