"""The plan of a call of dilated attention: its arguments checked, the kernel calls that it takes, and their execution.

A plan depends on shapes, types and integers alone, so all layers of a step share one. Each branch is one plain
attention call on strided views (`views`), and branches merge by their log-sum-exp (`merging`), with exact gradients.

B batch, N tokens of the shard, H query heads, K key heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, groupby, pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from .branches import Branch, Turned, Union, branches, united
from .cache import FarKeys
from .merging import Merge, add_gradient, gradient_sum
from .pattern import Padding, Pattern, whole_numbers
from .plain_call import Kernel
from .spans import SINKS, FarSpan, Lanes, Rows
from .views import (
    FarTensors,
    KnownViews,
    PlacedCalls,
    accumulator,
    kernel_calls,
    of_level,
    unit_stride,
    without_autocast,
)

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Shard(NamedTuple):
    """The tokens of sequences that a call computes, and what they see of these sequences (`dilated_attention`)."""

    start: int = 0
    lengths: Sequence[int] | Tensor | None = None
    documents: Sequence[int] | None = None
    total: int | None = None
    padding: Padding = "exact"
    causal: bool = True

    def hashable(self) -> Shard:
        """Return the same shard with its lists of numbers as tuples. Raises ValueError for other than whole numbers."""
        lengths = _numbers("lengths", self.lengths)
        documents = _numbers("documents", self.documents)
        return self._replace(lengths=lengths, documents=documents)

    def places(self, batch: int, tokens: int) -> Iterator[tuple[slice, slice]]:
        """Yield rows of a batch with `tokens` per row, and the tokens that are one sequence in each of these rows.

        Call it on what `hashable` returns. Raises ValueError for wrong lengths.
        """
        if self.documents is not None:
            shortest = min(self.documents, default=0)
            if shortest < 1 or sum(self.documents) != tokens:
                raise ValueError(
                    f"documents need lengths of at least 1 that make {tokens} tokens, got {[*self.documents]}"
                )
            for start, stop in pairwise([0, *accumulate(self.documents)]):
                yield slice(0, batch), slice(start, stop)
            return
        lengths = (tokens,) * batch if self.lengths is None else (*self.lengths,)
        shortest = min(lengths, default=0)
        longest = max(lengths, default=0)
        if len(lengths) != batch or not 0 <= shortest <= longest <= tokens:
            raise ValueError(f"lengths needs {batch} numbers from 0 to {tokens}, got {[*lengths]}")
        row = 0
        for length, equal in groupby(lengths):  # neighbours of equal length go together
            stop_row = row + len([*equal])
            if length:
                yield slice(row, stop_row), slice(0, length)
            row = stop_row


def _numbers(name: str, numbers: Sequence[int] | Tensor | None) -> tuple[int, ...] | None:
    if isinstance(numbers, Tensor):
        numbers = numbers.tolist()
    return None if numbers is None else whole_numbers(name, numbers)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """All calls of a batch, for a kernel, by their places.

    `covered`: the branches that cover reach every row. `views`: those of near rows, as `kernel_calls` has found them.
    """

    kernel: Kernel
    placed: Sequence[PlacedCalls]
    covered: bool
    views: KnownViews = field(default_factory=dict)


def plan_calls(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    shard: Shard,
    far_keys: Sequence[FarKeys] = (),
    sinks: Mapping[int, int] = {},
) -> AttentionPlan:
    """Check the arguments of `dilated_attention`, and return the plan of its calls.

    `sinks` are the `SinkRows.rows` of turned sinks, which come after the far keys. Raises ValueError as
    `dilated_attention` does.
    """
    tensors = [q, k, v]
    for keys in far_keys:
        tensors += keys.k, keys.v
    facts = tuple([_Facts(x.shape, x.dtype, x.device) for x in tensors])
    spans = tuple([keys.span for keys in far_keys])
    turned = tuple([(token, Turned(len(spans), row)) for token, row in sinks.items()])
    return _plan(kernel, pattern, facts, spans, shard.hashable(), turned)


class _Facts(NamedTuple):
    """The facts of a tensor on which a plan depends."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@lru_cache(maxsize=4)  # all layers of a step share a plan, which is large for many documents
def _plan(
    kernel: Kernel,
    pattern: Pattern,
    tensors: tuple[_Facts, ...],
    spans: tuple[FarSpan, ...],
    shard: Shard,
    turned: tuple[tuple[int, Turned], ...],
) -> AttentionPlan:
    """Check everything, and plan the calls of all places.

    `tensors` are the facts of q, k, v, and of k and v of each of the far keys, whose `spans` are given. `turned` has
    turned sinks, by the first token of their document.
    """
    q, k, v, *of_far = tensors
    _check_tensors(q, k, v, pattern)
    _check_shard(shard, pattern, q.shape[1], spans)
    for i, span in enumerate(spans):
        _check_far(span, of_far[2 * i : 2 * i + 2], q, k, pattern)
    batch, tokens = q.shape[:2]
    heads = q.shape[-2]
    by_level = len(q.shape) == 5
    lanes = Lanes(pattern, heads, k.shape[-2])
    placed = []
    reached = 0  # tokens of the batch in places whose branches cover them
    sinks = dict(turned)
    unites = kernel.takes_counts and not by_level and shard.padding == "exact"
    for rows, columns in shard.places(batch, tokens):
        start = 0
        outside: tuple[FarSpan, ...] = ()
        if columns.start == 0:  # only the first document may have started before the shard
            start = shard.start
            outside = spans
        length = columns.stop - columns.start
        turned_sinks = sinks.get(columns.start)
        calls = None
        if unites and start == 0 and not outside and not turned_sinks:
            calls = united(lanes, length, shard.causal)
        if calls is None:
            options = shard.causal, shard.padding, outside, shard.total, turned_sinks
            calls = branches(lanes, start, length, *options)
        placed.append((rows, columns, calls))
        if any(branch.covers for branch in calls):
            reached += (rows.stop - rows.start) * length
    return AttentionPlan(kernel, placed, covered=reached == batch * tokens)


def _check_tensors(q: _Facts, k: _Facts, v: _Facts, pattern: Pattern) -> None:
    sizes = [(*x.shape[:-2], *x.shape[-1:]) for x in (q, k)]
    fits = len(q.shape) in (4, 5) and k.shape == v.shape and sizes[0] == sizes[1]
    if not fits or not k.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            "q, k and v need one shape (batch, tokens, heads, head_dim), where the heads of k and v may be a divisor, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if len(q.shape) == 5 and (q.shape[2] != len(pattern.levels) or pattern.moves_keys):
        raise ValueError(
            f"q, k and v of {q.shape[2]} levels need a pattern of so many, without sinks and blocks, got {pattern}"
        )
    places = [f"{x.dtype} on {x.device}" for x in (q, k, v)]
    if len(set(places)) > 1:
        raise ValueError(f"q, k and v need one dtype and one device, got {', '.join(places)}")
    if q.dtype not in _DTYPES:
        raise ValueError(f"q, k and v need one of {', '.join(map(str, _DTYPES))}, got {q.dtype}")


def _check_shard(shard: Shard, pattern: Pattern, tokens: int, spans: Sequence[FarSpan]) -> None:
    """Raise ValueError for fields that do not go together, or not with the pattern, or not with far keys."""
    start, lengths, documents, total, padding, causal = shard
    stop = start + tokens
    if start < 0:
        raise ValueError(f"start must be a position, got {start}")
    if padding not in ("exact", "zero_key"):
        raise ValueError(f'padding must be "exact" or "zero_key", got {padding!r}')
    if refusal := pattern.refusal(causal, padding):
        raise ValueError(refusal)
    if padding == "zero_key" and total is None and (start or spans):
        raise ValueError(
            'padding="zero_key" depends on the length of the whole sequence: give total'
        )
    if documents is not None and (total is not None or lengths is not None):
        raise ValueError("documents have their own lengths: no total or lengths beside them")
    if total is not None and (total < stop or lengths is not None):
        raise ValueError(
            f"total={total} must hold the shard [{start}, {stop}), and excludes lengths"
        )
    if lengths is not None and max((span.start for span in spans), default=-1) >= stop:
        raise ValueError("far keys after the shard cannot be combined with lengths")


def _check_far(
    span: FarSpan,
    of_span: Sequence[_Facts],
    q: _Facts,
    k: _Facts,
    pattern: Pattern,
) -> None:
    level, start, stop = span
    if level != SINKS and not 0 <= level < len(pattern.levels):
        raise ValueError(f"far keys name level {level} of {len(pattern.levels)}")
    rows = Lanes(pattern, q.shape[-2], k.shape[-2]).counts(span)
    needed = (len(rows), q.shape[-1])
    for shape, dtype, device in of_span:
        size = (shape[0], *shape[2:]) if len(shape) == 4 else ()
        fits = size == (q.shape[0], *needed) and shape[1] >= max(rows)
        if not fits or (dtype, device) != (q.dtype, q.device):
            raise ValueError(
                f"far keys [{start}, {stop}) of level {level} need {(q.shape[0], max(rows), *needed)} "
                f"in {q.dtype} on {q.device}, got {tuple(shape)} in {dtype} on {device}"
            )


def merged_forward(
    plan: AttentionPlan,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: FarTensors,
) -> tuple[Tensor, Tensor]:
    """Return (out, LSE): (B, N, H, D) like q, and (B, N, H) in fp32 (fp64 for fp64).

    `far` returns far k and v.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    merge = Merge(of_level(q, 0), plan.covered)
    query_like = (q, *merge.places)
    with without_autocast(q.device):
        calls = kernel_calls(plan.placed, plan.kernel, query_like, (k, v), far, plan.views)
        for branch, (q_, *places), (k_, v_) in calls:
            out, lse = plan.kernel.forward(q_, k_, v_, branch.causal, scale, *_counts(branch, q_))
            merge.add(branch, places, out, lse)
        return merge.result()


def merged_backward(
    plan: AttentionPlan,
    scale: float,
    tensors: Sequence[Tensor],
    far: Sequence[Tensor],
    on_far: Callable[[Sequence[Tensor]], None] = lambda sums: None,
) -> list[Tensor]:
    """Return dq, dk, dv and the gradients of the far tensors (k, v, k, v, ...), all in fp32 or fp64.

    `tensors` are dout, q, k, v, and the merged out and LSE. Far keys come first: `on_far` is called with all
    sums when those of far keys are complete, and before anything of near keys is added.
    """
    dout, q, k, v, out, lse = map(unit_stride, tensors)
    sums = [gradient_sum(x) for x in (q, k, v, *far)]
    dq, dk, dv, *of_far = sums

    def far_tensors(index: int) -> list[Tensor]:
        """Return k and v of far keys, and the sums of their gradients."""
        both = slice(2 * index, 2 * index + 2)
        return [*far[both], *of_far[both]]

    def add_calls(far_calls: bool) -> None:
        calls = _only(plan.placed, far_calls)
        query_like = (dout, q, out, lse[..., None], dq)
        views = kernel_calls(
            calls,
            plan.kernel,
            query_like,
            (k, v, dk, dv),
            far_tensors,
            plan.views,
        )
        for branch, (dout_, q_, out_, lse_, dq_), (k_, v_, *totals) in views:
            of_call = (dout_, q_, k_, v_, out_, lse_[..., 0])
            part, *parts = plan.kernel.backward(of_call, branch.causal, scale, *_counts(branch, q_))
            add_gradient(dq_, part, branch.queries)
            for total, part_of_keys in zip(totals, parts, strict=True):
                add_gradient(total, part_of_keys, branch.keys)
            del part, parts, part_of_keys  # the next call needs the memory

    with without_autocast(q.device):
        add_calls(far_calls=True)
        on_far(sums)
        add_calls(far_calls=False)
    return sums


def refuse_capture(q: Tensor) -> None:
    """Raise RuntimeError while a CUDA graph captures: a replay would read tables and rows that are gone by then."""
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "dilated attention cannot be captured in a CUDA graph: capture what is around it, as torch.compile does"
        )


def _only(placed: Sequence[PlacedCalls], far: bool) -> list[PlacedCalls]:
    """Return the calls on far keys alone, or on near keys alone."""
    chosen_calls: list[PlacedCalls] = []
    for rows, columns, calls in placed:
        of_one_kind = [branch for branch in calls if (branch.far_index is not None) == far]
        chosen_calls.append((rows, columns, tuple(of_one_kind)))
    return chosen_calls


def _counts(branch: Branch, q: Tensor) -> tuple[Tensor, ...]:
    """Return the `log_counts` of a union, as a tuple of one tensor (heads, rows, keys); () for other branches."""
    if branch.union is None:
        return ()
    table = log_counts(branch.union, accumulator(q.dtype), q.device)
    shown = branch.queries
    of_heads = table[shown.first_head :: max(shown.head_step, 1)]
    return (of_heads[: shown.heads, : shown.rows, : shown.rows],)


@lru_cache(maxsize=4)
def log_counts(union: Union, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (H, tokens, tokens): the log of how often a key counts, once for each level that shows it; or -inf."""
    lanes, causal, tokens = union
    with torch.inference_mode(False):  # the cached table outlives the caller's inference mode
        counts = torch.zeros(lanes.num_heads, tokens, tokens, dtype=dtype, device=device)
        for branch in branches(lanes, 0, tokens, causal, "exact", ()):
            queries, keys = branch.queries, branch.keys
            seen = counts.new_ones(queries.rows, keys.rows)
            if branch.causal:
                seen.tril_()
            for segment, index in product(range(queries.segments), range(queries.heads)):
                of_head = counts[queries.first_head + index * queries.head_step]
                of_head[_tokens(queries, segment, index), _tokens(keys, segment, index)] += seen
        return counts.log_()


def _tokens(rows: Rows, segment: int, index: int) -> slice:
    """Return the tokens that a view shows of one segment and of its index-th head."""
    start = rows.first_token + segment * rows.segment_step + index * rows.skew
    return slice(start, start + (rows.rows - 1) * rows.row_step + 1, rows.row_step)
