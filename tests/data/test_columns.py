"""Which columns of a table hold documents, and which name them or are carried along; unclear ones are asked for.

Files of other libraries are read as these wrote them: every type they have for text and for ids. They write at test
time; where one is not installed, its tests are skipped: pip install -e '.[data-test]'
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pytest
from files import FORMATS, IDS, read, tokens, write_file, write_parquet, write_rows, write_stream

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.tokenizer import Tokenizer


def test_the_column_can_be_chosen(tmp_path):
    path = write_file(
        tmp_path / "x.arrow",
        pa.table(
            {"text": ["aa"], "body": ["bb"], "tokens": [["a"]], "input_ids": [[1]], "mask": [[0]]}
        ),
    )
    assert tokens(read(path)) == [[1]]
    assert tokens(read(path, column="body")) == [[98, 98]]
    assert tokens(read(path, column="mask")) == [[0]]
    assert [text.text for text in Inputs([path]).texts()] == ["aa"]


def test_text_and_streams_need_a_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for path in (tmp_path / "a.txt", FORMATS["flat column"](tmp_path)):
        with pytest.raises(ConfigError, match="give a tokenizer"):
            read(path, tokenizer=None)
    ids = read(FORMATS["file"](tmp_path), tokenizer=None)
    assert (tokens(ids), ids[0].n_bytes) == (IDS, None)


@pytest.mark.parametrize("name", ["input_ids", "doc_id"])
@pytest.mark.parametrize("write", [write_file, write_stream, write_parquet])
def test_a_name_of_several_columns_is_refused_where_it_is_used(tmp_path, write, name):
    ids, doc_ids, others = pa.array([[1], [2]]), pa.array(["a", "b"]), pa.array([0, 1])
    columns = {"input_ids": [ids, ids], "doc_id": [doc_ids, doc_ids]}[name]
    rest = ids if name == "doc_id" else doc_ids
    table = pa.Table.from_arrays(
        [*columns, rest], names=[name, name, "input_ids" if name == "doc_id" else "doc_id"]
    )
    with pytest.raises(DataError, match=rf"x: several columns are named '{name}'"):
        read(write(tmp_path / "x", table))
    unused = pa.Table.from_arrays([ids, others, others], names=["input_ids", "n", "n"])
    assert tokens(read(write(tmp_path / "y", unused))) == [[1], [2]]


BYTES = Tokenizer.bytes()
ROWS = [
    {
        "id": 7,
        "doc": {"body": "one", "ids": [1, 2], "deep": {"name": "x"}},
        "n": 1,
        "text": "first",
    },
    {"id": 8, "doc": {"body": "two", "ids": [3], "deep": {"name": "y"}}, "n": 2, "text": "second"},
    {
        "id": 9,
        "doc": {"body": "three", "ids": [], "deep": {"name": "y"}},
        "n": None,
        "text": "third",
    },
]
FORMS = ("x.arrow", "x.stream", "x.parquet", "x.jsonl")


@pytest.fixture(params=FORMS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_rows(tmp_path / request.param, ROWS)


def read_kept(path: Path, **options: object) -> list[tuple[str, list[int], dict]]:
    found = Inputs([path], BYTES, vocab_size=300, **options).documents()  # type: ignore[arg-type]
    return [
        (each.doc_id, each.read().tolist(), {k: v.as_py() for k, v in each.kept.items()})
        for each in found
    ]


def test_a_column_may_be_inside_of_others(path):
    bodies = [text.text for text in Inputs([path], column="doc.body").texts()]
    assert bodies == ["one", "two", "three"]
    assert [ids for _, ids, _ in read_kept(path, column="doc.ids")] == [[1, 2], [3], []]
    assert [
        name for name, _, _ in read_kept(path, column="doc.body", id_column="doc.deep.name")
    ] == ["x", "y"]
    # neighbours are one
    assert read_kept(path, column="doc.body", id_column="doc.deep.name")[1][1] == list(b"twothree")
    for column in ("doc.text", "doc.body.x", "nothing", "doc"):
        with pytest.raises((ConfigError, DataError), match=r"column|no key") as caught:
            read_kept(path, column=column)
        assert "\n" not in str(caught.value)


def test_a_name_with_a_dot_comes_before_one_inside(tmp_path):
    rows = [{"doc": {"body": "inside"}, "doc.body": "beside"}]
    for form in FORMS:
        assert [
            text.text
            for text in Inputs([write_rows(tmp_path / form, rows)], column="doc.body").texts()
        ] == ["beside"]


def test_what_is_in_a_null_is_null(tmp_path):
    rows = [
        {"doc": {"body": "a"}, "n": {"a": 1}},
        {"doc": {"body": "b"}, "n": None},
        {"doc": None, "n": {"a": 2}},
    ]
    for form in FORMS:
        file = write_rows(tmp_path / form, rows)
        with pytest.raises(DataError, match=r"(row 2|line 3)"):
            list(Inputs([file], column="doc.body").texts())
        good = write_rows(tmp_path / form, rows[:2])
        assert [kept for _, _, kept in read_kept(good, column="doc.body", keep=("n.a",))] == [
            {"n.a": 1},
            {"n.a": None},
        ]


def test_documents_are_named_by_id_and_by_any_column(path):
    assert [name for name, _, _ in read_kept(path)] == ["7", "8", "9"]
    assert [name for name, _, _ in read_kept(path, id_column="text", column="doc.body")] == [
        "first",
        "second",
        "third",
    ]
    assert [text.doc_id for text in Inputs([path], id_column="doc.deep.name").texts()] == ["x", "y"]
    with pytest.raises(ConfigError, match="there is no column 'uid'; its columns are"):
        read_kept(path, id_column="uid")
    with pytest.raises((ConfigError, DataError), match="doc"):
        read_kept(path, id_column="doc")


def test_an_id_that_is_no_name_is_not_taken_for_one(tmp_path):
    for form in ("x.arrow", "x.parquet"):
        file = write_rows(tmp_path / form, [{"id": 0.5, "text": "a"}, {"id": 0.5, "text": "b"}])
        assert [name for name, _, _ in read_kept(file)] == [f"{form}:0", f"{form}:1"]
    both = write_rows(
        tmp_path / "both.parquet",
        [{"id": 1, "doc_id": "a", "text": "x"}, {"id": 1, "doc_id": "b", "text": "y"}],
    )
    assert [name for name, _, _ in read_kept(both)] == ["a", "b"]


def test_columns_are_carried_along(path):
    kept = [found[2] for found in read_kept(path, keep=("n", "doc.deep.name", "text", "id"))]
    assert kept == [
        {
            "n": row["n"],
            "doc.deep.name": row["doc"]["deep"]["name"],
            "text": row["text"],
            "id": row["id"],
        }
        for row in ROWS
    ]


def test_json_says_of_what_type_it_is_in_its_first_lines(tmp_path):
    rows = [
        {"text": "a", "n": None},
        {"text": "b", "n": 1},
        {"text": "c", "n": 1.5},
        {"text": "d", "n": "x"},
    ]
    file, mixed = tmp_path / "x.jsonl", tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [kept["n"] for _, _, kept in read_kept(file, keep=("n",))] == [None, 1.0, 1.5]
    with pytest.raises(DataError, match="the values of 'n' are not of one type"):
        read_kept(mixed, keep=("n",))
    late = write_rows(
        tmp_path / "x.jsonl", [{"text": "a" * 500, "n": 1}] * 2500 + [{"text": "b", "n": 1.5}]
    )
    with pytest.raises(
        DataError, match=r"line 2501: 'n' is not int64, as it is in the first lines"
    ):
        read_kept(late, keep=("n",))


def test_bytes_are_base64_in_json_lines(tmp_path, run_longnet):
    ends = pa.RunEndEncodedArray.from_arrays(pa.array([2], pa.int32()), pa.array(["x"]))
    write_file(
        tmp_path / "x.arrow",
        pa.table({"text": ["one", "two"], "ends": ends, "bytes": [b"\xff\0", b"\\xff"]}),
    )
    run_longnet("encode x.arrow --keep ends,bytes -o out.jsonl", code=0)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["ends"], base64.b64decode(row["bytes"])) for row in rows] == [
        ("x", b"\xff\0"),
        ("x", b"\\xff"),
    ]


TEXTS = ["hello", "wörld, 漢字\n", "x" * 70, "hello"]  # one repeats, as categories do
LISTS = [[1, 2, 3], [0], [100, 7], [5, 6, 7]]
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


def check_columns(path: Path, names: Iterable[str]) -> None:
    for name in names:
        if name.startswith("text"):
            assert read_text(path, name) == TEXTS, (name, path.name)
        elif name != "doc_id":
            wanted = PAIRS if name.startswith("pairs") else LISTS
            assert read_ids(path, name) == wanted, (name, path.name)


def test_polars(tmp_path):
    pl = pytest.importorskip("polars")
    columns = {"doc_id": pl.Series(["a", "b", "c", "d"], dtype=pl.Categorical)}
    for kind in (pl.String, pl.Categorical, pl.Enum(sorted(set(TEXTS)))):
        columns[f"text {kind}"] = pl.Series(TEXTS, dtype=kind)
    numbers = [pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64]
    for number in numbers:
        columns[f"ids {number}"] = pl.Series(LISTS, dtype=pl.List(number))
        columns[f"pairs {number}"] = pl.Series(PAIRS, dtype=pl.Array(number, 2))
    for path in write_polars(pl.DataFrame(columns), tmp_path):
        check_columns(path, columns)
    for number in numbers[1:4] + numbers[5:]:
        for path in write_polars(pl.DataFrame({"ids": pl.Series(FLAT, dtype=number)}), tmp_path):
            assert read_ids(path) == FLAT_IDS, (number, path.name)


def test_integers_of_128_bits_are_not_called_damage(tmp_path):
    pl = pytest.importorskip("polars")
    pl.DataFrame({"text": ["a"], "n": pl.Series([1], dtype=pl.Int128)}).write_ipc(
        tmp_path / "x.arrow"
    )
    with pytest.raises(
        DataError, match=r"x\.arrow: pyarrow does not read this \(Integers with more than 64 bits"
    ):
        read_text(tmp_path / "x.arrow")


TEXT_TYPES = [
    *(pa.string(), pa.large_string(), pa.string_view()),
    *(
        pa.dictionary(index, pa.string())
        for index in (pa.int8(), pa.uint16(), pa.int32(), pa.int64())
    ),
    pa.dictionary(pa.int32(), pa.large_string()),
]
LIST_TYPES = [pa.list_, pa.large_list, pa.list_view, pa.large_list_view]


@pytest.mark.parametrize("suffix", ["file", "stream", "file lz4", "stream zstd", "parquet"])
def test_pyarrow(tmp_path, suffix):
    columns = {"doc_id": pa.array(list("abcd"))}
    for number, kind in enumerate(TEXT_TYPES):
        plain = pa.array(TEXTS, kind.value_type if pa.types.is_dictionary(kind) else kind)
        columns[f"text{number}"] = (
            plain.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else plain
        )
    for number, make in enumerate(LIST_TYPES):
        columns[f"ids{number}"] = pa.array(LISTS, make(pa.uint16()))
    table, path = pa.table(columns), tmp_path / "x"
    if suffix == "parquet":
        write_parquet(path, table)
    else:
        kind, _, compression = suffix.partition(" ")
        options = ipc.IpcWriteOptions(compression=compression or None)
        (write_file if kind == "file" else write_stream)(path, table, 4, options=options)
    check_columns(path, columns)


def library(name: str) -> Any:
    return pytest.importorskip(name)


TABLE = pa.table({"n": range(len(TEXTS)), "text": TEXTS})
WRITTEN: dict[str, Callable[[Path], object]] = {
    "datasets": lambda path: (
        library("datasets")
        .Dataset.from_dict(TABLE.to_pydict())
        .save_to_disk(str(path), num_shards=2)
    ),
    "duckdb.parquet": lambda path: library("duckdb").from_arrow(TABLE).write_parquet(str(path)),
    "pandas.feather": lambda path: library("pandas").DataFrame(TABLE.to_pydict()).to_feather(path),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_other_libraries(form, tmp_path):
    WRITTEN[form](tmp_path / form)
    assert read_text(tmp_path / form) == TEXTS
