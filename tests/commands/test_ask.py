"""`longnet ask` as a person and a script meet it: stdout and stderr, exit codes, an index that is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from builders import tiny_net
from conftest import RunLongnet
from files import write_lines

from longnet_cli.data.tokenizer import Tokenizer

TEXT = "Nothing of note happens in this sentence. " * 200 + "The shed's key is 4821. " + "The end is near. " * 90
QUESTION = 'Which "key*" opens the shed?'


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_net(vocab_size=257, position="rope").save_pretrained(tmp_path / "tiny", Tokenizer.bytes().to_json())
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text(TEXT)
    (tmp_path / "texts/b.md").write_text("Another shed. " * 9)
    return tmp_path / "tiny"


def test_an_answer_goes_to_stdout_and_its_sources_to_stderr(model: Path, run_longnet: RunLongnet) -> None:
    words = ["ask", "texts", QUESTION, "-m", model, "-n", "9"]
    done = run_longnet(*words, "--passages", "1")
    assert done.returncode == 0, done.stderr
    begin, end, shown = re.findall(r"source 1: a.txt, characters ([\d,]+) to ([\d,]+): (.+) \.\.\.\n", done.stderr)[0]
    passage = TEXT[int(begin.replace(",", "")) : int(end.replace(",", ""))]
    assert "key is 4821" in passage
    assert passage.startswith(shown)
    row = json.loads(run_longnet(*words, "--passages", "1", "--format", "json").stdout)
    assert done.stdout.strip() == row.pop("answer")
    assert row.pop("n_prompt") > len(passage)
    assert row.pop("sources")[0].items() >= {"doc_id": "a.txt", "text": passage}.items()
    assert row == {"question": QUESTION, "model": str(model), "n_tokens": 9, "finish_reason": "length"}
    for text in (f"A shed. {TEXT}", TEXT):  # what comes from a pipe is never taken for what is known
        piped = run_longnet(*words[:1], "-", *words[2:], "--index", "i.sqlite", "--format", "json", input=text)
        assert all(text[each["char_start"] :].startswith(each["text"]) for each in json.loads(piped.stdout)["sources"])
    quiet = run_longnet(*words[:1], "-", *words[2:], "-q", "--passages", "1", input=TEXT)
    assert (quiet.stdout, quiet.stderr) == (done.stdout, "")
    drawn = run_longnet(*words, "--temperature", "9", "--format", "text")
    assert ": b.md, characters 0 to 125: Another shed." in drawn.stderr
    (seed,) = re.findall(r"\(\w+, seed (\d+)\)", drawn.stderr)
    assert run_longnet(*words, "--temperature", "9", "--seed", seed).stdout == drawn.stdout


def test_several_questions_have_a_line_each_and_one_without_a_passage_has_no_answer(
    model: Path, run_longnet: RunLongnet, tmp_path: Path
) -> None:
    write_lines(
        tmp_path / "q.jsonl", [{"question": QUESTION}, {"question": "xyzzy?"}, {"question": "When is the end?"}]
    )
    words = ["texts", "--index", "i.sqlite", "-m", model, "-n", "3", "-q"]
    done = run_longnet("ask", *words, "--questions", "q.jsonl")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["question"] for row in rows] == [QUESTION, "xyzzy?", "When is the end?"]
    assert (rows[1]["answer"], rows[1]["sources"]) == (None, [])
    assert "near" in rows[2]["sources"][0]["text"]
    assert done.returncode == 1
    assert done.stderr.startswith("longnet: error: no passage has a word of 1 of 3 questions")
    one = run_longnet("ask", words[0], "xyzzy?", *words[1:])
    assert (one.returncode, one.stdout) == (1, "")
    again = run_longnet("ask", words[0], QUESTION, *words[1:], "--format", "json")
    assert json.loads(again.stdout) == rows[0]


def test_what_cannot_be_read_is_left_out_as_asked(model: Path, run_longnet: RunLongnet, tmp_path: Path) -> None:
    (tmp_path / "texts/c.txt").write_bytes(b"\xff")
    words = ["ask", "texts", QUESTION, "-m", model, "-n", "1", "-q"]
    assert run_longnet(*words).returncode == 3
    done = run_longnet(*words, "--skip-bad")
    assert (done.returncode, len(done.stdout) > 0) == (6, True)
