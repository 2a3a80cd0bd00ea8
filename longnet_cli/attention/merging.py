"""Execution and merging of branches, with exact gradients.

Each branch is one plain attention call on strided views. Branches merge by their log-sum-exp in fp32:

    LSE = log sum_i exp(lse_i)        out = sum_i exp(lse_i - LSE) out_i

The backward calls each branch's kernel with the merged out and LSE, and adds up dq, dk, dv.

B batch, N tokens of the shard, H query heads, K key heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import log
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .branches import Branch, Union, branches
from .groups import GroupedPart
from .packing import Block, Pack, PackedRows, packed
from .plain_call import Kernel
from .spans import Rows

if TYPE_CHECKING:
    from .chosen import Chosen

KernelCall = tuple[Branch, list[Tensor], list[Tensor]]  # query-like and key-like views
FarTensors = Callable[[int], Sequence[Tensor]]  # index of far keys -> their key-like tensors, once they are there
# strides and width of all tensors -> (branch, rows and first column of its block) -> the layouts of a call's views
Layouts = dict[tuple[Any, ...], dict[tuple[int, int, int, int], "_CallLayout"]]


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """All calls of a batch, for a kernel: blocks as views, then packs.

    `covered`: no branch is packed, and the `first` branches reach every row. `squares`: besides, in each `first` branch
        queries and keys are the same rows of the same heads (H = K). `chosen`: the groups of queries that see chosen
        blocks. `start`: the branch that a forward starts with, without a merge, as it has all heads of a single token.
        `layouts`: those of the views of near rows, as `kernel_calls` has found them.
    """

    kernel: Kernel
    blocks: Sequence[Block]
    packs: Sequence[Pack] = ()
    covered: bool = False
    squares: bool = False
    chosen: Sequence[GroupedPart] = ()
    start: Branch | None = None
    layouts: Layouts = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        kernel: Kernel,
        blocks: Sequence[Block],
        batch: int,
        tokens: int,
        heads: int,
        kv_heads: int,
        chosen: Sequence[GroupedPart] = (),
    ) -> AttentionPlan:
        """Plan the calls of some blocks."""
        views, gathered = packed(blocks, tokens, heads, kv_heads) if kernel.packs else (blocks, [])
        full = sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns, _ in blocks)
        covered = not gathered and full == batch * tokens and all(calls and calls[0].first for *_, calls in blocks)
        even = all(branch.queries == branch.keys for *_, calls in blocks for branch in calls if branch.first)
        first = blocks[0][2][0] if covered and len(blocks) == tokens == 1 else None
        start = first if first and first.queries.heads * first.queries.rows == heads and not first.zero_keys else None
        return cls(kernel, views, gathered, covered, covered and even and heads == kv_heads, chosen, start)


def merged_forward(
    plan: AttentionPlan,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: FarTensors | None = None,
    chosen: Chosen | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, LSE): (B, N, H, D) like q, and (B, N, H) in fp32 (fp64 for fp64).

    `far` returns far k and v. `chosen` chooses the blocks of `plan.chosen`, and keeps the choice for the backward pass.
    """
    if torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):  # kernels choose their own precision
            return merged_forward(plan, scale, q, k, v, far, chosen)
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    kernel, blocks = plan.kernel, plan.blocks
    if plan.start:
        merge = _single_token(plan, plan.start, scale, q, k, v, far)
        blocks = [(rows, columns, calls[1:]) for rows, columns, calls in blocks if len(calls) > 1]
    else:
        merge = Merge(q, plan.covered)
    if blocks:  # after a single token's first call, there are often no others
        calls = kernel_calls(blocks, kernel, (q, *merge.places), (k, v), far, plan.layouts)
        for branch, (q_, *places), (k_, v_) in calls:
            out, lse = kernel.forward(q_, k_, v_, branch.causal, scale, *_counts(branch, q_))
            merge.add(branch, places, out, lse)
    for pack in plan.packs:
        queries, keys = pack.rows(q.device)
        q_, k_, v_ = _rows(q)[queries.places], _rows(k)[keys.places], _rows(v)[keys.places]
        out, lse = kernel.forward_packed(q_, k_, v_, queries, keys, pack.causal, scale)
        merge.add_rows(pack, queries, out, lse)
    if chosen:
        chosen.choose(q, k, scale)
        chosen.merge(kernel, scale, q, k, v, merge)
    return merge.result()


def _single_token(
    plan: AttentionPlan, branch: Branch, scale: float, q: Tensor, k: Tensor, v: Tensor, far: FarTensors | None
) -> Merge:
    """Return a merge that starts with the result of `branch`, which has all heads of a single token."""
    k, v = (k, v) if branch.far is None or not far else far(branch.far)
    rows = plan.blocks[0][0]
    q_, k_, v_ = (
        _view(x, shown, rows, 0, True) for x, shown in ((q, branch.queries), (k, branch.keys), (v, branch.keys))
    )
    out, lse = plan.kernel.forward(q_, k_, v_, False, scale)
    return Merge(q, True, (out, lse))


def merged_backward(
    plan: AttentionPlan,
    scale: float,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    far: Sequence[Tensor],
    on_far: Callable[[Sequence[Tensor]], None] | None = None,
    chosen: Chosen | None = None,
) -> list[Tensor]:
    """Return dq, dk, dv and the gradients of the far tensors (k, v, k, v, ...), from the merged out and LSE.

    All are in fp32 or fp64. With `on_far`, far keys come first, and `on_far` is called once with their gradients,
    before the gradients of near keys are computed.
    """
    dout, q, k, v = (unit_stride(x) for x in (dout, q, k, v))
    sums = _Gradients(plan, q, k, v, far, far_first=on_far is not None)
    of_queries = (dout, q, out, lse[..., None])
    with torch.autocast(q.device.type, enabled=False):
        if on_far:
            sums.add_calls(_only(plan.blocks, far=True), scale, of_queries, (k, v))
            on_far(sums.of_far)
            sums.add_calls(_only(plan.blocks, far=False), scale, of_queries, (k, v))
        else:
            sums.add_calls(plan.blocks, scale, of_queries, (k, v))
        for pack in plan.packs:
            sums.add_pack(pack, scale, of_queries, (k, v))
        of_chosen = chosen.gradients(plan.kernel, scale, of_queries, (k, v), sums.q) if chosen else ()
    dq, *of_keys = (total.place for total in (sums.q, sums.k, sums.v))
    for index, more in enumerate(of_chosen):
        of_keys[index] = of_keys[index] + more
    return [dq, *of_keys, *sums.of_far]


def refuse_capture(q: Tensor) -> None:
    """Raise RuntimeError while a CUDA graph captures: a replay would read tables and rows that are gone by then."""
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "dilated attention cannot be captured in a CUDA graph: capture what is around it, as torch.compile does"
        )


def _only(blocks: Sequence[Block], far: bool) -> list[Block]:
    """Return the calls of blocks on far keys alone, or on near keys alone."""
    return [
        (rows, columns, tuple(branch for branch in calls if (branch.far is not None) == far))
        for rows, columns, calls in blocks
    ]


class _Gradients:
    """The sums of all calls of a backward pass: of q, k and v, and of far tensors (`of_far`, in fp32 or fp64)."""

    def __init__(
        self, plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor, far: Sequence[Tensor], far_first: bool
    ) -> None:
        """Allocate the sums. `far_first`: far keys come before near ones."""
        # what the first calls write anyway needs no zeros, if nothing else is added before
        self.q = GradientSum(q, plan.covered and not far_first)
        self.k, self.v = (GradientSum(x, plan.squares and not far_first) for x in (k, v))
        self.kernel, self.far, self._far_sums = plan.kernel, far, [GradientSum(x) for x in far]
        self._layouts = plan.layouts
        self.of_far = [total.place for total in self._far_sums]
        self._far_first, self._shared_heads = far_first, q.shape[2] != k.shape[2]

    def add_calls(
        self, blocks: Sequence[Block], scale: float, of_queries: Sequence[Tensor], keys: Sequence[Tensor]
    ) -> None:
        """Add the gradients of calls on views; `of_queries` are dout, q, out and lse (B, N, H, 1), `keys` k and v."""
        query_like, key_like = (*of_queries, self.q.place), (*keys, self.k.place, self.v.place)
        calls = kernel_calls(blocks, self.kernel, query_like, key_like, self._far_tensors, self._layouts)
        for branch, (dout, q, out, lse, dq), (k, v, *places) in calls:
            part, *parts = self.kernel.backward(
                dout, q, k, v, out, lse[..., 0], branch.causal, scale, *_counts(branch, q)
            )
            self.q.add(dq, part, branch.queries, fresh=branch.first and not self._far_first)
            fresh = branch.first and branch.queries == branch.keys and not self._shared_heads
            of_keys = (self.k, self.v) if branch.far is None else self._far_sums[2 * branch.far : 2 * branch.far + 2]
            for total, place, part in zip(of_keys, places, parts, strict=True):
                total.add(place, part, branch.keys, fresh)
            del part, parts  # the next call needs the memory

    def add_pack(self, pack: Pack, scale: float, of_queries: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
        """Add the gradients of a call on gathered rows; the other arguments are as in `add_calls`."""
        queries, of_keys = pack.rows(of_queries[0].device)
        dout, q, out, lse = (_rows(x)[queries.places] for x in of_queries)
        k, v = (_rows(x)[of_keys.places] for x in keys)
        parts = self.kernel.backward_packed(dout, q, k, v, out, lse[..., 0], queries, of_keys, pack.causal, scale)
        for total, rows, part in zip((self.q, self.k, self.v), (queries, of_keys, of_keys), parts, strict=True):
            total.add_rows(rows, part)

    def _far_tensors(self, index: int) -> Sequence[Tensor]:
        """Return k and v of far keys, and the sums of their gradients."""
        both = slice(2 * index, 2 * index + 2)
        return *self.far[both], *self.of_far[both]


class Merge:
    """The running out and LSE of all branches, in fp32 or fp64."""

    def __init__(self, q: Tensor, covered: bool, start: tuple[Tensor, Tensor] | None = None) -> None:
        """Allocate out and LSE. `covered`: the `first` branches write every row, so out needs no zeros.

        `start` is the out and lse of a single token, in the order of heads, that the merge starts with.
        """
        dtype = accumulator(q.dtype)
        self._dtype = q.dtype
        if start:
            out, lse = start
            self._out, self._lse = _as(out.reshape(q.shape), dtype), lse.reshape(q.shape[:3])
            return
        self._out = (torch.empty if covered else torch.zeros)(q.shape, dtype=dtype, device=q.device)
        self._lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
        if not covered:
            self._lse.fill_(float("-inf"))

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        return self._out, self._lse[..., None]

    def add(self, branch: Branch | Pack, places: Sequence[Tensor], part: Tensor, lse: Tensor) -> None:
        """Merge one call in place into `places`, its views of out (.., rows, D) and lse (.., rows, 1)."""
        (out, total), lse = places, lse[..., None]
        if branch.zero_keys:  # n keys with score 0 and value 0: a branch with out 0 and lse log n, merged first
            with_zeros = torch.logaddexp(lse, torch.full_like(lse, log(branch.zero_keys)))
            part, lse = part * (lse - with_zeros).exp(), with_zeros
        if branch.first:
            out.copy_(part)
            total.copy_(lse)
            return
        sums = torch.logaddexp(total, lse)
        out.lerp_(part.to(out.dtype), (lse - sums).exp_())
        total.copy_(sums)

    def add_rows(self, pack: Pack, queries: PackedRows, part: Tensor, lse: Tensor) -> None:
        """Merge one call (rows, D) of gathered rows, all of them distinct."""
        gathered = [_rows(x)[queries.places] for x in self.places]
        self.add(pack, gathered, part, lse)
        for x, rows in zip(self.places, gathered, strict=True):
            _rows(x).index_copy_(0, queries.places, rows)

    def result(self) -> tuple[Tensor, Tensor]:
        return _as(self._out, self._dtype), self._lse


class GradientSum:
    """The sum of all parts of a gradient, in fp32 or fp64."""

    def __init__(self, x: Tensor, written: bool = False) -> None:
        """Allocate the sum. `written`: fresh parts write every row."""
        self.place = (torch.empty if written else torch.zeros)(x.shape, dtype=accumulator(x.dtype), device=x.device)

    def add(self, place: Tensor, part: Tensor, rows: Rows, fresh: bool) -> None:
        """Add the part of a call to `place`, its view of the sum. `fresh`: nothing was added there before."""
        if fresh:
            place.copy_(part)
            return
        for into, share in apart(place, part, rows):
            into.add_(share)

    def add_rows(self, rows: PackedRows, part: Tensor) -> None:
        """Add the part (rows, D) of gathered rows, which may be the same more than once."""
        _rows(self.place).index_add_(0, rows.places, part.to(self.place.dtype))


def _rows(x: Tensor) -> Tensor:
    """Reshape (B, N, H, D) to (B N H, D), a view if x is contiguous."""
    return x.reshape(-1, x.shape[-1])


def apart(total: Tensor, part: Tensor, keys: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of `total` (batch, heads, rows, D) and the parts to add to them; no view shows a number twice."""
    if keys.heads > 1 and keys.head_step == keys.skew == 0:  # all heads of the call read the same rows
        total, part = total[:, :1], part.sum(1, keepdim=True)
    # if segments look back over each other, one segment's rows at a time
    if keys.segments > 1 and keys.rows > (rows := -(-keys.segment_step // keys.row_step)):
        yield from zip(total.split(rows, 2), part.split(rows, 2), strict=True)
    else:
        yield total, part


def kernel_calls(
    blocks: Sequence[Block],
    kernel: Kernel,
    query_like: Sequence[Tensor],
    key_like: Sequence[Tensor],
    far: FarTensors | None = None,
    layouts: Layouts | None = None,
) -> Iterator[KernelCall]:
    """Yield every kernel call of some blocks, as views (batch, heads, rows, last dim) of the tensors, in a fixed order.

    `far` returns as many tensors for far keys as `key_like` has. It is called right before a call that needs them.
    `layouts` are kept from one call to the next, if they are the plan's.
    """
    near = *query_like, *key_like
    known = {} if layouts is None else layouts.setdefault(tuple([(x.stride(), x.shape[3]) for x in near]), {})
    begins = [x.storage_offset() for x in near]
    queries = len(query_like)
    for run, columns, calls in blocks:
        for branch in calls:
            key = id(branch), run.start, run.stop, columns.start
            if (layout := known.get(key)) is None:
                layout = known[key] = _CallLayout.of(branch, run, columns.start, kernel, query_like, key_like)
            shown = zip(near, layout.views, begins, strict=False)  # of far keys, only the queries are near
            views = [x.as_strided(size, stride, begin + offset) for x, (size, stride, offset), begin in shown]
            if branch.far is not None:
                assert far is not None
                views += [_view(x, branch.keys, run, 0) for x in far(branch.far)]
            if layout.single and branch.far is None:
                yield branch, views[:queries], views[queries:]
            else:
                for call in _batched(views, layout.limit):
                    yield branch, call[:queries], call[queries:]


class _CallLayout(NamedTuple):
    """The layouts of a branch's views in one block, without those of far keys, and how many rows a call takes.

    views: size, stride and offset of each. single: one call takes all.
    """

    views: list[tuple[Any, Any, int]]
    limit: int
    single: bool

    @classmethod
    def of(
        cls,
        branch: Branch,
        run: slice,
        column: int,
        kernel: Kernel,
        query_like: Sequence[Tensor],
        key_like: Sequence[Tensor],
    ) -> _CallLayout:
        shown = [(x, branch.queries) for x in query_like]
        if branch.far is None:
            shown += [(x, branch.keys) for x in key_like]
        views = [_layout_of_call(x, rows, run, column) for x, rows in shown]
        rows = max(branch.queries.rows, branch.keys.rows)
        limit = kernel.max_batch(branch.queries.heads, rows, query_like[0].shape[-1])
        size = views[0][0]
        return cls(views, limit, len(size) == 4 and size[0] <= limit)


def _counts(branch: Branch, q: Tensor) -> tuple[Tensor, ...]:
    """Return the `log_counts` of a union, as a tuple of one tensor (heads, rows, keys); () for other branches."""
    if branch.union is None:
        return ()
    shown = branch.queries
    of_heads = log_counts(branch.union, accumulator(q.dtype), q.device)[shown.first_head :: max(shown.head_step, 1)]
    return (of_heads[: shown.heads, : shown.rows, : shown.rows],)


@lru_cache(maxsize=4)
def log_counts(union: Union, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (H, tokens, tokens): the log of how often a key counts, once for each level that shows it; or -inf."""
    pattern, heads, kv_heads, causal, tokens = union
    with torch.inference_mode(False):  # the cached table outlives the caller's inference mode
        counts = torch.zeros(heads, tokens, tokens, dtype=dtype, device=device)
        for branch in branches(pattern, heads, 0, tokens, causal, "exact", (), 0, kv_heads):
            seen = counts.new_ones(branch.queries.rows, branch.keys.rows)
            seen = seen.tril_() if branch.causal else seen
            for segment in range(branch.queries.segments):
                for index in range(branch.queries.heads):
                    of_head = counts[branch.queries.first_head + index * branch.queries.head_step]
                    rows, keys = (_tokens(x, segment, index) for x in (branch.queries, branch.keys))
                    of_head[rows, keys] += seen
        return counts.log_()


def _tokens(rows: Rows, segment: int, index: int) -> slice:
    """Return the tokens that a view shows of one segment and of its index-th head."""
    first = rows.first_token + segment * rows.segment_step + index * rows.skew
    return slice(first, first + (rows.rows - 1) * rows.row_step + 1, rows.row_step)


def strided_view(x: Tensor, rows: Rows, first: int = 0, batch: int | None = None) -> Tensor:
    """View x (batch, tokens, heads, last dim) as the rows (batch, segments, heads, rows, last dim), without a copy.

    `first` and `batch` select a part of the batch.
    """
    size, stride, offset = _layout(x, rows, first, x.shape[0] if batch is None else first + batch, 0)
    return x.as_strided(size, stride, x.storage_offset() + offset)


def _view(x: Tensor, rows: Rows, run: slice, column: int, apart: bool = False) -> Tensor:
    """View the rows `run` of a batch x, tokens counted from `column`, like `strided_view`.

    The result is (batch or segments, heads, rows, last dim) if batch or segments is 1. If both are, and heads shall be
    `apart`, it is (heads, 1, rows, last dim): then the output of a kernel comes in the order of heads.
    """
    size, stride, offset = _layout_of_call(x, rows, run, column, apart)
    return x.as_strided(size, stride, x.storage_offset() + offset)


def _layout_of_call(x: Tensor, rows: Rows, run: slice, column: int, apart: bool = False) -> tuple[Any, Any, int]:
    """Return size, stride and offset of `_view`."""
    size, stride, offset = _layout(x, rows, run.start, run.stop, column)
    if apart and size[0] == 1:
        size, stride = (size[2], *size[1:2], *size[3:]), (stride[2], *stride[1:2], *stride[3:])
    elif size[0] == 1:
        size, stride = size[1:], stride[1:]
    elif size[1] == 1:
        size, stride = size[:1] + size[2:], stride[:1] + stride[2:]
    return size, stride, offset


def _layout(x: Tensor, rows: Rows, start: int, stop: int, column: int) -> tuple[Any, Any, int]:
    """Return size, stride and offset of `strided_view`, for rows [start, stop) of a batch, from token `column` on."""
    segments, segment_step, heads, first_head, head_step, number, row_step, first, skew, row_heads = rows
    of_batch, token, head, last = x.stride()
    size = (stop - start, segments, heads, number, x.shape[3])
    of_head, of_row = head_step * head + skew * token, row_step * token + row_heads * head
    offset = start * of_batch + (first + column) * token + first_head * head
    return size, (of_batch, segment_step * token, of_head, of_row, last), offset


def _batched(views: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Yield views as (batch * segments, ..), at most `limit` at a time.

    If batch and segments do not merge into one stride, loop over the shorter of the two.
    """
    batch, segments = views[0].shape[:2]
    if views[0].dim() == 4:
        groups = [views]
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


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # a call that does nothing takes time too


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_stride(x: Tensor) -> Tensor:
    """Return x with a last stride of 1, which kernels assume without a check; a size of 1 may have any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()
