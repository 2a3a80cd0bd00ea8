"""Proves that damaged input ends in one line that names the file, or gives exactly the original: hundreds of mutations.

Each mutation says what may come of it:

- ERROR: a LongNetError of one line that names the input.
- SAME: that, or exactly the original tokens (the byte was padding, or said something twice).
- DATA: that, or anything of the right kind: the byte was one of a token, of a row's place, or of a compressed page.
  Arrow has no checksums, nor has Parquet unless its writer asked for them, so this cannot be seen by anybody.

Files are read in a process of their own, which a crash would end: that is a failure as well. A file that declares more
than it has, or writes more than its size, is refused before a library takes the memory; one that changes under its
reader ends in one line with file and row, never in SIGBUS.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import random
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
import torch
from files import write_file, write_stream

from longnet_cli.basics.errors import CheckpointError, ConfigError, DataError
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.data.files import local_files as files
from longnet_cli.data.files.column_choice import Wanted
from longnet_cli.data.files.opening import open_input
from longnet_cli.jobs.converting import convert

IDS = [
    [1, 2, 3, 4, 5, 6, 7],
    [250, 251, 252],
    [60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 70],
    [9, 8],
    [100, 101, 102],
]
ERROR, SAME, DATA = "error", "same", "data"


class Mutation(NamedTuple):
    """`data` is what a reader gets, `expected` one of ERROR, SAME, DATA; `name` is for the message of a failure."""

    name: str
    data: bytes
    expected: str


# --- the originals ---------------------------------------------------------------------------------------------------


def table(kind: pa.DataType) -> pa.Table:
    names = ["alpha", "beta", "gamma", "delta", "epsilon"]
    return pa.table({"doc_id": names, "input_ids": pa.array(IDS, kind)})


def arrow(write: Callable[..., Any], rows: pa.Table, compression: str | None = None) -> bytes:
    options = ipc.IpcWriteOptions(compression=compression)
    return write(pa.BufferOutputStream(), rows, options=options).getvalue().to_pybytes()


def parquet(rows: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, row_group_size=2, **options)
    return sink.getvalue().to_pybytes()


INT32, UINT16, LARGE = map(
    table, (pa.list_(pa.int32()), pa.list_(pa.uint16()), pa.large_list(pa.int64()))
)
ORIGINALS: dict[str, bytes] = {
    "file int32": arrow(write_file, INT32),
    "file large int64": arrow(write_file, LARGE),
    "file lz4": arrow(write_file, UINT16, "lz4"),
    "stream int32": arrow(write_stream, INT32),
    "stream uint16": arrow(write_stream, UINT16),
    "parquet with checksums": parquet(INT32, write_page_checksum=True),
    "parquet": parquet(LARGE, compression="none"),
    "json lines": b"".join(json.dumps(row).encode() + b"\n" for row in INT32.to_pylist()),
}

FEW = ("stream uint16", "parquet with checksums", "json lines")  # which `make test` reads


# --- the mutations ---------------------------------------------------------------------------------------------------


def values_in(data: bytes) -> set[int]:
    """The places of bytes that are token ids, or list offsets between them, in an uncompressed Arrow file."""
    places: set[int] = set()
    for first in range(0, len(IDS), 2):
        rows = IDS[first : first + 2]
        ids = np.concatenate(rows)
        offsets = np.cumsum([0, *map(len, rows)])
        for array, kinds in ((ids, ("i4", "u2", "i8")), (offsets, ("i4", "i8"))):
            for kind in kinds:
                for match in re.finditer(re.escape(array.astype(kind).tobytes()), data):
                    places.update(range(*match.span()))
    return places


def flips(name: str, data: bytes, chosen: random.Random, count: int) -> Iterator[Mutation]:
    """One byte changed, in one bit or in all: some bytes of each file, and two bits of every byte of some files."""
    values = values_in(data)
    assert values or not name.startswith(("file int32", "file large", "stream"))
    flipped = [
        (place, chosen.choice((1, 2, 4, 8, 16, 32, 64, 128, 255)))
        for place in chosen.sample(range(len(data)), count)
    ]
    if name in ("file int32", "stream int32"):
        flipped += [(place, mask) for place in range(len(data)) for mask in (1, 8)]
    for place, mask in sorted(set(flipped)):
        changed = data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]
        weak = name in ("parquet", "file lz4", "json lines") or place in values
        yield Mutation(f"byte {place} ^ {mask}", changed, DATA if weak else SAME)


def cuts(name: str, data: bytes, chosen: random.Random, count: int) -> Iterator[Mutation]:
    """Truncated where batches begin and end, and anywhere."""
    ends = {match.start() for match in re.finditer(rb"\xff\xff\xff\xff", data)}
    ends |= (
        {match.start() for match in re.finditer(rb"\n", data)} if name == "json lines" else set()
    )
    for place in sorted(
        ends | set(chosen.sample(range(len(data)), count)) | {0, 1, 7, 8, len(data) - 1}
    ):
        whole = name == "json lines" and (
            place == len(data) - 1 or data[:place].endswith((b"\n", b"}"))
        )
        # a text format of whole lines does not say how many: a cut between two cannot be seen
        if not whole:
            yield Mutation(f"cut at {place}", data[:place], ERROR)


def replaced(name: str, data: bytes) -> Iterator[Mutation]:
    """A wrong beginning, and something more at the end."""
    for magic in (
        b"ARROW2\0\0",
        b"PK\3\4\0\0\0\0",
        b"\0" * 8,
        b"\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"PAR1\0\0\0\0",
    ):
        if not data.startswith(magic[:4]) or not name.startswith("parquet"):
            yield Mutation(f"begins with {magic!r}", magic + data[8:], ERROR)
    if not name.startswith("parquet"):  # which begins at its end
        yield Mutation("twice", data + data, DATA if name == "json lines" else ERROR)
        yield Mutation("more bytes", data + b"more", ERROR)


def mutations(name: str) -> list[Mutation]:
    """All mutations of one original, the same each time."""
    data, chosen = ORIGINALS[name], random.Random(name)
    return [*cuts(name, data, chosen, 25), *flips(name, data, chosen, 200), *replaced(name, data)]


# --- reading them ----------------------------------------------------------------------------------------------------

# Reads each (place, how) of a list and says at once what came of it, so that after a crash it is known where.
READER = """
import json, os, resource, sys
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.basics.errors import LongNetError

resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # a damaged size may ask for any amount

def read(path, piped):
    if piped:
        inner, outer = os.pipe()
        with open(path, "rb") as file:
            assert os.write(outer, file.read()) < 1 << 16  # what a pipe holds
        os.close(outer)
        sys.stdin, path = os.fdopen(inner), "-"
    return [d.read().tolist() for d in Inputs([path], vocab_size=257).documents()]

for path, piped in json.loads(sys.stdin.read()):
    try:
        result = ["tokens", read(path, piped)]
    except LongNetError as error:
        result = ["error", str(error)]
    except BaseException as error:
        result = ["exception", repr(error)]
    print(json.dumps(result), flush=True)
"""


def read_all(paths: list[Path], piped: bool, env: dict[str, str]) -> list[tuple[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps([(str(path), piped) for path in paths]),
        capture_output=True,
        text=True,
        env=env,
        timeout=60,
        check=False,
    )
    results = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (
        f"{paths[len(results)]} ended the reader ({done.returncode}): {done.stderr[-500:]}"
    )
    return results


def judge(mutation: Mutation, result: tuple[str, Any], name: str) -> str | None:
    """What is wrong with a result, None when it is allowed."""
    kind, value = result
    if kind == "error":
        return (
            None
            if name in value and "\n" not in value
            else f"not one line that names {name}: {value!r}"
        )
    if kind == "exception":
        return value
    if mutation.expected == DATA or (mutation.expected == SAME and value == IDS):
        return None
    return f"silently gave {value}"


@pytest.mark.full
@pytest.mark.parametrize(
    "piped", [False, pytest.param(True, marks=pytest.mark.ci)], ids=["disk", "pipe"]
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.ci) for name in ORIGINALS]
)
def test_damage_is_one_line_or_changes_nothing(tmp_path, command_env, name, piped):
    suffix = ".jsonl" if name == "json lines" else ""
    items = [Mutation("the original", ORIGINALS[name], SAME), *mutations(name)]
    # a pipe has no name that promises JSON Lines: what begins otherwise is a text to be read
    if piped and suffix:
        items = [
            item
            for item in items
            if item.data.partition(b"\n")[0] == items[0].data.partition(b"\n")[0]
        ]
    paths = []
    for index, item in enumerate(items):
        paths.append(tmp_path / f"{index}{suffix}")
        paths[-1].write_bytes(item.data)
    results = read_all(paths, piped, command_env)
    assert results[0] == ("tokens", IDS)
    wrong = {
        item.name: problem
        for item, path, result in zip(items, paths, results, strict=True)
        if (problem := judge(item, result, "stdin" if piped else str(path)))
    }
    assert not wrong
    refused = sum(kind == "error" for kind, _ in results)
    assert refused > len(results) / 3, "hardly a mutation did anything"


def test_a_page_of_parquet_with_fewer_values_is_not_believed(tmp_path, command_env):
    """Without checksums a value may change, and the rows in which values lie, but no value may get lost."""
    data = parquet(INT32.select(["input_ids"]), compression="none")
    places = [(place, (1, 8)[place // 4 % 2]) for place in range(len(data))]
    for place, mask in places:
        changed = data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]
        (tmp_path / f"{place}-{mask}").write_bytes(changed)
    results = read_all([tmp_path / f"{place}-{mask}" for place, mask in places], False, command_env)
    sizes = {sum(map(len, value)) if kind == "tokens" else kind for kind, value in results}
    assert sizes == {"error", sum(map(len, IDS))}


def test_an_arrow_file_with_two_schemas_is_refused(tmp_path):
    """The name of a column stands at both ends of the file: documents must not fall apart because one is damaged."""
    path = tmp_path / "x.arrow"
    path.write_bytes(ORIGINALS["file int32"].replace(b"doc_id", b"dok_id", 1))
    with pytest.raises(DataError, match=r"x\.arrow: .*two different schemas"):
        list(Inputs([path]).documents())


@pytest.mark.parametrize("lost", ["first", "last", "twice"])
def test_an_index_that_has_lost_or_repeats_a_batch_loses_and_repeats_none(tmp_path, lost):
    """Batches are read as they come, and counted."""
    data = bytearray(ORIGINALS["file int32"])
    blocks = re.search(
        rb"\x03\x00\x00\x00(.{72})",
        bytes(data[data.rindex(b"\xff\xff\xff\xff\0\0\0\0") :]),
        re.DOTALL,
    )
    start = data.rindex(blocks[0])
    first, second, third = (blocks[1][place : place + 24] for place in (0, 24, 48))
    count, kept = {
        "first": (2, second + third + third),
        "last": (2, first + second + third),
        "twice": (3, first + first + third),
    }[lost]
    data[start : start + 76] = count.to_bytes(4, "little") + kept
    (tmp_path / "x.arrow").write_bytes(data)
    # pyarrow sees nothing
    assert ipc.open_file(tmp_path / "x.arrow").read_all().num_rows in (3, 4, 5)
    documents = Inputs([tmp_path / "x.arrow"]).documents()
    if count == 3:
        assert [document.tokens.tolist() for document in documents] == IDS
        return
    with pytest.raises(
        DataError, match=r"x\.arrow, batch 3: .*\(3 batches were read, and its index lists 2\)"
    ):
        list(documents)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["file int32", "file lz4", "stream int32", "parquet"])
def test_a_cut_file_does_not_abort_a_process(tmp_path, command_env, name):
    """Beside two busy loops: a thread of pyarrow that outlives the interpreter would."""
    data, path = ORIGINALS[name], tmp_path / "cut"
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for size in [
            *range(20, len(data) - 20, len(data) // 15),
            *range(len(data) - 12, len(data) - 6),
        ]:
            path.write_bytes(data[:size])
            command = [sys.executable, "-m", "longnet_cli", "data", "inspect", path]
            done = subprocess.run(command, env=command_env, capture_output=True, text=True)
            assert (done.returncode, done.stderr.count("\n")) == (DataError.exit_code, 1), (
                size,
                done.stderr,
            )
    finally:
        for process in busy:
            process.kill()
            process.wait()


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
        (
            b"GGUF" + struct.pack("<IQQ", 3, 1 << 50, 0),
            "it declares 8 bytes at offset 24, of a file of 24",
        ),
    ],
)
def test_counts_of_a_gguf_file(tmp_path, data, line):
    pytest.importorskip("gguf")
    from longnet_cli.models.gguf import open_gguf

    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=line):
        open_gguf(tmp_path / "x.gguf")


class Filler:
    def __reduce__(self) -> tuple:
        return bytearray, (1 << 33,)


@pytest.mark.parametrize("old", [False, True])
def test_checkpoints(tmp_path, old):
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
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "x.pt", "w", 8) as packed,
    ):
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
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [replace({"String": "e"}, "ee")] * 30,
                }
            },
            "1,073,741,824",
        ),
        ({"normalizer": replace({"Regex": ""}, "x" * 1000)}, "1,001 times"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}}, "999 times"),
        (
            {"decoder": {"type": "Sequence", "decoders": [replace({"String": "ab"}, "abab")] * 9}},
            "512 times",
        ),
        ({"model": {"vocab": {"a": 4_294_967_295}}}, "an id 4294967295"),
    ],
)
def test_tokenizers(tmp_path, changes, line):
    known = json.loads(Tokenizer.bytes().to_json())
    model = known["model"] | {
        "vocab": known["model"]["vocab"] | changes.pop("model", {}).get("vocab", {})
    }
    text = json.dumps(known | changes | {"model": model})
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=line):
        Tokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match=line):  # of a run that is resumed
        Tokenizer.from_description({"json": text}, tmp_path)


def test_a_regular_expression_without_end(tmp_path, run_longnet):
    known = json.loads(Tokenizer.bytes().to_json())
    split = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    known["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, known["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(known))
    (tmp_path / "a.txt").write_text("a" * 300 + "!")
    done = run_longnet(f"tokenize a.txt --tokenizer {tmp_path}/tokenizer.json -o a.arrow")
    line = done.stderr.splitlines()[-1]  # the library says something of its own before
    assert (done.returncode, line[:39]) == (2, "longnet: error: the tokenizer fails (On"), (
        done.stderr
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"chunks": (8, 4)}, "the file has 1 of its 131,072 chunks"),
        ({}, "the file lacks some of its rows"),
        (
            {"chunks": (1 << 20, 1 << 9), "compression": "gzip"},
            "chunks have 2,147,483,648 bytes each",
        ),
    ],
)
def test_rows_of_hdf5_that_are_not_there(tmp_path, changes, line):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        width = changes.get("chunks", (0, 4))[-1]
        rows = file.create_dataset("features", (1 << 20, width), "f4", **changes)
        if width == 4 and changes:
            rows[:8] = np.ones((8, 4))
    with pytest.raises(DataError, match=line):
        list(Inputs([tmp_path / "x.h5"], vectors=True).documents())


ROWS, LENGTH = 8, 1 << 16


def large_table(kind: str = "list") -> pa.Table:
    ids = pa.array(np.arange(ROWS * LENGTH, dtype=np.int32) % 250)
    if kind == "flat":
        return pa.table({"ids": ids})
    lists = pa.LargeListArray.from_arrays(pa.array(np.arange(0, ROWS * LENGTH + 1, LENGTH)), ids)
    return pa.table({"input_ids": lists})


def write(path: Path, kind: str) -> Path:
    if kind == "parquet":
        pq.write_table(large_table(), path, row_group_size=1)
    elif kind == "text":
        path.write_text("some words\n" * 500_000)
    elif kind == "json lines":
        path.write_text(f'{{"input_ids": {[7] * 1000}}}\n' * 2000)
    else:
        made = large_table(kind)
        (write_stream if kind == "stream" else write_file)(
            path, made, LENGTH if kind == "flat" else 1
        )
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
    with pytest.raises(
        DataError, match=r"x\.arrow, row \d+: the file changed while it was read \("
    ) as caught:
        last.read()
    row = int(str(caught.value).split("row ")[1].split(":")[0])
    assert row == (ROWS - 1 if kind != "flat" else last.parts[0].row)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["list", "flat", "stream", "parquet", "json lines"])
def test_a_table_that_changes_before_it_is_read(tmp_path, kind, change):
    path = write(tmp_path / "x.arrow", kind)
    (source,) = Inputs([path]).all_files
    opened = open_input(source, Wanted())
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
    with pytest.raises(
        DataError,
        match=r"x\.arrow, row \d+: the file changed while it was read \(it was written to",
    ):
        list(texts)


def test_a_table_that_has_been_read_keeps_one_file_open(tmp_path):
    gc.collect()  # of files that other tests have left open
    path, before = write(tmp_path / "x.arrow", "list"), len(os.listdir("/proc/self/fd"))
    documents = list(Inputs([path]).documents())
    assert len(os.listdir("/proc/self/fd")) == before + 1
    assert documents[-1].read(0, 1).size == 1


@pytest.mark.parametrize("change", CHANGES)
def test_a_text_that_changes_while_it_is_read(tmp_path, change):
    path = write(tmp_path / "x.txt", "text")
    opened = files.LocalFile.open(path, "x.txt")
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
