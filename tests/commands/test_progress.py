"""Proves that progress goes to stderr only: a bar on a terminal (a pty), plain lines in a log, else nothing.
It tells how much is left, by the bytes of the inputs."""

import gzip
import os
import pty
import re
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
from files import write_rows
from processes import invoke

from longnet_cli.cli.progress import ExpectedTokens, progress
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.tokenizer import Tokenizer

PROGRAM = """
import sys, time
from longnet_cli.cli.progress import progress
with progress("scoring [x]", total=1000) as advance:
    for step in range(4):
        advance(250, loss=f"{2 - step / 10:.2f}")
        print("row", step)
        sys.stdout.flush()
"""
COLOUR = re.compile(r"\x1b\[[0-9;]*[1-9][0-9;]*m")


def run_on_terminal(env, stdout=subprocess.PIPE, program=PROGRAM):
    """Exit code, stdout and what the terminal on stderr was sent; with stdout="terminal" both go to it."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=end if stdout == "terminal" else stdout,
        stderr=end,
        env=env,
        text=True,
    )
    os.close(end)
    shown = b""
    while True:
        try:
            block = os.read(terminal, 65536)
        except OSError:  # Linux says EIO when the last writer has closed a pty
            break
        if not block:
            break
        shown += block
    os.close(terminal)
    rows, _ = process.communicate(timeout=30)
    return process.returncode, rows, shown.decode()


def test_a_process_that_is_quiet_shows_none(command_env):
    quiet = "from longnet_cli.cli.output import be_quiet\nbe_quiet(True)"
    assert run_on_terminal(command_env | {"TERM": "xterm"}, program=quiet + PROGRAM)[2] == ""


def test_a_terminal_gets_a_bar_with_rate_and_fields(command_env):
    code, rows, shown = run_on_terminal(command_env | {"TERM": "xterm", "COLUMNS": "120"})
    assert (code, rows) == (0, "".join(f"row {step}\n" for step in range(4)))
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "scoring [x]" in plain
    assert re.search(r"1\.00k/1\.00k tok, \S+ tok/s, in [\d.]+ (ms|us|s), loss 1\.70", plain)
    assert COLOUR.search(shown)


def test_no_color(command_env):
    _, _, shown = run_on_terminal(
        command_env | {"TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}
    )
    assert "scoring [x]" in shown
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", shown)


def test_rows_on_the_same_terminal_stand_on_lines_of_their_own(command_env):
    _, _, shown = run_on_terminal(
        command_env | {"TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}, stdout="terminal"
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert re.findall(r"[\r\n](row \d)[\r\n]", plain) == [f"row {step}" for step in range(4)]


def test_a_dumb_terminal_gets_no_bar(command_env):
    assert run_on_terminal(command_env | {"TERM": "dumb"})[2] == ""


def test_a_quick_job_is_silent_in_a_pipe_and_loads_no_rich(run_python):
    program = PROGRAM + "assert 'rich' not in sys.modules\n"
    assert run_python("-c", program).stderr == ""


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told: `clock(10)` lets ten seconds pass."""
    now = 0.0

    def wait(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr("time.monotonic", lambda: now)
    return wait


def test_a_long_job_writes_a_line_every_half_minute(capsys, clock):
    with progress("scoring", total=10_000) as advance:
        for step in range(7):
            clock(10)
            advance(1000, loss=step)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 30 %, 3.00k/10.0k tok, 100 tok/s, 1m10s left, loss 2",
        "scoring: 60 %, 6.00k/10.0k tok, 100 tok/s, 40.0 s left, loss 5",
    ]


def test_what_an_earlier_run_did_counts_as_done_but_not_in_the_rate(capsys, clock):
    with progress("training", total=10_000, start=5000) as advance:
        clock(50)
        advance(500)
    assert capsys.readouterr().err == "training: 55 %, 5.50k/10.0k tok, 10 tok/s, 7m30s left\n"


def test_a_narrow_terminal_keeps_the_first_word_and_the_bar(command_env):
    """As much of the fields as fits 80 columns is shown, from the first on."""
    fields = (
        'loss="2.3100", step="1,200", lr="3.00e-04", grad="0.50", memory="1.20 GiB", ppl="10.07"'
    )
    program = PROGRAM.replace('loss=f"{2 - step / 10:.2f}"', fields).replace(
        "total=1000", "total=10_000_000"
    )
    program = program.replace("scoring [x]", "training").replace(
        "advance(250,", "advance(1_234_567,"
    )
    _, _, shown = run_on_terminal(
        command_env | {"TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}, program=program
    )
    lines = [
        line.strip()
        for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", shown).split("\n")
        if "tok/s" in line
    ]
    assert lines
    for line in lines:
        assert re.match(
            r"training .*[\u2501\u2578\u257a-]{2,}.* \d+ %, .* left, loss 2\.3100", line
        ), line
        assert len(line) <= 80
        assert "ppl" not in line


def documents_of(kind: str, folder: Path) -> Path:
    rows = [{"text": f"text {number} " * (1 + number % 7)} for number in range(40)]
    if kind == "text":
        for number, row in enumerate(rows):
            (folder / f"{number:02}.txt").write_text(row["text"])
        return folder
    path = write_rows(folder / f"x.{'jsonl' if kind == 'gzip' else kind}", rows)
    if kind == "gzip":
        packed = path.with_suffix(".jsonl.gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        return packed
    return path


@pytest.mark.parametrize("kind", ["text", "jsonl", "gzip", "arrow", "parquet"])
def test_the_bytes_of_files_tell_how_many_tokens_will_come(kind, tmp_path):
    expected, documents = (
        ExpectedTokens(),
        Inputs([documents_of(kind, tmp_path)], Tokenizer.bytes()).documents(),
    )
    assert expected.total() is None
    guesses, tokens = [], 0
    for document in documents:
        expected.count(len(document), documents.fraction)
        tokens += len(document)
        guesses.append(expected.total())
    assert guesses[-1] == tokens
    halfway = guesses[len(guesses) // 2]
    assert 0.6 * tokens < halfway < 1.5 * tokens


def test_tokenize_counts_each_byte_once(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr("longnet_cli.jobs.tokenizing.TEXT_CHARS", 10)
    bar = nullcontext(lambda size, **_: counted.append(size))
    monkeypatch.setattr("longnet_cli.cli.tokenize.progress", lambda *_, **__: bar)
    invoke(
        "tokenize",
        write_rows(tmp_path / "x.jsonl", [{"text": "some words"}] * 9),
        "-o",
        tmp_path / "out",
        code=0,
    )
    assert (len(counted) > 1, sum(counted)) == (True, 90)


def test_a_pipe_has_no_total(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("some text"))
    writer.start()
    documents = Inputs([tmp_path / "pipe"], Tokenizer.bytes()).documents()
    assert len([*documents]) == 1
    assert documents.fraction is None
    writer.join()


def test_an_expected_total_is_marked_and_grows(capsys, clock):
    expected = iter([None, 4000, 3000])
    with progress("scoring", total=lambda: next(expected), every=1) as advance:
        for amount in (1000, 1000, 2000):
            clock(10)
            advance(amount)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 1.00k tok, 100 tok/s, in 10.0 s",
        "scoring: 50 %, 2.00k/~4.00k tok, 100 tok/s, 20.0 s left",
        "scoring: 4.00k/~4.00k tok, 133 tok/s, in 30.0 s",
    ]


def test_an_unknown_end_has_no_time_left(capsys, clock):
    with progress("encoding", total=None, unit="doc", every=1) as advance:
        clock(2)
        advance(4)
    assert capsys.readouterr().err == "encoding: 4 doc, 2 doc/s, in 2.00 s\n"
