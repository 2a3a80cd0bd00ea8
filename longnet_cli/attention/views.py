"""Strided views: every kernel call of a plan, as views of whole tensors, without a copy.

B batch, N tokens of the shard, H query heads, K key heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .branches import Branch
from .plain_call import Kernel
from .spans import Rows

# rows and tokens of a batch, and the calls of each of these rows
PlacedCalls = tuple[slice, slice, tuple[Branch, ...]]
_Layout = tuple[tuple[int, ...], tuple[int, ...], int]  # size, stride and offset of a view
KernelCall = tuple[Branch, list[Tensor], list[Tensor]]  # query-like and key-like views
# index of far keys -> their key-like tensors, once they are there
FarTensors = Callable[[int], Sequence[Tensor]]
# strides and width of all tensors -> (branch, rows and first column of its place) -> the layouts of a call's views
Layouts = dict[tuple[Any, ...], dict[tuple[int, int, int, int], "_CallLayout"]]


def kernel_calls(
    placed: Sequence[PlacedCalls],
    kernel: Kernel,
    query_like: Sequence[Tensor],
    key_like: Sequence[Tensor],
    far: FarTensors | None = None,
    layouts: Layouts | None = None,
) -> Iterator[KernelCall]:
    """Yield every kernel call of some places, as views (batch, heads, rows, last dim) of the tensors, in a fixed order.

    Each tensor is (B, N, heads, last dim), or (B, N, levels, heads, last dim), of which a call sees its own level.
    `far` returns as many tensors for far keys as `key_like` has. It is called right before a call that needs them.
    `layouts` are kept from one call to the next, if they are the plan's.
    """
    tensors = (*query_like, *key_like)
    queries = len(query_like)
    of_calls: dict[Any, _CallLayout] = {}
    if layouts is not None:
        strides = tuple([(x.stride(), x.shape[-1]) for x in tensors])
        of_calls = layouts.setdefault(strides, {})
    of_levels: dict[int, tuple[list[Tensor], list[Any]]] = {}
    for run, columns, calls in placed:
        for branch in calls:
            level = branch.level if key_like[0].dim() == 5 else 0
            if level not in of_levels:
                of_one = [of_level(x, level) for x in tensors]
                of_levels[level] = of_one, [x.storage_offset() for x in of_one]
            near, begins = of_levels[level]
            place = id(branch), run.start, run.stop, columns.start
            layout = of_calls.get(place)
            if layout is None:
                layout = _CallLayout.of(
                    branch, run, columns.start, kernel, near[:queries], near[queries:]
                )
                of_calls[place] = layout
            views = layout.shown(near, begins)
            single = layout.single
            if branch.far_index is not None:
                assert far is not None
                views += [view(x, branch.keys, run, 0) for x in far(branch.far_index)]
                single = False
            for call in [views] if single else _batched(views, layout.limit):
                yield branch, call[:queries], call[queries:]


class _CallLayout(NamedTuple):
    """The layouts of a branch's views in one place, without those of far keys, and how many rows a call takes.

    single: one call takes all.
    """

    views: list[_Layout]
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
        queries, keys = branch.queries, branch.keys
        views = [_layout_of_call(x, queries, run, column) for x in query_like]
        if branch.far_index is None:
            views += [_layout_of_call(x, keys, run, column) for x in key_like]
        rows = max(queries.rows, keys.rows)
        head_dim = query_like[0].shape[-1]
        limit = kernel.max_batch(queries.heads, rows, head_dim)
        size, *_ = views[0]
        single = len(size) == 4 and size[0] <= limit
        return cls(views, limit, single)

    def shown(self, near: Sequence[Tensor], begins: Sequence[int]) -> list[Tensor]:
        """Return the views of tensors that begin there in their storages: of far keys, those of queries alone."""
        layouts = zip(near, self.views, begins, strict=False)
        return [
            x.as_strided(size, stride, begin + offset)
            for x, (size, stride, offset), begin in layouts
        ]


def of_level(x: Tensor, level: int) -> Tensor:
    """Return x (batch, tokens, heads, last dim) as it is, and of (batch, tokens, levels, heads, last dim) one level."""
    return x if x.dim() == 4 else x[:, :, level]


def strided_view(x: Tensor, rows: Rows, first_row: int = 0, batch: int | None = None) -> Tensor:
    """View x (batch, tokens, heads, last dim) as the rows (batch, segments, heads, rows, last dim), without a copy.

    `first_row` and `batch` select a part of the batch.
    """
    stop = x.shape[0] if batch is None else first_row + batch
    size, stride, offset = _layout(x, rows, first_row, stop, 0)
    return x.as_strided(size, stride, x.storage_offset() + offset)


def view(
    x: Tensor,
    rows: Rows,
    run: slice,
    column: int,
    apart: bool = False,
) -> Tensor:
    """View the rows `run` of a batch x, tokens counted from `column`, like `strided_view`.

    The result is (batch or segments, heads, rows, last dim) if batch or segments is 1. If both are, and heads shall be
    `apart`, it is (heads, 1, rows, last dim): then the output of a kernel comes in the order of heads.
    """
    size, stride, offset = _layout_of_call(x, rows, run, column, apart)
    return x.as_strided(size, stride, x.storage_offset() + offset)


def _layout_of_call(
    x: Tensor,
    rows: Rows,
    run: slice,
    column: int,
    apart: bool = False,
) -> _Layout:
    """Return the layout of `view`."""
    size, stride, offset = _layout(x, rows, run.start, run.stop, column)
    dimensions = [0, 1, 2, 3, 4]  # batch, segments, heads, rows, last dim
    if apart and size[0] == 1:
        dimensions = [2, 1, 3, 4]
    elif size[0] == 1:
        dimensions = [1, 2, 3, 4]
    elif size[1] == 1:
        dimensions = [0, 2, 3, 4]
    shown = itemgetter(*dimensions)
    return shown(size), shown(stride), offset


def _layout(x: Tensor, rows: Rows, start: int, stop: int, column: int) -> _Layout:
    """Return the layout of `strided_view`, for rows [start, stop) of a batch, from token `column` on."""
    batch, token, head, last = x.stride()
    size = (stop - start, rows.segments, rows.heads, rows.rows, x.shape[3])
    stride = (
        batch,
        rows.segment_step * token,
        rows.head_step * head + rows.skew * token,
        rows.row_step * token + rows.row_heads * head,
        last,
    )
    offset = start * batch + (rows.first_token + column) * token + rows.first_head * head
    return size, stride, offset


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


def autocasts(device: torch.device) -> bool:
    """Return whether autocast is on for a device. The meta device has none, and torch fails if it is asked."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
