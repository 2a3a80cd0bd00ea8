"""No rank outlives its parent or another rank, even where it is blocked in C.

Real processes, which are forks of one that has imported torch.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import processes_of, wait_for

from longnet_cli.basics.errors import LongNetError
from longnet_cli.running.ranks.launch import LAUNCHED, LOST
from longnet_cli.running.ranks.ranks import Ranks
from longnet_cli.running.ranks.watch import _listen, check_agent, watch

GRACE = 0.5
BLOCK = """
import ctypes
def block(library):
    "For ever, and no signal interrupts it."
    lock = ctypes.create_string_buffer(64)
    for _ in range(2):
        library.pthread_mutex_lock(lock)
"""
exec(BLOCK)

# its ranks are forks, each blocked in another way
PARENT = (
    BLOCK
    + f"""
import os, signal, sys, time
from longnet_cli.running.ranks.ranks import Ranks
from longnet_cli.running.ranks.launch import unwind_on_signals
from longnet_cli.running.ranks.watch import die_with_parent, watch

def work(met):
    die_with_parent()
    if met:
        watch(Ranks(), grace={GRACE})
        unwind_on_signals()

def rank(how):
    met, where = how.split()
    work(met == "met")
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
)


def orphans(word: str, *ways: str) -> str:
    """Kill the parent of such ranks when all are ready; what was said when none was left."""
    command = [sys.executable, "-c", PARENT, word, *ways]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as parent:
        assert parent.stdout is not None
        try:
            assert [parent.stdout.readline() for _ in ways] == ["ready\n"] * len(ways)
        finally:
            parent.kill()
        wait_for(lambda: not processes_of(word))
        return parent.stdout.read()


def test_no_rank_outlives_its_parent(tmp_path: Path) -> None:
    said = orphans(str(tmp_path), "alone python", "alone released", "alone held", "met python", "met released")
    assert sorted(said.splitlines()) == [
        *["longnet: error: rank None: the process that started this rank ended, and this one with it"] * 2,
        "unwound",  # the one that runs Python and has something to lose
    ]


@pytest.mark.slow
def test_not_even_one_that_holds_the_interpreter_s_lock(tmp_path: Path) -> None:
    assert orphans(str(tmp_path), "met held") == ""


def lose_a_rank(rank: int, store: str, way: str) -> None:
    os.environ |= {
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "3" if way == "one machine" else "1",
        "MASTER_ADDR": "localhost",
    }
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", LAUNCHED: str(os.getppid())}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    watch(Ranks(rank, 3), grace=GRACE)
    dist.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to which it is deaf
    block(ctypes.CDLL(None))  # noqa: F821


@pytest.mark.parametrize("way", ["one machine", "several"])
def test_no_rank_outlives_another(way: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=lose_a_rank, args=(rank, str(tmp_path / "store"), way)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [LOST, LOST, -signal.SIGKILL]


def test_a_rank_whose_torchrun_has_ended_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LongNetError, match="the torchrun that started this rank has ended"):
        check_agent()


def test_many_ranks_may_call_at_once() -> None:
    """Before the first one has accepted any: a call that finds no room is tried again, and a second later at that."""
    with _listen("127.0.0.1", 300) as server, ExitStack() as calls:
        for _ in range(300):
            calls.enter_context(socket.create_connection(server.getsockname(), timeout=0.5))
