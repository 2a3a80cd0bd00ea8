"""Proves which column of a table holds the documents, and that an unclear one is asked for."""

import pyarrow as pa
import pytest
from files import FORMATS, IDS, read, tokens, write_file, write_parquet, write_stream

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.data.inputs import Inputs


def test_the_column_can_be_chosen(tmp_path):
    path = write_file(
        tmp_path / "x.arrow", pa.table({"text": ["aa"], "body": ["bb"], "input_ids": [[1]], "mask": [[0]]})
    )
    assert tokens(read(path)) == [[1]]
    assert tokens(read(path, column="body")) == [[98, 98]]
    assert tokens(read(path, column="mask")) == [[0]]
    assert [text.text for text in Inputs([path]).texts()] == ["aa"]


@pytest.mark.parametrize(
    ("columns", "column"),
    [
        ({"body": ["a"], "n": [1]}, None),
        ({"input_ids": [[1]], "tokens": [[1]]}, None),
        ({"text": ["a"], "ids": [1]}, None),
        ({"input_ids": [["a"]]}, None),
        ({"text": ["a"]}, "nope"),
        ({"text": ["a"], "x": [1.5]}, "x"),
    ],
)
def test_an_unclear_column_is_an_error_that_lists_them(tmp_path, columns, column):
    path = write_file(tmp_path / "x.arrow", pa.table(columns))
    with pytest.raises(ConfigError, match=r"x\.arrow.*its columns are \w+: ") as caught:
        read(path, column=column)
    assert all(name in str(caught.value) for name in columns)


def test_string_tokens_beside_input_ids_are_not_ids(tmp_path):
    path = write_file(tmp_path / "x.arrow", pa.table({"tokens": [["a"]], "input_ids": [[1]]}))
    assert tokens(read(path)) == [[1]]


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
    table = pa.Table.from_arrays([*columns, rest], names=[name, name, "input_ids" if name == "doc_id" else "doc_id"])
    with pytest.raises(DataError, match=rf"x: several columns are named '{name}'"):
        read(write(tmp_path / "x", table))
    unused = pa.Table.from_arrays([ids, others, others], names=["input_ids", "n", "n"])
    assert tokens(read(write(tmp_path / "y", unused))) == [[1], [2]]


def test_a_null_in_a_dictionary_is_named(tmp_path):
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), pa.array(["a", None]))
    with pytest.raises(DataError, match="row 1: the value is null"):
        read(write_file(tmp_path / "x.arrow", pa.table({"text": texts})))
