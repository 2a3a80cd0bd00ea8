"""Dilated attention as one operator of torch, `torch.ops.longnet.dilated_attention`, for compiled graphs.

A compiler sees a call with a known result shape and a known backward. The plan is made when the graph runs, from the
operator's integers, so that dynamic shapes and true lengths break no graph. Eager code calls `dilated_attention`
without this operator: it keeps its plan from the forward to the backward, and pays for no dispatcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .kernels import select_kernel
from .outside import FarKeys
from .pattern import Pattern
from .planning import AttentionPlan, Shard, merged_backward, merged_forward, plan_calls, refuse_capture
from .sinks import sink_rows
from .views import accumulator, unit_stride

# The type of each field of `Pattern` and `Shard`. All go to the operator, by these names: a new field without a type
# fails here, rather than be a default there. (One text for a pattern is not to be had: a graph may hold its numbers as
# symbols, which have no text.)
_OF_VALUE = {tuple: "int[]", str: "str", int: "int"}
_OF_PATTERN = {name: _OF_VALUE[type(value)] for name, value in vars(Pattern((1,), (1,))).items()}
_SHARD = {"start": "SymInt", "documents": "SymInt[]?", "total": "SymInt?", "padding": "str", "causal": "bool"}
_OF_SHARD = {name: _SHARD[name] for name in Shard._fields if name != "lengths"}
# `far` has k and v of each of the far keys in turn, then k and v of turned sinks. `spans` has level, start and stop of
# each of the far keys.
_OPTIONS = "Tensor[] far, Tensor? lengths, SymInt[] spans, float scale, str? kernel, " + ", ".join(
    f"{kind} {name}" for name, kind in (_OF_PATTERN | _OF_SHARD).items()
)
_TAGS = (torch.Tag.cudagraph_unsafe,)  # torch.compile leaves the operators out of the CUDA graphs that it captures


def attend_in_graph(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: Sequence[Tensor],
    spans: Sequence[int],
    pattern: Pattern,
    shard: Shard,
    scale: float,
    kernel: str | None,
) -> Tensor:
    """Call the operator; `far` and `spans` are as in its options. Return (B, N, H, D) like q."""
    lengths = None if shard.lengths is None else torch.as_tensor(shard.lengths)
    of_pattern = [getattr(pattern, name) for name in _OF_PATTERN]
    lists = [list(value) if isinstance(value, tuple) else value for value in of_pattern]
    of_shard = [getattr(shard, name) for name in _OF_SHARD]
    return torch.ops.longnet.dilated_attention(q, k, v, far, lengths, spans, scale, kernel, *lists, *of_shard)[0]


@lru_cache(maxsize=64)
def _pattern(*values: Any) -> Pattern:
    """Return the pattern of the operator's values, in the order of its fields."""
    return Pattern(**dict(zip(_OF_PATTERN, values, strict=True)))


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: Sequence[Tensor],
    lengths: Tensor | None,
    spans: Sequence[int],
    scale: float,
    kernel: str | None,
    *values: Any,
) -> tuple[AttentionPlan, float]:
    refuse_capture(q)
    of_pattern, of_shard = values[: len(_OF_PATTERN)], values[len(_OF_PATTERN) :]
    pattern = _pattern(*(tuple(value) if isinstance(value, list) else value for value in of_pattern))
    shard = Shard(lengths=lengths, **dict(zip(_OF_SHARD, of_shard, strict=True)))
    each = zip(spans[::3], spans[1::3], spans[2::3], far[::2], far[1::2], strict=False)  # `far` may end with sinks
    far_keys = [FarKeys(level, begin, end, k_, v_) for level, begin, end, k_, v_ in each]
    sinks = None
    if len(far) > 2 * len(far_keys):
        sinks = sink_rows(pattern, shard.start, q.shape[1], shard.documents, [keys.span for keys in far_keys])
    selected = select_kernel(q.device, q.dtype, q.shape[-1], kernel)
    return plan_calls(selected, q, k, v, pattern, shard, far_keys, sinks), scale


@torch.library.custom_op(
    "longnet::dilated_attention",
    mutates_args=(),
    tags=_TAGS,
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _forward(q: Tensor, k: Tensor, v: Tensor, far: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    far = [unit_stride(x) for x in far]
    return merged_forward(*_plan(q, k, v, far, *options), q, k, v, lambda i: far[2 * i : 2 * i + 2])


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


@torch.library.custom_op(
    "longnet::dilated_attention_backward",
    mutates_args=(),
    tags=_TAGS,
    schema=f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) -> Tensor[]",
)
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, far: Sequence[Tensor], *options: Any
) -> list[Tensor]:
    far = [unit_stride(x) for x in far]
    grads = merged_backward(*_plan(q, k, v, far, *options), dout, q, k, v, out, lse, far)
    return [d.to(x.dtype) for d, x in zip(grads, (q, k, v, *far), strict=True)]


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, far: Sequence[Tensor], *_: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, *far)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, far, lengths, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, lengths, *far)


def _gradients(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse, lengths, *far = ctx.saved_tensors
    dq, dk, dv, *dfar = torch.ops.longnet.dilated_attention_backward(
        dout, q, k, v, out, lse, far, lengths, *ctx.options
    )
    # torch takes an empty list for a list of tensors, and wants a list of as many gradients
    return (dq, dk, dv, dfar, None, *([] if isinstance(x, list) and not x else None for x in ctx.options))


_forward.register_autograd(_gradients, setup_context=_save)
