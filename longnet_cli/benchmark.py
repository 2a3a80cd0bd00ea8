"""The job `bench`: how fast an op runs on this machine, one row a measurement, each given out as soon as it is known.

A row's `seconds` is the median of `repeats` runs after one warm-up run; where time runs out before the second run, it
is that of the warm-up. Rates count executed FLOPs, not those that dense attention would need, and causal attention as
half. A row that would not fit memory or time is not run: its status says so, and `reason` why.

Another op is one more function in `OPS`, from (settings, impl, direction, seq) to a `Case`.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from longnet_cli.attention import Pattern, dilated_attention
from longnet_cli.attention.dilated import kernel_calls
from longnet_cli.attention.kernels import select_kernel
from longnet_cli.attention.pattern import branches
from longnet_cli.errors import ConfigError
from longnet_cli.runtime.device import DTYPES, check_kernel, free_memory, resolve_dtype, select_device

IMPLS = ("dilated", "dense", "kernels")
DIRECTIONS = ("forward", "backward")

_BACKWARD_FLOPS = 2.5  # of the forward's: five matrix products to its two
_PROBE_SEQ = 2048  # tokens of the run that estimates a long one
_LONG_FLOPS = 10**11  # a second or so on a slow CPU: from here on an estimate is worth a probe


@dataclass(frozen=True)
class Measurement:
    """One row. Times in seconds, sizes in bytes; what was not measured, or does not apply, is None.

    `status`: ok; oom (memory ran out); skipped (would not fit memory, or the time for dense); stopped (out of time).
    `peak_rss_bytes` is the process's peak from making the inputs to the last run; on a GPU, that of torch's allocator.
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


@dataclass(frozen=True)
class Settings:
    """What all rows of a run have in common. `pattern`: a Pattern, "paper", or "geometric" with its base and ratio."""

    heads: int
    head_dim: int
    batch: int
    causal: bool
    pattern: Pattern | str
    base: int
    ratio: int
    dtype: str
    device: torch.device

    def pattern_for(self, seq: int) -> Pattern:
        if isinstance(self.pattern, Pattern):
            return self.pattern
        return Pattern.paper() if self.pattern == "paper" else Pattern.geometric(seq, self.base, self.ratio)


@dataclass(frozen=True)
class Case:
    """A row to be measured. `start` makes the inputs and returns the run that the clock is put on."""

    row: Measurement
    tokens: int  # of one run
    flops: float  # of one run
    setup_flops: float  # of `start`
    memory_bytes: int  # estimated peak, beyond what the process has already
    start: Callable[[], Callable[[], object]]


OnStart = Callable[[Case, float | None], None]


def bench(
    seqs: Sequence[int],
    *,
    op: str = "attention",
    impls: Sequence[str] = ("dilated", "dense"),
    directions: Sequence[str] = DIRECTIONS,
    heads: int = 12,
    head_dim: int = 64,
    batch: int = 1,
    causal: bool = True,
    pattern: Pattern | str = "paper",
    base: int = 2048,
    ratio: int = 2,
    dtype: str = "auto",
    device: str = "auto",
    repeats: int = 3,
    max_time: float | None = None,
    max_dense_time: float | None = None,
    on_start: OnStart | None = None,
) -> Iterator[Measurement]:
    """Measure every combination of `seqs` (tokens), `directions` and `impls`, in that order of nesting.

    impls: dilated (ours), dense (torch's), kernels (the kernel calls that dilated makes, without what it does between).
    pattern: a Pattern, "paper", or "geometric": the levels of `Pattern.geometric(seq, base, ratio)`.
    dtype: fp32, bf16, fp16; auto is bf16 on a GPU that has it, else fp32.
    max_time: seconds for all rows. A run, once begun, is not cut short, so no run begins that is expected to overrun.
    max_dense_time: seconds of a dense run beyond which it is skipped; estimated from the rate of shorter ones.
    on_start: told of each case before it runs, with the estimated seconds of one run, None where nobody knows.

    Raises ConfigError at once for settings that do not fit, before any row.
    """
    for what, given, known in (
        ("op", [op], OPS),
        ("implementation", impls, IMPLS),
        ("direction", directions, DIRECTIONS),
        ("pattern", [pattern] if isinstance(pattern, str) else [], ("paper", "geometric")),
        ("dtype", [dtype], ("auto", *DTYPES)),
    ):
        for name in given:
            if name not in known:
                raise ConfigError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
    if min(*seqs, heads, head_dim, batch, repeats, base) < 1 or ratio < 2:
        raise ConfigError("seq, heads, head_dim, batch, repeats and base must be at least 1, ratio at least 2")
    where = select_device(device)
    settings = Settings(heads, head_dim, batch, causal, pattern, base, ratio, resolve_dtype(dtype, where), where)
    check_kernel(where, dtype, head_dim)
    order = [(impl, direction, seq) for seq in seqs for direction in directions for impl in impls]

    def make(impl: str, direction: str, seq: int) -> Case:
        return OPS[op](settings, impl, direction, seq)

    return _measure_all(make, order, where, repeats, max_time, max_dense_time, on_start)


def attention_flops(pattern: Pattern, heads: int, head_dim: int, tokens: int, causal: bool, batch: int = 1) -> int:
    """Executed FLOPs of a forward: 4 * rows * keys * head_dim a head and segment over all branches; causal, half."""
    found = branches(pattern, heads, 0, tokens, causal, "exact", ())
    pairs = sum(b.queries.segments * b.queries.heads * b.queries.rows * b.keys.rows for b in found)
    return 4 * head_dim * batch * pairs // (2 if causal else 1)


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


def _attention(settings: Settings, impl: str, direction: str, seq: int) -> Case:
    """Attention of random q, k, v, forward without a graph, or backward alone."""
    s, pattern, dtype = settings, settings.pattern_for(seq), DTYPES[settings.dtype]
    dilated, backward = impl != "dense", direction == "backward"
    if dilated:
        forward_flops = attention_flops(pattern, s.heads, s.head_dim, seq, s.causal, s.batch)
        scratch = _scratch_bytes(settings, pattern, seq, backward)
    else:
        forward_flops = 4 * s.head_dim * s.heads * s.batch * seq**2 // (2 if s.causal else 1)
        scratch = 0
    elements = s.batch * seq * s.heads * s.head_dim
    wide = 0 if dtype == torch.float32 else 4  # bytes of an fp32 copy beside the tensor itself
    tensors = 4 * dtype.itemsize + wide  # q, k, v, out
    if backward:
        tensors += 4 * dtype.itemsize + 3 * wide  # dout, dq, dk, dv
    memory = elements * tensors + 4 * s.batch * seq * s.heads + scratch

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if dilated:
            return dilated_attention(q, k, v, pattern, causal=s.causal)
        return F.scaled_dot_product_attention(q, k, v, is_causal=s.causal)

    def start() -> Callable[[], object]:
        # each implementation gets the layout that it is made for
        shape = (s.batch, seq, s.heads, s.head_dim) if dilated else (s.batch, s.heads, seq, s.head_dim)
        draw = torch.Generator(s.device).manual_seed(0)

        def tensor() -> Tensor:
            return torch.randn(shape, generator=draw, dtype=dtype, device=s.device, requires_grad=backward)

        q, k, v = tensor(), tensor(), tensor()
        if impl == "kernels":
            return _kernels_alone(settings, pattern, q, k, v, tensor() if backward else None)
        if not backward:
            return lambda: attend(q, k, v)
        out, dout = attend(q, k, v), tensor().detach()
        return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    row = Measurement(
        "attention", impl, direction, seq,
        heads=s.heads, head_dim=s.head_dim, batch=s.batch, causal=s.causal, dtype=s.dtype, device=str(s.device),
        kernel=select_kernel(s.device, dtype, s.head_dim).name if dilated else "sdpa",
        pattern=",".join(f"{w}/{r}" for w, r in pattern.levels) if dilated else None,
    )  # fmt: skip
    flops = forward_flops * (_BACKWARD_FLOPS if backward else 1)
    return Case(row, s.batch * seq, flops, forward_flops if backward else 0, memory, start)


@torch.no_grad()
def _kernels_alone(
    s: Settings, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None
) -> Callable[[], object]:
    """The raw kernel calls of a forward or, given dout, of a backward, on the views that dilated attention takes."""
    kernel, scale = select_kernel(s.device, q.dtype, s.head_dim), s.head_dim**-0.5
    plan = [(slice(0, s.batch), slice(0, q.shape[1]), branches(pattern, s.heads, 0, q.shape[1], s.causal, "exact", ()))]
    if dout is None:
        calls = list(kernel_calls(plan, kernel, (q,), (k, v), ()))

        def forward() -> None:
            for branch, (q_,), (k_, v_) in calls:
                kernel.forward(q_, k_, v_, branch.causal, scale)

        return forward
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:3], device=s.device)[..., None]
    backward_calls = list(kernel_calls(plan, kernel, (dout, q, out, lse), (k, v), ()))

    def backward() -> None:
        for branch, (dout_, q_, out_, lse_), (k_, v_) in backward_calls:
            kernel.backward(dout_, q_, k_, v_, out_, lse_[..., 0], branch.causal, scale)

    return backward


OPS: dict[str, Callable[[Settings, str, str, int], Case]] = {"attention": _attention}


def _scratch_bytes(s: Settings, pattern: Pattern, seq: int, backward: bool) -> int:
    """What the largest kernel call of a dilated attention needs beside its arguments, which are views."""
    kernel = select_kernel(s.device, DTYPES[s.dtype], s.head_dim)
    math = kernel.name == "math"  # two matrices of scores; the flash kernels have (rows, head_dim) tensors alone
    largest = 0
    for queries, keys, *_ in branches(pattern, s.heads, 0, seq, s.causal, "exact", ()):
        limit = kernel.max_batch(queries.heads, queries.rows, s.head_dim)
        rows = min(limit, s.batch * queries.segments) * queries.heads * queries.rows
        largest = max(largest, rows * (max(keys.rows, s.head_dim) if math else s.head_dim))
    return 4 * largest * (8 if backward and not math else 2)


def _measure_all(
    make: Callable[[str, str, int], Case],
    order: Sequence[tuple[str, str, int]],
    device: torch.device,
    repeats: int,
    max_time: float | None,
    max_dense_time: float | None,
    on_start: OnStart | None,
) -> Iterator[Measurement]:
    deadline = time.perf_counter() + (float("inf") if max_time is None else max_time)
    rates = _Rates()
    for impl, direction, seq in order:
        case = make(impl, direction, seq)
        free = free_memory(device)
        if time.perf_counter() >= deadline:
            yield replace(case.row, reason="the time is over")
            continue
        if free is not None and case.memory_bytes > free:
            why = f"needs {_gib(case.memory_bytes)} of memory, {_gib(free)} are free"
            yield replace(case.row, status="skipped", reason=why)
            continue
        if case.flops > _LONG_FLOPS and seq > _PROBE_SEQ and not rates.knows(case):
            probe = make(impl, direction, _PROBE_SEQ)
            rates.add(probe, _measure(probe, device, 1, deadline))
        estimate = rates.seconds(case)
        remaining = deadline - time.perf_counter()
        limit = remaining if max_dense_time is None or impl != "dense" else min(remaining, max_dense_time)
        if estimate is not None and estimate > limit:
            status = "skipped" if impl == "dense" else "stopped"
            yield replace(case.row, status=status, reason=f"takes about {estimate:.3g} s and may take {limit:.3g} s")
            continue
        if on_start:
            on_start(case, estimate)
        row = _measure(case, device, repeats, deadline)
        rates.add(case, row)
        yield row


def _measure(case: Case, device: torch.device, repeats: int, deadline: float) -> Measurement:
    """Run the case: warm-up, then `repeats` runs, or as many as end before the deadline."""
    seconds: list[float] = []
    try:
        with _PeakMemory(device) as peak:
            run = case.start()
            warm_up = _timed(run, device)
            while len(seconds) < repeats and time.perf_counter() + warm_up <= deadline:
                seconds.append(_timed(run, device))
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
        flops_per_second=case.flops / median,
        peak_rss_bytes=peak.bytes,
    )


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, whose results are freed off the clock."""
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


class _Rates:
    """FLOPs per second so far. The best one counts, so that short runs, mostly overhead, do not frighten long ones."""

    def __init__(self) -> None:
        self.best: dict[tuple[str, str], float] = {}

    def knows(self, case: Case) -> bool:
        return (case.row.impl, case.row.direction) in self.best

    def add(self, case: Case, row: Measurement) -> None:
        if row.flops_per_second is not None:
            key = (case.row.impl, case.row.direction)
            self.best[key] = max(self.best.get(key, 0.0), row.flops_per_second)

    def seconds(self, case: Case) -> float | None:
        """Estimated seconds of the set-up and one run."""
        rate = self.best.get((case.row.impl, case.row.direction))
        return (case.flops + case.setup_flops) / rate if rate else None


class _PeakMemory:
    """The most memory in use while the block ran, in `bytes`: resident memory of the process, or that of the GPU.

    Linux can reset its own high-water mark (VmHWM). Where a container forbids that, a thread looks every few
    milliseconds; where there is no /proc, `bytes` stays None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self.sampler: threading.Thread | None = None
        self.done = threading.Event()

    def __enter__(self) -> _PeakMemory:
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
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self.sampler:
            self.done.set()
            self.sampler.join()
        else:
            lines = Path("/proc/self/status").read_text().splitlines()
            self.bytes = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

    def _sample(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        with suppress(OSError):
            while True:
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
                self.bytes = max(self.bytes or 0, resident)
                if self.done.wait(0.005):
                    return


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error)


def _cpu_name() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"
