"""Strided views: every kernel call of a plan, as views of whole tensors, without a copy.

B batch, N tokens of the shard, H query heads, K key heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .branches import Branch
from .plain_call import Kernel
from .spans import Rows

# rows and tokens of a batch, and the calls of each of these rows
PlacedCalls = tuple[slice, slice, tuple[Branch, ...]]
KernelCall = tuple[Branch, list[Tensor], list[Tensor]]  # query-like and key-like views
# index of far keys -> their key-like tensors, once they are there
FarTensors = Callable[[int], Sequence[Tensor]]
# strides and width of all tensors -> (branch, rows and first column of its place) -> the views of a call
KnownViews = dict[tuple[Any, ...], dict[tuple[int, int, int, int], "_CallViews"]]


def kernel_calls(
    placed: Sequence[PlacedCalls],
    kernel: Kernel,
    query_like: Sequence[Tensor],
    key_like: Sequence[Tensor],
    far: FarTensors,
    known_views: KnownViews,
) -> Iterator[KernelCall]:
    """Yield every kernel call of some places, as views (batch, heads, rows, last dim) of the tensors, in a fixed order.

    Each tensor is (B, N, heads, last dim), or (B, N, levels, heads, last dim), of which a call sees its own level.
    `far` returns as many tensors for far keys as `key_like` has. It is called right before a call that needs them.
    `known_views` are the plan's: views that one layer has found serve the next.
    """
    tensors = (*query_like, *key_like)
    queries = len(query_like)
    strides = tuple([(x.stride(), x.shape[-1]) for x in tensors])
    views_of_calls = known_views.setdefault(strides, {})
    of_levels: dict[int, list[Tensor]] = {}
    for batch_rows, columns, calls in placed:
        for branch in calls:
            level = branch.level if key_like[0].dim() == 5 else 0
            if level not in of_levels:
                of_levels[level] = [of_level(x, level) for x in tensors]
            near = of_levels[level]
            place = id(branch), batch_rows.start, batch_rows.stop, columns.start
            of_call = views_of_calls.get(place)
            if of_call is None:
                of_call = _CallViews.of(branch, batch_rows, columns.start, kernel, near, queries)
                views_of_calls[place] = of_call
            # of far keys, the call knows no views
            views = [view.shown(x) for x, view in zip(near, of_call.views, strict=False)]
            if branch.far_index is not None:
                for x in far(branch.far_index):
                    views.append(_StridedView.of_call(x, branch.keys, batch_rows, 0).shown(x))
            for call in _batched(views, of_call.limit):
                yield branch, call[:queries], call[queries:]


class _StridedView(NamedTuple):
    """The arguments of `as_strided`, for tensors of the same strides. `offset` counts from their first number."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of_rows(
        cls,
        x: Tensor,
        rows: Rows,
        batch_rows: slice,
        column: int = 0,
    ) -> _StridedView:
        """Return the view (batch, segments, heads, rows, last dim) of a part of a batch x, from token `column` on."""
        batch, token, head, last = x.stride()
        size = (
            batch_rows.stop - batch_rows.start,
            rows.segments,
            rows.heads,
            rows.rows,
            x.shape[3],
        )
        stride = (
            batch,
            rows.segment_step * token,
            rows.head_step * head + rows.skew * token,
            rows.row_step * token + rows.row_heads * head,
            last,
        )
        first_token = rows.first_token + column
        offset = batch_rows.start * batch + first_token * token + rows.first_head * head
        return cls(size, stride, offset)

    @classmethod
    def of_call(
        cls,
        x: Tensor,
        rows: Rows,
        batch_rows: slice,
        column: int,
    ) -> _StridedView:
        """Return the same view as (batch or segments, heads, rows, last dim), if batch or segments is 1."""
        size, stride, offset = cls.of_rows(x, rows, batch_rows, column)
        if size[0] == 1:
            return cls(size[1:], stride[1:], offset)
        if size[1] == 1:
            return cls(size[:1] + size[2:], stride[:1] + stride[2:], offset)
        return cls(size, stride, offset)

    def shown(self, x: Tensor) -> Tensor:
        """Return the view of a tensor."""
        return x.as_strided(self.size, self.stride, x.storage_offset() + self.offset)


class _CallViews(NamedTuple):
    """A branch's views in one place, without those of far keys, and how many rows of the batch a call takes."""

    views: list[_StridedView]
    limit: int

    @classmethod
    def of(
        cls,
        branch: Branch,
        batch_rows: slice,
        column: int,
        kernel: Kernel,
        near: Sequence[Tensor],
        queries: int,
    ) -> _CallViews:
        """Find the views of tensors, of which the first `queries` are like queries."""
        views = []
        for index, x in enumerate(near):
            rows = branch.queries if index < queries else branch.keys
            if rows is branch.queries or branch.far_index is None:
                views.append(_StridedView.of_call(x, rows, batch_rows, column))
        most_rows = max(branch.queries.rows, branch.keys.rows)
        return cls(views, kernel.max_batch(branch.queries.heads, most_rows, near[0].shape[-1]))


def of_level(x: Tensor, level: int) -> Tensor:
    """Return x (batch, tokens, heads, last dim) as it is, and of (batch, tokens, levels, heads, last dim) one level."""
    return x if x.dim() == 4 else x[:, :, level]


def strided_view(x: Tensor, rows: Rows, first_row: int = 0, batch: int | None = None) -> Tensor:
    """View x (batch, tokens, heads, last dim) as the rows (batch, segments, heads, rows, last dim), without a copy.

    `first_row` and `batch` select a part of the batch.
    """
    stop = x.shape[0] if batch is None else first_row + batch
    return _StridedView.of_rows(x, rows, slice(first_row, stop)).shown(x)


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
        groups = _together([x.unbind(walked) for x in views])
    for group in groups:
        if len(group[0]) <= limit:
            yield group
        else:
            yield from _together([x.split(limit) for x in group])


def _together(parts_of_views: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Return the first parts of all views, then the second ones, and so on."""
    return [list(parts) for parts in zip(*parts_of_views, strict=True)]


def unit_stride(x: Tensor) -> Tensor:
    """Return x with a last stride of 1, which kernels assume without a check; a size of 1 may have any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which kernels choose their own precision."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def autocasts(device: torch.device) -> bool:
    """Return whether autocast is on for a device. The meta device has none, and torch fails if it is asked."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
