"""Proves that a resumed run refuses inputs with other contents and a damaged manifest, and takes everything else."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow.fs as fs
import pytest
from builders import tiny_model
from conftest import RunLongnet
from files import write_rows
from processes import contents

from longnet_cli.data.inputs import WHOLE_TABLE, content_digest
from longnet_cli.data.manifest import UNFINISHED, read_manifest
from longnet_cli.data.names import Source

COMMANDS = {
    "tokenize": ["tokenize", "--shard-tokens", "30"],
    "score": ["score", "-m", "./model", "--shard-tokens", "30"],
    "encode": ["encode", "-m", "./model", "--shard-rows", "2"],
}


@pytest.mark.parametrize(
    ("job", "name"),
    [("tokenize", "in.jsonl"), *((job, form) for job in ("score", "encode") for form in ("in.jsonl", "in.arrow"))],
)
def test_only_other_contents_are_refused(run_longnet: RunLongnet, tmp_path: Path, job: str, name: str) -> None:
    """By the digests of what finished shards hold. A kill before the last of these leaves `out`, beside `whole`."""
    out, path = tmp_path / "out", tmp_path / name
    kind = {"in.jsonl": lambda n: {"text": f"text {n}"}, "in.arrow": lambda n: {"ids": [n] * 9}}[name]
    write_rows(path, [{"id": str(n)} | kind(n) for n in range(20)])
    if job != "tokenize":
        tiny_model(tmp_path / "model")
    for folder in ("whole", "out"):
        done = run_longnet(*COMMANDS[job], name, "-o", folder)
        assert done.returncode == 0, done.stderr
    manifest = read_manifest(out)
    (out / manifest.shards.pop()["name"]).unlink()
    (out / "_manifest.arrow").unlink()
    (out / UNFINISHED).write_text(manifest.to_json())
    before, good = contents(out), path.read_bytes()
    byte = good.index(b"3" if name.endswith("jsonl") else b"\x03" + bytes(7) + b"\x03")  # of a finished shard
    path.write_bytes(good[:byte] + b"4" + good[byte + 1 :])
    done = run_longnet(*COMMANDS[job], name, "-o", "out", "--resume")
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1), done.stderr
    assert f"{name}: cannot resume: the file has changed" in done.stderr
    assert contents(out) == before
    path.write_bytes(good)
    os.utime(path, (1, 1))  # a time alone is no change
    done = run_longnet(*COMMANDS[job], name, "-o", "out", "--resume")
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(tmp_path / "whole")


def test_a_large_table_is_known_by_its_ends_and_pieces(tmp_path: Path) -> None:
    path = tmp_path / "large.arrow"
    path.write_bytes(b"ARROW1\0\0" + np.random.default_rng(0).bytes(2 * WHOLE_TABLE))
    source = Source(path, "large", "large")
    whole = content_digest(source)
    for position in (100, path.stat().st_size // 2 + 9, path.stat().st_size - 1):
        with open(path, "r+b") as file:
            file.seek(position)
            old = file.read(1)
            file.seek(position)
            file.write(bytes([old[0] ^ 1]))
            file.flush()
            assert content_digest(source) != whole
            file.seek(position)
            file.write(old)
    assert content_digest(source) == whole
    assert content_digest(Source(None, "-", "-")) is None


def test_a_file_in_a_store_is_known_by_its_tag_or_its_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    first = content_digest(Source(Path("a"), "a", "store://a", store))
    assert first == content_digest(Source(Path("a"), "a", "store://a", store))
    os.utime(tmp_path / "a", (1, 1))
    assert content_digest(Source(Path("a"), "a", "store://a", store)) not in (None, first)
    assert content_digest(Source(Path("b"), "b", "store://b", store)) is None

    class Tagged(fs.FSSpecHandler):
        def __init__(self, tag: str) -> None:
            self.fs = type("Store", (), {"protocol": "x", "info": lambda self, path: {"ETag": tag}})()

    tags = [content_digest(Source(Path("a"), "a", "a", fs.PyFileSystem(Tagged(tag)))) for tag in ("1", "1", "2")]
    assert tags[0] == tags[1] != tags[2]
