"""Few calls for many documents: their rows are gathered, and one call takes many sequences of any lengths.

A branch of one document has a few sequences, one per segment and head. Similar branches of other documents join it in
one `Pack`, for kernels that take packed sequences (`Kernel.packs`). Large branches stay views, which copy nothing. Only
`rows_of` needs more than integer arithmetic.

B batch, N tokens, H heads; a row is one of the B N H vectors of a tensor (B, N, H, D), and S sequences make a pack.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .branches import Branch
from .spans import Rows

# scores from which a branch gets its own call: a GPU computes them for as long as a CPU takes to start a call
LARGE = 1 << 26
MAX_SEQUENCES = 1 << 14  # per call: they are a dimension of the kernel's grid
# rows per call, counted as if all sequences were as long as the longest one: some kernels size their lse and scratch
# memory that way. A backward pass may have 2^31 numbers: up to 256 per row, for these rows and 128 more per sequence
MAX_ROWS = 6 << 20

PlacedCalls = tuple[
    slice, slice, tuple[Branch, ...]
]  # rows and tokens of a batch, and the calls of each row
_Key = tuple[bool, int, int]  # what branches of a pack have in common, as in `Pack`, and a number


class Sequences(NamedTuple):
    """S sequences of rows. Each has `count` rows, `step` apart, from its first row on."""

    first_rows: list[int]
    steps: list[int]
    counts: list[int]

    def cut(self, begin: int, stop: int | None) -> Sequences:
        return Sequences(*(numbers[begin:stop] for numbers in self))


@dataclass(frozen=True, eq=False)
class Pack:
    """One call of query rows on key rows, sequence by sequence. It has no query row twice.

    `causal` and `zero_keys` are as in `Branch`. A pack never `covers` rows: it comes after all views.
    """

    queries: Sequences
    keys: Sequences
    causal: bool
    zero_keys: int
    covers = False
    _there: dict[torch.device, tuple[PackedRows, PackedRows]] = field(default_factory=dict)

    def rows(self, device: torch.device) -> tuple[PackedRows, PackedRows]:
        """Return the rows of queries and of keys on a device, cached because all layers ask for the same."""
        if device not in self._there:
            queries = rows_of(self.queries, device)
            self._there[device] = (
                queries,
                queries if self.keys == self.queries else rows_of(self.keys, device),
            )
        return self._there[device]


class PackedRows(NamedTuple):
    """Rows as `places` (rows,) int64 among all B N H, `edges` (S + 1,) int32 of sequences, and the longest length."""

    places: Tensor
    edges: Tensor
    longest: int


def rows_of(sequences: Sequences, device: torch.device) -> PackedRows:
    """Build the tensors that kernels need. Only three numbers per sequence go to the device, and nothing comes back."""
    total, longest = sum(sequences.counts), max(sequences.counts)
    first_rows, steps, counts = (
        x.to(device, non_blocking=True) for x in torch.tensor(sequences, dtype=torch.int64)
    )
    edges = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    which = torch.repeat_interleave(counts, output_size=total)
    inside = torch.arange(total, device=device) - edges[which]
    return PackedRows(first_rows[which] + steps[which] * inside, edges.to(torch.int32), longest)


def packed(
    placed: Sequence[PlacedCalls], tokens: int, heads: int, kv_heads: int
) -> tuple[list[PlacedCalls], list[Pack]]:
    """Divide the calls of several places of a batch (B, `tokens`) into calls on views, and packs."""
    if len(placed) < 2:
        return list(placed), []
    views: list[PlacedCalls] = []
    groups: dict[_Key, tuple[Sequences, Sequences]] = defaultdict(
        lambda: (Sequences([], [], []), Sequences([], [], []))
    )
    for rows, columns, calls in placed:
        left = []
        taken: dict[_Key, list[_Taken]] = defaultdict(list)
        for branch in calls:
            queries = branch.queries
            scores = (
                queries.heads
                * queries.segments
                * queries.rows
                * branch.keys.rows
                * (rows.stop - rows.start)
            )
            if branch.far_index is not None or scores >= LARGE:
                left.append(branch)
                continue
            mine, place = _Taken.of(queries), 0
            key = (branch.causal, branch.zero_keys, place)
            while any(map(mine.meets, taken[key])):
                place += 1
                key = (*key[:2], place)
            taken[key].append(mine)
            for into, part, width in zip(
                groups[key], (queries, branch.keys), (heads, kv_heads), strict=True
            ):
                for row in range(rows.start, rows.stop):
                    _append(into, part, row * tokens + columns.start, width)
        if left:
            views.append((rows, columns, tuple(left)))
    return views, [
        pack for key, (queries, keys) in groups.items() for pack in _calls(key, queries, keys)
    ]


class _Taken(NamedTuple):
    """The heads and the range of tokens of a branch's queries."""

    heads: frozenset[int]
    first_token: int
    last_token: int

    @classmethod
    def of(cls, rows: Rows) -> _Taken:
        heads = frozenset(
            rows.first_head + i * rows.head_step + j * rows.row_heads
            for i in range(rows.heads)
            for j in range(rows.rows if rows.row_heads else 1)
        )
        last = (
            (rows.segments - 1) * rows.segment_step
            + (rows.heads - 1) * rows.skew
            + (rows.rows - 1) * rows.row_step
        )
        return cls(heads, rows.first_token, rows.first_token + last)

    def meets(self, other: _Taken) -> bool:
        """Return whether both may have a query row in common."""
        overlap = self.first_token <= other.last_token and other.first_token <= self.last_token
        return overlap and not self.heads.isdisjoint(other.heads)


def _append(into: Sequences, rows: Rows, token: int, heads: int) -> None:
    """Append the sequences that a view shows. Its tokens count from `token`, in a tensor with `heads` heads."""
    for segment in range(rows.segments):
        start = token + rows.first_token + segment * rows.segment_step
        for head in range(rows.heads):
            into.first_rows.append(
                (start + head * rows.skew) * heads + rows.first_head + head * rows.head_step
            )
    number = rows.segments * rows.heads
    into.steps.extend([rows.row_step * heads + rows.row_heads] * number)
    into.counts.extend([rows.rows] * number)


def _calls(key: _Key, queries: Sequences, keys: Sequences) -> Iterator[Pack]:
    """Yield packs that are each small enough for one call."""
    begin, longest = 0, 0
    for index, counts in enumerate(zip(queries.counts, keys.counts, strict=True)):
        longest, count = max(longest, *counts), index - begin
        if count and (count >= MAX_SEQUENCES or (count + 1) * longest > MAX_ROWS):
            yield Pack(queries.cut(begin, index), keys.cut(begin, index), *key[:2])
            begin, longest = index, max(counts)
    yield Pack(queries.cut(begin, None), keys.cut(begin, None), *key[:2])
