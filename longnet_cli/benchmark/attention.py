"""The op `attention`: dilated attention of random q, k, v against dense attention, forward or backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from longnet_cli.attention import KVCache, Pattern, dilated_attention
from longnet_cli.attention.dilated import kernel_calls
from longnet_cli.attention.kernels import select_kernel
from longnet_cli.attention.pattern import BACKWARD_FLOPS, attention_flops, branches
from longnet_cli.benchmark.measurement import Case, Measurement, Stream
from longnet_cli.benchmark.settings import Settings
from longnet_cli.runtime.device import DTYPES


def attention(settings: Settings, impl: str, direction: str, seq: int) -> Case:
    """Attention of random q, k, v, forward without a graph, or backward alone."""
    s, pattern, dtype = settings, settings.pattern_for(seq), DTYPES[settings.dtype]
    dilated, backward = impl != "dense", direction == "backward"
    if impl == "dilated" and not backward and s.streams(seq):
        return _streamed(settings, pattern, seq)
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

    row = _row(settings, impl, direction, seq, pattern)
    flops = forward_flops * (BACKWARD_FLOPS if backward else 1)
    return Case(row, s.batch * seq, flops, forward_flops if backward else 0, memory, start)


def _row(s: Settings, impl: str, direction: str, seq: int, pattern: Pattern) -> Measurement:
    dilated = impl != "dense"
    return Measurement(
        "attention", impl, direction, seq,
        heads=s.heads, head_dim=s.head_dim, batch=s.batch, causal=s.causal, dtype=s.dtype, device=str(s.device),
        kernel=select_kernel(s.device, DTYPES[s.dtype], s.head_dim).name if dilated else "sdpa",
        pattern=pattern_name(pattern) if dilated else None,
    )  # fmt: skip


def pattern_name(pattern: Pattern) -> str:
    """`2048/1,4096/2`"""
    return ",".join(f"{w}/{r}" for w, r in pattern.levels)


def _streamed(s: Settings, pattern: Pattern, seq: int) -> Stream:
    """One causal sequence, chunk by chunk through a KVCache: every key and query of it is attended to.

    The numbers of q, k and v are drawn once, for one chunk, and every chunk has the same: drawing 1e9 would take longer
    than what is measured, and attention takes as long for any numbers.
    """
    dtype, chunk = DTYPES[s.dtype], s.chunk_for(seq)
    shape = (s.batch, chunk, s.heads, s.head_dim)

    def cache() -> KVCache:
        return KVCache(pattern, s.batch, s.heads, s.head_dim, dtype=dtype, device=s.device)

    def start() -> Callable[[int], object]:
        draw = torch.Generator(s.device).manual_seed(0)
        q, k, v = (torch.randn(shape, generator=draw, dtype=dtype, device=s.device) for _ in range(3))
        past = cache()

        def run(tokens: int) -> None:
            q_, k_, v_ = (x[:, :tokens] for x in (q, k, v))
            dilated_attention(q_, k_, v_, pattern, start=past.position, far=past.far())
            past.append(k_, v_)

        return run

    def flops_to(tokens: int) -> float:
        return attention_flops(pattern, s.heads, s.head_dim, tokens, True, s.batch) if tokens else 0

    cache_bytes = 2 * s.batch * s.heads * s.head_dim * dtype.itemsize * pattern.cache_rows
    elements = s.batch * chunk * s.heads * s.head_dim
    memory = elements * (4 * dtype.itemsize + 4) + cache_bytes + _scratch_bytes(s, pattern, chunk, False)
    row = replace(_row(s, "dilated", "forward", seq, pattern), chunk=chunk, cache_bytes=cache_bytes)
    return Stream(row, s.batch * seq, flops_to(seq), 0, memory, start, flops_to)


@torch.no_grad()
def _kernels_alone(
    s: Settings, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None
) -> Callable[[], object]:
    """The raw kernel calls of a forward or, given dout, of a backward, on the views that dilated attention takes."""
    kernel, scale = select_kernel(s.device, q.dtype, s.head_dim), s.head_dim**-0.5
    plan = [(slice(0, s.batch), slice(0, q.shape[1]), branches(pattern, s.heads, 0, q.shape[1], s.causal, "exact", ()))]
    if dout is None:
        calls = list(kernel_calls(plan, kernel, (q,), (k, v)))

        def forward() -> None:
            for branch, (q_,), (k_, v_) in calls:
                kernel.forward(q_, k_, v_, branch.causal, scale)

        return forward
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:3], device=s.device)[..., None]
    backward_calls = list(kernel_calls(plan, kernel, (dout, q, out, lse), (k, v)))

    def backward() -> None:
        for branch, (dout_, q_, out_, lse_), (k_, v_) in backward_calls:
            kernel.backward(dout_, q_, k_, v_, out_, lse_[..., 0], branch.causal, scale)

    return backward


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
