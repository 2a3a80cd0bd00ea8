"""The device, the precision and the attention kernel that a job computes with."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch

from longnet_cli.attention.kernels import select_kernel
from longnet_cli.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def select_device(name: str = "auto") -> torch.device:
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:1`. Raises ConfigError for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ConfigError(f"there is no device {name!r} here ({found} CUDA devices): use --device cpu or auto")
    return device


def resolve_dtype(name: str, device: torch.device) -> str:
    """`--dtype`, where auto is bf16 on a GPU that has it, otherwise fp32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on `device`, where a GPU goes on computing while it travels."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.is_cpu else x.to(device)


def to_host(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Send a tensor to the CPU behind what its device is told to compute; what is returned waits for it there."""
    if x.device.type != "cuda":
        return x.cpu
    there = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    arrived = torch.cuda.current_stream(x.device).record_event()

    def wait() -> torch.Tensor:
        arrived.synchronize()
        return there

    return wait


def precision(dtype: str, device: torch.device) -> AbstractContextManager:
    """The autocast context of `--dtype`; fp32 computes as it is."""
    name = resolve_dtype(dtype, device)
    return nullcontext() if name == "fp32" else torch.autocast(device.type, dtype=DTYPES[name])


def check_kernel(device: torch.device, dtype: str, head_dim: int) -> str:
    """The name of the attention kernel that will run.

    Raises ConfigError, before any work, where LONGNET_KERNEL names one that cannot.
    """
    try:
        return select_kernel(device, DTYPES[resolve_dtype(dtype, device)], head_dim).name
    except ValueError as error:
        raise ConfigError(str(error)) from None


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken; None where the system does not say."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    free = []
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError, KeyError):  # a container's limit, below which MemAvailable may promise more
        group = Path("/sys/fs/cgroup")
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        free.append(int((group / "memory.max").read_text()) - used)
    return max(0, min(free)) if free else None


def random_state(device: torch.device) -> list[torch.Tensor]:
    """The state of the generators that a net on this device draws its dropout from: the CPU's, and its own."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_state(state: Sequence[torch.Tensor], device: torch.device) -> None:
    """Draw on from a `random_state`."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def resident_memory(device: torch.device) -> int:
    """Bytes that this process holds now: of the GPU's memory, otherwise of the machine's (0 where it does not say)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far, as `resident_memory` counts them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    # elsewhere; on Linux it would count what the process that started this one held
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> None:
    """Let this process keep what tensors on a CPU free, for those of the next step; without glibc, nothing is done.

    Else every large tensor is new memory, which the system clears page by page: a tenth of a training step.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        most = (1 << 31) - 1
        libc.mallopt(_M_MMAP_THRESHOLD, most)  # from the heap, whatever the size
        libc.mallopt(_M_TRIM_THRESHOLD, most)  # and the heap never shrinks


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@torch.no_grad()
def matmul_peak(device: torch.device, dtype: str = "auto") -> float:
    """FLOP/s of large square matrix products: what a job's own rate is held against, as its MFU.

    The best of those of a third of a second, two at least, because other work on the machine only ever slows one.
    """
    n = 8192 if device.type == "cuda" else 1024
    x = torch.randn(n, n, device=device).to(DTYPES[resolve_dtype(dtype, device)])
    best, begin = float("inf"), time.perf_counter()
    times = 0
    while times < 3 or time.perf_counter() < begin + 0.3:
        start = time.perf_counter()
        torch.mm(x, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if times:  # the first one wakes up threads and libraries
            best = min(best, time.perf_counter() - start)
        times += 1
    return 2 * n**3 / best


class MatmulPeak:
    """The best `matmul_peak` so far, in `rate` (FLOP/s). A run that goes on looking can only find a higher one."""

    EVERY = 30.0  # seconds between two looks: a hundredth of the time goes into them

    def __init__(self, device: torch.device, dtype: str = "auto") -> None:
        self.device, self.dtype = device, dtype
        self.rate, self._looked = matmul_peak(device, dtype), time.monotonic()

    def again(self) -> float:
        """The rate, after another look where one is due; on a GPU there is none, whose memory is the run's by now."""
        if self.device.type == "cpu" and time.monotonic() >= self._looked + self.EVERY:
            self.rate, self._looked = max(self.rate, matmul_peak(self.device, self.dtype)), time.monotonic()
        return self.rate
