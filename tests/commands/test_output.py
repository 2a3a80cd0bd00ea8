"""Proves that machine output parses in every format, also when the run is cut, and that people get readable units."""

import csv
import io
import json
from collections.abc import Callable
from typing import get_args

import pyarrow as pa
import pyarrow.ipc as ipc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet_cli.basics.sizes import format_bytes, format_count, format_duration
from longnet_cli.cli.output import RowFormat, RowWriter, emit_jsonl, printable

COLUMNS = ["op", "seq", "seconds", "status"]
ROWS = [
    {"op": "attention", "seq": 8192, "seconds": 0.0123456789, "status": "ok"},
    {"op": 'a,b|c\n"d"', "seq": 10**9, "seconds": float("nan"), "status": "oom"},
    {"op": "model", "seq": 1},
]
INFINITE = [float("nan"), float("inf"), float("-inf")]


def write_rows(format, rows, **settings):
    with RowWriter(format, COLUMNS, **settings) as out:
        for row in rows:
            out.write(row)


def parse(format, text):
    """The rows of a machine format, with null for an empty cell of CSV."""
    if format == "json":
        return json.loads(text)
    if format == "jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return [{key: value or None for key, value in row.items()} for row in csv.DictReader(io.StringIO(text))]


@pytest.mark.parametrize("format", ["json", "jsonl", "csv"])
def test_rows_read_back(capsys, format):
    write_rows(format, ROWS)
    rows = parse(format, capsys.readouterr().out)
    assert [list(row) for row in rows] == [COLUMNS] * 3
    assert [row["op"] for row in rows] == [row["op"] for row in ROWS]
    assert float(rows[0]["seconds"]) == ROWS[0]["seconds"]
    assert rows[1]["seconds"] is None
    assert rows[2]["status"] is None
    write_rows(format, [])
    assert parse(format, capsys.readouterr().out) == []


@pytest.mark.parametrize("format", get_args(RowFormat))
def test_each_row_is_written_at_once(capsys, format):
    with RowWriter(format, COLUMNS) as out:
        for row in ROWS:
            out.write(row)
            assert str(row["seq"]) in capsys.readouterr().out


@pytest.mark.parametrize("cut", [KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("format", ["json", "jsonl", "csv"])
def test_rows_written_before_a_stop_can_be_parsed(capsys, format, cut):
    def measurements():
        yield ROWS[0]
        raise cut

    with pytest.raises(cut):
        write_rows(format, measurements())
    assert [row["op"] for row in parse(format, capsys.readouterr().out)] == ["attention"]


def test_a_column_nobody_declared_is_a_bug():
    with pytest.raises(AssertionError, match="no such column: \\['secnods'\\]"):
        write_rows("csv", [{"secnods": 1.0}])


def test_markdown_is_aligned_and_in_human_units(capsys):
    write_rows("md", ROWS, human={"seq": format_count, "seconds": format_duration})
    assert capsys.readouterr().out.splitlines() == [
        "| op        |      seq |  seconds | status   |",
        "| --------- | -------: | -------: | -------- |",
        "| attention |    8.19k |  12.3 ms | ok       |",
        '| a,b\\|c "d" |    1.00G |          | oom      |',
        "| model     |        1 |          |          |",
    ]
    write_rows("md", [])
    assert capsys.readouterr().out.splitlines()[0] == "| op       | seq      | seconds  | status   |"


def test_a_failure_before_the_first_row_leaves_no_table(capsys):
    with pytest.raises(ValueError, match="wrong"), RowWriter("md", COLUMNS):
        raise ValueError("wrong")
    assert capsys.readouterr().out == ""


def test_a_wide_row_is_not_cut_in_a_pipe(capsys):
    write_rows("md", [{"op": "x" * 500}])
    assert "x" * 500 in capsys.readouterr().out


@pytest.mark.parametrize("value", INFINITE)
def test_what_json_cannot_write_is_null_at_any_depth(capsys, value):
    emit_jsonl({"ppl": value, "documents": [{"ppl": value}, (value, 1.5)]})
    assert json.loads(capsys.readouterr().out) == {"ppl": None, "documents": [{"ppl": None}, [None, 1.5]]}


def test_any_document_name_is_ascii_and_one_line(capsys):
    name = "a\nb 文 \udcff"  # the last is a byte of a file name that is not UTF-8
    emit_jsonl({"doc_id": name})
    text = capsys.readouterr().out
    assert text.isascii()
    assert text.count("\n") == 1
    assert json.loads(text)["doc_id"] == name


NUMBERS: dict[Callable[[float], str], dict[float, str]] = {
    format_count: {0: "0", 7: "7", 0.5: "0.50", 999: "999", 1000: "1.00k", 12_345: "12.3k", 123_456: "123k"}
    | {999_999: "1.00M", 1234567: "1.23M", 10**9: "1.00G", -1500: "-1.50k"},
    format_bytes: {0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 3 * 2**30: "3.00 GiB", 1.5 * 2**40: "1.50 TiB"},
    format_duration: {0: "0 s", 3e-8: "30 ns", 1.23e-6: "1.23 us", 0.00123: "1.23 ms", 0.5: "500 ms"}
    | {12.34: "12.3 s", 59.94: "59.9 s", 59.96: "1m00s", 75: "1m15s", 3599.6: "1h00m", 3700: "1h01m"}
    | {200_000: "2d07h"},
}


@pytest.mark.parametrize("write", NUMBERS)
def test_numbers_for_people(write):
    assert [write(value) for value in NUMBERS[write]] == [*NUMBERS[write].values()]


@given(st.floats(min_value=1e-9, max_value=1e8))
def test_durations_and_counts_stay_short(value):
    assert len(format_duration(value)) <= 8
    assert len(format_count(value)) <= 6
    assert len(format_bytes(value)) <= 9


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, wörld, 漢字 👩‍🔬", "plain, wörld, 漢字 👩‍🔬"),
        ("\x1b[31mred\x07\x7f\x9b", r"\x1b[31mred\x07\x7f\x9b"),
        ("a\nb\tc\u2028d", r"a\x0ab\x09c\u2028d"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\udcc3\udca9.txt", "é.txt"),  # a name as Python reads it where the locale is not UTF-8
        ("\udcff\ud800", r"\xff\ud800"),
    ],
)
def test_what_is_shown_has_no_control_character(text, shown):
    assert printable(text) == shown


def test_names_in_files_do_not_reach_the_terminal_raw(tmp_path, run_longnet):
    """Names of files, columns and documents, keys, metadata, and the errors that name them."""
    evil = "\x1b]0;x\x07"
    (tmp_path / f"{evil}.jsonl").write_text(json.dumps({"doc_id": evil, "text": "abc"}) + "\n")
    table = pa.table({"doc_id": [evil], "input_ids": [[1, 2, 3]], f"{evil}c": [1]})
    with ipc.new_file(tmp_path / "x.arrow", table.replace_schema_metadata({f"longnet.{evil}": evil}).schema) as writer:
        writer.write_table(table)
    for words in (
        ["data", "inspect", f"{evil}.jsonl", "x.arrow", f"no{evil}"],
        ["data", "inspect", "x.arrow", "--column", evil],
        ["score", "x.arrow", f"{evil}.jsonl"],
        ["tokenize", f"{evil}.jsonl", "-o", f"{evil}.arrow"],
        ["tokenize", f"{evil}.jsonl", "-o", f"{evil}.arrow", "--column", evil],
    ):
        done = run_longnet(*words)
        assert "\\x1b" in done.stdout + done.stderr
        assert not set(done.stdout + done.stderr) & {"\x1b", "\x07"}, words
