"""Texts at the size that people have: tokenized and counted, beside the libraries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers


def ids_of(folder: Path) -> np.ndarray:
    tables = [
        ipc.open_file(path).read_all()
        for path in sorted(folder.glob("*.arrow"))
        if path.name[0] != "_"
    ]
    return np.concatenate(
        [np.asarray(row) for table in tables for row in table["input_ids"].to_numpy()]
    )


def test_a_vocabulary_of_a_text_of_megabytes_is_that_of_the_library(run, book, tmp_path):
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    run("tokenize book.txt -o tokens.arrow --train-vocab 4096", mib=400)
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    theirs.train_from_iterator([book], trainer)
    ours = json.loads((tmp_path / "tokens.arrow.tokenizer.json").read_text())
    assert ours["model"] == json.loads(theirs.to_str())["model"]
    assert np.array_equal(ids_of(tmp_path), theirs.encode(book).ids)


@pytest.mark.slow
def test_tokens_of_a_folder_are_those_of_the_library(run, library, tmp_path):
    (tmp_path / "files.txt").write_text("\n".join(map(str, library)))
    words = "tokenize @files.txt -o tokens --tokenizer longnet-tiny --shard-tokens 500k"
    run(words, mib=300)
    theirs = tokenizers.Tokenizer.from_file("models/longnet-tiny/tokenizer.json")
    texts = [path.read_bytes().decode("utf-8-sig") for path in library]
    whole = [np.array(each.ids) for each in theirs.encode_batch(texts, add_special_tokens=False)]
    assert np.array_equal(ids_of(tmp_path / "tokens"), np.concatenate(whole))
    counted = run("data inspect tokens --format json", mib=250).stdout
    assert sum(map(len, whole)) == json.loads(counted)["tokens"]


def test_nested_columns_of_compressed_lines(run, lines, tmp_path):
    words = ["--column", "doc.body", "--tokenizer", "longnet-tiny", "-q"]
    run("tokenize", lines, "-o", "t.parquet", *words, mib=300)
    with pa.CompressedInputStream(str(lines), "zstd") as file:
        texts = [json.loads(line)["doc"]["body"] for line in file.read().splitlines()]
    theirs = tokenizers.Tokenizer.from_file("models/longnet-tiny/tokenizer.json")
    expected = [each.ids for each in theirs.encode_batch(texts, add_special_tokens=False)]
    assert pq.read_table(tmp_path / "t.parquet")["input_ids"].to_pylist() == expected
