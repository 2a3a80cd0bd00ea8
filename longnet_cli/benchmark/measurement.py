"""One row of a benchmark: what is to be measured, the clock and the memory around it."""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

FIRST_DECADE = 10**6  # tokens: a streamed run reports each power of ten from here on


@dataclass(frozen=True)
class Measurement:
    """One row. Times in seconds, sizes in bytes; what was not measured, or does not apply, is None.

    `status`: ok; oom (memory ran out); skipped (would not fit memory, or the time for dense); stopped (out of time). A
    streamed run, `chunk` tokens at a time, also gives a row for each decade of its positions, [start, stop).
    `cpu_seconds` is the time of all its threads, which says on a shared machine whether others slowed the clock.
    `bytes` is what one of several `ranks` receives, the one with the most. `peak_rss_bytes` is the process's peak from
    making the inputs to the last run; on a GPU, that of torch's allocator.
    """

    op: str
    impl: str
    direction: str
    seq: int
    status: str = "stopped"
    seconds: float | None = None
    tokens_per_second: float | None = None
    flops_per_second: float | None = None
    peak_rss_bytes: int | None = None
    cache_bytes: int | None = None
    heads: int = 0
    head_dim: int = 0
    batch: int = 1
    causal: bool = True
    dtype: str = "fp32"
    device: str = "cpu"
    kernel: str | None = None
    pattern: str | None = None
    reason: str | None = None
    chunk: int | None = None
    start: int | None = None
    stop: int | None = None
    cpu_seconds: float | None = None
    bytes: int | None = None
    ranks: int | None = None


@dataclass(frozen=True)
class Case:
    """A row to be measured. `start` makes the inputs and returns the run that the clock is put on."""

    row: Measurement
    tokens: int  # of one run
    flops: float  # of one run
    setup_flops: float  # of `start`
    memory_bytes: int  # estimated peak, beyond what the process has already
    start: Callable[[], Callable[..., object]]


@dataclass(frozen=True)
class Stream(Case):
    """One sequence that is run once, `row.chunk` tokens at a time: `start` returns the run of the next so many."""

    flops_to: Callable[[int], float]  # of its first so many tokens


@dataclass(frozen=True)
class Clocked(Case):
    """Only a part of each run counts: the run returns its seconds."""

    start: Callable[[], Callable[[], float]]


def measure(
    case: Case, device: torch.device, repeats: int, deadline: float, largest: Callable[[float], float] = float
) -> Measurement:
    """Run the case: warm-up, then `repeats` runs, or as many as end before the deadline.

    `largest` is `Ranks.largest` where several ranks measure together: the slowest one's seconds count, on all.
    """
    seconds: list[float] = []
    try:
        with PeakMemory(device) as peak:
            timed = case.start() if isinstance(case, Clocked) else partial(_timed, case.start(), device)
            warm_up = largest(timed())
            while len(seconds) < repeats and not largest(time.perf_counter() + warm_up > deadline):
                seconds.append(largest(timed()))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        return replace(case.row, status="oom", reason="memory ran out")
    median = statistics.median(seconds or [warm_up])
    return replace(
        case.row,
        status="ok",
        seconds=median,
        tokens_per_second=case.tokens / median,
        flops_per_second=case.flops / median if case.flops else None,
        peak_rss_bytes=peak.bytes,
    )


def measure_stream(
    case: Stream, device: torch.device, deadline: float, on_tokens: Callable[[int], None] | None
) -> Iterator[Measurement]:
    """Run the sequence to its end: a row for each decade of positions as it is passed, and the whole one at last.

    At the deadline and at Ctrl-C the run ends as "stopped", with what was measured until then; so it does, as "oom",
    where memory runs out.
    """
    row, total = case.row, case.row.seq
    chunk = row.chunk or total
    interrupted: KeyboardInterrupt | None = None
    status, reason = "ok", None

    def measured(first: int, last: int, seconds: float, cpu: float, **more: object) -> Measurement:
        flops = case.flops_to(last) - case.flops_to(first)
        rates = {"tokens_per_second": row.batch * (last - first) / seconds, "flops_per_second": flops / seconds}
        values = {"status": "ok", "seconds": seconds, "cpu_seconds": cpu, "peak_rss_bytes": peak.bytes, **rates, **more}
        return replace(row, **values)  # type: ignore[arg-type]

    position, decade, passed = 0, FIRST_DECADE, (0, 0.0, 0.0)  # where and when the decade began: clock, threads
    begin, threads = time.perf_counter(), time.process_time()
    with PeakMemory(device) as peak:
        try:
            case.start()(chunk)  # warm-up
            run = case.start()
            begin, threads = time.perf_counter(), time.process_time()
            while position < total:
                # a chunk ends where a decade does, and the next one where it would have ended
                size = min(chunk - position % chunk, min(decade, total) - position)
                run(size)
                synchronize(device)
                position += size
                now, spent = time.perf_counter() - begin, time.process_time() - threads
                if on_tokens:
                    on_tokens(size)
                if total > FIRST_DECADE and position in (decade, total):
                    first, *before = passed
                    yield measured(first, position, now - before[0], spent - before[1], start=first, stop=position)
                    passed, decade = (position, now, spent), decade * 10
                if position < total and now + begin >= deadline:
                    status, reason = "stopped", f"the time is over after {position} tokens"
                    break
        except KeyboardInterrupt as error:
            status, reason, interrupted = "stopped", f"interrupted after {position} tokens", error
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            status, reason = "oom", f"memory ran out after {position} tokens"
        now, spent = time.perf_counter() - begin, time.process_time() - threads
    if position:
        part = {} if position == total else {"start": 0, "stop": position}
        yield measured(0, position, now, spent, status=status, reason=reason, **part)
    elif status == "oom":
        yield replace(row, status=status, reason=reason)
    if interrupted:
        raise interrupted


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, whose results are freed off the clock."""
    synchronize(device)
    begin = time.perf_counter()
    result = run()
    synchronize(device)
    seconds = time.perf_counter() - begin
    del result
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """The most memory in use since the block began, in `bytes`: resident memory of the process, or that of the GPU.

    Linux can reset its own high-water mark (VmHWM). Where a container forbids that, a thread looks every few
    milliseconds; where there is no /proc, `bytes` is None. After the block it stays what it was at its end.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seen: int | None = None  # by the thread, or at the end
        self.running = False
        self.sampler: threading.Thread | None = None
        self.done = threading.Event()

    def __enter__(self) -> PeakMemory:
        self.running = True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        with suppress(OSError, AttributeError):  # glibc keeps what earlier rows freed, and it would count here
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.sampler = threading.Thread(target=self._sample, daemon=True)
            self.sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seen = self.bytes
        self.running = False
        if self.sampler:
            self.done.set()
            self.sampler.join()

    @property
    def bytes(self) -> int | None:
        if not self.running or self.sampler:
            return self.seen
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

    def _sample(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        with suppress(OSError):
            while True:
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
                self.seen = max(self.seen or 0, resident)
                if self.done.wait(0.005):
                    return


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error)
