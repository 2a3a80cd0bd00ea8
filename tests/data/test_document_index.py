"""Proves that an index of arrays has the documents that a pass has, in every format, and refuses bad ones alike."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from files import BYTES, FORMATS, IDS, write_file, write_lines, write_parquet, write_rows

from longnet_cli.basics.errors import DataError, LongNetError
from longnet_cli.data.documents import column_documents, document_index
from longnet_cli.data.documents.document_index import DocumentIndex, index_documents
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.token_documents import Document


def facts(documents: Any) -> list[tuple[Any, ...]]:
    return [(document.where, len(document), ids_or_error(document)) for document in documents]


def ids_or_error(document: Document) -> tuple[list[int], int | None] | str:
    try:
        ids = [*document.read(0, 2).tolist(), *document.read(2).tolist()]
        return ids, document.n_bytes
    except DataError as error:
        return str(error)


def same(*paths: Any) -> DocumentIndex:
    """Return the index of inputs, after a comparison with their documents."""
    index = index_documents(Inputs(paths, BYTES))
    assert facts(index) == facts(Inputs(paths, BYTES).documents())
    assert index.lengths.tolist() == [*map(len, index)]
    return index


@pytest.mark.parametrize("name", FORMATS)
def test_an_index_has_the_documents_of_every_format(name, tmp_path, monkeypatch):
    monkeypatch.setattr(column_documents, "FLAT_STEP", 3)
    path = FORMATS[name](tmp_path)
    index = same(path)
    assert [document.tokens.tolist() for document in index] == IDS
    other = write_lines(tmp_path / "other.jsonl", [{"text": "a"}, {"text": ""}, {"text": "bc"}])
    assert len(same(other, path)) == len(same(path, other)) == len(IDS) + 3


def test_documents_without_ids_and_lists_out_of_order(tmp_path):
    empty = pa.array([[], [1, 2], [], [], [3], []], pa.large_list(pa.uint16()))
    names = ["a", "a", "b", "c", "c", "d"]
    path = write_file(tmp_path / "x.arrow", pa.table({"doc_id": names, "input_ids": empty}))
    assert same(path).lengths.tolist() == [2, 0, 1, 0]
    views = pa.ListViewArray.from_arrays(
        [3, 0, 4], [2, 2, 0], pa.array([1, 2, 9, 3, 4], pa.int32())
    )
    path = write_file(tmp_path / "y.arrow", pa.table({"input_ids": views}), rows=3)
    assert [document.tokens.tolist() for document in same(path)] == [[3, 4], [1, 2], []]


def test_a_bad_id_and_a_null_one_are_named_as_ever(tmp_path):
    bad = pa.table({"input_ids": pa.array([[1], [2, 300], [3, None], [4]], pa.list_(pa.int32()))})
    for path in (write_file(tmp_path / "x.arrow", bad), write_parquet(tmp_path / "x.parquet", bad)):
        index = same(path)
        assert "row 1, offset 1: token id 300" in str(ids_or_error(index[1]))
        assert "row 2, offset 1: the token id is null" in str(ids_or_error(index[2]))


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("a", 0, [1]), ("a", 2, [2])],
            "row 1: part 2 of document 'a' stands where part 1 should",
        ),
        (
            [("a", 0, [1]), ("b", 0, [2]), ("b", 1, [3]), ("b", 1, [4])],
            "row 3: part 1 of .* part 2 ",
        ),
        ([("a", 0, [1]), ("b", 0, None)], "row 1: the value is null"),
        ([("a", 0, [1]), ("b", 0, [1]), (None, 1, [2])], "row 2, doc_id: the value is null"),
    ],
)
def test_bad_rows_end_an_index_as_they_end_a_pass(rows, message, suffix, tmp_path):
    columns = ("doc_id", "part", "input_ids")
    path = write_rows(
        tmp_path / f"x.{suffix}", [dict(zip(columns, row, strict=True)) for row in rows]
    )
    with pytest.raises(DataError, match=message) as error:
        index_documents(Inputs([path], BYTES))
    with pytest.raises(DataError) as plain:
        [*Inputs([path], BYTES).documents()]
    assert str(error.value) == str(plain.value)


def test_ids_on_a_full_disk_are_one_line(tmp_path, monkeypatch):
    path = FORMATS["parquet list"](tmp_path)
    with open("/dev/full", "wb") as full:
        monkeypatch.setattr(document_index.tempfile, "TemporaryFile", lambda: full)
        with pytest.raises(LongNetError, match="No space left on device; set TMPDIR"):
            index_documents(Inputs([path], BYTES))


def test_a_document_takes_24_bytes_and_ids_of_parquet_a_file(tmp_path):
    table = pa.table({"input_ids": pa.array([[1, 2]] * 1000, pa.list_(pa.int16()))})
    assert str(same(write_file(tmp_path / "x.arrow", table, rows=99))) == (
        "1,000 documents of 2,000 tokens, indexed in 23.4 KiB of memory"
    )
    index = same(write_parquet(tmp_path / "x.parquet", table))
    assert f"{index}".partition("memory; ")[2].startswith("3.91 KiB of ids are in ")
    assert len(index.stretches) == 1
