"""Proves that files of other libraries are read as these wrote them: every type they have for text and for ids.

Libraries are real and write at test time; where one is not installed, its tests are skipped.
pip install -e '.[data-test]'
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from files import tokens

from longnet_cli.basics.errors import DataError
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.tokenizer import Tokenizer

TEXTS = ["hello", "wörld, 漢字\n", "x" * 70, "hello"]  # one repeats, as categories do
IDS = [[1, 2, 3], [0], [100, 7], [5, 6, 7]]
PAIRS = [[1, 2], [3, 4], [100, 7], [5, 6]]
FLAT = [1, 2, 256, 3, 256, 100, 7, 256, 5]
FLAT_IDS = [[1, 2], [3], [100, 7], [5]]

pytestmark = pytest.mark.ci


def read_ids(path: Path, column: str | None = None) -> list[list[int]]:
    return tokens(list(Inputs([path], column=column, vocab_size=257, eos_id=256).documents()))


def read_text(path: Path, column: str | None = None) -> list[str]:
    """By both ways in."""
    encoded = Inputs([path], Tokenizer.bytes(), column=column).documents()
    texts = [text.text for text in Inputs([path], column=column).texts()]
    assert [bytes(document.tokens.tolist()).decode() for document in encoded] == texts
    return texts


def write_polars(frame, folder: Path) -> Iterator[Path]:
    """By every way of Polars to write Arrow and Parquet."""
    import polars as pl

    frame.write_ipc(folder / "new.arrow")
    frame.write_ipc(folder / "old.arrow", compat_level=pl.CompatLevel.oldest())
    frame.write_ipc(folder / "lz4.arrow", compression="lz4")
    frame.write_ipc(folder / "zstd.arrow", compression="zstd")
    frame.lazy().sink_ipc(folder / "sink.arrow")
    pl.concat([frame[:2], frame[2:]], rechunk=False).write_ipc(folder / "chunks.arrow")
    frame.write_ipc_stream(folder / "stream.arrow")
    frame.write_ipc_stream(folder / "stream-zstd.arrow", compression="zstd")
    frame.write_parquet(folder / "x.parquet")
    for path in sorted(folder.iterdir()):
        yield path
        path.unlink()


def test_texts_of_polars(tmp_path):
    pl = pytest.importorskip("polars")
    kinds = [pl.String, pl.Categorical, pl.Enum(sorted(set(TEXTS)))]
    for kind in kinds:
        frame = pl.DataFrame({"other": [1, 2, 3, 4], "text": pl.Series(TEXTS, dtype=kind)})
        for path in write_polars(frame, tmp_path):
            assert read_text(path) == TEXTS, (kind, path.name)


def test_ids_of_polars(tmp_path):
    pl = pytest.importorskip("polars")
    numbers = [pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64]
    for number in numbers:
        frame = pl.DataFrame(
            {
                "doc_id": pl.Series(["a", "b", "c", "d"], dtype=pl.Categorical),
                "input_ids": pl.Series(IDS, dtype=pl.List(number)),
                "pairs": pl.Series(PAIRS, dtype=pl.Array(number, 2)),
            }
        )
        for path in write_polars(frame, tmp_path):
            assert read_ids(path) == IDS, (number, path.name)
            assert read_ids(path, "pairs") == PAIRS, (number, path.name)
        if number not in (pl.Int8, pl.UInt8):
            for path in write_polars(pl.DataFrame({"ids": pl.Series(FLAT, dtype=number)}), tmp_path):
                assert read_ids(path) == FLAT_IDS, (number, path.name)


def test_integers_of_128_bits_are_not_called_damage(tmp_path):
    pl = pytest.importorskip("polars")
    pl.DataFrame({"text": ["a"], "n": pl.Series([1], dtype=pl.Int128)}).write_ipc(tmp_path / "x.arrow")
    with pytest.raises(DataError, match=r"x\.arrow: pyarrow does not read this \(Integers with more than 64 bits"):
        read_text(tmp_path / "x.arrow")


TEXT_TYPES = [
    *(pa.string(), pa.large_string(), pa.string_view()),
    *(pa.dictionary(index, pa.string()) for index in (pa.int8(), pa.uint16(), pa.int32(), pa.int64())),
    pa.dictionary(pa.int32(), pa.large_string()),
]
LIST_TYPES = [pa.list_, pa.large_list, pa.list_view, pa.large_list_view]


@pytest.mark.parametrize("suffix", ["file", "stream", "file lz4", "stream zstd", "parquet"])
def test_pyarrow(tmp_path, suffix):
    columns = {"doc_id": pa.array(list("abcd"))}
    for number, kind in enumerate(TEXT_TYPES):
        plain = pa.array(TEXTS, kind.value_type if pa.types.is_dictionary(kind) else kind)
        columns[f"text{number}"] = plain.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else plain
    for number, make in enumerate(LIST_TYPES):
        columns[f"ids{number}"] = pa.array(IDS, make(pa.uint16()))
    table = pa.table(columns)
    path = tmp_path / "x"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        kind, _, compression = suffix.partition(" ")
        new = ipc.new_file if kind == "file" else ipc.new_stream
        with new(path, table.schema, options=ipc.IpcWriteOptions(compression=compression or None)) as writer:
            writer.write_table(table)
    for name in columns:
        if name.startswith("text"):
            assert read_text(path, name) == TEXTS, (name, columns[name].type)
        elif name.startswith("ids"):
            assert read_ids(path, name) == IDS, (name, columns[name].type)


def library(name: str) -> Any:
    return pytest.importorskip(name)


TABLE = pa.table({"n": range(len(TEXTS)), "text": TEXTS})
FORMS: dict[str, Callable[[Path], object]] = {
    "datasets": lambda path: (
        library("datasets").Dataset.from_dict(TABLE.to_pydict()).save_to_disk(str(path), num_shards=2)
    ),
    "duckdb.parquet": lambda path: library("duckdb").from_arrow(TABLE).write_parquet(str(path)),
    "pandas.feather": lambda path: library("pandas").DataFrame(TABLE.to_pydict()).to_feather(path),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_libraries(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path / form)
    assert read_text(tmp_path / form) == TEXTS
