"""The device, the precision and the attention kernel that a job computes with."""

from __future__ import annotations

import ctypes
import math
import os
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path

import torch

from longnet_cli.attention.kernels import select_kernel
from longnet_cli.basics.errors import ConfigError, InputWarning
from longnet_cli.basics.sizes import DTYPES_OF_TORCH

CPU_INFO = Path("/proc/cpuinfo")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def select_device(name: str = "auto") -> torch.device:
    """Return the device for `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:1`.

    Raises ConfigError for a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        # with a driver that is too old, the count may be above 0
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(
                f"there is no device {name!r} here ({count} CUDA devices): use --device cpu or auto"
            )
    return device


def resolve_dtype(name: str, device: torch.device) -> str:
    """Resolve `--dtype`: auto is bf16 on a GPU that supports it, otherwise fp32. Torch's names stand for ours.

    Warns once, with InputWarning, of bf16 on a CPU that computes it slowly.
    """
    name = DTYPES_OF_TORCH.get(name, name)
    if name == "bf16" and device.type == "cpu" and has_bf16_instructions() is False:
        _warn_of_slow_bf16()
    if name != "auto":
        return name
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


@cache
def _warn_of_slow_bf16() -> None:
    warnings.warn(
        "this CPU has no bf16 instructions: --dtype fp32 is faster here",
        InputWarning,
        stacklevel=3,
    )


def system_value(path: str | Path, name: str) -> str | None:
    """Return what a file of Linux says after a name and a colon; None without it, as on other systems."""
    with suppress(OSError):
        if found := re.search(rf"^(?:{name})\s*:(.*)", Path(path).read_text(), re.MULTILINE):
            return found[1].strip()
    return None


def has_bf16_instructions() -> bool | None:
    """Return whether the CPU has instructions for bf16; None where the system does not say."""
    flags = system_value(CPU_INFO, "flags|Features")
    if flags is None:
        return None
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on `device`. A GPU continues to compute during the copy."""
    return (
        x.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda" and x.is_cpu
        else x.to(device)
    )


def to_host(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Queue a copy of a tensor to the CPU; return a function that waits for the copy and returns it."""
    if x.device.type != "cuda":
        return x.cpu
    there = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    arrived = torch.cuda.current_stream(x.device).record_event()

    def wait() -> torch.Tensor:
        arrived.synchronize()
        return there

    return wait


def runs_ahead(device: torch.device) -> bool:
    """Return whether the host goes on while the device computes."""
    return device.type == "cuda"


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all queued work; a CPU queues none."""
    torch.get_device_module(device).synchronize(device)


def precision(dtype: str, device: torch.device) -> AbstractContextManager:
    """Return the autocast context of `--dtype`; for fp32, a context that does nothing."""
    name = resolve_dtype(dtype, device)
    return nullcontext() if name == "fp32" else torch.autocast(device.type, dtype=DTYPES[name])


def check_kernel(device: torch.device, dtype: str, head_dim: int) -> str:
    """Return the name of the attention kernel that will run.

    Raises ConfigError, before any work, where LONGNET_KERNEL names a kernel that cannot run.
    """
    try:
        return select_kernel(device, DTYPES[resolve_dtype(dtype, device)], head_dim).name
    except ValueError as error:
        raise ConfigError(str(error)) from None


# Not psutil, which knows neither a container's limit nor a process's peak.
def free_memory(device: torch.device) -> float:
    """Return the bytes of memory that are free; infinity where the system does not say."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    free = [math.inf]
    if available := system_value("/proc/meminfo", "MemAvailable"):
        free.append(int(available.split()[0]) * 1024)
    with suppress(OSError, ValueError, KeyError):  # a container's limit, which MemAvailable ignores
        group = Path("/sys/fs/cgroup")
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        free.append(int((group / "memory.max").read_text()) - used)
    return max(0, min(free))


def random_state(device: torch.device) -> list[torch.Tensor]:
    """Return the state of the generators from which dropout on this device draws: the CPU's and, on a GPU, its own."""
    return [torch.get_rng_state()] + (
        [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    )


def set_random_state(state: Sequence[torch.Tensor], device: torch.device) -> None:
    """Continue to draw from a state that `random_state` returned."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def resident_memory(device: torch.device) -> int:
    """Return the bytes that this process holds now, of GPU memory for a GPU, otherwise of the machine's memory.

    Returns 0 where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held so far, as `resident_memory` counts them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if peak := system_value("/proc/self/status", "VmHWM"):
        return int(peak.split()[0]) * 1024
    # not on Linux, where it would include the memory of the process that started this one
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def peak_from_now(device: torch.device) -> Callable[[], int | None]:
    """Return a function that returns the most bytes that this process has held since this call, as `peak_memory`.

    Linux and torch reset their own high-water marks for it. Where the system does not, it returns None.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return lambda: None
    return partial(peak_memory, device)


def trim_memory(device: torch.device) -> None:
    """Give freed memory, which glibc and torch keep for later tensors, back to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory(device: torch.device) -> None:
    """Let a process that computes on a CPU keep the memory that tensors free, for later ones. It needs glibc.

    By default every large tensor is new memory, which the system clears page by page: a tenth of a training step.
    """
    if device.type != "cpu":
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        most = (1 << 31) - 1
        libc.mallopt(_M_MMAP_THRESHOLD, most)  # allocate on the heap, whatever the size
        libc.mallopt(_M_TRIM_THRESHOLD, most)  # never shrink the heap


# of malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


@torch.no_grad()
def matmul_peak(device: torch.device, dtype: str = "auto") -> float:
    """Return the FLOP/s of large square matrix products, the rate to which a job's MFU is relative.

    The fastest of the products in about a third of a second counts, because other work on the machine only ever slows
    a product. At least two are timed.
    """
    n = 8192 if device.type == "cuda" else 1024
    x = torch.randn(n, n, device=device).to(DTYPES[resolve_dtype(dtype, device)])

    def seconds_of_product() -> float:
        start = time.perf_counter()
        torch.mm(x, x)
        wait_for(device)
        return time.perf_counter() - start

    end = time.perf_counter() + 0.3
    seconds_of_product()  # warms up threads and libraries
    times: list[float] = []
    while len(times) < 2 or time.perf_counter() < end:
        times.append(seconds_of_product())
    return 2 * n**3 / min(times)
