"""The plan of a call of dilated attention: its arguments checked, and the kernel calls that it takes.

A plan depends on shapes, types and integers alone, so all layers of a step share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .branches import Turned, branches, united
from .groups import GroupedPart, groups_of
from .merging import AttentionPlan
from .outside import FarKeys
from .pattern import Pattern
from .plain_call import Kernel
from .shard import Shard
from .sinks import SinkRows
from .spans import SINKS, FarSpan, span_rows

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def plan_calls(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    shard: Shard,
    far_keys: Sequence[FarKeys] = (),
    sinks: SinkRows | None = None,
) -> AttentionPlan:
    """Check the arguments of `dilated_attention`, and return the plan of its calls.

    Turned `sinks` come after the far keys. Raises ValueError as `dilated_attention` does.
    """
    tensors = tuple([(x.shape, x.dtype, x.device) for x in (q, k, v, *[y for x in far_keys for y in (x.k, x.v)])])
    spans = tuple([x.span for x in far_keys])
    turned = tuple(sinks.rows.items()) if sinks else ()
    return _plan(kernel, pattern, tensors, spans, shard.hashable(), turned)


class _Facts(NamedTuple):
    """The facts of a tensor on which a plan depends."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@lru_cache(maxsize=4)  # all layers of a step share one plan, and a plan of a thousand documents is large
def _plan(
    kernel: Kernel,
    pattern: Pattern,
    tensors: tuple[tuple[torch.Size, torch.dtype, torch.device], ...],
    spans: tuple[FarSpan, ...],
    shard: Shard,
    turned: tuple[tuple[int, int], ...],
) -> AttentionPlan:
    """Check everything, and plan the calls of all places.

    `tensors` are the facts of q, k, v, and of k and v of each of the far keys, whose `spans` are given. `turned` has
    the rows of turned sinks, as `SinkRows.rows`.
    """
    q, k, v, *of_far = (_Facts(*x) for x in tensors)
    _check_tensors(q, k, v)
    _check_shard(shard, pattern, q.shape[1], spans)
    for i, span in enumerate(spans):
        _check_far(span, of_far[2 * i : 2 * i + 2], q, k, pattern)
    (batch, tokens, heads, _), kv_heads = q.shape, k.shape[2]
    blocks, sinks, chosen = [], dict(turned), []
    for rows, columns in shard.places(batch, tokens):
        # only the first document may have started before the shard
        start, outside = (shard.start, spans) if columns.start == 0 else (0, ())
        length, row = columns.stop - columns.start, sinks.get(columns.start)
        calls = None
        if kernel.takes_counts and shard.padding == "exact" and start == 0 and not outside and row is None:
            calls = united(pattern, heads, length, shard.causal, kv_heads)
        if calls is None:
            seen = None if row is None else Turned(far=len(spans), row=row)
            whole = shard.total or 0
            calls = branches(pattern, heads, start, length, shard.causal, shard.padding, outside, whole, kv_heads, seen)
        blocks.append((rows, columns, calls))
        if pattern.chosen:
            groups = groups_of(pattern, start, start + length)
            chosen += [GroupedPart(rows, columns, start, each) for each in groups]
    return AttentionPlan.of(kernel, blocks, batch, tokens, heads, kv_heads, chosen)


def _check_tensors(q: _Facts, k: _Facts, v: _Facts) -> None:
    fits = (
        len(q.shape) == len(k.shape) == 4
        and k.shape == v.shape
        and (*q.shape[:2], q.shape[3]) == (*k.shape[:2], k.shape[3])
    )
    if not fits or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            "q, k and v need one shape (batch, tokens, heads, head_dim), where the heads of k and v may be a divisor, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(f"q, k and v need one dtype and device, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.dtype not in _DTYPES:
        raise ValueError(f"q, k and v need one of {', '.join(map(str, _DTYPES))}, got {q.dtype}")


def _check_shard(shard: Shard, pattern: Pattern, tokens: int, spans: Sequence[FarSpan]) -> None:
    """Raise ValueError for fields that do not go together, or not with the pattern, or not with far keys."""
    start, lengths, documents, total, padding, causal = shard
    if start < 0:
        raise ValueError(f"start must be a position, got {start}")
    if padding not in ("exact", "zero_key"):
        raise ValueError(f'padding must be "exact" or "zero_key", got {padding!r}')
    if refusal := pattern.refusal(causal, padding):
        raise ValueError(refusal)
    if padding == "zero_key" and total is None and (start or spans):
        raise ValueError('padding="zero_key" depends on the length of the whole sequence: give total')
    if documents is not None and (total is not None or lengths is not None):
        raise ValueError("documents have their own lengths: no total or lengths beside them")
    if total is not None and (total < start + tokens or lengths is not None):
        raise ValueError(f"total={total} must hold the shard [{start}, {start + tokens}), and excludes lengths")
    if lengths is not None and any(span.start >= start + tokens for span in spans):
        raise ValueError("far keys after the shard cannot be combined with lengths")


def _check_far(span: FarSpan, of_span: Sequence[_Facts], q: _Facts, k: _Facts, pattern: Pattern) -> None:
    level, start, stop = span
    if level != SINKS and not 0 <= level < len(pattern.levels):
        raise ValueError(f"far keys name level {level} of {len(pattern.levels)}")
    rows = span_rows(pattern, span, q.shape[2], k.shape[2])
    needed = (len(rows), q.shape[3])
    for shape, dtype, device in of_span:
        fits = len(shape) == 4 and (shape[0], *shape[2:]) == (q.shape[0], *needed) and shape[1] >= max(rows)
        if not fits or dtype != q.dtype or device != q.device:
            raise ValueError(
                f"far keys [{start}, {stop}) of level {level} need {(q.shape[0], max(rows), *needed)} "
                f"in {q.dtype} on {q.device}, got {tuple(shape)} in {dtype} on {device}"
            )
