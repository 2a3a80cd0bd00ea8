"""Proves that a resumed run refuses inputs with other contents and a damaged manifest, and takes everything else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.ipc as ipc
import pytest
from builders import tiny_model
from conftest import RunLongnet
from processes import contents

from longnet_cli.data.inputs import WHOLE_TABLE, content_digest
from longnet_cli.data.manifest import UNFINISHED, read_manifest
from longnet_cli.data.names import Source

COMMANDS = {
    "tokenize": ["tokenize", "--shard-tokens", "30"],
    "score": ["score", "-m", "./model", "--shard-tokens", "30"],
    "encode": ["encode", "-m", "./model", "--shard-rows", "2"],
}


@pytest.fixture
def begin(run_longnet: RunLongnet, tmp_path: Path) -> Callable[[str, str], list[str]]:
    """Leaves `out` as a kill before its last shard does, beside `whole`; returns the words that resume it."""

    def begin(job: str, name: str) -> list[str]:
        if name == "in.jsonl":
            lines = [json.dumps({"id": str(n), "text": f"text {n} " + "x" * (n % 3)}) + "\n" for n in range(20)]
            (tmp_path / name).write_text("".join(lines))
        else:
            ids = pa.table({"input_ids": [[n] * 9 for n in range(20)], "doc_id": [str(n) for n in range(20)]})
            with ipc.new_file(tmp_path / name, ids.schema) as writer:
                writer.write_table(ids)
        if job != "tokenize":
            tiny_model(tmp_path / "model")
        words = [*COMMANDS[job], name, "-o"]
        for folder in ("whole", "out"):
            done = run_longnet(*words, folder)
            assert done.returncode == 0, done.stderr
        manifest = read_manifest(tmp_path / "out")
        (tmp_path / "out" / manifest.shards.pop()["name"]).unlink()
        (tmp_path / "out/_manifest.arrow").unlink()
        (tmp_path / "out" / UNFINISHED).write_text(manifest.to_json())
        return [*words, "out", "--resume"]

    return begin


@pytest.mark.parametrize(
    ("job", "name"), [*((job, "in.jsonl") for job in COMMANDS), ("score", "in.arrow"), ("encode", "in.arrow")]
)
def test_only_other_contents_are_refused(
    begin: Callable[[str, str], list[str]], run_longnet: RunLongnet, tmp_path: Path, job: str, name: str
) -> None:
    words, path = begin(job, name), tmp_path / name
    before, good = contents(tmp_path / "out"), path.read_bytes()
    lines = good.splitlines(keepends=True)
    byte = good.index(b"\x03" + bytes(7) + b"\x03") if name == "in.arrow" else 0  # of an id of a finished shard
    path.write_bytes(
        good[:byte] + b"\x04" + good[byte + 1 :] if name == "in.arrow" else b"".join(lines[7:] + lines[:7])
    )
    done = run_longnet(*words)
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1), done.stderr
    assert f"{name}: cannot resume: the file has changed" in done.stderr
    assert contents(tmp_path / "out") == before
    path.write_bytes(good)
    os.utime(path, (1, 1))  # a time alone is no change
    done = run_longnet(*words)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_damaged_manifest_is_one_line(
    begin: Callable[[str, str], list[str]], run_longnet: RunLongnet, tmp_path: Path
) -> None:
    """Whatever was changed, or if it lacks its digest."""
    words, place = begin("tokenize", "in.jsonl"), tmp_path / "out" / UNFINISHED
    good = json.loads(place.read_text())
    more = [good["shards"][0] | {"documents": good["shards"][0]["documents"] + 1}, *good["shards"][1:]]
    for damage in ({"shards": more}, {"shards": good["shards"][1:]}, {"settings": 3}, {"digest": None}, {"version": 0}):
        place.write_text(json.dumps(good | damage))
        done = run_longnet(*words)
        assert (done.returncode, len(done.stderr.splitlines())) == (3, 1), (damage, done.stderr)
    place.write_text(json.dumps(good))
    assert run_longnet(*words).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


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
