"""The job `bench`: how fast attention is on this machine. Each measurement is a row, given out as soon as it is known.

    Settings, each option with bounds and a default --case_of--> Case --measure, measure_stream--> Measurement, a row

What is measured is dilated attention of random q, k, v, forward or backward, beside dense attention.

The `seconds` of a row are the median of `repeats` runs after one warm-up run. If time runs out before the second run,
they are those of the warm-up. Rates count executed FLOPs, with causal attention as half, and not the FLOPs that dense
attention would need. A case that would not fit in memory or time is not run: the `status` of its row says so, and its
`reason` says why.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from longnet_cli.attention import KVCache, Pattern, dilated_attention
from longnet_cli.attention.branches import BACKWARD_FLOPS, attention_flops
from longnet_cli.attention.kernels import select_kernel
from longnet_cli.attention.notation import format_levels
from longnet_cli.basics.configuration import validate, without_none
from longnet_cli.basics.errors import is_out_of_memory
from longnet_cli.basics.events import Events
from longnet_cli.basics.sizes import format_bytes
from longnet_cli.running import device as machines
from longnet_cli.running.device import DTYPES, free_memory
from longnet_cli.running.reader import BENCH_CHUNK, GPU_BENCH_CHUNK, chunk_of

# From so many tokens on, a causal forward pass is streamed, and the defaults are for long sequences.
LONG = 10**6
# Tokens. With the most heads of the largest size, int64 still counts the numbers of a sequence.
LONGEST = 1 << 40

Impl = Literal["dilated", "dense"]
Direction = Literal["forward", "backward"]
Size = Annotated[int, Field(ge=1, le=1 << 32)]
Seconds = Annotated[float, Field(ge=0)]


def _option(name: str) -> str:
    """Return the name of an option in errors: `head_dim` -> `--head-dim`."""
    return f"--{name.replace('_', '-')}"


class Settings(BaseModel):
    """Immutable settings; `Settings.of(seq=[4096], heads=4)` fills in the rest. Errors name options of `longnet bench`.

    Every combination of `seq` (tokens), `direction` and `impl` is a case, in that order of nesting.

    impl: dilated (ours) or dense (torch's).
    pattern: None is one that suits the length (`pattern_for`).
    chunk: tokens per chunk of longer causal sequences. A forward pass that is cut this way is streamed, see `streams`.
    max_time: seconds for all rows. A streamed run ends then; another run does not start if it is expected to overrun.
    max_dense_time: seconds; a dense run that would take longer, by the rate of shorter ones, is skipped.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        arbitrary_types_allowed=True,
        alias_generator=_option,
    )

    seq: tuple[Annotated[int, Field(ge=1, le=LONGEST)], ...]
    impl: tuple[Impl, ...] = ("dilated", "dense")
    direction: tuple[Direction, ...] = ("forward",)
    batch: Size = 1
    heads: Annotated[int, Field(ge=1, le=1024)]  # limited, as Python loops over heads
    head_dim: Annotated[int, Field(ge=1, le=2048)]
    causal: bool = True
    pattern: Pattern | None = None
    chunk: Annotated[int, Field(ge=1)] | None = None
    repeats: Annotated[int, Field(ge=1, le=10**6)] = 3
    max_time: Seconds = math.inf
    max_dense_time: Seconds = math.inf
    dtype: Literal["fp32", "bf16", "fp16"]
    device: torch.device

    @classmethod
    def of(cls, **options: Any) -> Settings:
        """Return the settings for these options; None stands for the default. Raises ConfigError.

        The defaults are the paper's 12 heads of 64. From LONG tokens on, a CPU gets 2 heads of 32: two cores read a
        billion tokens in half an hour.
        """
        asked = without_none(options)
        device = machines.select_device(asked.get("device", "auto"))
        is_small = device.type == "cpu" and max(asked.get("seq", ()), default=0) >= LONG
        heads, head_dim = (2, 32) if is_small else (12, 64)
        settings = {
            "heads": heads,
            "head_dim": head_dim,
            **asked,
            "device": device,
            "dtype": machines.resolve_dtype(asked.get("dtype", "auto"), device),
        }
        named = {_option(name): value for name, value in settings.items()}
        return validate(cls, named, "longnet bench")

    @model_validator(mode="after")
    def _check(self) -> Settings:
        """Raise ValueError for settings that cannot be measured, or that the rows would not show."""
        for w, r in self.pattern_for(max(self.seq)).levels:
            if max(w, r) >= 2 * LONGEST:
                raise ValueError(
                    f"a segment of {w} tokens, dilated {r} times, is longer than any sequence"
                )
        if self.pattern and self.pattern.chosen:
            raise ValueError("--pattern: a text names chosen blocks, and bench reads none")
        machines.check_kernel(self.device, self.dtype, self.head_dim)
        return self

    def pattern_for(self, seq: int) -> Pattern:
        """Return the requested pattern, otherwise one that suits `seq` tokens.

        That is the paper's or, if some sequence has LONG tokens, a geometric one, on a CPU from 256 on.
        """
        if self.pattern == Pattern.dense():
            return Pattern((seq,), (1,))
        if self.pattern:
            return self.pattern
        if max(self.seq) < LONG:
            return Pattern.paper()
        return Pattern.geometric(seq, 256 if self.device.type == "cpu" else 2048)

    def streams(self, seq: int) -> bool:
        """Return whether a causal forward pass is streamed: `seq` exceeds the chunk or, without one, reaches LONG."""
        return self.causal and seq > (self.chunk or LONG - 1)

    def chunk_for(self, seq: int) -> int:
        """Return the tokens per chunk of a streamed run."""
        default = GPU_BENCH_CHUNK if self.device.type == "cuda" else BENCH_CHUNK
        return min(seq, chunk_of(self.chunk, default))


@dataclass(frozen=True)
class Measurement:
    """One row. Times are in seconds, sizes in bytes. A value that was not measured, or does not apply, is None.

    `status`: ok; oom (memory ran out); skipped (would not fit in memory, or in the time for dense); stopped (out of
    time). A streamed run, `chunk` tokens at a time, also gives a row for each decade of its positions, [start, stop).
    `cpu_seconds` is the CPU time of all threads: on a shared machine, it shows whether other processes slowed the run.
    `peak_rss_bytes` is the process's peak from making the inputs to the last run; on a GPU, the peak of torch's
    allocator. `machine` is the name of the processor or GPU; `date`, the day in UTC.
    """

    impl: Impl
    direction: Direction
    seq: int
    op: str = "attention"
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
    machine: str | None = None
    date: str | None = None


@dataclass(frozen=True, eq=False)
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

    def measured(
        self,
        begin: int,
        end: int,
        peak: int | None,
        *,
        seconds: float,
        status: str = "ok",
        **values: Any,
    ) -> Measurement:
        """Return the row of positions [begin, end), which took `seconds`."""
        flops = self.flops(end) - self.flops(begin)
        return replace(
            self.row,
            status=status,
            seconds=seconds,
            tokens_per_second=self.row.batch * (end - begin) / seconds,
            flops_per_second=flops / seconds or None,
            peak_rss_bytes=peak,
            **values,
        )


def case_of(s: Settings, impl: Impl, direction: Direction, seq: int) -> Case:
    """Return a case of attention over random q, k, v: forward without an autograd graph, or backward alone."""
    ours = impl == "dilated"
    back = direction == "backward"
    dtype = DTYPES[s.dtype]
    pattern = Pattern((seq,), (1,)) if impl == "dense" else s.pattern_for(seq)
    streamed = ours and not back and s.streams(seq)
    passes = BACKWARD_FLOPS if back else 1

    def flops(tokens: int) -> float:
        forward = attention_flops(pattern, s.heads, s.head_dim, tokens, s.causal)
        return passes * s.batch * forward

    start: Callable[[], Callable[..., object]]
    start = partial(_attention, s, impl, pattern, seq, back)
    numbers = s.batch * s.heads * s.head_dim
    chunk = seq
    cache = 0
    of_stream: dict[str, Any] = {}
    if streamed:
        chunk = s.chunk_for(seq)
        start = partial(_stream, s, pattern, chunk)
        cache = 2 * numbers * dtype.itemsize * pattern.cache_rows
        of_stream = {"chunk": chunk, "cache_bytes": cache or None}
    # q, k, v, out and their gradients, float32 copies of narrower ones, and what a pattern's largest kernel call copies
    wide = 0 if dtype == torch.float32 else 4
    size = 4 * dtype.itemsize + wide + back * (4 * dtype.itemsize + 3 * wide) + ours * 8
    row = Measurement(
        impl=impl,
        direction=direction,
        seq=seq,
        **s.model_dump(include={"heads", "head_dim", "batch", "causal", "dtype"}),
        device=str(s.device),
        kernel=select_kernel(s.device, dtype, s.head_dim).name if ours else "sdpa",
        pattern=None if impl == "dense" else format_levels(pattern),
        machine=device_name(s.device),
        date=_today(),
        **of_stream,
    )
    return Case(row, flops, numbers * chunk * size + cache, start, streamed)


def _inputs(s: Settings, shape: tuple[int, ...], number: int, back: bool = False) -> list[Tensor]:
    """Return random tensors of a shape, which have gradients in a `back`ward pass."""
    draw = torch.Generator(s.device).manual_seed(0)
    options: dict[str, Any] = {"dtype": DTYPES[s.dtype], "device": s.device, "requires_grad": back}
    return [torch.randn(shape, generator=draw, **options) for _ in range(number)]


def _stream(s: Settings, pattern: Pattern, chunk: int) -> Callable[[int], None]:
    """Return what reads the next tokens, up to a chunk, through a KVCache, over every query and key.

    All chunks have the same numbers: drawing numbers for 1e9 tokens would take longer than the attention, and the time
    of attention does not depend on its numbers.
    """
    shape = (s.batch, chunk, s.heads, s.head_dim)
    inputs = _inputs(s, shape, 3)
    past = KVCache(
        pattern,
        s.batch,
        s.heads,
        s.head_dim,
        dtype=DTYPES[s.dtype],
        device=s.device,
    )

    def read(tokens: int) -> None:
        q, k, v = (x[:, :tokens] for x in inputs)
        start = past.position
        dilated_attention(q, k, v, pattern, start=start, far=past.append(k, v))

    return read


def _attention(
    s: Settings,
    impl: Impl,
    pattern: Pattern,
    seq: int,
    back: bool,
) -> Callable[[], object]:
    """Return the forward pass over whole sequences, or the backward pass after one that is done here."""
    shape = (s.batch, s.heads, seq, s.head_dim)  # the layout that torch's is made for
    attend: Callable[..., Tensor]
    if impl == "dilated":
        shape = (s.batch, seq, s.heads, s.head_dim)
        attend = partial(dilated_attention, pattern=pattern, causal=s.causal)
    else:
        attend = partial(F.scaled_dot_product_attention, is_causal=s.causal)
    if not back:
        return partial(attend, *_inputs(s, shape, 3))
    *inputs, grad = _inputs(s, shape, 4, back)
    out = attend(*inputs)
    return partial(torch.autograd.grad, out, inputs, grad.detach(), retain_graph=True)


FIRST_DECADE = 10**6  # tokens: a streamed run reports each power of ten from here on
_PROBE_SEQ = 2048  # tokens of the run that tells the rate before a longer one


def bench(
    s: Settings,
    *,
    events: Events = Events(),  # noqa: B008
) -> Iterator[Measurement]:
    """Measure every case of the settings, row by row.

    A streamed case has a row for each decade of its positions, then one for the whole. `events.progress` gets the
    number of tokens of each chunk of a streamed run, and of each other run; `events.total` those of all cases, and
    again where one is not run.
    """
    cases = [
        case_of(s, impl, direction, seq)
        for seq, direction, impl in product(s.seq, s.direction, s.impl)
    ]
    total = sum(s.seq) * len(s.direction) * len(s.impl)
    events.total(total)
    # FLOP/s of each implementation and direction, the best so far: short runs are mostly overhead
    best = defaultdict[tuple[str, str], float](float)
    deadline = time.perf_counter() + s.max_time

    def run(case: Case, repeats: int) -> Iterator[Measurement]:
        machines.trim_memory(s.device)  # what earlier rows freed would count here
        peak = machines.peak_from_now(s.device)
        if case.streamed:
            rows = measure_stream(case, s.device, peak, deadline, events.progress)
        else:
            rows = measure(case, s.device, peak, deadline, repeats)
        for row in rows:
            kind = (row.impl, row.direction)
            best[kind] = max(best[kind], row.flops_per_second or 0.0)
            yield row

    for case in cases:
        row = case.row
        kind = (row.impl, row.direction)
        refusal = _refusal(case, s, deadline, best[kind])
        # a shorter run tells the rate; a stream needs none, as it ends in time
        if not (refusal or case.streamed or best[kind]) and row.seq > _PROBE_SEQ:
            for _ in run(case_of(s, row.impl, row.direction, _PROBE_SEQ), 1):
                pass  # only its rate counts
            refusal = _refusal(case, s, deadline, best[kind])
        if refusal:
            total -= row.seq
            events.total(total)
            yield refusal
            continue
        yield from run(case, s.repeats)
        if not case.streamed:
            events.progress(row.seq)


def _refusal(case: Case, s: Settings, deadline: float, rate: float) -> Measurement | None:
    """Return the row that says why the case is not run, or None. At this `rate`, in FLOP/s, it would take too long."""
    row = case.row
    left = deadline - time.perf_counter()
    if left <= 0:
        return replace(row, status="stopped", reason="the time is over")
    needed = case.memory_bytes
    free = free_memory(s.device)
    if needed > free:
        reason = f"needs {format_bytes(needed)} of memory, {format_bytes(free)} are free"
        return replace(row, status="skipped", reason=reason)
    status = "stopped"
    allowed = left
    if row.impl != "dilated":
        status = "skipped"
        allowed = min(left, s.max_dense_time)
    seconds = case.flops(row.seq) / rate if rate and not case.streamed else 0.0
    if seconds > allowed:
        reason = f"would take about {seconds:.3g} s, and {allowed:.3g} s are allowed"
        return replace(row, status=status, reason=reason)
    return None


def measure(
    case: Case,
    device: torch.device,
    peak: Callable[[], int | None],
    deadline: float,
    repeats: int,
) -> Iterator[Measurement]:
    """Run the case, and yield its row: a warm-up, then `repeats` runs, or as many as end before the deadline.

    The median counts.
    """
    seconds: list[float] = []
    try:
        run = case.start()
        while len(seconds) <= repeats:
            if seconds and time.perf_counter() + seconds[0] > deadline:
                break
            clock = _Clock(device)
            _ = run()  # kept: the time to free its results is not that of the run
            seconds.append(clock.spent()["seconds"])
        median = statistics.median(seconds[1:] or seconds)
        yield case.measured(0, case.row.seq, peak(), seconds=median)
    except (RuntimeError, MemoryError) as error:
        yield replace(case.row, status="oom", reason=_out_of_memory(error))


def measure_stream(
    case: Case,
    device: torch.device,
    peak: Callable[[], int | None],
    deadline: float,
    progress: Callable[..., None],
) -> Iterator[Measurement]:
    """Run the sequence to its end. Yield a row for each decade of positions as it is passed, then one for the whole.

    At the deadline and at Ctrl-C, the run ends as "stopped", with a row of what was measured so far. If memory runs
    out, it ends in the same way as "oom".
    """
    total = case.row.seq
    chunk = case.row.chunk or case.row.seq
    position = 0
    begin = 0
    decade = FIRST_DECADE

    def ended(status: str, why: str | None) -> Measurement:
        reason = why and f"{why} after {position} tokens"
        if not position:
            return replace(case.row, status=status, reason=reason)
        reached: dict[str, Any] = {} if position == total else {"start": 0, "stop": position}
        return case.measured(
            0,
            position,
            peak(),
            status=status,
            reason=reason,
            **reached,
            **whole.spent(),
        )

    try:
        case.start()(chunk)  # warm-up
        run = case.start()
        part = whole = _Clock(device)
        while position < total and (not position or time.perf_counter() < deadline):
            # a decade cuts a chunk in two, so that later chunks end where they would have ended
            size = min(chunk - position % chunk, min(decade, total) - position)
            run(size)
            machines.wait_for(device)
            position += size
            progress(size)
            if total > FIRST_DECADE and position in (decade, total):
                yield case.measured(
                    begin,
                    position,
                    peak(),
                    start=begin,
                    stop=position,
                    **part.spent(),
                )
                part = _Clock(device)
                begin = position
                decade = decade * 10
        yield ended("ok", None) if position == total else ended("stopped", "the time is over")
    except KeyboardInterrupt:
        yield ended("stopped", "interrupted")
        raise
    except (RuntimeError, MemoryError) as error:
        yield ended("oom", _out_of_memory(error))


class _Clock:
    """A clock that starts when a device has done all of its work. It counts seconds, and the CPU seconds of threads."""

    def __init__(self, device: torch.device) -> None:
        machines.wait_for(device)
        self._device = device
        self._began = time.perf_counter()
        self._threads = time.process_time()

    def spent(self) -> dict[str, Any]:
        machines.wait_for(self._device)
        return {
            "seconds": time.perf_counter() - self._began,
            "cpu_seconds": time.process_time() - self._threads,
        }


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
    name = machines.system_value(machines.CPU_INFO, "model name")
    return name or platform.processor() or platform.machine()
