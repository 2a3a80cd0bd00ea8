"""Dilated attention: one softmax over the union of every level's keys (arXiv 2307.02486, Eq. 3-15).

The union is a multiset, and it may be divided in any way: by levels, by chunks of a long sequence, by ranks, by
cache and new tokens. Each part is a branch, one plain attention call on strided views (`pattern.branches`), and
branches merge by their log-sum-exp in fp32:

    LSE = log sum_i exp(lse_i)        out = sum_i exp(lse_i - LSE) out_i

B batch, N tokens of the shard, H heads, D head_dim, w segment length, r dilation rate.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import Kernel, select_kernel
from .pattern import Branch, Padding, Pattern, Rows, Span, branches, span_positions, span_rows

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# A block of a batch, rows and tokens, and the branches of the sequence that each of its rows is
Plan = list[tuple[slice, slice, tuple[Branch, ...]]]
Call = tuple[Branch, list[Tensor], list[Tensor]]  # query-like and key-like views
Back = Callable[[Tensor, Tensor], object] | None  # that of FarKeys


@dataclass(frozen=True)
class FarKeys:
    """Keys and values from outside the shard: one level's rows at positions [start, stop) of one segment.

    k, v: (batch, rows, heads, head_dim). Row j of head h is that head's j-th row in [start, stop); heads differ by at
    most one in how many they have (`span_positions`), and rows beyond a head's own are never read. Where they come
    from (a cache, another rank, a file) is the caller's business; gradients flow into k and v.

    `ready` is called before k and v are read, after near keys. `back` is called in the backward with the gradients of k
    and v, in fp32 or fp64, before those of near keys are computed; they flow into k and v as well. Both let a message
    travel while near keys are attended to.
    """

    level: int
    start: int
    stop: int
    k: Tensor
    v: Tensor
    ready: Callable[[], object] | None = None
    back: Callable[[Tensor, Tensor], object] | None = None

    @property
    def span(self) -> Span:
        return Span(self.level, self.start, self.stop)


def far_keys(k: Tensor, v: Tensor, pattern: Pattern, span: Span, *, start: int = 0) -> FarKeys:
    """Take the rows of `span` out of a shard's k and v (batch, tokens, heads, head_dim) that begins at `start`.

    Differentiable. Raises ValueError where the shard does not have all of the span.
    """
    if not start <= span.start < span.stop <= start + k.shape[1]:
        raise ValueError(f"the shard [{start}, {start + k.shape[1]}) does not hold [{span.start}, {span.stop})")
    positions = span_positions(pattern, span, k.shape[2])
    rows = max(len(p) for p in positions)
    # a head with one row fewer repeats a token of the shard there, which nobody reads
    index = torch.tensor(
        [[p[j] - start if j < len(p) else 0 for p in positions] for j in range(rows)], dtype=torch.int64
    )
    index, heads = index.reshape(rows, len(positions)).to(k.device), torch.arange(len(positions), device=k.device)
    return FarKeys(*span, k[:, index, heads], v[:, index, heads])  # (B, rows, H, D)


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    causal: bool = True,
    start: int = 0,
    far: Sequence[FarKeys] | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    documents: Sequence[int] | None = None,
    padding: Padding = "exact",
    total: int | None = None,
    scale: float | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Dilated attention of a shard, exact in its output and in every gradient.

    q, k, v: (batch, tokens, heads, head_dim), fp64, fp32, bf16 or fp16, on one device; returns the same shape. The
    shard is the positions [start, start + tokens) of its sequence, any start, any length. A query that takes part in no
    level gets zeros.

    far: keys from outside the shard; causal ones lie before it.
    lengths: true length of each row of a right-padded batch, 0 to tokens; each row comes out as it would alone, and
        zeros beyond its length.
    documents: lengths of the documents that lie one after the other in every row, `tokens` in all. Each attends to
        itself alone, from position 0: its result is what it would get alone. `start` and `far` are the first one's.
    padding: "zero_key" adds torchscale's zero keys to ragged segments of a bidirectional call.
    total: length of the whole sequence, where the shard is a part of it and zero keys depend on it.
    scale: of the scores, head_dim^-0.5 unless given.
    kernel: forces one of `kernels.KERNELS`, as LONGNET_KERNEL does.

    Raises ValueError for shapes, far keys, lengths or kernels that do not fit.
    """
    far = tuple(far or ())
    far_tensors = [x for keys in far for x in (keys.k, keys.v)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_compiling():  # one opaque operator (`compiled`): no graph follows the integers of a plan
        for keys in far:
            if keys.ready:
                keys.ready()
        spans = [number for keys in far for number in keys.span]
        levels = (list(pattern.segment_lengths), list(pattern.dilation_rates), pattern.head_offsets)
        true_lengths = None if lengths is None else torch.as_tensor(lengths)
        options = (spans, documents, *levels, causal, start, padding, total, scale, kernel)
        return torch.ops.longnet.dilated_attention(q, k, v, far_tensors, true_lengths, *options)[0]
    plan = plan_calls(q, k, v, pattern, causal, start, far, lengths, documents, padding, total)
    chosen = select_kernel(q.device, q.dtype, q.shape[-1], kernel)
    ready = [keys.ready for keys in far if keys.ready]
    back = [keys.back for keys in far]
    return _DilatedAttention.apply(plan, scale, chosen, ready, back, q, k, v, *far_tensors)


def plan_calls(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    causal: bool,
    start: int,
    far: Sequence[FarKeys],
    lengths: Sequence[int] | Tensor | None,
    documents: Sequence[int] | None,
    padding: Padding,
    total: int | None,
) -> Plan:
    """Check the arguments of `dilated_attention` and divide its work; raises ValueError as it does."""
    _check(q, k, v, start, padding)
    for keys in far:
        _check_far(keys, q, pattern)
    batch, tokens, heads, _ = q.shape
    if padding == "zero_key" and total is None and (start or far):
        raise ValueError('padding="zero_key" depends on the length of the whole sequence: give total')
    if documents is not None and (total is not None or lengths is not None):
        raise ValueError("documents have their own lengths: no total or lengths beside them")
    if total is not None and (total < start + tokens or lengths is not None):
        raise ValueError(f"total={total} must hold the shard [{start}, {start + tokens}), and excludes lengths")
    if lengths is not None and any(keys.start >= start for keys in far):
        raise ValueError("far keys after the shard cannot be combined with lengths")
    spans = tuple(keys.span for keys in far)
    plan = []
    for rows, columns in _blocks(lengths, documents, batch, tokens):
        # only the first document may have begun before the shard
        begin, outside = (start, spans) if columns.start == 0 else (0, ())
        length = columns.stop - columns.start
        plan.append((rows, columns, branches(pattern, heads, begin, length, causal, padding, outside, total or 0)))
    return plan


class _DilatedAttention(torch.autograd.Function):
    """All branches of a shard, merged. Saves only q, k, v, far keys, out and LSE."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        scale: float,
        kernel: Kernel,
        ready: list[Callable[[], object]],
        back: Sequence[Back],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *far: Tensor,
    ) -> Tensor:
        q, k, v, *rest = (_unit_stride(x) for x in (q, k, v, *far))
        out, lse = merged_forward(plan, scale, kernel, q, k, v, rest, ready)
        ctx.save_for_backward(q, k, v, out, lse, *rest)
        ctx.plan, ctx.scale, ctx.kernel, ctx.back = plan, scale, kernel, back
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *far = ctx.saved_tensors
        grads = merged_backward(ctx.plan, ctx.scale, ctx.kernel, dout, q, k, v, out, lse, far, ctx.back)
        return (None, None, None, None, None, *grads)


def merged_forward(
    plan: Plan,
    scale: float,
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: Sequence[Tensor],
    ready: Sequence[Callable[[], object]] = (),
) -> tuple[Tensor, Tensor]:
    """(out, LSE): (B, N, H, D) as q, and (B, N, H) in fp32 (fp64 for fp64). `ready` are those of FarKeys."""
    waiting = list(ready)
    q, k, v, *far = (_unit_stride(x) for x in (q, k, v, *far))
    dtype = _accumulator(q.dtype)
    full = sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns, _ in plan)
    # no row needs a zero of ours
    written = full == q.shape[0] * q.shape[1] and all(found and found[0].first for *_, found in plan)
    out = (torch.empty if written else torch.zeros)(q.shape, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):  # kernels choose their own precision
        for branch, qs, ks in kernel_calls(plan, kernel, (q, out, lse[..., None]), (k, v), far):
            while branch.far is not None and waiting:
                waiting.pop()()
            (q_, out_, lse_), (k_, v_) = qs, ks
            part, part_lse = kernel.forward(q_, k_, v_, branch.causal, scale)
            _merge(out_, lse_, part, part_lse[..., None], branch)
    while waiting:  # what no query needed is waited for all the same: its buffers must not be freed in flight
        waiting.pop()()
    return out.to(q.dtype), lse


def merged_backward(
    plan: Plan,
    scale: float,
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    far: Sequence[Tensor],
    back: Sequence[Back] = (),
) -> list[Tensor]:
    """dq, dk, dv and the gradients of the far tensors, each as its input, from the merged out and LSE.

    `back` are those of FarKeys, one for each.
    """
    dout, q, k, v, *far = (_unit_stride(x) for x in (dout, q, k, v, *far))
    dtype = _accumulator(q.dtype)
    inputs = (q, k, v, *far)
    grads = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in inputs]
    dq, dk, dv, *dfar = grads
    tensors = (dout, q, out, lse[..., None], dq)
    pairs = [x for i in range(0, len(far), 2) for x in (far[i], far[i + 1], dfar[i], dfar[i + 1])]
    waiting = [(tell, dfar[2 * i], dfar[2 * i + 1]) for i, tell in enumerate(back) if tell]
    far_first = bool(waiting)
    with torch.autocast(q.device.type, enabled=False):
        calls: Iterable[Call] = kernel_calls(plan, kernel, tensors, (k, v, dk, dv), pairs)
        for branch, qs, ks in sorted(calls, key=lambda call: call[0].far is None) if far_first else calls:
            while branch.far is None and waiting:
                tell, *found = waiting.pop(0)
                tell(*found)
            (dout_, q_, out_, lse_, dq_), (k_, v_, dk_, dv_) = qs, ks
            parts = kernel.backward(dout_, q_, k_, v_, out_, lse_[..., 0], branch.causal, scale)
            for total, part in zip((dq_, dk_, dv_), parts, strict=True):
                fresh = branch.first and not (far_first and total is dq_)  # what nothing was added to
                total.copy_(part) if fresh else total.add_(part)
    for tell, *found in waiting:
        tell(*found)
    return [g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, branch: Branch) -> None:
    """Fold one branch into the running out (.., rows, D) and lse (.., rows, 1), both views, in place."""
    if branch.zero_keys:  # n keys with score 0 and value 0: a branch with out 0 and lse log n, folded in first
        with_zeros = torch.logaddexp(part_lse, torch.full_like(part_lse, log(branch.zero_keys)))
        part, part_lse = part * (part_lse - with_zeros).exp(), with_zeros
    if branch.first:
        out.copy_(part)
        lse.copy_(part_lse)
        return
    total = torch.logaddexp(lse, part_lse)
    out.lerp_(part.to(out.dtype), (part_lse - total).exp_())
    lse.copy_(total)


def kernel_calls(
    plan: Plan, kernel: Kernel, query_like: Sequence[Tensor], key_like: Sequence[Tensor], far: Sequence[Tensor]
) -> Iterator[Call]:
    """Every kernel call of a plan, as views (batch, heads, rows, last dim) of the tensors, in a fixed order.

    Far keys lie in `far` one after the other, as many tensors each as `key_like` has.
    """
    for run, columns, found in plan:
        queries = [x[run, columns] for x in query_like]
        for branch in found:
            if branch.far is None:
                sources = [x[run, columns] for x in key_like]
            else:
                sources = [x[run] for x in far[branch.far * len(key_like) : (branch.far + 1) * len(key_like)]]
            views = [strided_view(x, branch.queries) for x in queries]
            views += [strided_view(x, branch.keys) for x in sources]
            rows = max(branch.queries.rows, branch.keys.rows)
            limit = kernel.max_batch(branch.queries.heads, rows, query_like[0].shape[-1])
            for call in _batched(views, limit):
                yield branch, call[: len(queries)], call[len(queries) :]


def strided_view(x: Tensor, rows: Rows) -> Tensor:
    """The rows as a zero-copy view (batch, segments, heads, rows, last dim) of x (batch, tokens, heads, last dim)."""
    batch, token, head, last = x.stride()
    size = (x.shape[0], rows.segments, rows.heads, rows.rows, x.shape[3])
    stride = (batch, rows.segment_step * token, rows.head_step * head + rows.skew * token, rows.row_step * token, last)
    return x.as_strided(size, stride, x.storage_offset() + rows.first_token * token + rows.first_head * head)


def _batched(views: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Make (batch, segments, ..) views (batch * segments, ..), at most `limit` at a time.

    Where batch and segments do not merge into one stride, the shorter of the two is walked.
    """
    batch, segments = views[0].shape[:2]
    if batch == 1:
        groups = [[x[0] for x in views]]
    elif segments == 1:
        groups = [[x[:, 0] for x in views]]
    elif all(x.stride(0) == segments * x.stride(1) for x in views):
        groups = [[x.flatten(0, 1) for x in views]]
    else:
        walked = 0 if batch <= segments else 1
        groups = [list(step) for step in zip(*(x.unbind(walked) for x in views), strict=True)]
    for group in groups:
        if len(group[0]) <= limit:
            yield group
        else:
            yield from (list(part) for part in zip(*(x.split(limit) for x in group), strict=True))


def _blocks(
    lengths: Sequence[int] | Tensor | None, documents: Sequence[int] | None, batch: int, tokens: int
) -> Iterator[tuple[slice, slice]]:
    """The batch as blocks (rows, columns) in which every row is one sequence that one set of calls can serve."""
    if documents is not None:
        documents = _whole_numbers("documents", documents)
        if min(documents, default=0) < 1 or sum(documents) != tokens:
            raise ValueError(f"documents need lengths of at least 1 that make {tokens} tokens, got {documents}")
        stop = 0
        for length in documents:
            start, stop = stop, stop + length
            yield slice(0, batch), slice(start, stop)
        return
    if lengths is None:
        yield slice(0, batch), slice(0, tokens)
        return
    found = _whole_numbers("lengths", lengths)
    if len(found) != batch or not all(0 <= n <= tokens for n in found):
        why = ": -1 is a row with tokens after padding, which has to be on the right" if -1 in found else ""
        raise ValueError(f"lengths needs {batch} numbers from 0 to {tokens}, got {found}{why}")
    for length, rows in groupby(range(batch), key=found.__getitem__):  # neighbours of equal length go together
        members = list(rows)
        if length:
            yield slice(members[0], members[-1] + 1), slice(0, length)


def _whole_numbers(name: str, numbers: Sequence[int] | Tensor) -> list[int]:
    try:
        return [operator.index(n) for n in (numbers.tolist() if isinstance(numbers, Tensor) else numbers)]
    except TypeError:
        raise ValueError(f"{name} needs whole numbers, in one dimension, got {numbers}") from None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _unit_stride(x: Tensor) -> Tensor:
    """Kernels read the last dimension as contiguous without asking; a size of 1 may carry any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, start: int, padding: str) -> None:
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            "q, k and v need one shape (batch, tokens, heads, head_dim), got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(f"q, k and v need one dtype and device, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.dtype not in _DTYPES:
        raise ValueError(f"q, k and v need one of {', '.join(map(str, _DTYPES))}, got {q.dtype}")
    if start < 0:
        raise ValueError(f"start must be a position, got {start}")
    if padding not in ("exact", "zero_key"):
        raise ValueError(f'padding must be "exact" or "zero_key", got {padding!r}')


def _check_far(keys: FarKeys, q: Tensor, pattern: Pattern) -> None:
    if not 0 <= keys.level < len(pattern.levels):
        raise ValueError(f"far keys name level {keys.level} of {len(pattern.levels)}")
    rows = max(span_rows(pattern, keys.span, q.shape[2]), default=0)
    for x in (keys.k, keys.v):
        fits = x.dim() == 4 and (x.shape[0], *x.shape[2:]) == (q.shape[0], *q.shape[2:]) and x.shape[1] >= rows
        if not fits or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"far keys [{keys.start}, {keys.stop}) of level {keys.level} need {(q.shape[0], rows, *q.shape[2:])} "
                f"in {q.dtype} on {q.device}, got {tuple(x.shape)} in {x.dtype} on {x.device}"
            )
