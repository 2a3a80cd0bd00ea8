"""Rows of a padded batch, grouped by the column at which they start: rows of one group are at the same position.

B batch, N new tokens, L columns (the new tokens and all before them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AlignedRows(NamedTuple):
    """Rows of a batch that start at column `first`, and so are at the same position.

    `members` None means all rows. `lengths` is the number of real tokens of each row in this call; None means all.
    """

    members: list[int] | None
    first: int
    lengths: Sequence[int] | Tensor | None


def rows_of(columns: Tensor | None, before: int, shape: Sequence[int]) -> Iterator[AlignedRows]:
    """Yield the rows of (batch, tokens) new tokens after `before` columns, grouped by the column at which they start.

    `columns` is the result of `columns_of`. Rows without a token yet are left out.
    """
    batch, tokens = shape
    if columns is None:
        yield AlignedRows(None, 0, None)
    elif torch.compiler.is_compiling():  # values are unknown there: padding must be on the right
        stops = columns[:, 1]
        yield AlignedRows(None, 0, stops.where(stops < 0, (stops - before).clamp(min=0)))
    else:
        found: dict[int, list[int]] = {}
        spans = columns.tolist()
        for row, (first, stop) in enumerate(spans):
            if first < stop:
                found.setdefault(first, []).append(row)
        for first, members in found.items():
            begin = max(first, before)
            lengths = [max(0, spans[row][1] - begin) for row in members]
            whole = all(n == before + tokens - begin for n in lengths)
            alone = len(members) == batch and begin == before
            yield AlignedRows(None if alone else members, first, None if whole else lengths)


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
