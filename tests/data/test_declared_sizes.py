"""A file that declares more than it has, or writes more than its size, is refused before a library takes the memory.

A file that changes under its reader ends in one line with file and row, never in SIGBUS.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from files import write_file, write_stream

from longnet_cli.basics.errors import CheckpointError, ConfigError, DataError
from longnet_cli.data import files
from longnet_cli.data.columns import Wanted
from longnet_cli.data.formats import open_source
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.jobs.converting import convert


def array(kind: int, count: int, of: bytes = b"", *, order: str = "<") -> bytes:
    """A GGUF file of one key, an array."""
    head = struct.pack(f"{order}IQQ", 3, 0, 1) + struct.pack(f"{order}Q", 1) + b"k"
    return b"GGUF" + head + struct.pack(f"{order}IIQ", 9, kind, count) + of


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (array(4, 1 << 60), "an array of 1152921504606846976 values"),
        (array(4, 1 << 60, order=">"), "an array of 1152921504606846976 values"),
        (array(8, 1, struct.pack("<Q", 1 << 60)), "it declares 1152921504606846976 bytes"),
        (array(0, 1 << 23, bytes(1 << 23)), "an array of 8388608 values"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 50, 0), "it declares 8 bytes at offset 24, of a file of 24"),
    ],
)
def test_counts_of_a_gguf_file(tmp_path: Path, data: bytes, line: str) -> None:
    pytest.importorskip("gguf")
    from longnet_cli.models.gguf import open_gguf

    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=line):
        open_gguf(tmp_path / "x.gguf")


class Filler:
    def __reduce__(self) -> tuple:
        return bytearray, (1 << 33,)


@pytest.mark.parametrize("old", [False, True])
def test_checkpoints(tmp_path: Path, old: bool) -> None:
    name = "layers.0.ffn.fc1.weight"
    contents: dict[str, Any] = {
        "it asks for __builtin__.bytearray": {name: torch.zeros(4, 4), "filler": Filler()},
        "has not all of its numbers": {name: torch.zeros(1).expand(1 << 20, 1 << 20)},
        "has not all": {name: torch.zeros(4, 4, device="meta")},
    }
    for line, content in contents.items():
        torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
        with pytest.raises(CheckpointError, match=line):
            convert(tmp_path / "x.pt", tmp_path / "out")
    if old:
        return
    torch.save({name: torch.zeros(1 << 10, 1 << 10)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "x.pt", "w", 8) as packed:
        for record in plain.infolist():
            packed.writestr(record.filename, plain.read(record))
    with pytest.raises(CheckpointError, match="its records are compressed"):
        convert(tmp_path / "x.pt", tmp_path / "out")


def replace(pattern: dict[str, str], content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


CHARSMAP = base64.b64encode(struct.pack("<II", 4, 0) + b"a\0" + b"b" * 999 + b"\0").decode()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [replace({"String": "e"}, "ee")] * 30}}, "1,073,741,824"),
        ({"normalizer": replace({"Regex": ""}, "x" * 1000)}, "1,001 times"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}}, "999 times"),
        ({"decoder": {"type": "Sequence", "decoders": [replace({"String": "ab"}, "abab")] * 9}}, "512 times"),
        ({"model": {"vocab": {"a": 4_294_967_295}}}, "an id 4294967295"),
    ],
)
def test_tokenizers(tmp_path: Path, changes: dict, line: str) -> None:
    known = json.loads(Tokenizer.bytes().to_json())
    model = known["model"] | {"vocab": known["model"]["vocab"] | changes.pop("model", {}).get("vocab", {})}
    (tmp_path / "tokenizer.json").write_text(json.dumps(known | changes | {"model": model}))
    with pytest.raises(ConfigError, match=line):
        Tokenizer.load(tmp_path)


def test_a_regular_expression_without_end(tmp_path: Path, run_longnet: Any) -> None:
    known = json.loads(Tokenizer.bytes().to_json())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    known["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, known["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(known))
    (tmp_path / "a.txt").write_text("a" * 300 + "!")
    done = run_longnet("tokenize", "a.txt", "--tokenizer", tmp_path / "tokenizer.json", "-o", "a.arrow")
    line = done.stderr.splitlines()[-1]  # the library says something of its own before
    assert (done.returncode, line[:39]) == (2, "longnet: error: the tokenizer fails (On"), done.stderr


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"chunks": (8, 4)}, "the file has 1 of its 131,072 chunks"),
        ({}, "the file lacks some of its rows"),
        ({"chunks": (1 << 20, 1 << 9), "compression": "gzip"}, "chunks have 2,147,483,648 bytes each"),
    ],
)
def test_rows_of_hdf5_that_are_not_there(tmp_path: Path, changes: dict, line: str) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        width = changes.get("chunks", (0, 4))[-1]
        rows = file.create_dataset("features", (1 << 20, width), "f4", **changes)
        if width == 4 and changes:
            rows[:8] = np.ones((8, 4))
    with pytest.raises(DataError, match=line):
        list(Inputs([tmp_path / "x.h5"], vectors=True).documents())


ROWS, LENGTH = 8, 1 << 16


def table(kind: str = "list") -> pa.Table:
    ids = pa.array(np.arange(ROWS * LENGTH, dtype=np.int32) % 250)
    if kind == "flat":
        return pa.table({"ids": ids})
    lists = pa.LargeListArray.from_arrays(pa.array(np.arange(0, ROWS * LENGTH + 1, LENGTH)), ids)
    return pa.table({"input_ids": lists})


def write(path: Path, kind: str) -> Path:
    if kind == "parquet":
        pq.write_table(table(), path, row_group_size=1)
    elif kind == "text":
        path.write_text("some words\n" * 500_000)
    elif kind == "json lines":
        path.write_text(f'{{"input_ids": {[7] * 1000}}}\n' * 2000)
    else:
        made = table(kind)
        (write_stream if kind == "stream" else write_file)(path, made, LENGTH if kind == "flat" else 1)
    return path


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def rewrite(path: Path) -> None:
    """In place, of the same size."""
    before = path.stat()
    while path.stat().st_mtime_ns == before.st_mtime_ns:  # the system's clock for files has ticks
        with path.open("r+b") as file:
            file.seek(before.st_size // 3)
            file.write(b"\1\1\1\1")


CHANGES: dict[str, Callable[[Path], None]] = {"shrink": shrink, "empty": empty, "rewrite": rewrite}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["list", "flat", "stream"])
def test_ids_of_a_file_that_changes_after_it_was_opened(tmp_path, kind, change):
    path = write(tmp_path / "x.arrow", kind)
    documents = list(Inputs([path], eos_id=249).documents())
    last = documents[-1]
    assert len(last.read(0, 10)) == min(10, len(last))
    CHANGES[change](path)
    with pytest.raises(DataError, match=r"x\.arrow, row \d+: the file changed while it was read \(") as caught:
        last.read()
    row = int(str(caught.value).split("row ")[1].split(":")[0])
    assert row == (ROWS - 1 if kind != "flat" else last.parts[0].row)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["list", "flat", "stream", "parquet", "json lines"])
def test_a_table_that_changes_before_it_is_read(tmp_path, kind, change):
    path = write(tmp_path / "x.arrow", kind)
    (source,) = Inputs([path]).sources
    opened = open_source(source, Wanted())
    CHANGES[change](path)
    with pytest.raises(DataError, match=r"x\.arrow.*: the file changed while it was read"):
        list(Inputs((), eos_id=249).documents_of(opened))


@pytest.mark.parametrize("write_texts", [write_file, write_stream])
def test_texts_of_a_table_that_is_rewritten_while_they_are_read(tmp_path, write_texts):
    """Its only batch is a slice of a map."""
    path = tmp_path / "x.arrow"
    write_texts(path, pa.table({"text": ["some words " * 20_000] * 3}), 3)
    texts = iter(Inputs([path]).texts())
    assert next(texts).text.startswith("some words")
    rewrite(path)
    with pytest.raises(DataError, match=r"x\.arrow, row \d+: the file changed while it was read \(it was written to"):
        list(texts)


def test_a_table_that_has_been_read_keeps_one_file_open(tmp_path):
    path, before = write(tmp_path / "x.arrow", "list"), len(os.listdir("/proc/self/fd"))
    documents = list(Inputs([path]).documents())
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert documents[-1].read(0, 1).size == 1


@pytest.mark.parametrize("change", CHANGES)
def test_a_text_that_changes_while_it_is_read(tmp_path, change):
    path = write(tmp_path / "x.txt", "text")
    opened = files.StoredFile(path, "x.txt")
    assert opened.read(1 << 20)
    CHANGES[change](path)
    with pytest.raises(DataError, match=r"x\.txt: the file changed while it was read"):
        opened.read(1 << 20)


def test_a_file_replaced_by_a_rename_is_read_as_it_was(tmp_path):
    path = write(tmp_path / "x.arrow", "list")
    (document, *_) = Inputs([path]).documents()
    write(tmp_path / "new", "flat")
    os.replace(tmp_path / "new", path)
    assert document.read().sum() == (np.arange(LENGTH) % 250).sum()
