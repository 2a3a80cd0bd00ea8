"""The job `bench`: how fast an op runs on this machine, one row a measurement, each given out as soon as it is known.

A row's `seconds` is the median of `repeats` runs after one warm-up run; where time runs out before the second run, it
is that of the warm-up. Rates count executed FLOPs, not those that dense attention would need, and causal attention as
half. A row that would not fit memory or time is not run: its status says so, and `reason` why.

Another op is one more function in `OPS`, from (settings, impl, direction, seq) to a `Case`.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longnet_cli.benchmark.attention import attention
from longnet_cli.benchmark.exchange import exchange
from longnet_cli.benchmark.loop import loop
from longnet_cli.benchmark.measurement import Case, Measurement, Stream, measure, measure_stream
from longnet_cli.benchmark.model import model, train
from longnet_cli.benchmark.settings import Settings
from longnet_cli.errors import ConfigError
from longnet_cli.runtime.device import check_kernel, free_memory, resolve_dtype, select_device

OPS: dict[str, Callable[[Settings, str, str, int], Case]] = {
    "attention": attention,
    "model": model,
    "train": train,
    "loop": loop,
    "exchange": exchange,
}
_IMPLS = {"attention": ("dilated", "dense", "kernels"), "loop": ("train", "bare")}
DIRECTIONS = ("forward", "backward")
_ONE_DIRECTION = {"model": ("forward",), "train": ("backward",), "loop": ("backward",)}  # of a net, not of attention

_PROBE_SEQ = 2048  # tokens of the run that estimates a long one
_LONG_FLOPS = 10**11  # a second or so on a slow CPU: from here on an estimate is worth a probe
_SHORTEST_REACH = 4096  # tokens of a dense run that is measured in place of a longer one

OnStart = Callable[[Case, float | None], None]


def bench(
    seqs: Sequence[int],
    *,
    op: str = "attention",
    impls: Sequence[str] | None = None,
    directions: Sequence[str] | None = None,
    repeats: int = 3,
    max_time: float | None = None,
    max_dense_time: float | None = None,
    on_start: OnStart | None = None,
    on_tokens: Callable[[int], None] | None = None,
    **settings: Any,
) -> Iterator[Measurement]:
    """Measure every combination of `seqs` (tokens), `directions` and `impls`, in that order of nesting.

    op: attention, of random queries, keys and values; model, tokens in and their loss out; train, tokens in and the
        gradients out; loop, steps of training. These have one direction. exchange, keys and values between several
        ranks, which all call this and get the same rows.
    impls: dilated (ours), dense (torch's), kernels (the kernel calls that dilated makes, without what it does between);
        of loop, train (the whole training loop) and bare (its gradients and updates alone). By default the first two.
    settings: those of `Settings.resolve`. A causal forward of a million tokens or more, or of more than `chunk`, is
        streamed through a KV cache and run once: a row for each decade of its positions, then one for the whole.
    max_time: seconds for all rows. A streamed run ends there; of the others, none begins that is expected to overrun.
    max_dense_time: seconds of a dense run beyond which it is skipped, estimated from the rate of shorter ones; the
        longest power of two that the limits allow is measured in its place, once.
    on_start: told of each case before it runs, with the estimated seconds of one run, None where nobody knows.
    on_tokens: told of each chunk of a streamed run.

    Raises ConfigError at once for settings that do not fit, before any row.
    """
    if op not in OPS:
        raise ConfigError(f"unknown op {op!r}: choose from {', '.join(OPS)}")
    impls = impls_of(op)[:2] if impls is None else impls
    directions = directions_of(op) if directions is None else directions
    for what, given, known in (
        (f"implementation of --op {op}", impls, impls_of(op)),
        (f"direction of --op {op}", directions, directions_of(op)),
    ):
        for name in given:
            if name not in known:
                raise ConfigError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
    _refuse_what_does_nothing(op, settings)
    world = settings["ranks"].world if settings.get("ranks") else 1
    if (op == "exchange") != (world > 1):
        one, several = "--op exchange takes several processes", f"--op {op} measures one process, not {world}"
        raise ConfigError(f"{one}: give --nproc 2 or more, or use torchrun" if world == 1 else several)
    if repeats < 1:
        raise ConfigError(f"repeats must be at least 1, not {repeats}")
    found = Settings.resolve(seqs, **settings)
    order = [(impl, direction, seq) for seq in seqs for direction in directions for impl in impls]

    def make(impl: str, direction: str, seq: int) -> Case:
        return OPS[op](found, impl, direction, seq)

    limits = _Limits(found.device, repeats, max_time, max_dense_time, found.ranks.largest)
    return _measure_all(make, order, limits, on_start, on_tokens)


def _refuse_what_does_nothing(op: str, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting that the rows would not show."""
    if settings.get("model") is not None:
        if op not in _ONE_DIRECTION:
            raise ConfigError(f"--op {op} has no model: --model is for --op {', '.join(_ONE_DIRECTION)}")
        given = [name for name in ("heads", "head_dim", "layers", "vocab") if settings.get(name) is not None]
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(f"{names}: a saved model has its own, leave it out or leave out --model")
    if op in _ONE_DIRECTION and not settings.get("causal", True):
        raise ConfigError(f"--op {op} runs causal language models: --bidirectional is for --op attention and exchange")


def machine(device: str = "auto", dtype: str = "auto", head_dim: int = 64) -> dict[str, str]:
    """What a reader of the rows must know of the machine: its processor, cores, torch, kernel and the date (UTC)."""
    where = select_device(device)
    dtype = resolve_dtype(dtype, where)
    return {
        "processor": torch.cuda.get_device_name(where) if where.type == "cuda" else _cpu_name(),
        "cores": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": f"torch {torch.__version__}",
        "dtype": dtype,
        "kernel": f"kernel {check_kernel(where, dtype, head_dim)}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def impls_of(op: str) -> tuple[str, ...]:
    """The implementations of an op, of which the first two are compared by default."""
    return _IMPLS.get(op, ("dilated", "dense"))


def directions_of(op: str) -> tuple[str, ...]:
    """The directions of an op: attention's two, or the one that a net is run in."""
    return _ONE_DIRECTION.get(op, DIRECTIONS)


class _Limits:
    """What a run may take: the time for all rows and for a dense one."""

    def __init__(
        self,
        device: torch.device,
        repeats: int,
        max_time: float | None,
        max_dense_time: float | None,
        largest: Callable[[float], float],
    ) -> None:
        self.device, self.repeats, self.largest = device, repeats, largest
        self.deadline = time.perf_counter() + (float("inf") if max_time is None else max_time)
        self.dense = float("inf") if max_dense_time is None else max_dense_time

    def seconds(self, case: Case) -> float:
        remaining = self.deadline - time.perf_counter()
        return min(remaining, self.dense) if case.row.impl == "dense" else remaining


def _measure_all(
    make: Callable[[str, str, int], Case],
    order: Sequence[tuple[str, str, int]],
    limits: _Limits,
    on_start: OnStart | None,
    on_tokens: Callable[[int], None] | None,
) -> Iterator[Measurement]:
    rates = _Rates()

    def run(case: Case, estimate: float | None) -> Iterator[Measurement]:
        if on_start:
            on_start(case, estimate)
        if isinstance(case, Stream):
            for row in measure_stream(case, limits.device, limits.deadline, on_tokens):
                rates.add(row)
                yield row
            return
        row = measure(case, limits.device, limits.repeats, limits.deadline, limits.largest)
        rates.add(row)
        yield row

    for impl, direction, seq in order:
        case = make(impl, direction, seq)
        if limits.largest(time.perf_counter() >= limits.deadline):  # what one rank does, all do
            yield replace(case.row, reason="the time is over")
            continue
        if case.flops > _LONG_FLOPS and seq > _PROBE_SEQ and not rates.knows(case):
            rates.add(measure(make(impl, direction, case.row.chunk or _PROBE_SEQ), limits.device, 1, limits.deadline))
        estimate, free, allowed = rates.seconds(case), free_memory(limits.device), limits.seconds(case)
        if free is not None and limits.largest(case.memory_bytes > free):
            reason = f"needs {_gib(case.memory_bytes)} of memory, {_gib(free)} are free"
            yield replace(case.row, status="skipped", reason=reason)
        elif estimate is not None and estimate > allowed and not isinstance(case, Stream):
            status = "skipped" if impl == "dense" else "stopped"
            reason = f"takes about {estimate:.3g} s and may take {allowed:.3g} s"
            yield replace(case.row, status=status, reason=reason)
        else:
            yield from run(case, estimate)
            continue
        if impl == "dense" and estimate is not None:  # then as far as it can go
            by_memory = case.memory_bytes / free if free else 0.0
            share = max(1.0, (estimate / allowed) ** 0.5, by_memory)
            reach = 1 << int(0.95 * seq / share).bit_length() - 1
            if reach >= max(_SHORTEST_REACH, 2 * rates.longest(case)):
                shorter = make(impl, direction, reach)
                yield from run(shorter, rates.seconds(shorter))


class _Rates:
    """FLOPs per second so far. The best one counts, so that short runs, mostly overhead, do not frighten long ones."""

    def __init__(self) -> None:
        self.rows: list[Measurement] = []

    def add(self, row: Measurement) -> None:
        self.rows.append(row)

    def _of(self, case: Case) -> list[Measurement]:
        like = (case.row.impl, case.row.direction)
        return [row for row in self.rows if (row.impl, row.direction) == like and row.flops_per_second]

    def knows(self, case: Case) -> bool:
        return bool(self._of(case))

    def longest(self, case: Case) -> int:
        """Tokens of the longest run that was measured."""
        return max((row.seq for row in self._of(case)), default=0)

    def seconds(self, case: Case) -> float | None:
        """Estimated seconds of the set-up and one run."""
        best = max((row.flops_per_second or 0.0 for row in self._of(case)), default=None)
        return (case.flops + case.setup_flops) / best if best else None


def _cpu_name() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"
