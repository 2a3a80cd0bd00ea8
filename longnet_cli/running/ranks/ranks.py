"""The place of this process in a torchrun job: its rank, and the ranks with which it shares a sequence."""

from __future__ import annotations

import math
import os
import resource
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from longnet_cli.basics.errors import ConfigError
from longnet_cli.running.device import select_device
from longnet_cli.running.ranks.launch import (
    check_agent,
    divide,
    started_by_torchrun,
    unwind_on_signals,
)

# of a collective of hosts: rank 0 may write a checkpoint while the others wait
TIMEOUT = timedelta(minutes=30)
# of one of GPUs: a rank whose GPU hangs is ended by its timeout alone
GPU_TIMEOUT = timedelta(minutes=10)
_FILES = 1024  # that a process may open beside its connections


@dataclass(frozen=True)
class Ranks:
    """`world` processes as `dp` groups of `sp`. A group's ranks share each sequence; other groups have other sequences.

    Rank r is the (r % sp)-th of the (r // sp)-th group. `group` is its own group, None if sp is 1. `everyone` is the
    group of all `world` processes, None if these are all processes of the job. `planned` ranks are no processes yet:
    one makes a plan for them.
    """

    rank: int = 0
    world: int = 1
    sp: int = 1
    group: dist.ProcessGroup | None = None
    everyone: dist.ProcessGroup | None = None
    planned: bool = False

    @property
    def dp(self) -> int:
        return self.world // self.sp

    def own(self, rate: float, device: torch.device) -> float:
        """Return one rank's share of a rate that this process has measured. On a CPU, planned ranks share it."""
        return rate / self.world if self.planned and device.type == "cpu" else rate

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp

    @property
    def sp_rank(self) -> int:
        return self.rank % self.sp

    def edges(self, start: int, tokens: int) -> list[int]:
        """Return the sp + 1 edges of the shards of `tokens` positions from `start` on, as `even_edges` does."""
        return even_edges(start, tokens, self.sp)

    @property
    def writes(self) -> bool:
        """Return whether this rank writes files and prints."""
        return self.rank == 0

    def all_in_one(self) -> Ranks:
        """Return the same ranks as one group, which shares every sequence."""
        return replace(self, sp=self.world, group=dist.group.WORLD if self.world > 1 else None)

    def of_group(self) -> Ranks:
        """Return the ranks of this rank's own group, as if there were no others."""
        return Ranks(self.sp_rank, self.sp, self.sp, self.group, self.group)

    def sum(self, *tensors: torch.Tensor) -> None:
        """Sum tensors over all ranks, in place. They may be on the hosts or on the ranks' devices."""
        if self.world == 1:
            return
        works = []
        on_devices: defaultdict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        for tensor in tensors:
            if tensor.is_cuda:
                on_devices[tensor.dtype].append(tensor)
            else:
                works.append(dist.all_reduce(tensor, group=self.everyone, async_op=True))
        for of_dtype in on_devices.values():  # NCCL takes all of a dtype in one launch
            with dist._coalescing_manager(self.everyone, async_ops=True) as coalesced:
                for tensor in of_dtype:
                    dist.all_reduce(tensor, group=self.everyone)
            works.append(coalesced)
        for work in works:
            work.wait()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank. All ranks get the same answer."""
        return bool(self.largest(flag))

    def largest(self, value: float) -> float:
        """Return the largest of all ranks' values. The hosts exchange them, so no rank waits for its device."""
        if self.world == 1 or self.planned:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.everyone)
        return tensor.item()

    def from_first(self, value: int) -> int:
        """Return rank 0's value on all ranks; exact below 2^53."""
        return int(self.largest(value if self.writes else -math.inf))

    def barrier(self) -> None:
        """Wait for all ranks, on the hosts: for half an hour, if one of them writes for so long."""
        self.largest(0.0)

    def smallest(self, value: float) -> float:
        return -self.largest(-value)


ALONE = Ranks()  # one process


def even_edges(start: int, tokens: int, ranks: int) -> list[int]:
    """Return the P + 1 edges of shards whose lengths differ by at most one token."""
    return [start + tokens * rank // ranks for rank in range(ranks + 1)]


def join(
    device: str = "auto",
    *,
    sp: int | None = None,
    dp: int | None = None,
    planned: int | None = None,
) -> tuple[Ranks, torch.device]:
    """Connect to the other processes that torchrun started, if any; return the ranks and this process's device.

    By default, without `sp` and `dp`, all ranks share each sequence. `planned` ranks of this machine are not there, and
    the process is the first of them. GPUs, one per process (LOCAL_RANK), communicate by NCCL; hosts by gloo. Raises
    ConfigError, on every rank and before any work, where dp x sp is not the number of processes.
    """
    world = planned or int(os.environ.get("WORLD_SIZE", "1"))
    sp, _ = divide(world, sp, dp)
    where = select_device(device)
    if world == 1:
        if started_by_torchrun():
            unwind_on_signals()
        return Ranks(), where
    gpu = None
    backend = "gloo"
    if where.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"  # hosts agree on what to do next without their GPUs
        where = gpu = _own_gpu(str(planned - 1) if planned else os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(where)
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives, which a timeout prints
        if torch.version.hip is None:  # there, it hangs
            # of the groups' communicators and that of all
            os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    if planned:
        return Ranks(0, world, sp, planned=True), where
    check_agent()
    _allow_files(2 * world + _FILES)  # gloo connects every rank with all others
    with _silent_stdout():
        # NCCL guesses its GPU if not told
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=gpu)
        rank = dist.get_rank()
        group = None
        # another group of the same ranks would take another half a gigabyte of the GPU
        if sp == world:
            group = dist.group.WORLD
        elif sp > 1:
            group, _ = dist.new_subgroups(sp)
    if gpu is not None:
        for used in filter(None, (dist.group.WORLD, group)):
            used._get_backend(gpu)._set_default_timeout(GPU_TIMEOUT)  # of NCCL alone
    unwind_on_signals()  # from now on there is something to clean up and to save
    return Ranks(rank, world, sp, group), where


def _allow_files(number: int) -> None:
    """Raise the limit on this process's open files to `number`, or as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # some systems have other limits as well
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Discard what C++ code prints. Gloo, until torch 2.9 at least, reports new connections on stdout."""
    try:
        stdout = os.dup(1)
        nowhere = os.open(os.devnull, os.O_WRONLY)
    except OSError:  # stdout is closed
        yield
        return
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


def _own_gpu(local_rank: str) -> torch.device:
    """Return the GPU of a LOCAL_RANK. Raises ConfigError where it has none: NCCL would hang if two ranks shared one."""
    count = torch.cuda.device_count()
    if not local_rank.isdigit() or int(local_rank) >= count:
        raise ConfigError(
            f"LOCAL_RANK is {local_rank!r} and this machine has {count} CUDA devices, one for each process: start as "
            "many with --nproc or torchrun, or take --device cpu"
        )
    return torch.device("cuda", int(local_rank))


def leave() -> None:
    """End a job that went well. Without it, the first rank to finish may break the others' last collective."""
    if dist.is_initialized():
        Ranks(dist.get_rank(), dist.get_world_size()).barrier()
        dist.destroy_process_group()
