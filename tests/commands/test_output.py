"""Proves that machine output parses, and that people get readable units."""

import json
from collections.abc import Callable

import pyarrow as pa
import pyarrow.ipc as ipc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet_cli.basics.sizes import format_bytes, format_count, format_duration
from longnet_cli.cli.output import emit_jsonl, printable

INFINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", INFINITE)
def test_what_json_cannot_write_is_null_at_any_depth(capsys, value):
    emit_jsonl({"ppl": value, "documents": [{"ppl": value}, (value, 1.5)]})
    assert json.loads(capsys.readouterr().out) == {
        "ppl": None,
        "documents": [{"ppl": None}, [None, 1.5]],
    }


def test_any_document_name_is_ascii_and_one_line(capsys):
    name = "a\nb 文 \udcff"  # the last is a byte of a file name that is not UTF-8
    emit_jsonl({"doc_id": name})
    text = capsys.readouterr().out
    assert text.isascii()
    assert text.count("\n") == 1
    assert json.loads(text)["doc_id"] == name


NUMBERS: dict[Callable[[float], str], dict[float, str]] = {
    format_count: {
        0: "0",
        7: "7",
        0.5: "0.50",
        999: "999",
        1000: "1.00k",
        12_345: "12.3k",
        123_456: "123k",
    }
    | {999_999: "1.00M", 1234567: "1.23M", 10**9: "1.00G", -1500: "-1.50k"},
    format_bytes: {
        0: "0 B",
        1023: "1023 B",
        1024: "1.00 KiB",
        3 * 2**30: "3.00 GiB",
        1.5 * 2**40: "1.50 TiB",
    },
    format_duration: {
        0: "0 s",
        3e-8: "30 ns",
        1.23e-6: "1.23 us",
        0.00123: "1.23 ms",
        0.5: "500 ms",
    }
    | {
        12.34: "12.3 s",
        59.94: "59.9 s",
        59.96: "1m00s",
        75: "1m15s",
        3599.6: "1h00m",
        3700: "1h01m",
    }
    | {200_000: "2d07h", 1e8: "3 years"},
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
    with ipc.new_file(
        tmp_path / "x.arrow", table.replace_schema_metadata({f"longnet.{evil}": evil}).schema
    ) as writer:
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
