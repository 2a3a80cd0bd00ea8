"""Proves that a file that changes under its reader ends in one line with file and row, never in SIGBUS."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import write_file, write_stream

from longnet_cli.basics.errors import DataError
from longnet_cli.data import files
from longnet_cli.data.columns import Wanted
from longnet_cli.data.formats import open_source
from longnet_cli.data.inputs import Inputs

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
