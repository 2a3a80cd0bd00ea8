"""Dilated attention as one operator of torch, `torch.ops.longnet.dilated_attention`, for compiled graphs.

A compiler sees a call with a known result shape and a known backward. The plan is made when the graph runs, from the
operator's integers, so that dynamic shapes and true lengths break no graph. Eager code calls `dilated_attention`
without this operator: it keeps its plan from the forward to the backward, and pays for no dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dilated import plan_calls
from .kernels import select_kernel
from .merging import Plan, accumulator, merged_backward, merged_forward, unit_stride
from .outside import FarKeys
from .pattern import Padding, Pattern
from .plain_call import Kernel
from .sinks import sink_rows

# `far` has k and v of each of the far keys in turn, then k and v of turned sinks. `spans` has level, start and stop of
# each of the far keys. An empty look_back or level_bias means none.
_OPTIONS = (
    "Tensor[] far, Tensor? lengths, SymInt[] spans, SymInt[]? documents, int[] segment_lengths, int[] dilation_rates, "
    "str head_offsets, bool causal, SymInt start, str padding, SymInt? total, float scale, "
    "str? kernel, *, "
    'int[] look_back=[], str overlap="repeat", str queries="dilated", int sinks=0, float[] level_bias=[]'
)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: Sequence[Tensor],
    lengths: Tensor | None,
    spans: Sequence[int],
    documents: Sequence[int] | None,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    head_offsets: Any,
    causal: bool,
    start: int,
    padding: Padding,
    total: int | None,
    scale: float,
    kernel: str | None,
    *,
    look_back: Sequence[int] = (),
    overlap: Any = "repeat",
    queries: Any = "dilated",
    sinks: int = 0,
    level_bias: Sequence[float] = (),
) -> tuple[Plan, float, Kernel]:
    fixed = tuple(level_bias) if any(level_bias) else None
    levels = tuple(segment_lengths), tuple(dilation_rates)
    pattern = Pattern(*levels, head_offsets, tuple(look_back) or 0, overlap, queries, sinks, fixed)
    each = zip(spans[::3], spans[1::3], spans[2::3], far[::2], far[1::2], strict=False)  # `far` may end with sinks
    far_keys = [FarKeys(level, begin, end, k_, v_) for level, begin, end, k_, v_ in each]
    given = [keys.span for keys in far_keys]
    turned = sink_rows(pattern, start, q.shape[1], documents, given) if len(far) > 2 * len(far_keys) else None
    chosen = select_kernel(q.device, q.dtype, q.shape[-1], kernel)
    plan = plan_calls(chosen, q, k, v, pattern, causal, start, far_keys, lengths, documents, padding, total, turned)
    return plan, scale, chosen


@torch.library.custom_op(
    "longnet::dilated_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: Sequence[Tensor],
    lengths: Tensor | None,
    *options: Any,
    **seen: Any,
) -> tuple[Tensor, Tensor]:
    far = [unit_stride(x) for x in far]
    call = _prepare(q, k, v, far, lengths, *options, **seen)
    return merged_forward(*call, q, k, v, lambda i: far[2 * i : 2 * i + 2])


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


@torch.library.custom_op(
    "longnet::dilated_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) -> Tensor[]",
)
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    far: Sequence[Tensor],
    lengths: Tensor | None,
    *options: Any,
    **seen: Any,
) -> list[Tensor]:
    far = [unit_stride(x) for x in far]
    call = _prepare(q, k, v, far, lengths, *options, **seen)
    grads = merged_backward(*call, dout, q, k, v, out, lse, far)
    return [d.to(x.dtype) for d, x in zip(grads, (q, k, v, *far), strict=True)]


@_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    far: Sequence[Tensor],
    lengths: Tensor | None,
    *_: Any,
    **__: Any,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, *far)]


def _save(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, far, lengths, *ctx.options = inputs
    ctx.seen = keyword_only_inputs
    ctx.save_for_backward(q, k, v, *output, lengths, *far)


def _gradients(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, lengths, *far = ctx.saved_tensors
    dq, dk, dv, *dfar = torch.ops.longnet.dilated_attention_backward(
        dout, q, k, v, out, lse, far, lengths, *ctx.options, **ctx.seen
    )
    # torch takes an empty list for a list of tensors, and wants a list of as many gradients
    return (dq, dk, dv, dfar, None, *([] if isinstance(x, list) and not x else None for x in ctx.options))


_forward.register_autograd(_gradients, setup_context=_save)
