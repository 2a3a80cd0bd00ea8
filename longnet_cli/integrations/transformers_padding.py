"""Rows of a padded batch, grouped by the column at which they start: rows of one group are at the same position.

B batch, N new tokens, L columns (the new tokens and all before them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AlignedRows(NamedTuple):
    """Rows of a batch that start at column `first`, and so are at the same position.

    `members` None means all rows. `skip` new columns come before their first new token, which is at position `start`.
    `lengths` is the number of real tokens of each row in this call; None means all.
    """

    members: list[int] | None
    first: int
    skip: int
    start: int
    lengths: Sequence[int] | Tensor | None

    def of(self, x: Tensor) -> Tensor:
        """Return these rows of a tensor (B, ...)."""
        return x if self.members is None else x[self.members]


def by_rows(
    columns: Tensor | None, before: int, shape: Sequence[int], compute: Callable[[AlignedRows], Tensor]
) -> Tensor | None:
    """Return `compute` of all groups of rows, (rows, N - skip, ...), put together: (B, N, ...), with zeros elsewhere.

    `shape` begins with (B, N): new tokens after `before` columns. `columns` is the result of `columns_of`. Rows without
    a token yet are left out. Returns None if no row has a token.
    """
    if columns is None:
        return compute(AlignedRows(None, 0, 0, before, None))
    if torch.compiler.is_compiling():  # values are unknown there: padding must be on the right
        stops = columns[:, 1]
        return compute(AlignedRows(None, 0, 0, before, stops.where(stops < 0, (stops - before).clamp(min=0))))
    groups: dict[int, list[int]] = {}
    spans = columns.tolist()
    for row, (first, stop) in enumerate(spans):
        if first < stop:
            groups.setdefault(first, []).append(row)
    out = None
    for first, members in groups.items():
        begin = max(first, before)
        lengths = [max(0, spans[row][1] - begin) for row in members]
        known = None if all(n == before + shape[1] - begin for n in lengths) else lengths
        if len(members) == shape[0] and begin == before:
            return compute(AlignedRows(None, first, 0, before - first, known))
        found = compute(AlignedRows(members, first, begin - before, begin - first, known))
        out = found.new_zeros(*shape[:2], *found.shape[2:]) if out is None else out
        out[members, begin - before :] = found
    return out


def columns_of(tokens: Tensor) -> Tensor | None:
    """Return columns [first, stop) of each row's tokens, (B, 2), from a mask (B, L) that is True at tokens.

    Returns None if all are tokens. A row without a token starts at L. In a compiled graph, `stop` is -1 for padding
    that is not on the right, which the attention call refuses. Otherwise, padding between tokens raises ValueError.
    """
    counts, columns = tokens.sum(-1), torch.arange(tokens.shape[-1], device=tokens.device)
    if torch.compiler.is_compiling():
        right = (tokens == (columns < counts[:, None])).all(-1)
        return torch.stack([torch.zeros_like(counts), counts.where(right, -1)], -1)
    first = tokens.int().argmax(-1).where(counts > 0, tokens.shape[-1])
    stop = first + counts
    whole = (tokens == ((columns >= first[:, None]) & (columns < stop[:, None]))).all(-1)
    found = torch.stack([first, stop, whole], -1).cpu()
    if not found[:, 2].all():
        row = int(found[:, 2].logical_not().nonzero()[0])
        raise ValueError(
            f"row {row} has padding between its tokens: pad on the left or on the right, and prompts of generate() on "
            'the left (tokenizer.padding_side = "left")'
        )
    return None if counts.numel() and bool((found[:, 1] - found[:, 0] == tokens.shape[-1]).all()) else found[:, :2]
