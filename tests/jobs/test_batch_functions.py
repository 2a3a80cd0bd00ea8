"""Proves that batches of any size get the rows of `longnet encode` and `longnet score -o`, with the columns kept, and
that what is not a document a row is refused; and runs the examples for Ray and Spark where those are installed."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import vectors

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.jobs.batch_functions import Reading, embed, encode_batches, score_batches

TEXTS = ["one two three " * 40, "x", "", "def f():\n    return 1\n" * 30, "four five " * 20]
TABLE = pa.table({"id": [7, 8, 9, 10, 11], "text": TEXTS, "lang": ["a", None, "c", "d", "e"]})


def test_batches_have_the_rows_of_the_commands(run_longnet, tmp_path):
    named = TABLE.select(["text"]).append_column("doc_id", TABLE["id"].cast(pa.string()))
    pq.write_table(named.filter(pa.compute.not_equal(named["text"], "")), tmp_path / "in.parquet")
    assert run_longnet("encode in.parquet --span 50 -o v.parquet").returncode == 0
    assert run_longnet("score in.parquet --context 32,256 -o g.parquet").returncode == 0
    expected, gained = pq.read_table(tmp_path / "v.parquet"), pq.read_table(tmp_path / "g.parquet")
    whole = encode_batches(TABLE, span=50, keep=("lang",))
    assert isinstance(whole, pa.Table)
    parts = TABLE.to_batches(max_chunksize=2)
    in_parts = pa.concat_tables([encode_batches(part, span=50, keep=("lang",)) for part in parts])
    for table in (whole, in_parts):
        names = expected.column_names
        assert table.column_names == [*names, "lang"]
        others = [name for name in names if name != "embedding"]
        assert table.select(others).equals(expected.select(others))
        np.testing.assert_allclose(vectors(table), vectors(expected), atol=1e-6)
        lang = dict(zip(["7", "8", "9", "10", "11"], TABLE["lang"].to_pylist(), strict=True))
        assert table["lang"].to_pylist() == [lang[name] for name in table["doc_id"].to_pylist()]

    scored = score_batches(TABLE, context=(256, 32), keep="lang")  # one name, or several
    assert scored["doc_id"].to_pylist() == ["7", "8", "9", "10", "11"]
    assert scored["lang"].to_pylist() == TABLE["lang"].to_pylist()
    assert scored["n_tokens"].to_pylist()[2] == 0
    rows = [row for row in scored.to_pylist() if row["n_tokens"]]
    for row, other in zip(rows, gained.to_pylist(), strict=True):
        assert {name: row[name] for name in other} == pytest.approx(other, abs=1e-5)


def test_a_process_loads_a_model_once():
    assert Reading(column="text").load() is Reading(keep=("lang",)).load()


def test_documents_that_cannot_be_read_are_left_out():
    table = pa.table(
        {"doc_id": ["a", "b", "c"], "ids": [[1, 2], [1, 1 << 20], [3]], "n": [0, 1, 2]}
    )
    with pytest.raises(DataError, match="table, row 1, offset 1: token id 1048576"):
        encode_batches(table)
    for function in (encode_batches, score_batches):
        found = function(table, keep=("n",), skip_bad=True)
        assert (found["doc_id"].to_pylist(), found["n"].to_pylist()) == (["a", "c"], [0, 2])
        texts = table.set_column(1, "text", [["x", None, "y"]]).drop_columns("n")
        assert function(texts, skip_bad=True)["doc_id"].to_pylist() == ["a", "c"]


def test_batches_without_rows_or_tokens_have_no_vectors():
    none, empty = encode_batches(TABLE[:0]), encode_batches(TABLE[2:3])
    assert none.num_rows == empty.num_rows == 0
    assert score_batches(TABLE[:0]).schema == score_batches(TABLE[3:4]).schema
    assert none.schema == encode_batches(TABLE[:1]).schema
    assert score_batches(TABLE[2:3])["n_tokens"].to_pylist() == [0]


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        ({"text": ["a"]}, {}, "no column 'doc_id' or 'id' that names the documents"),
        ({"id": ["a"], "text": ["a"]}, {"id_column": "name"}, "no column 'name' that names"),
        ({"id": ["a"], "ids": [1]}, {}, "a row is a document"),
        (
            {"doc_id": ["a", "a"], "part": [0, 1], "ids": [[1], [2]]},
            {},
            "row 1: part 1 of document 'a'",
        ),
        ({"id": ["a"], "text": ["a"]}, {"pattern": "papr"}, "pattern: "),
    ],
)
def test_what_is_no_batch_of_documents_is_refused(columns, options, said):
    with pytest.raises((ConfigError, DataError), match=said) as error:
        encode_batches(pa.table(columns), **options)
    assert len(str(error.value).splitlines()) == 1


class Frame:
    """What a frame of polars or pandas, or a relation of DuckDB, is for a reader of Arrow data."""

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return TABLE[3:].__arrow_c_stream__(requested_schema)


def test_whatever_passes_arrow_data_on_is_a_table():
    expected = encode_batches(TABLE[3:])
    for given in (Frame(), TABLE[3:].to_batches()[0], TABLE[3:].to_reader()):
        assert encode_batches(given).equals(expected)
    assert score_batches(Frame()).equals(score_batches(TABLE[3:]))


def test_a_list_of_texts_is_a_table():
    for function in (encode_batches, score_batches):
        assert function(TEXTS[3:]).equals(function(Frame()).set_column(0, "doc_id", [["0", "1"]]))


def test_a_text_has_its_row_of_an_array():
    made = embed(pa.chunked_array([TEXTS[:2], TEXTS[2:]]), model="longnet-tiny", dims=8)
    assert (made.dtype, made.shape) == (np.float32, (5, 8))
    assert np.isnan(made[2]).all()
    np.testing.assert_allclose(
        made[[0, 1, 3, 4]], vectors(encode_batches(TEXTS, dims=8)), atol=1e-6
    )
    for none in ([], [""]):
        assert embed(none, model="longnet-tiny").shape == (len(none), 256)
    for given in ("one text", ["a", None]):
        with pytest.raises(ConfigError, match="a list of texts is needed"):
            embed(given, model="longnet-tiny")


def test_views_of_text_are_carried_along():
    """Frames of polars pass these on."""
    views = pa.array(["a", "b"], pa.string_view())
    kept = {
        "views": views,
        "enum": pa.DictionaryArray.from_arrays(pa.array([1, 0]), views),
        "lists": [["c"], ["d"]],
    }
    kept["lists"] = pa.array(kept["lists"], pa.large_list(pa.string_view()))
    table = pa.table({"id": views, "text": pa.array(["one", "two"], pa.string_view()), **kept})
    for function in (encode_batches, score_batches):
        found = function(table, keep=tuple(kept))
        plain = {"views": ["a", "b"], "enum": ["b", "a"], "lists": [["c"], ["d"]]}
        assert found.select(["doc_id", *kept]).to_pydict() == {"doc_id": ["a", "b"], **plain}


@pytest.mark.parametrize("package", ["polars", "pandas", "duckdb", "datasets"])
def test_frames_of_real_libraries_are_tables(package):
    library = pytest.importorskip(package)
    table = TABLE[3:]
    frame = {
        "polars": lambda: library.from_arrow(table),
        "pandas": lambda: table.to_pandas(),
        "duckdb": lambda: library.from_arrow(table),
        "datasets": lambda: library.Dataset(library.table.InMemoryTable(table)),
    }[package]()
    found, expected = encode_batches(frame), encode_batches(table)
    assert found["doc_id"].to_pylist() == expected["doc_id"].to_pylist()
    assert found["embedding"].equals(expected["embedding"])


def test_a_frame_of_mixed_types_is_one_line():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(
        DataError, match=r"^the table cannot be Arrow data: [^\n]*Conversion failed for column id"
    ):
        encode_batches(pandas.DataFrame({"id": [1, "1"], "text": ["a", "b"]}))


@pytest.mark.parametrize(
    "given",
    ["corpus.arrow", {"text": ["a"]}, 7, ["a text", 7], TABLE.to_batches()],
    ids=lambda given: type(given).__name__,
)
def test_what_is_no_table_is_refused_at_the_call(given):
    for function in (encode_batches, score_batches):
        with pytest.raises(ConfigError, match=r"^a table .* needed, not (str|dict|int|list)"):
            function(given)


@pytest.mark.parametrize(
    ("kind", "makes"), [("LazyFrame", ".collect()"), ("Series", ".to_frame()")]
)
def test_a_column_or_a_plan_is_told_what_makes_a_table_of_it(kind, makes):
    for function in (encode_batches, score_batches):
        with pytest.raises(ConfigError, match=re.escape(f"not {kind}: {makes} makes one")):
            function(type(kind, (Frame,), {})())


def test_the_rows_of_a_frame_without_names_are_numbered():
    frame = type(
        "Frame",
        (),
        {"__arrow_c_stream__": lambda self, schema=None: texts.__arrow_c_stream__(schema)},
    )()
    texts = TABLE.select(["text"])
    # Document 2 is empty
    assert encode_batches(frame)["doc_id"].to_pylist() == [
        "0",
        "1",
        "3",
        "4",
    ]
    assert score_batches(frame)["doc_id"].to_pylist() == ["0", "1", "2", "3", "4"]
    with pytest.raises(ConfigError, match="no column 'name'"):
        score_batches(frame, id_column="name")


def test_sizes_and_patterns_may_be_texts():
    for sizes in ("64,0.1k", ("64", "100")):
        assert score_batches(TABLE[:1], context=sizes).equals(
            score_batches(TABLE[:1], context=(64, 100))
        )
    by_pattern = [
        score_batches(TABLE[:1], pattern=each) for each in ("window:64", Pattern.window(64))
    ]
    assert by_pattern[0].equals(by_pattern[1])
    assert encode_batches(TABLE[:1], span="0.1k", chunk="1Ki").equals(
        encode_batches(TABLE[:1], span=100, chunk=1024)
    )
    with pytest.raises(ConfigError, match=r"^context: '1Kx' is not a size: write"):
        score_batches(TABLE, context="64,1Kx")


@pytest.mark.ci
@pytest.mark.parametrize(
    ("package", "program", "extra", "code"),
    [
        ("transformers", "import longnet_cli.integrations.transformers", "hf", 1),
        ("lm_eval", "import longnet_cli.lm_eval", "lm-eval", 1),
        (
            "lm_eval",
            "import runpy; runpy.run_module('longnet_cli.lm_eval', run_name='__main__')",
            "lm-eval",
            2,
        ),
    ],
)
def test_without_its_extra_an_import_says_which_to_install(
    package, program, extra, code, run_python
):
    program = f"import sys; sys.modules[{package!r}] = None; {program}"
    done = run_python("-c", program, code=code)
    assert f"pip install '.[{extra}]'" in done.stderr.splitlines()[-1]
