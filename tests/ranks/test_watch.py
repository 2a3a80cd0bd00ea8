"""No rank outlives its parent, even where it is blocked in C before the ranks have met. Real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from processes import processes_of, wait_for

from longnet_cli.basics.errors import LongNetError
from longnet_cli.running.ranks.watch import check_agent

# its ranks are forks, each blocked in another way
PARENT = """
import ctypes, os, signal, sys, time
from longnet_cli.running.ranks.launch import unwind_on_signals
from longnet_cli.running.ranks.watch import end_with_parent

def block(library):
    "For ever, and no signal interrupts it."
    lock = ctypes.create_string_buffer(64)
    for _ in range(2):
        library.pthread_mutex_lock(lock)

def rank(how):
    met, where = how.split()
    end_with_parent()
    if met == "met":
        unwind_on_signals()
    try:
        os.write(1, b"ready\\n")
        if where == "python":
            time.sleep(99)
        block(ctypes.CDLL(None) if where == "released" else ctypes.PyDLL(None))
    finally:
        os.write(1, b"unwound\\n")
        os._exit(0)

for how in sys.argv[2:]:
    if os.fork() == 0:
        rank(how)
time.sleep(99)
"""


def orphans(word: str, *ways: str) -> str:
    """Kill the parent of such ranks when all are ready; what was said when none was left."""
    command = [sys.executable, "-c", PARENT, word, *ways]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as parent:
        try:
            assert [parent.stdout.readline() for _ in ways] == ["ready\n"] * len(ways)
        finally:
            parent.kill()
        wait_for(lambda: not processes_of(word))
        return parent.stdout.read()


def test_no_rank_outlives_its_parent(tmp_path: Path) -> None:
    said = orphans(str(tmp_path), "alone python", "alone released", "alone held", "met python")
    assert said == "unwound\n"  # by the one that has something to lose


def test_a_rank_whose_torchrun_has_ended_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LongNetError, match="the torchrun that started this rank has ended"):
        check_agent()
