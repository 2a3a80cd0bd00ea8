"""Sinks: the first rows of each document, turned so that every segment sees them right before what it sees anyway.

A query of segment s (of the first level, w_0 tokens, looking back b_0) sees sink i of n as if it stood at position
(s - b_0) w_0 - n + i, never at its true distance (arXiv 2309.17453). A rotated key that moves by one distance turns by
one angle, so n rows per segment are enough; the operator finds the rows, and whoever owns the positions turns them.

B batch, S segments, n sinks, K key heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .pattern import SINKS, Pattern, Span
from .spans import sink_segments

# (keys (B, S, n, K, D) rotated for their own positions, distances (S,) int64) -> the same keys that much further on
Turn = Callable[[Tensor, Tensor], Tensor]


class SinkRows(NamedTuple):
    """The places of a shard's sinks, and how far each segment's move.

    `firsts` are the tokens at which the documents begin whose sinks are seen by themselves; `outside` rows of the one
    at token 0 lie before the shard, in the far keys `far`: (index, rows) of each, in order. `documents` has, for each
    segment, the index of its document, `distances` the tokens that its sinks move. `rows` has, for the token at which
    a document begins, its first row among those that `spread` returns.
    """

    firsts: tuple[int, ...]
    outside: int
    far: tuple[tuple[int, int], ...]
    documents: tuple[int, ...]
    distances: tuple[int, ...]
    rows: dict[int, int]

    def collect(self, x: Tensor, far: Sequence[Tensor], n: int) -> Tensor:
        """The rows of each document, (B, documents, n, K, D), of a shard's x (B, N, K, D) and all its far tensors."""
        found = []
        for first in self.firsts:
            outside = self.outside if first == 0 else 0
            own = x[:, first : first + n - outside]
            found.append(torch.cat([*(far[i][:, :rows] for i, rows in self.far), own], 1) if outside else own)
        return torch.stack(found, 1)

    def spread(self, k: Tensor, v: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """Return what each segment sees, packed: (B, S n, K, D) of both, from the rows of each document."""
        of = torch.tensor(self.documents, device=k.device)
        turned = turn(k[:, of], torch.tensor(self.distances, device=k.device)).to(k.dtype)
        return turned.flatten(1, 2), v[:, of].flatten(1, 2)

    def gradients(self, k: Tensor, v: Tensor, turn: Turn, dk: Tensor, dv: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of each document's rows, given those of what `spread` returned for them."""
        with torch.enable_grad():
            leaves = [x.detach().to(d.dtype).requires_grad_() for x, d in ((k, dk), (v, dv))]
            return torch.autograd.grad(self.spread(leaves[0], leaves[1], turn), leaves, (dk, dv))

    def give_far(self, d: Tensor, dfar: Sequence[Tensor]) -> None:
        """Add gradients (B, documents, n, K, D) of what was collected to those of the far tensors."""
        at = 0
        for index, rows in self.far:
            dfar[index][:, :rows].add_(d[:, 0, at : at + rows])
            at += rows

    def give_own(self, d: Tensor, dx: Tensor) -> None:
        """Add gradients (B, documents, n, K, D) of what was collected to those of the shard."""
        for first, rows in zip(self.firsts, d.unbind(1), strict=True):
            own = rows[:, self.outside :] if first == 0 else rows
            dx[:, first : first + own.shape[1]].add_(own)


def sink_rows(
    pattern: Pattern, start: int, tokens: int, documents: Sequence[int] | None, spans: Sequence[Span]
) -> SinkRows | None:
    """The sinks that the queries of a shard see by themselves, or None. Raises ValueError where they are missing."""
    n, w, b = pattern.sinks, pattern.segment_lengths[0], pattern.look_backs[0]
    firsts: list[int] = []
    of_segment: list[int] = []
    distances: list[int] = []
    rows: dict[int, int] = {}
    edges = [0]
    for length in [tokens] if documents is None else documents:
        edges.append(edges[-1] + length)
    for first, stop in pairwise(edges):
        begin = start if first == 0 else 0
        segments = sink_segments(pattern, begin, begin + stop - first)
        if segments:
            rows[first] = len(distances) * n
            of_segment += [len(firsts)] * len(segments)
            distances += [(s - b) * w - n for s in segments]
            firsts.append(first)
    if not distances:
        return None
    outside = min(n, start) if 0 in firsts else 0
    before = sorted((span.start, span.stop, i) for i, span in enumerate(spans) if outside and span.level == SINKS)
    at = 0
    for first, stop, _ in before:
        at = stop if first == at else -1
    if at != outside:
        raise ValueError(f"the sinks [0, {outside}) lie before the shard that starts at {start}: give them as far keys")
    far = tuple((i, stop - first) for first, stop, i in before)
    return SinkRows(tuple(firsts), outside, far, tuple(of_segment), tuple(distances), rows)
