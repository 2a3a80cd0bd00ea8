"""Proves that `data inspect` counts what is there, finds every fault in one go, and says so in text and in JSON."""

import itertools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from files import write_file
from hypothesis import given
from hypothesis import strategies as st
from processes import invoke

from longnet_cli.basics.events import Events
from longnet_cli.data.documents import whole_columns
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.jobs import inspecting
from longnet_cli.jobs.inspecting import Inspection, inspect

BYTES = Tokenizer.bytes()


def write(
    path: Path, rows: list[list[int | None]], kind: pa.DataType | None = None, **metadata: str
) -> Path:
    table = pa.table({"input_ids": pa.array(rows, kind or pa.list_(pa.int32()))})
    return write_file(
        path,
        table.replace_schema_metadata({f"longnet.{key}": value for key, value in metadata.items()}),
    )


def test_counts_of_good_files(tmp_path):
    rows = [[5, 9], [], [7] * 8, [3, 200, 4]]
    write(tmp_path / "a.arrow", rows, tokenizer_sha256=BYTES.sha256)
    write(tmp_path / "b.arrow", rows[:1], tokenizer_sha256=BYTES.sha256)
    seen: list[int] = []
    found = inspect(Inputs([tmp_path], BYTES), events=Events(progress=seen.append))
    assert found.as_dict() == {
        "documents": 5,
        "tokens": 15,
        "byte_tokens": 0,
        "vectors": 0,
        "sizes": {},
        "n_bytes": 15,
        "length": {"min": 0, "mean": 3.0, "median": 2.0, "max": 8},
        "histogram": [
            {"from": 0, "to": 0, "documents": 1},
            {"from": 1, "to": 1, "documents": 0},
            {"from": 2, "to": 3, "documents": 3},
            {"from": 4, "to": 7, "documents": 0},
            {"from": 8, "to": 15, "documents": 1},
        ],
        "ids": {"min": 3, "max": 200},
        "formats": {"Arrow IPC file": 2},
        "token_types": {"int32": 2},
        "metadata": {"longnet.tokenizer_sha256": {BYTES.sha256: 2}},
        "n_problems": 0,
        "problems": [],
    }
    assert sum(seen) == 15
    assert inspect(Inputs([tmp_path])).n_bytes is None  # without a tokenizer nobody knows


def test_text_and_json_lines_count_bytes_without_a_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("wörld")
    (tmp_path / "b.jsonl").write_text('{"text": "ab"}\n{"text": "c"}\n')
    found = inspect(Inputs([tmp_path / "a.txt", tmp_path / "b.jsonl"]))
    assert (found.documents, found.tokens, found.n_bytes, found.num_problems) == (3, 9, 9, 0)
    assert found.formats == {"text": 1, "JSON Lines": 1}
    assert found.byte_tokens == 9


def test_vectors_are_read_where_there_is_nothing_else(tmp_path):
    columns = {"doc_id": list("aab"), "embedding": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]}
    path = write_file(tmp_path / "a.arrow", pa.table(columns))
    found = inspect(Inputs([path]))
    assert (found.documents, found.tokens, found.byte_tokens, found.num_problems) == (2, 0, 0, 0)
    assert (found.vectors, found.sizes, found.lengths, found.length()["mean"]) == (
        3,
        {2: 2},
        {1: 1, 2: 1},
        1.5,
    )
    shown = invoke("data inspect", path).stdout
    assert "vectors      3 of 2 numbers\n" in shown
    assert "token types  vectors (1 file)\n" in shown
    path = write_file(tmp_path / "a.arrow", pa.table(columns | {"text": ["one", "two", "three"]}))
    assert inspect(Inputs([path])).vectors == 0
    assert inspect(Inputs([path], column="embedding")).vectors == 3
    columns["embedding"][1][1] = math.nan
    found = inspect(Inputs([write_file(tmp_path / "a.arrow", pa.table(columns))]))
    assert (found.documents, found.num_problems) == (1, 1)
    assert found.problems[0].endswith("a.arrow, row 1: number 1 of the vector is nan")


@given(st.lists(st.integers(0, 40), min_size=1))
def test_lengths_agree_with_the_statistics_module(lengths):
    found = Inspection(documents=len(lengths), tokens=sum(lengths))
    found.lengths.update(lengths)
    length = found.length()
    assert length["median"] == statistics.median(lengths)
    assert length["mean"] == pytest.approx(statistics.mean(lengths), abs=1e-3)
    histogram = found.histogram()
    assert sum(count for _, _, count in histogram) == len(lengths)
    for low, high, count in histogram:
        assert count == sum(low <= value <= high for value in lengths)


def test_blocks_do_not_show(tmp_path, monkeypatch):
    ids = np.random.default_rng(0).integers(3, 250, 1000).tolist()
    write(tmp_path / "a.arrow", [ids])
    whole = inspect(Inputs([tmp_path], BYTES))
    monkeypatch.setattr(inspecting, "STEP", 7)
    assert inspect(Inputs([tmp_path], BYTES)) == whole
    assert (whole.low, whole.high) == (min(ids), max(ids))


def test_every_problem_is_found_and_what_is_good_is_counted(tmp_path):
    good = write(tmp_path / "good.arrow", [[1, 2]], tokenizer_sha256="a" * 64)
    bad = write(tmp_path / "bad.arrow", [[1], [2, 999], [3], [-4], [5, 5, None]])
    cut = tmp_path / "cut.arrow"
    cut.write_bytes(good.read_bytes()[:-3])
    (tmp_path / "empty.txt").touch()
    wide = write(tmp_path / "wide.arrow", [[7]], pa.list_(pa.int64()), tokenizer_sha256="b" * 64)
    inputs = [good, tmp_path / "missing.arrow", bad, cut, tmp_path / "empty.txt", wide]
    found = inspect(Inputs(inputs, vocab_size=300))
    assert (found.documents, found.tokens, found.low, found.high) == (5, 5, 1, 7)
    assert found.lengths[0] == 1  # empty.txt
    for problem, expected in zip(
        found.problems,
        [
            "missing.arrow: no such file",
            "bad.arrow, row 1, offset 1: token id 999 does not fit",
            "bad.arrow, row 3, offset 0: token id -4 is negative",
            "bad.arrow, row 4, offset 2: the token id is null",
            "cut.arrow: truncated: the index at the end of the Arrow file is missing",
            "wide.arrow: its tokens were made by tokenizer bbbbbbbbbbbb, the first by aaaaaaaaaaaa",
            "wide.arrow: its tokens are int64 and those of",
        ],
        strict=True,
    ):
        assert expected in problem
    assert found.num_problems == 7


def test_rows_after_a_bad_one_are_read_too(tmp_path):
    lines = ['{"text": "ab"}', '{"text": null}', '{"text": 3}', '{"text": "c"}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    found = inspect(Inputs([tmp_path / "x.jsonl"]))
    assert (found.documents, found.tokens, found.num_problems) == (2, 3, 2)
    assert [problem.rpartition(", ")[2] for problem in found.problems] == [
        "line 2: 'text' is null",
        "line 3: 'text' is not text",
    ]


def test_problems_without_end_are_counted_but_not_all_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(inspecting, "MAX_PROBLEMS", 3)
    found = inspect(Inputs([write(tmp_path / "a.arrow", [[-1]] * 10)]))
    assert (found.documents, found.num_problems, len(found.problems)) == (0, 10, 3)
    assert (found.n_bytes, found.low, found.histogram()) == (None, None, [])


@pytest.mark.parametrize("kind", [pa.list_(pa.uint16()), pa.large_list(pa.int64())])
@given(
    rows=st.lists(
        st.tuples(st.sampled_from("aab"), st.lists(st.integers(0, 300), max_size=5)), min_size=1
    ),
    batch_rows=st.integers(1, 5),
    parts=st.sampled_from(["none", "right", "wrong"]),
    named=st.booleans(),
    step=st.integers(1, 8),
)
def test_whole_columns_say_what_rows_say(
    tmp_path_factory, kind, rows, batch_rows, parts, named, step
):
    names, lists = zip(*rows, strict=True)
    places = [0]
    for last, name in itertools.pairwise(names):
        places.append(places[-1] + 1 if name == last and named else 0)
    table = pa.table({"input_ids": pa.array(lists, kind)})
    if named:
        table = table.append_column("doc_id", pa.array(names))
    if parts != "none":
        places[-1] += parts == "wrong"
        table = table.append_column("part", pa.array(places))
    path = write_file(tmp_path_factory.mktemp("x") / "x.arrow", table, batch_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_columns, "STEP", step)
        by_columns = inspect(Inputs([path], BYTES))
        patch.setattr(Inputs, "opened_again", lambda *_: None)
        assert by_columns == inspect(Inputs([path], BYTES))


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_in_text_and_json(run_longnet, tmp_path):
    write(tmp_path / "a.arrow", [[1, 2], [3] * 5], eos_id="256")
    text = run_longnet("data inspect a.arrow")
    assert (text.returncode, text.stderr) == (0, "")
    assert "documents    2\ntokens       7\nbytes        -\n" in text.stdout
    assert "length       min 2, mean 3.5, median 3.5, max 5\nids          1 .. 3\n" in text.stdout
    assert "\nlongnet.eos_id 256 (1 file)\n" in text.stdout
    assert text.stdout.endswith("\nno problems found\n")
    read = run_longnet("data inspect -", input="hello").stdout
    assert "\ntokens       5 (bytes)\n" in read
    assert f"\n{'bytes':>27} {'documents':>12}\n" in read
    (tmp_path / "t.txt").write_text("hello")
    assert (
        "\ntokens       12 (5 of them bytes)\n" in run_longnet("data inspect a.arrow t.txt").stdout
    )
    own = run_longnet("data inspect t.txt --tokenizer longnet-tiny").stdout
    assert "bytes)" not in own
    assert f"\n{'tokens':>27} {'documents':>12}\n" in own
    value = run_longnet("data inspect - --format json", input="hello", code=0)
    assert json.loads(value.stdout) == inspect(Inputs([tmp_path / "t.txt"])).as_dict()


def test_problems_are_exit_code_3_after_everything_is_printed(run_longnet, tmp_path):
    write(tmp_path / "a.arrow", [[1, 2], [3, 300]])
    for format in ("text", "json"):
        done = run_longnet("data inspect missing a.arrow --tokenizer bytes --format", format)
        assert done.returncode == 3
        assert (
            done.stderr
            == "longnet: error: 2 problems, the first: missing: no such file or folder\n"
        )
        assert (
            "a.arrow, row 1, offset 1: token id 300 does not fit a vocabulary of 257" in done.stdout
        )
    assert json.loads(done.stdout)["documents"] == 1
