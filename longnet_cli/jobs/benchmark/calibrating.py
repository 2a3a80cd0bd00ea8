"""The calibration of this machine for plans: short measurements of each rate, as `jobs.estimating.plan` defines it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from longnet_cli.attention import Pattern, dilated_attention
from longnet_cli.attention.branches import BACKWARD_FLOPS, attention_flops
from longnet_cli.jobs.estimating.plan import Machine, Rates
from longnet_cli.running.device import DTYPES, free_memory, resident_memory, resolve_dtype
from longnet_cli.running.ranks.ranks import Ranks

SECONDS = 0.5  # per rate; the fastest run counts, because other work on the machine only slows a run
_TOKENS, _DIM, _HEADS = 1 << 11, 512, 8  # of products, attention and elementwise operations
_BYTES = 1 << 24  # of a message, and of a file


def calibrate(device: torch.device, dtype: str, ranks: Ranks, folder: Path) -> Machine:
    """Measure this machine for about five seconds; all `ranks` call it together, and get the slowest rank's rates.

    The machine has one device for each rank, on one node. Files are written to and read from `folder`.
    """
    name = resolve_dtype(dtype, device)
    made: dict[str, Any] = {"device": device, "dtype": DTYPES[name]}
    torch.manual_seed(0)

    def best(run: Callable[[], object]) -> float:
        return ranks.largest(fastest(run, device, ranks))

    x, weight = torch.randn(_TOKENS, _DIM, **made), torch.randn(4 * _DIM, _DIM, **made)
    pattern = Pattern((2048,), (1,))
    rates = {"products": 2 * weight.numel() * _TOKENS / best(lambda: F.linear(x, weight)), "share": 1.0}
    q, k, v = (torch.randn(1, _TOKENS, _HEADS, _DIM // _HEADS, requires_grad=True, **made) for _ in range(3))
    flops = attention_flops(pattern, _HEADS, _DIM // _HEADS, _TOKENS, True)
    with torch.no_grad():
        rates["attention"] = flops / best(lambda: dilated_attention(q, k, v, pattern, causal=True))
    out = dilated_attention(q, k, v, pattern, causal=True)
    back = best(lambda: torch.autograd.grad(out, (q, k, v), out.detach(), retain_graph=True))
    rates["attention_backward"] = BACKWARD_FLOPS * flops / back
    wide, moved = F.linear(x, weight), (5 * x.numel() + 4 * weight.shape[0] * _TOKENS) * x.element_size()
    rates["bandwidth"] = moved / best(lambda: _elementwise(x, wide))
    if ranks.world > 1:
        sent, empty = (torch.ones(n * ranks.world, device=device) for n in (_BYTES // 4 // ranks.world, 1))
        got = torch.empty_like(sent)
        rates["message"] = best(lambda: dist.all_to_all_single(empty.clone(), empty)) / (ranks.world - 1)
        share = _BYTES * (ranks.world - 1) / ranks.world
        rates["node_link"] = share / best(lambda: dist.all_to_all_single(got, sent))
    with tempfile.TemporaryFile(dir=folder) as file:
        rates["disk"] = _BYTES / best(lambda: _rewritten(file.fileno()))
    free = free_memory(device) or 0
    rates |= {"memory": (free if device.type == "cuda" else free / ranks.world) + resident_memory(device)}
    rates |= {"reserved": float(resident_memory(device)), "host_memory": float(free_memory(torch.device("cpu")) or 0)}
    link = rates.get("node_link", rates["bandwidth"])
    others = {"network": link, "host_link": rates["bandwidth"]}
    others |= {} if ranks.world > 1 else {"message": 0.0, "node_link": link}
    return Machine(
        device="cuda" if device.type == "cuda" else "cpu", dtype="bf16" if name == "bf16" else "fp32",
        devices=ranks.world, node=ranks.world, measured=Rates(**rates), assumed=Rates(**others),
    )  # fmt: skip


def _elementwise(x: torch.Tensor, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run operations as a layer has them. They move x (n, d) five times, and `wide` (n, 4 d) four times."""
    return F.layer_norm(x, x.shape[1:]) + x, F.layer_norm(F.gelu(wide), wide.shape[1:])


def fastest(run: Callable[[], object], device: torch.device, ranks: Ranks) -> float:
    """Return the seconds of the fastest of the runs in `SECONDS`, after one that warms up. All ranks run as often."""
    best, begin, times = float("inf"), clock(device), 0
    while times < 4 or ranks.any(clock(device) < begin + SECONDS):
        start = clock(device)
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, clock(device) - start) if times else best
        times += 1
    return best


def clock(device: torch.device) -> float:
    """Return seconds: of a CPU, only those in which this process computes, whatever else the machine does."""
    return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.perf_counter()


def _rewritten(file: int) -> None:
    os.pwrite(file, bytes(_BYTES), 0)
    os.fsync(file)


def as_toml(machine: Machine, comment: str) -> str:
    """Return the file of a machine, which `find_machine` reads."""
    lines = [f"# {comment}", *(f'{name} = "{getattr(machine, name)}"' for name in ("device", "dtype"))]
    lines += [f"{name} = {getattr(machine, name)}" for name in ("devices", "node")]
    for table, names in machine.known().items():
        lines += ["", f"[{table}]", *(f"{name} = {machine.rate(name):.4g}" for name in names)]
    return "\n".join(lines) + "\n"
