"""Compressed inputs are what they unpack to, in bounded memory; damage is one line."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc as ipc
import pytest

from longnet_cli.basics.errors import DataError, InputWarning
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
TEXT = "one line of text, and another; wörld\n" * 300


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": partial(pa.compress, codec="zstd", asbytes=True),
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


@pytest.fixture(params=PACKERS)
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


def texts(path: Path) -> list[str]:
    return ["".join(text.parts) for text in Inputs([path]).texts()]


def test_text_json_lines_and_arrow_are_read_by_their_first_bytes(suffix: str, tmp_path: Path) -> None:
    pack = PACKERS[suffix]
    lines = [TEXT, "two", "three"]
    json_lines = "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()
    table = pa.table({"text": lines})
    with ipc.new_stream(tmp_path / "stream", table.schema) as writer:
        writer.write_table(table)
    for name in (f"x{suffix}", "no-suffix"):  # a name says nothing
        (tmp_path / name).write_bytes(pack(TEXT.encode()))
        assert texts(tmp_path / name) == [TEXT]
        for data in (json_lines, (tmp_path / "stream").read_bytes()):
            (tmp_path / name).write_bytes(pack(data))
            assert texts(tmp_path / name) == lines
    (tmp_path / "twice").write_bytes(pack(TEXT.encode()[:100]) + pack(TEXT.encode()[100:]))  # as `cat a.gz b.gz`
    assert texts(tmp_path / "twice") == [TEXT]
    (tmp_path / "mark").write_bytes(pack(b"\xef\xbb\xbfx"))
    assert texts(tmp_path / "mark") == ["x"]


def test_a_folder_of_compressed_files_is_read(suffix: str, tmp_path: Path) -> None:
    pack = PACKERS[suffix]
    for name in (f"a.txt{suffix}", f"b.txt{suffix}", f"code.tar{suffix}"):
        (tmp_path / name).write_bytes(pack(b"text"))
    with pytest.warns(InputWarning, match=rf": 1 file is not read beside the 2 .*: code.tar{suffix}$"):
        assert [source.name for source in Inputs([tmp_path]).sources] == [f"a.txt{suffix}", f"b.txt{suffix}"]
    (tmp_path / f"c.jsonl{suffix}").write_bytes(pack(b'{"text": "x"}\n'))
    with pytest.warns(InputWarning, match=rf": 3 files are not read beside c.jsonl{suffix}: a.txt{suffix} and 1 "):
        assert [source.name for source in Inputs([tmp_path]).sources] == [f"c.jsonl{suffix}"]
    for name in "ab":
        (tmp_path / f"{name}.txt{suffix}").unlink()
    (tmp_path / f"c.jsonl{suffix}").write_bytes(pack(b"hello"))
    with pytest.warns(InputWarning), pytest.raises(DataError, match=r"line 1: not JSON Lines of documents"):
        texts(tmp_path)


@pytest.mark.parametrize("keep", [(), ("id",)])
def test_rows_before_damage_are_read(
    suffix: str, tmp_path: Path, keep: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for those of the last 4 KiB; zstd and bzip2 lose a larger block. They are as many, however fast they come."""
    lines = [json.dumps({"id": row, "text": random.Random(row).randbytes(200).hex()}) + "\n" for row in range(5000)]
    data = PACKERS[suffix]("".join(lines).encode())
    (tmp_path / "x.jsonl").write_bytes(data[: len(data) * 9 // 10])
    *found, last = Inputs([tmp_path / "x.jsonl"], skip_bad=True, keep=keep).texts()
    assert "data is damaged or truncated" in str(last.error)
    assert [f'"text": "{text.text}"}}\n' for text in found] == [line.partition(", ")[2] for line in lines[: len(found)]]
    lost = {".zst": 128 << 10, ".bz2": 900 << 10}.get(suffix, 4 << 10) + (8 << 10)
    assert len(found) > 5000 * 0.9 - lost / len(lines[0])
    monkeypatch.setattr("longnet_cli.data.jsonlines.PATIENCE", -1)
    assert len(list(Inputs([tmp_path / "x.jsonl"], skip_bad=True, keep=keep).texts())) == len(found) + 1


def test_damage_is_one_line(suffix: str, tmp_path: Path) -> None:
    packed, path = PACKERS[suffix](TEXT.encode()), tmp_path / "x"
    for data in (packed[:-3], packed[: len(packed) // 2], packed[:-12] + b"\0" * 12):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"x: the \w+ data is damaged or truncated") as caught:
            list(Inputs([path], BYTES).documents())
        assert "\n" not in str(caught.value)
    path.write_bytes(PACKERS[suffix](packed))  # only one skin is taken off: there are files that unpack to themselves
    with pytest.raises(DataError, match="neither Arrow, Parquet nor UTF-8 text"):
        list(Inputs([path], BYTES).documents())


@pytest.mark.parametrize("suffix", [".bz2", ".xz"])
def test_damage_in_a_later_member_is_seen(suffix: str, tmp_path: Path) -> None:
    """Or it changes nothing. gzip and zstd are read by others' code; zstd has checksums only where its writer asks."""
    packed, path = PACKERS[suffix](TEXT.encode()), tmp_path / "x"
    for place in range(len(packed)):
        data = bytearray(packed * 3)
        data[len(packed) + place] ^= 1 << place % 8
        path.write_bytes(data)
        with contextlib.suppress(DataError):
            assert texts(path) == [TEXT * 3], place
    for left in range(1, len(packed)):
        path.write_bytes(packed * 2 + packed[:left])
        with pytest.raises(DataError, match="data is damaged or truncated"):
            texts(path)


def test_xz_may_have_padding(tmp_path: Path) -> None:
    packed = lzma.compress(TEXT.encode())
    for zeros, good in ((4, True), (8192, True), (3, False), (4097, False)):
        (tmp_path / "x").write_bytes((packed + bytes(zeros)) * 2)
        with contextlib.nullcontext() if good else pytest.raises(DataError, match="padding"):
            assert texts(tmp_path / "x") == [TEXT * 2]


def test_a_long_text_goes_through_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longnet_cli.data.formats.TEXT_PART", 7)
    path = tmp_path / "x.txt"
    path.write_text("\ufeff" + TEXT)
    (text,) = Inputs([path]).texts()
    assert len(list(text.parts)) > 1000
    assert texts(path) == [TEXT]
    (document,) = Inputs([path], BYTES).documents()
    assert bytes(document.read().tolist()) == TEXT.encode()
    assert document.n_bytes == len(TEXT.encode())
    for bad, where in ((b"0123456789\xff", 10), (b"0123456789abc\0", 13), (b"abcdef\xc3x", 6), (b"abcdef\xc3", 6)):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=rf"x\.txt: neither .*: the byte at offset {where} is 0x"):
            list(Inputs([path], BYTES).documents())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "jsonl"])
def test_a_megabyte_that_unpacks_to_a_gigabyte_streams(form: str, tmp_path: Path) -> None:
    """In 3 GiB of data at most, most of which a program of Arrow reserves and does not use."""
    line, limit = b"some words, and some more of them.\n" * 1000, 3 << 30
    if form == "jsonl":
        line = json.dumps({"text": line.decode()}).encode() + b"\n"
    with gzip.open(tmp_path / "x.gz", "wb", compresslevel=9) as file:
        for _ in range((1 << 30) // len(line)):
            file.write(line)
    done = subprocess.run(
        [sys.executable, "-m", "longnet_cli", "data", "inspect", "x.gz", "--format", "json", "-q"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n_bytes"] >= 0.9 * (1 << 30)
