"""Attention sinks: the first rows of each document, turned so that every segment sees them right before its window.

Segments are those of the first level, with w_0 tokens and look-back b_0. A query of segment s sees sink i of n as if
it stood at position (s - b_0) w_0 - n + i, never at its true distance (arXiv 2309.17453). The distance alone decides by
which angles a rotated key turns, so n rows per segment are enough. The operator finds the rows; the caller, who knows
how positions rotate keys, turns them.

B batch, S segments, n sinks, K key heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .pattern import Pattern
from .spans import FarSpan, sink_segments, spans_of_sinks

# (keys (B, S, n, K, D) rotated for their own positions, distances (S,) int64) -> the keys, so many positions further on
Turn = Callable[[Tensor, Tensor], Tensor]


class SinkRows(NamedTuple):
    """The places of a shard's sinks, and the distance that they move for each segment.

    Documents are left out if none of their segments needs a separate call for sinks.

    starts: the token of the shard at which each document starts.
    outside: the number of sinks of the document at token 0 that lie before the shard.
    far: (index, rows) of the far keys that hold these sinks, in order.
    documents: for each segment, the index of its document.
    distances: for each segment, the number of tokens that its sinks move.
    rows: maps the token at which a document starts to the document's first row in the result of `spread`.
    """

    starts: tuple[int, ...]
    outside: int
    far: tuple[tuple[int, int], ...]
    documents: tuple[int, ...]
    distances: tuple[int, ...]
    rows: dict[int, int]

    def collect(self, x: Tensor, far: Sequence[Tensor], n: int) -> Tensor:
        """Return the sinks (B, documents, n, K, D) of each document, from a shard's x (B, N, K, D) and far tensors."""
        before_shard = [far[index][:, :rows] for index, rows in self.far]
        of_documents = []
        for start in self.starts:
            if start == 0 and self.outside:
                in_shard = x[:, : n - self.outside]
                of_documents.append(torch.cat([*before_shard, in_shard], 1))
            else:
                of_documents.append(x[:, start : start + n])
        return torch.stack(of_documents, 1)

    def spread(self, k: Tensor, v: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """Turn the sinks of each document for its segments; return k and v packed, both (B, S n, K, D)."""
        documents = torch.tensor(self.documents, device=k.device)
        distances = torch.tensor(self.distances, device=k.device)
        turned = turn(k[:, documents], distances).to(k.dtype)
        return turned.flatten(1, 2), v[:, documents].flatten(1, 2)

    def gradients(
        self,
        k: Tensor,
        v: Tensor,
        turn: Turn,
        dk: Tensor,
        dv: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the gradients of each document's sinks, given the gradients of the rows that `spread` returned."""
        with torch.enable_grad():
            leaf_k = k.detach().to(dk.dtype).requires_grad_()
            leaf_v = v.detach().to(dv.dtype).requires_grad_()
            rows = self.spread(leaf_k, leaf_v, turn)
            return torch.autograd.grad(rows, (leaf_k, leaf_v), (dk, dv))

    def give_far(self, d: Tensor, dfar: Sequence[Tensor]) -> None:
        """Add gradients (B, documents, n, K, D) of the collected sinks to the gradients of the far tensors."""
        first = 0
        for index, rows in self.far:
            dfar[index][:, :rows].add_(d[:, 0, first : first + rows])
            first += rows

    def give_own(self, d: Tensor, dx: Tensor) -> None:
        """Add gradients (B, documents, n, K, D) of the collected sinks to the gradients of the shard."""
        for start, rows in zip(self.starts, d.unbind(1), strict=True):
            in_shard = rows[:, self.outside :] if start == 0 else rows
            dx[:, start : start + in_shard.shape[1]].add_(in_shard)


def sink_rows(
    pattern: Pattern,
    start: int,
    tokens: int,
    documents: Sequence[int] | None,
    spans: Sequence[FarSpan],
) -> SinkRows | None:
    """Return the sinks for which a shard's queries need a separate call, or None.

    Raises ValueError for sinks before the shard that are not given as far keys.
    """
    sinks = pattern.sinks
    w, look_back = pattern.segment_lengths[0], pattern.look_backs[0]
    starts: list[int] = []
    of_segment: list[int] = []
    distances: list[int] = []
    rows: dict[int, int] = {}
    edges = [0, *accumulate([tokens] if documents is None else documents)]
    for token, stop in pairwise(edges):
        position = start if token == 0 else 0
        segments = sink_segments(pattern, position, position + stop - token)
        if segments:
            rows[token] = len(distances) * sinks
            of_segment += [len(starts)] * len(segments)
            distances += [(segment - look_back) * w - sinks for segment in segments]
            starts.append(token)
    if not distances:
        return None
    outside = 0
    far: list[tuple[int, int]] = []
    if starts[0] == 0 and start > 0:
        outside = min(sinks, start)
        for index, span in spans_of_sinks(spans, outside, start):
            far.append((index, span.stop - span.start))
    return SinkRows(
        starts=tuple(starts),
        outside=outside,
        far=tuple(far),
        documents=tuple(of_segment),
        distances=tuple(distances),
        rows=rows,
    )
