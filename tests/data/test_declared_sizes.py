"""A file that declares more than it has, or writes more than its size, is refused before a library takes the memory."""

from __future__ import annotations

import base64
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longnet_cli.basics.errors import CheckpointError, ConfigError, DataError
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
