"""One row of a benchmark: the case to measure, its time and its memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from longnet_cli.attention import Pattern
from longnet_cli.attention.notation import format_levels
from longnet_cli.basics.errors import is_out_of_memory
from longnet_cli.running.device import PeakMemory, trim_memory

from .settings import Settings

FIRST_DECADE = 10**6  # tokens: a streamed run reports each power of ten from here on


@dataclass(frozen=True)
class Measurement:
    """One row. Times are in seconds, sizes in bytes. A value that was not measured, or does not apply, is None.

    `status`: ok; oom (memory ran out); skipped (would not fit in memory, or in the time for dense); stopped (out of
    time). A streamed run, `chunk` tokens at a time, also gives a row for each decade of its positions, [start, stop).
    `cpu_seconds` is the CPU time of all threads: on a shared machine, it shows whether other processes slowed the run.
    `peak_rss_bytes` is the process's peak from making the inputs to the last run; on a GPU, the peak of torch's
    allocator. `model` is the name of a saved model, with its commit if it is on a hub.
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
    model: str | None = None

    @classmethod
    def of(
        cls, s: Settings, impl: str, direction: str, seq: int, pattern: Pattern | None = None, **values: Any
    ) -> Measurement:
        """Return the row of a case before it is measured: the settings that all rows share, and its own `values`."""
        shared = {name: getattr(s, name) for name in ("heads", "head_dim", "batch", "causal", "dtype")}
        levels = format_levels(pattern) if pattern else None  # 2048/1,4096/2
        return cls(s.op, impl, direction, seq, **{**shared, "device": str(s.device), "pattern": levels, **values})


@dataclass(frozen=True)
class Case:
    """A row to be measured. `start` makes the inputs and returns the function whose calls are timed.

    A `streamed` case is one sequence that is run once, `row.chunk` tokens at a time. Its function takes the number of
    tokens to run next.
    """

    row: Measurement
    flops: Callable[[int], float]  # of the first n tokens
    memory_bytes: int  # estimated peak, beyond what the process has already
    start: Callable[[], Callable[..., object]]
    streamed: bool = False

    def measured(self, first: int, last: int, seconds: float, peak: PeakMemory, **values: Any) -> Measurement:
        """Return the row of positions [first, last), which took `seconds`."""
        flops = self.flops(last) - self.flops(first)
        numbers = {
            "status": "ok",
            "seconds": seconds,
            "tokens_per_second": self.row.batch * (last - first) / seconds,
            "flops_per_second": flops / seconds if flops else None,
            "peak_rss_bytes": peak.bytes,
        }
        return replace(self.row, **{**numbers, **values})


def measure(case: Case, s: Settings, deadline: float) -> Measurement:
    """Run the case: a warm-up, then `s.repeats` runs, or as many as end before the deadline. The median counts."""
    seconds: list[float] = []
    try:
        trim_memory(s.device)  # what earlier rows freed would count here
        with PeakMemory(s.device) as peak:
            run = case.start()
            warm_up = _seconds(run, s.device)
            while len(seconds) < s.repeats and time.perf_counter() + warm_up <= deadline:
                seconds.append(_seconds(run, s.device))
            return case.measured(0, case.row.seq, statistics.median(seconds or [warm_up]), peak)
    except (RuntimeError, MemoryError) as error:
        if not _too_large(error):
            raise
        return replace(case.row, status="oom", reason="memory ran out")


def measure_stream(case: Case, s: Settings, deadline: float, on_tokens: Callable[[int], None]) -> Iterator[Measurement]:
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
                    yield case.measured(
                        part.position, position, peak=peak, start=part.position, stop=position, **part.spent()
                    )
                    part, decade = _Clock(position), decade * 10
                if position < total and time.perf_counter() >= deadline:
                    status, reason = "stopped", f"the time is over after {position} tokens"
        except KeyboardInterrupt as error:
            status, reason, interrupted = "stopped", f"interrupted after {position} tokens", error
        except (RuntimeError, MemoryError) as error:
            if not _too_large(error):
                raise
            status, reason = "oom", f"memory ran out after {position} tokens"
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

    def spent(self) -> dict[str, Any]:
        return {"seconds": time.perf_counter() - self._began, "cpu_seconds": time.process_time() - self._threads}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one run, without the time to free its results."""
    _synchronize(device)
    begin = time.perf_counter()
    result = run()
    _synchronize(device)
    seconds = time.perf_counter() - begin
    del result
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _too_large(error: Exception) -> bool:
    """Return whether memory ran out, or a tensor would have more bytes than torch can count."""
    return is_out_of_memory(error) or "calculation overflowed" in str(error)
