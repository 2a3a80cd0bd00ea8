"""Proves that progress goes to stderr only: a bar on a terminal (a pty), plain lines in a log, else nothing."""

import os
import pty
import re
import subprocess
import sys

import pytest

from longnet_cli.cli.progress import progress

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


def run_on_terminal(env, stdout=subprocess.PIPE):
    """Exit code, stdout and what the terminal on stderr was sent; with stdout="terminal" both go to it."""
    terminal, end = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=end if stdout == "terminal" else stdout, stderr=end, env=env, text=True
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
    rows, _ = program.communicate(timeout=30)
    return program.returncode, rows, shown.decode()


def test_a_terminal_gets_a_bar_with_rate_and_fields(command_env):
    code, rows, shown = run_on_terminal(command_env | {"TERM": "xterm", "COLUMNS": "120"})
    assert (code, rows) == (0, "".join(f"row {step}\n" for step in range(4)))
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "scoring [x]" in plain
    assert re.search(r"1\.00k/1\.00k tok, \S+ tok/s, in [\d.]+ (ms|us|s), loss 1\.70", plain)
    assert COLOUR.search(shown)


def test_no_color(command_env):
    _, _, shown = run_on_terminal(command_env | {"TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"})
    assert "scoring [x]" in shown
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", shown)


def test_rows_on_the_same_terminal_stand_on_lines_of_their_own(command_env):
    _, _, shown = run_on_terminal(command_env | {"TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}, stdout="terminal")
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert re.findall(r"[\r\n](row \d)[\r\n]", plain) == [f"row {step}" for step in range(4)]


def test_a_dumb_terminal_gets_no_bar(command_env):
    assert run_on_terminal(command_env | {"TERM": "dumb"})[2] == ""


def test_a_quick_job_is_silent_in_a_pipe_and_loads_no_rich(command_env):
    program = PROGRAM + "assert 'rich' not in sys.modules\n"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=command_env, check=True
    )
    assert result.stderr == ""


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
        "scoring: 3.00k/10.0k tok, 100 tok/s, 1m10s left, loss 2",
        "scoring: 6.00k/10.0k tok, 100 tok/s, 40.0 s left, loss 5",
    ]


def test_what_an_earlier_run_did_counts_as_done_but_not_in_the_rate(capsys, clock):
    with progress("training", total=10_000, start=5000) as advance:
        clock(50)
        advance(500)
    assert capsys.readouterr().err == "training: 5.50k/10.0k tok, 10 tok/s, 7m30s left\n"


def test_an_unknown_end_has_no_time_left(capsys, clock):
    with progress("encoding", total=None, unit="doc", every=1) as advance:
        clock(2)
        advance(4)
    assert capsys.readouterr().err == "encoding: 4 doc, 2 doc/s, in 2.00 s\n"


def test_quiet_is_quiet(capsys, clock):
    with progress("scoring", total=10, quiet=True) as advance:
        clock(100)
        advance(10)
    assert capsys.readouterr() == ("", "")
