"""Proves that JSON Lines are read line by line, that a bad line is named, and that other text stays text."""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from files import BYTES, pipe, read, write_lines

from longnet_cli.basics.errors import DataError
from longnet_cli.data.documents.input_documents import Inputs


@pytest.mark.parametrize(
    "text",
    [
        '{\n  "text": "pretty-printed"\n}\n',
        '{\n  "rows": [\n    {"text": "a"},\n    {"text": "b"}\n  ]\n}\n',
        '{\n"a":\n{"text": "b"}\n}\n{\n"a":\n{"text": "c"}\n}\n',
        '[section]\n{"text": "a"}\n',
        '  {"text": "a"}\n{"text": "b"}\n',
        '# Title\n\n{"text": "a"}\n',
        "{\n    int a[] = {};\n    return 0;\n}\n",
        "{{ template }}\n\n{% block %}\n" * 99,
        "\n\n",
        "{",
        "{color: red}",
        '["text"]\n',
    ],
)
def test_text_that_only_begins_like_json_lines_stays_text(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    assert [found.text for found in Inputs([tmp_path / "x.txt"]).texts()] == [text]
    assert pipe(text.encode(), texts=True) == [text]


def test_the_time_for_a_line_on_stdin_grows_with_its_length_alone():
    """A line of 24 MB took a minute while each 4 KiB of it copied all that had come before."""
    long = "words " * (4 << 20)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("a", long, "b"))
    begun = time.process_time()
    assert pipe(lines.encode(), texts=True) == ["a", long, "b"]
    assert time.process_time() - begun < 3


def test_json_lines_by_another_key_and_with_a_byte_order_mark(tmp_path):
    (tmp_path / "x").write_text(
        '\ufeff{"body": "a", "text": "b"}\n{"text": "c", "body": "d"}\n\n', "utf-8"
    )
    assert [text.text for text in Inputs([tmp_path / "x"]).texts()] == ["b", "c"]
    assert [text.text for text in Inputs([tmp_path / "x"], column="body").texts()] == ["a", "d"]


def test_json_lines_are_read_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr("longnet_cli.data.files.jsonlines.BATCH_BYTES", 1)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": \n')
    documents = iter(Inputs([tmp_path / "x.jsonl"], BYTES).documents())
    # what stands before it comes first
    assert [next(documents).read().tolist() for _ in "ab"] == [[97], [98]]
    with pytest.raises(DataError, match="line 3: not JSON: Expecting value at character 8"):
        next(documents)


def test_a_bad_byte_is_named_where_the_file_has_it_also_after_a_byte_order_mark(tmp_path):
    data = b'\xef\xbb\xbf{"text": "a\xff"}\n'
    (tmp_path / "x.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=f"line 1: .*byte {data.index(0xFF)} is 0xff"):
        read(tmp_path / "x.jsonl")


BEGINNINGS = [
    ('{"id": "a", "text": null}\n', "line 1: 'text' is null"),
    ('{"id": "a", "text": 5}\n', "line 1: 'text' is not text"),
    ('{"id": "a", "txt": "b"}\n', "line 1: there is no 'text'"),
    ('{"text":\n', "line 1: not JSON"),
    ('{ "text": "a\n', "line 1: not JSON"),
    ('\n\r\n{"bad\n', "line 3: not JSON"),
    ('{"bad\n' * 99, "line 1: not JSON"),
]
ALONE = [
    ('{"text": 5}\n', "line 1: .*no text, token ids or chat under text, .*; its keys are text: "),
    ('{"txt": "a"}\n{"txt": "b"}\n', r"line 1: .*; its keys are txt: choose one \(--column\)"),
    ('{"type": "rows", "rows": [\n{"text": "a"}]}\n', "line 1: .*not JSON"),
]
GOOD = '{"id": "b", "text": "hi you"}\n{"id": "c", "text": "c"}\n'


@pytest.mark.parametrize(("beginning", "problem"), BEGINNINGS)
@pytest.mark.parametrize("name", ["x", "x.jsonl", "x.ndjson.gz"])
def test_only_the_bad_first_lines_are_bad(tmp_path, name, beginning, problem):
    data = (beginning + GOOD).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(DataError, match=f"{name}, {problem}"):
        read(tmp_path / name)
    found = list(Inputs([tmp_path / name], skip_bad=True).texts())
    bad = beginning.strip().count("\n") + 1
    assert [type(item).__name__ for item in found] == ["Unread"] * bad + ["Text"] * 2
    assert [text.text for text in found[bad:]] == ["hi you", "c"]


PARTS = [("a", "aa"), ("a", None), ("a", "bb"), ("b", "cc"), ("b", "dd"), ("a", "ee")]


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("kind", ["null", "line", "ids"])
def test_a_bad_part_leaves_out_its_whole_document_and_no_other(tmp_path, numbered, kind):
    numbers = {"part": [0, 1, 2, 0, 1, 0]} if numbered else {}
    texts = [text and [*text.encode()] if kind == "ids" else text for _, text in PARTS]
    table = pa.table(
        {
            "id": [name for name, _ in PARTS],
            "input_ids" if kind == "ids" else "text": texts,
            **numbers,
        }
    )
    path = tmp_path / ("x.jsonl" if kind == "line" else "x.parquet")
    if kind == "line":  # of which not even the name can be read
        path.write_text(
            "".join(f"{json.dumps(row) if row['text'] else '{bad'}\n" for row in table.to_pylist())
        )
    else:
        pq.write_table(table, path)
    first, *rest = Inputs([path], BYTES, skip_bad=True).documents()
    assert re.search(r"x\.\w+, (row 1: the value is null|line 2: not JSON)", str(first.error))
    assert [(document.doc_id, bytes(document.read().tolist())) for document in rest] == [
        ("b", b"ccdd"),
        ("a", b"ee"),
    ]
    with pytest.raises(DataError):
        list(Inputs([path], BYTES).documents())


def test_a_document_that_lacks_a_part_is_left_out_alone(tmp_path):
    rows = [("a", 0), ("a", 2), ("a", 3), ("b", 0)]
    lines = [json.dumps({"id": name, "part": part, "text": "x"}) for name, part in rows]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    first, second = Inputs([tmp_path / "x.jsonl"], BYTES, skip_bad=True).documents()
    assert ("line 2: part 2 of document 'a' stands where" in str(first.error), second.doc_id) == (
        True,
        "b",
    )


@pytest.mark.parametrize(
    ("names", "kind"), [([1, 2], "int64"), (["1", "2"], "string"), ([1, "2"], "string")]
)
def test_kept_names_are_integers_where_all_are(tmp_path, names, kind):
    path = write_lines(tmp_path / "x.jsonl", [{"id": name, "text": "a"} for name in names])
    found = list(Inputs([path], keep=("id",)).texts())
    assert [text.doc_id for text in found] == ["1", "2"]
    assert {str(text.kept["id"].type) for text in found} == {kind}


@pytest.mark.parametrize(
    ("lists", "kind"),
    [
        ([[], ["a"]], "list<item: string>"),
        ([[], None, [], [0.5]], "list<item: double>"),
        ([[], [[1]]], "list<item: list<item: int64>>"),
        ([[], [1]], "large_list<item: int64>"),
        ([[], []], "large_list<item: int64>"),
    ],
)
def test_a_kept_list_has_the_type_of_the_first_that_is_not_empty(tmp_path, lists, kind):
    path = write_lines(tmp_path / "x.jsonl", [{"text": "a", "tags": tags} for tags in lists])
    found = [text.kept["tags"] for text in Inputs([path], keep=("tags",)).texts()]
    assert [value.as_py() for value in found] == lists
    assert {str(value.type) for value in found} == {kind}


def test_a_number_and_its_text_are_one_name(tmp_path):
    lines = [
        '{"id": 1, "text": "a"}',
        '{"id": "1", "text": "b"}',
        '{"id": "1", "text": "c"}',
        '{"id": 1, "text": "d"}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    found = [(text.doc_id, text.text) for text in Inputs([tmp_path / "x.jsonl"]).texts()]
    assert found == [("1", "abcd")]


@pytest.mark.parametrize(("lines", "problem"), [*BEGINNINGS, *ALONE])
def test_json_lines_in_a_pipe_that_begin_badly_are_an_error_and_no_text(lines, problem):
    data = lines + GOOD if (lines, problem) in BEGINNINGS else lines
    assert re.search(problem, pipe(data.encode(), texts=True))


def test_a_bad_first_line_of_a_pipe_waits_only_for_a_good_one(monkeypatch):
    reader, writer = os.pipe()
    os.write(writer, b'{"bad\n{"text": "a"}\n')
    end = threading.Timer(20, os.close, [writer])
    end.start()
    with open(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        first = next(iter(Inputs(["-"], skip_bad=True).texts()))
    assert (type(first).__name__, end.is_alive()) == ("Unread", True)
    end.cancel()
    os.close(writer)
