"""This process among the others of a torchrun job: who it is, whose sequence it shares, and how it starts and ends."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from longnet_cli.errors import ConfigError, LongNetError
from longnet_cli.runtime.device import select_device

LAUNCHED = "LONGNET_LAUNCHED"  # set where `start_ranks` tells of what happens to the ranks
LOST = 69  # exit code of such a rank that lost another
TIMEOUT = timedelta(minutes=30)  # of a collective: rank 0 may write a checkpoint while the others wait


@dataclass(frozen=True)
class Ranks:
    """`world` processes as `dp` groups of `sp`: those of a group share each sequence, the groups have others.

    Rank r is the (r % sp)-th of the (r // sp)-th group. `group` is its own group, None where sp is 1.
    """

    rank: int = 0
    world: int = 1
    sp: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def dp(self) -> int:
        return self.world // self.sp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp

    @property
    def first(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.rank == 0

    def all_in_one(self) -> Ranks:
        """The same ranks, sharing every sequence: what `score` and `encode` take."""
        return replace(self, sp=self.world, group=dist.group.WORLD if self.world > 1 else None)

    def sum(self, *tensors: torch.Tensor) -> None:
        """Add up tensors over all ranks, in place."""
        if self.world > 1:
            works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
            for work in works:
                work.wait()

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: all get the same answer."""
        return bool(self.largest(flag))

    def largest(self, value: float) -> float:
        """The largest of all ranks' values."""
        if self.world == 1:
            return value
        found = torch.tensor([value], dtype=torch.float64, device=_device_of_backend())
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.item()

    def from_first(self, value: int) -> int:
        """What rank 0 says, on all ranks; exact below 2^53."""
        return int(self.largest(value if self.first else -math.inf))

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def smallest(self, value: float) -> float:
        return -self.largest(-value)


def under_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: str = "auto", *, sp: int | None = None, dp: int | None = None) -> tuple[Ranks, torch.device]:
    """Meet the other processes that torchrun started; alone, there is nothing to do.

    `sp` and `dp` default to all ranks in one sequence. NCCL on GPUs, one a process (LOCAL_RANK); gloo on CPUs. Raises
    ConfigError, on every rank and before any work, for a mesh that is not the job's.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    sp = sp if sp is not None else world // dp if dp and world % dp == 0 else world
    dp = dp if dp is not None else world // sp if world % sp == 0 else 1
    if sp * dp != world:
        fits = ", ".join(f"{world // n} x {n}" for n in range(1, world + 1) if world % n == 0)
        raise ConfigError(
            f"dp x sp is {dp} x {sp}, which needs {dp * sp} processes, and there are {world}: {fits} would fit; "
            "start more with --nproc or torchrun"
        )
    where = select_device(device)
    if world == 1:
        return Ranks(), where
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(where)
    _end_with_parent()
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=TIMEOUT)
    rank, group = dist.get_rank(), None
    for first in range(0, world, sp):  # every process makes every group, in the same order
        members = dist.new_group(list(range(first, first + sp)))
        if first <= rank < first + sp and sp > 1:
            group = members
    return Ranks(rank, world, sp, group), where


def _end_with_parent() -> None:
    """Get SIGTERM when the torchrun that started this rank is killed: else it would run, and write, on its own."""
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def check_windows(ranks: Ranks, seq_len: int, windows: int) -> None:
    """Raise ConfigError where a step's `windows` of `seq_len` tokens cannot be shared, and say what would fit."""
    if windows % ranks.dp:
        fits = ", ".join(str(dp) for dp in range(1, windows + 1) if windows % dp == 0 and ranks.world % dp == 0)
        raise ConfigError(
            f"a step has {windows} windows of {seq_len} tokens, which {ranks.dp} groups of ranks cannot share alike: "
            f"--dp {fits} would fit, or other train.batch_tokens"
        )
    if seq_len < ranks.sp:
        raise ConfigError(
            f"{ranks.sp} ranks cannot share a window of {seq_len} tokens: --sp {seq_len} or less would fit, or longer "
            "windows"
        )


def leave() -> None:
    """End a job that went well: without it, a rank that is done first may break off the others' last collective."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class Signals:
    """SIGINT and SIGTERM, which ask a run to stop, and SIGUSR1, which asks it to save, until it next looks.

    A run looks where its state is whole. Ranks look together: torchrun passes a signal on to each of them, which meets
    it in another place, and one that left at once would break off the others in their next collective.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self._asked = ranks, 0

    def note(self, number: int, frame: object) -> None:
        """A signal handler. After a first SIGINT a second one kills: whoever presses twice means it."""
        if number != signal.SIGUSR1 or not self._asked:
            self._asked = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def look(self) -> bool:
        """Whether to save and go on. Raises KeyboardInterrupt (SIGINT) or SystemExit (SIGTERM), on all ranks."""
        mine = self._asked
        asked = self.ranks.largest(_WEIGHT[mine])
        if mine and self._asked == mine:  # not one that came meanwhile: ranks wait for each other here
            self._asked = 0
        if asked == _WEIGHT[signal.SIGINT]:
            raise KeyboardInterrupt
        if asked == _WEIGHT[signal.SIGTERM]:
            raise SystemExit(128 + signal.SIGTERM)
        return asked == _WEIGHT[signal.SIGUSR1]


_WEIGHT = {0: 0, signal.SIGUSR1: 1, signal.SIGINT: 2, signal.SIGTERM: 3}  # of several, the largest decides


@contextmanager
def noted_signals(ranks: Ranks) -> Iterator[Signals]:
    """`with noted_signals(ranks) as signals`: signals only act where `signals.look()` is called."""
    signals = Signals(ranks)
    if not _in_main_thread():
        yield signals
        return
    before = {kind: signal.signal(kind, signals.note) for kind in _WEIGHT if kind}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # held back until now, see `cli/train.py`
    try:
        yield signals
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _in_main_thread() -> bool:
    """Only there may Python set handlers: as a library, in a thread, a run leaves signals alone."""
    return threading.current_thread() is threading.main_thread()


def start_ranks(nproc: int) -> NoReturn:
    """Run this command as a torchrun of `nproc` processes, which `--nproc` is short for, and end as they do.

    Raises SystemExit with the code of the rank that failed first, or that of a signal; LongNetError for a rank that
    could not speak for itself.
    """
    if under_torchrun():
        raise ConfigError("--nproc starts torchrun, which runs this already: leave it out")
    arguments, words = [], iter(sys.argv[1:])
    for word in words:
        if word == "--nproc":
            next(words, None)
        elif not word.startswith("--nproc="):
            arguments.append(word)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # after a signal, ranks end the step and save
    _hand_on_sigusr1()
    logging.disable(logging.ERROR)  # what torchrun would say of a failure in thirty lines, we say in one
    os.environ[LAUNCHED] = "1"
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--standalone", "--nproc-per-node", str(nproc), "-m", "longnet_cli", *arguments])
    except SignalException as stop:
        raise SystemExit(128 + stop.sigval) from None
    except ChildFailedError as error:
        # those that only followed: they lost another, or torchrun ended them
        followed = (LOST, -signal.SIGTERM, 128 + signal.SIGTERM)
        causes = [(rank, found) for rank, found in error.failures.items() if found.exitcode not in followed]
        if not causes:
            raise LongNetError("the ranks lost each other: the network between them failed, or one hung") from None
        rank, first = min(causes, key=lambda cause: (cause[1].exitcode > 0, cause[1].timestamp))
        if first.exitcode < 0:
            name = signal.Signals(-first.exitcode).name
            raise LongNetError(f"rank {rank} was killed ({name}), and the job with it") from None
        raise SystemExit(first.exitcode) from None
    raise SystemExit(0)


def _hand_on_sigusr1() -> None:
    """Send each SIGUSR1, of which torchrun would die, on to its processes.

    A thread waits for it, and no other sees it. The processes begin with it held back as well, so it cannot kill one
    that does not listen yet. Elsewhere than on Linux, and before they are there, it is lost.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

    def hand_on() -> None:
        while True:
            signal.sigwait({signal.SIGUSR1})
            for children in Path("/proc/self/task").glob("*/children"):
                with suppress(OSError):  # a thread or a rank that has just ended
                    for child in children.read_text().split():
                        os.kill(int(child), signal.SIGUSR1)

    threading.Thread(target=hand_on, daemon=True).start()


def _device_of_backend() -> torch.device:
    nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
