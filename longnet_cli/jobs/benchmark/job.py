"""The job `bench`: how fast an op runs on this machine. Each measurement is a row, given out as soon as it is known.

A row's `seconds` is the median of `repeats` runs after one warm-up run. If time runs out before the second run, it is
the time of the warm-up. Rates count executed FLOPs, with causal attention as half, and not the FLOPs that dense
attention would need. A case that would not fit in memory or time is not run: the row's `status` says so, and its
`reason` says why.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from longnet_cli.attention.kernels import select_kernel
from longnet_cli.basics.errors import is_out_of_memory
from longnet_cli.running.device import DTYPES, PeakMemory, free_memory, trim_memory

from .cases import Case, Measurement, Settings, attention, model, train

CASES: dict[str, Callable[[Settings, str, str, int], Case]] = {  # (settings, impl, direction, seq) -> a case
    "attention": attention,
    "model": model,
    "train": train,
}
FIRST_DECADE = 10**6  # tokens: a streamed run reports each power of ten from here on
_PROBE_SEQ = 2048  # tokens of the run that estimates a long one
_LONG_FLOPS = 10**11  # a second or so on a slow CPU: a longer run is worth a probe
_SHORTEST_REACH = 4096  # fewest tokens of a dense run that is measured in place of a longer one

OnStart = Callable[[Case, float | None], None]
OnTokens = Callable[[int], None]


def bench(
    settings: Settings,
    *,
    on_start: OnStart = lambda case, seconds: None,
    on_tokens: OnTokens = lambda tokens: None,
) -> Iterator[Measurement]:
    """Measure every case of the settings, row by row.

    A streamed case has a row for each decade of its positions, then one for the whole. If a dense case would take too
    long or too much memory, the longest power of two that the limits allow is measured in its place, once.

    on_start: called with each case before it runs, and with the estimated seconds of one run, None if unknown.
    on_tokens: called with the number of tokens of each chunk of a streamed run.
    """
    for row in _RunningBench(settings, on_start, on_tokens).rows():
        yield replace(row, machine=device_name(settings.device), date=_today())


class _RunningBench:
    """A benchmark in progress: its deadline, and the rows so far, whose rates tell how long the next cases take."""

    def __init__(self, s: Settings, on_start: OnStart, on_tokens: OnTokens) -> None:
        self.s, self.on_start, self.on_tokens = s, on_start, on_tokens
        self.done: list[Measurement] = []
        self.deadline = time.perf_counter() + (math.inf if s.max_time is None else s.max_time)

    def rows(self) -> Iterator[Measurement]:
        for seq, direction, impl in product(self.s.seq, self.s.direction, self.s.impl):
            case = self._case(impl, direction, seq)
            if time.perf_counter() >= self.deadline:
                yield replace(case.row, reason="the time is over")
                continue
            if case.flops(seq) > _LONG_FLOPS and seq > _PROBE_SEQ and not self._like(case):
                probe, free = self._case(impl, direction, case.row.chunk or _PROBE_SEQ), free_memory(self.s.device)
                if free is None or probe.memory_bytes <= free:
                    self.done.append(measure(probe, self.s.model_copy(update={"repeats": 1}), self.deadline))
            share, refusal = self._fit(case)
            if refusal is None:
                yield from self._run(case)
                continue
            yield refusal
            if impl == "dense" and self._like(case):  # then run a shorter one that fits
                reach = 1 << max(1, int(0.95 * seq / share)).bit_length() - 1
                if reach >= max(_SHORTEST_REACH, 2 * max(row.seq for row in self._like(case))):
                    yield from self._run(self._case(impl, direction, reach))

    def _case(self, impl: str, direction: str, seq: int) -> Case:
        return CASES[self.s.op](self.s, impl, direction, seq)

    def _run(self, case: Case) -> Iterator[Measurement]:
        self.on_start(case, self._seconds(case))
        streamed = measure_stream(case, self.s, self.deadline, self.on_tokens) if case.streamed else None
        for row in streamed or [measure(case, self.s, self.deadline)]:
            self.done.append(row)
            yield row

    def _fit(self, case: Case) -> tuple[float, Measurement | None]:
        """Return by how much a dense sequence is too long, and the row that says why the case is not run, or None."""
        dense = case.row.impl == "dense"
        free, seconds = free_memory(self.s.device), self._seconds(case)
        left = self.deadline - time.perf_counter()
        allowed = min(left, math.inf if self.s.max_dense_time is None else self.s.max_dense_time) if dense else left
        over_memory = case.memory_bytes / max(1, free) if free is not None else 0.0
        over_time = seconds / max(1e-9, allowed) if seconds is not None and not case.streamed else 0.0
        share = max(1.0, over_memory, math.sqrt(over_time))
        if free is not None and over_memory > 1:
            reason = f"needs {_gib(case.memory_bytes)} of memory, {_gib(free)} are free"
            return share, replace(case.row, status="skipped", reason=reason)
        if over_time > 1:
            reason = f"would take about {seconds:.3g} s, and {allowed:.3g} s are allowed"
            return share, replace(case.row, status="skipped" if dense else "stopped", reason=reason)
        return share, None

    def _like(self, case: Case) -> list[Measurement]:
        """Return the rows so far of the same implementation and direction that have a rate."""
        like = (case.row.impl, case.row.direction)
        return [row for row in self.done if (row.impl, row.direction) == like and row.flops_per_second]

    def _seconds(self, case: Case) -> float | None:
        """Estimate the seconds of one run from the best rate: short runs are mostly overhead. None if unknown."""
        best = max((row.flops_per_second or 0.0 for row in self._like(case)), default=None)
        return case.flops(case.row.seq) / best if best else None


def measure(case: Case, s: Settings, deadline: float) -> Measurement:
    """Run the case: a warm-up, then `s.repeats` runs, or as many as end before the deadline. The median counts."""
    seconds: list[float] = []
    try:
        trim_memory(s.device)  # what earlier rows freed would count here
        with PeakMemory(s.device) as peak:
            run = case.start()
            while len(seconds) <= s.repeats and (not seconds or time.perf_counter() + seconds[0] <= deadline):
                seconds.append(_seconds(run, s.device))
            return case.measured(0, case.row.seq, statistics.median(seconds[1:] or seconds), peak)
    except (RuntimeError, MemoryError) as error:
        return replace(case.row, status="oom", reason=_out_of_memory(error))


def measure_stream(case: Case, s: Settings, deadline: float, on_tokens: OnTokens) -> Iterator[Measurement]:
    """Run the sequence to its end. Yield a row for each decade of positions as it is passed, then one for the whole.

    At the deadline and at Ctrl-C, the run ends as "stopped", with a row of what was measured so far. If memory runs
    out, it ends in the same way as "oom".
    """
    total, chunk = case.row.seq, case.row.chunk or case.row.seq
    position, decade, status, reason = 0, FIRST_DECADE, "ok", None
    interrupted: KeyboardInterrupt | None = None
    trim_memory(s.device)
    with PeakMemory(s.device) as peak:
        whole = part = _Clock(0)
        try:
            case.start()(chunk)  # warm-up
            run = case.start()
            whole = part = _Clock(0)
            while position < total and status == "ok":
                # a decade cuts a chunk in two, so that later chunks end where they would have ended
                size = min(chunk - position % chunk, min(decade, total) - position)
                run(size)
                _synchronize(s.device)
                position += size
                on_tokens(size)
                if total > FIRST_DECADE and position in (decade, total):
                    place = {"start": part.position, "stop": position}
                    yield case.measured(part.position, position, peak=peak, **place, **part.spent())
                    part, decade = _Clock(position), decade * 10
                if position < total and time.perf_counter() >= deadline:
                    status, reason = "stopped", f"the time is over after {position} tokens"
        except KeyboardInterrupt as error:
            status, reason, interrupted = "stopped", f"interrupted after {position} tokens", error
        except (RuntimeError, MemoryError) as error:
            status, reason = "oom", f"{_out_of_memory(error)} after {position} tokens"
        if position:
            reached = {} if position == total else {"start": 0, "stop": position}
            yield case.measured(0, position, peak=peak, status=status, reason=reason, **reached, **whole.spent())
        elif status == "oom":
            yield replace(case.row, status=status, reason=reason)
    if interrupted:
        raise interrupted


class _Clock:
    """A clock that starts at a position. It counts seconds, and the CPU seconds of all threads."""

    def __init__(self, position: int) -> None:
        self.position, self._began, self._threads = position, time.perf_counter(), time.process_time()

    def spent(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._began, "cpu_seconds": time.process_time() - self._threads}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one run, without the time to free its results."""
    _synchronize(device)
    begin = time.perf_counter()
    _ = run()  # kept
    _synchronize(device)
    return time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _out_of_memory(error: Exception) -> str:
    """Return that memory ran out, also of a tensor with more bytes than torch can count. Raises other errors again."""
    if is_out_of_memory(error) or "calculation overflowed" in str(error):
        return "memory ran out"
    raise error


def machine(s: Settings) -> str:
    """Describe the machine for a reader of the rows: its processor, cores, torch, kernel and the date (UTC)."""
    kernel = select_kernel(s.device, DTYPES[s.dtype], s.head_dim).name
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{device_name(s.device)}, {cores}, torch {torch.__version__}, {s.dtype}, kernel {kernel}, {_today()}"


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"
