"""The op `attention`: dilated attention of random q, k, v against dense attention, forward or backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from longnet_cli.attention import KVCache, Pattern, dilated_attention
from longnet_cli.attention.branches import BACKWARD_FLOPS, attention_flops, branches
from longnet_cli.attention.dilated import kernel_calls
from longnet_cli.attention.groups import past_bytes
from longnet_cli.attention.kernels import select_kernel
from longnet_cli.runtime.device import DTYPES

from .measurement import Case, Measurement
from .settings import Settings


def attention(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """Return a case of attention over random q, k, v: forward without an autograd graph, or backward alone.

    A streamed case goes chunk by chunk through a KVCache, over every query and key. All chunks have the same numbers:
    drawing numbers for 1e9 tokens would take longer than the attention, and the time of attention does not depend on
    its numbers.
    """
    pattern, dtype = s.pattern_for(seq), DTYPES[s.dtype]
    dense, backward = impl == "dense", direction == "backward"
    streamed = impl == "dilated" and not backward and s.streams(seq)
    chunk = s.chunk_for(seq) if streamed else seq
    cache_bytes = None
    if streamed:
        rows = 2 * s.heads * s.head_dim * dtype.itemsize * pattern.cache_rows
        cache_bytes = s.batch * (rows + sum(past_bytes(pattern, s.heads, s.head_dim, seq, dtype.itemsize)))
    # each implementation gets the layout that it is made for
    shape = (s.batch, s.heads, chunk, s.head_dim) if dense else (s.batch, chunk, s.heads, s.head_dim)

    def flops(tokens: int) -> float:
        if dense:
            forward = 4 * s.head_dim * s.heads * s.batch * tokens**2 // (2 if s.causal else 1)
        else:
            forward = attention_flops(pattern, s.heads, s.head_dim, tokens, s.causal, s.batch)
        return forward * (BACKWARD_FLOPS if backward else 1)

    def start() -> Callable[..., object]:
        draw = torch.Generator(s.device).manual_seed(0)

        def tensor() -> Tensor:
            return torch.randn(shape, generator=draw, dtype=dtype, device=s.device, requires_grad=backward)

        q, k, v = tensor(), tensor(), tensor()
        if impl == "kernels":
            return _kernels_alone(s, pattern, q, k, v, tensor() if backward else None)
        if streamed:
            past = KVCache(pattern, s.batch, s.heads, s.head_dim, dtype=dtype, device=s.device)

            def run(tokens: int) -> None:
                q_, k_, v_ = (x[:, :tokens] for x in (q, k, v))
                dilated_attention(q_, k_, v_, pattern, start=past.position, far=past.far())
                past.append(k_, v_, q=q_)

            return run

        def attend() -> Tensor:
            if dense:
                return F.scaled_dot_product_attention(q, k, v, is_causal=s.causal)
            return dilated_attention(q, k, v, pattern, causal=s.causal)

        if not backward:
            return attend
        out, dout = attend(), tensor().detach()
        return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    wide = 0 if dtype == torch.float32 else 4  # bytes per number of an fp32 copy beside the tensor itself
    number = 4 * dtype.itemsize + wide  # bytes per number, of q, k, v and out together
    if backward:
        number += 4 * dtype.itemsize + 3 * wide  # and of dout, dq, dk and dv
    scratch = 0 if dense else _scratch_bytes(s, pattern, chunk, backward)
    memory = math.prod(shape) * number + 4 * s.batch * chunk * s.heads + scratch + (cache_bytes or 0)
    kernel = "sdpa" if dense else select_kernel(s.device, dtype, s.head_dim).name
    row = Measurement.of(
        s, impl, direction, seq, None if dense else pattern,
        kernel=kernel, chunk=chunk if streamed else None, cache_bytes=cache_bytes,
    )  # fmt: skip
    return Case(row, flops, memory, start, streamed)


@torch.no_grad()
def _kernels_alone(
    s: Settings, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None
) -> Callable[[], object]:
    """Return a run of the kernel calls alone, forward or, given dout, backward, on the views of dilated attention."""
    kernel, scale = select_kernel(s.device, q.dtype, s.head_dim), s.head_dim**-0.5
    plan = [(slice(0, s.batch), slice(0, q.shape[1]), branches(pattern, s.heads, 0, q.shape[1], s.causal, "exact", ()))]
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:3], device=s.device)[..., None]
    calls = list(kernel_calls(plan, kernel, (q,) if dout is None else (q, out, lse, dout), (k, v)))

    def run() -> None:
        for branch, (q_, *others), (k_, v_) in calls:
            if others:
                out_, lse_, dout_ = others
                kernel.backward(dout_, q_, k_, v_, out_, lse_[..., 0], branch.causal, scale)
            else:
                kernel.forward(q_, k_, v_, branch.causal, scale)

    return run


def _scratch_bytes(s: Settings, pattern: Pattern, tokens: int, backward: bool) -> int:
    """Return the bytes that the largest kernel call of dilated attention needs beside its arguments (views)."""
    kernel = select_kernel(s.device, DTYPES[s.dtype], s.head_dim)
    scores = kernel.name == "math"  # two matrices of scores; flash kernels need only (rows, head_dim) tensors
    largest = 0
    for queries, keys, *_ in branches(pattern, s.heads, 0, tokens, s.causal, "exact", ()):
        limit = kernel.max_batch(queries.heads, queries.rows, s.head_dim)
        rows = min(limit, s.batch * queries.segments) * queries.heads * queries.rows
        largest = max(largest, rows * (max(keys.rows, s.head_dim) if scores else s.head_dim))
    return 4 * largest * (8 if backward and not scores else 2)
