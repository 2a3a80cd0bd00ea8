"""Proves that files of other libraries are read as these wrote them: every type each of them has for text and for ids.

The libraries are real and write at test time; where one is not installed, its tests are skipped.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from files import pipe, tokens

from longnet_cli.data.inputs import Inputs
from longnet_cli.data.tokenizer import Tokenizer

TEXTS = ["hello", "wörld, 漢字\n", "x" * 70, "hello"]  # one repeats, as categories do
IDS = [[1, 2, 3], [0], [100, 7], [5, 6, 7]]
PAIRS = [[1, 2], [3, 4], [100, 7], [5, 6]]
FLAT = [1, 2, 256, 3, 256, 100, 7, 256, 5]
FLAT_IDS = [[1, 2], [3], [100, 7], [5]]

pytestmark = pytest.mark.slow


def read_ids(path: Path, column: str | None = None) -> list[list[int]]:
    return tokens(list(Inputs([path], column=column, vocab_size=257, eos_id=256).documents()))


def read_text(path: Path, column: str | None = None) -> list[str]:
    """By both ways in."""
    encoded = Inputs([path], Tokenizer.bytes(), column=column).documents()
    texts = [text.text for text in Inputs([path], column=column).texts()]
    assert [bytes(document.tokens.tolist()).decode() for document in encoded] == texts
    return texts


# --- polars ----------------------------------------------------------------------------------------------------------


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


def test_polars_through_a_pipe(tmp_path):
    pl = pytest.importorskip("polars")
    frame = pl.DataFrame({"doc_id": pl.Series(["a", "b", "c", "d"], dtype=pl.Categorical), "input_ids": IDS})
    for path in write_polars(frame, tmp_path):
        assert pipe(path.read_bytes()) == IDS, path.name


def test_a_truncated_file_of_polars_is_an_error(tmp_path):
    pl = pytest.importorskip("polars")
    from longnet_cli.basics.errors import DataError

    pl.DataFrame({"input_ids": IDS}).write_ipc(tmp_path / "x.arrow")
    data = (tmp_path / "x.arrow").read_bytes()
    for keep in range(8, len(data), 7):
        (tmp_path / "x.arrow").write_bytes(data[:keep])
        with pytest.raises(DataError, match=r"x\.arrow"):
            read_ids(tmp_path / "x.arrow")


# --- duckdb ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"produce_arrow_string_view": True, "arrow_output_list_view": True}, {"arrow_large_buffer_size": True}],
)
def test_duckdb(tmp_path, settings):
    duckdb = pytest.importorskip("duckdb")
    base = duckdb.connect()
    base.execute("SET arrow_output_version = '1.4'")
    for name, value in settings.items():
        base.execute(f"SET {name} = {value}")
    base.execute(
        "CREATE TABLE t (doc_id VARCHAR, text VARCHAR, kind ENUM ('p', 'q'), input_ids INTEGER[], pairs SMALLINT[2])"
    )
    for row, (text, ids, pair) in enumerate(zip(TEXTS, IDS, PAIRS, strict=True)):
        base.execute("INSERT INTO t VALUES (?, ?, ?, ?, ?)", [str(row), text, "pq"[row % 2], ids, pair])
    base.execute(f"COPY t TO '{tmp_path}/x.parquet' (FORMAT parquet)")
    base.execute(f"COPY (SELECT text FROM t) TO '{tmp_path}/text.jsonl' (FORMAT json)")
    base.execute(f"COPY (SELECT input_ids FROM t) TO '{tmp_path}/ids.jsonl' (FORMAT json)")
    table = base.execute("SELECT * FROM t").to_arrow_table()
    with ipc.new_file(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table)
    with ipc.new_stream(tmp_path / "s.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("x.parquet", "x.arrow", "s.arrow"):
        assert read_ids(tmp_path / name) == IDS, name
        assert read_ids(tmp_path / name, "pairs") == PAIRS, name
        assert read_text(tmp_path / name, "text") == TEXTS, name
        assert read_text(tmp_path / name, "kind") == ["p", "q", "p", "q"], name
    assert read_text(tmp_path / "text.jsonl") == TEXTS
    assert read_ids(tmp_path / "ids.jsonl") == IDS


# --- datasets --------------------------------------------------------------------------------------------------------


def test_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    lists = [datasets.List, datasets.LargeList, lambda value: datasets.List(value, length=2)]
    for kind in ("string", "large_string", "string_view"):
        features = datasets.Features({"text": datasets.Value(kind)})
        made = datasets.Dataset.from_dict({"text": TEXTS}, features=features)
        for path in write_datasets(made, tmp_path / kind):
            assert read_text(path) == TEXTS, (kind, path.name)
    for number in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
        for index, make in enumerate(lists):
            values = PAIRS if index == 2 else IDS
            features = datasets.Features({"input_ids": make(datasets.Value(number))})
            made = datasets.Dataset.from_dict({"input_ids": values}, features=features)
            for path in write_datasets(made, tmp_path / f"{number}-{index}"):
                assert read_ids(path) == values, (number, path.name)


def write_datasets(made, folder: Path) -> Iterator[Path]:
    made.save_to_disk(folder / "saved", num_shards=2)
    made.to_parquet(folder / "x.parquet")
    made.to_json(folder / "x.jsonl")
    yield from (folder / "saved", folder / "x.parquet", folder / "x.jsonl")


# --- pandas and pyarrow ----------------------------------------------------------------------------------------------


def test_pandas(tmp_path):
    pd = pytest.importorskip("pandas")
    kinds = ["object", "str", "string[python]", "string[pyarrow]", "category", pd.ArrowDtype(pa.string_view())]
    for kind in kinds:
        frame = pd.DataFrame({"text": pd.Series(TEXTS, dtype=kind), "n": range(4)}).set_index(pd.Index([3, 5, 9, 1]))
        frame.to_parquet(tmp_path / "x.parquet")
        frame.reset_index().to_feather(tmp_path / "x.feather")
        frame.reset_index().to_feather(tmp_path / "plain.feather", compression="uncompressed")
        if kind in kinds[:-1]:  # pandas 3.1 itself crashes when it writes views as JSON
            frame.to_json(tmp_path / "x.jsonl", orient="records", lines=True)
        for name in ("x.parquet", "x.feather", "plain.feather", "x.jsonl"):
            assert read_text(tmp_path / name) == TEXTS, (kind, name)
    frame = pd.DataFrame({"input_ids": IDS})
    frame.to_parquet(tmp_path / "x.parquet")
    frame.to_feather(tmp_path / "x.feather")
    frame.to_json(tmp_path / "x.jsonl", orient="records", lines=True)
    assert [read_ids(tmp_path / name) for name in ("x.parquet", "x.feather", "x.jsonl")] == [IDS] * 3


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
