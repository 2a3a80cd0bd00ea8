"""One sequence over several ranks: each holds a contiguous shard, and one all-to-all a layer carries the far rows.

    rank 0     [ shard 0 ]
                    \\  \\                     a level wider than a shard: its rows go to the ranks whose shards
    rank 1     [ shard 1 ] \\                  lie in the same segment, or in one that looks back at it; causal ones
                         \\  |                 only to later ranks; sinks go to all that do not see them near
    rank 2     [ shard 2 ]

What a rank receives is what its queries see outside its shard: `sum of (1 + look_back) w / r` rows and the sinks at
most, twice that where attention looks both ways, whatever the length of the sequence.
The backward is the same exchange turned around: gradients of far rows go back to the rank that made them, which adds
them up in fp32. The net stays what it is on one device: it is handed far keys.

Where the data comes from, and what to do with the parameters' gradients, is the caller's business. NCCL on GPUs, gloo
on CPUs, the same code.

B batch, H heads of keys, D head dim, P ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import chain, pairwise
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.attention import FarKeys, Span
from longnet_cli.attention.dilated import strided_view
from longnet_cli.attention.pattern import Pattern, SpanViews, far_spans, lanes, open_spans, span_rows, span_views
from longnet_cli.attention.spans import level_of
from longnet_cli.model.net import NetConfig


class Parcel(NamedTuple):
    """Rows that go from one rank to another: those of `span`, of a shard that begins at `start` in the same document.

    `attended` by the reader's shard, or only kept in its cache.
    """

    span: Span
    start: int
    rows: int
    attended: bool


class Exchange:
    """Who sends which rows to whom, for shards with these `edges`; called once a layer, with that layer's keys.

    `edges` are P + 1 positions: rank i holds [edges[i], edges[i + 1]), which may be empty. `cuts` are the positions at
    which documents begin: rows never cross them, and spans count from the begin of their document. With `cached`, every
    rank also gets all rows of the segments that are open at the end, for its KVCache. Raises ValueError for cuts of a
    bidirectional net, whose last document would need far keys as well as its first.
    """

    def __init__(
        self,
        config: NetConfig,
        edges: Sequence[int],
        *,
        group: dist.ProcessGroup | None = None,
        rank: int | None = None,
        cuts: Sequence[int] = (),
        cached: bool = False,
    ) -> None:
        self.pattern, self.num_heads, self.causal = config.pattern, config.num_heads, config.causal
        if not self.causal and len({*cuts} - {edges[0], edges[-1]}):
            raise ValueError("documents over several ranks are for causal nets")
        self.group, self.cached = group, cached
        self.rank = dist.get_rank(group) if rank is None else rank
        self.edges = list(edges)
        begin = 0 if cached else self.edges[0]  # a cached chunk goes on with a document that began at 0
        self.starts = sorted({begin, *(cut for cut in cuts if self.edges[0] < cut < self.edges[-1])})
        ranks = range(len(edges) - 1)
        wanted = [self._wanted(reader) for reader in ranks]
        self.parcels = [[self._parcels(maker, reader, wanted[reader]) for reader in ranks] for maker in ranks]
        self.sent = self.parcels[self.rank]
        self.received = [row[self.rank] for row in self.parcels]
        # the same on every rank: a collective is entered by all or by none
        self.needed = any(parcels for row in self.parcels for parcels in row)

    @property
    def start(self) -> int:
        """Position of this rank's first token in its document."""
        return self.edges[self.rank] - self._document(self.edges[self.rank])[0]

    @property
    def documents(self) -> list[int] | None:
        """Lengths of the documents in this rank's shard; None where it is one."""
        first, last = self.edges[self.rank], self.edges[self.rank + 1]
        inside = [first, *(cut for cut in self.starts if first < cut < last), last]
        return [b - a for a, b in pairwise(inside)] if len(inside) > 2 else None

    @property
    def shard(self) -> slice:
        """This rank's part of the chunk's tokens."""
        return slice(self.edges[self.rank] - self.edges[0], self.edges[self.rank + 1] - self.edges[0])

    def __call__(self, layer: int, k: Tensor, v: Tensor) -> list[FarKeys]:
        """This layer's keys and values (B, n, H, D) out, the far keys of the shard in: a `FarProvider`."""
        return self.run(k, v)[0]

    def run(self, k: Tensor, v: Tensor) -> tuple[list[FarKeys], list[FarKeys]]:
        """(far keys that the shard attends to, all rows received)."""
        if not self.needed:
            return [], []
        parcels = [*chain(*self.received)]
        there, back = _Flight(), _WayBack(self, k, [i for i, parcel in enumerate(parcels) if parcel.attended])
        tensors = _AllToAll.apply(self, there, back, k, v)
        got = [
            FarKeys(*parcel.span, tensors[2 * i], tensors[2 * i + 1], there.land, partial(back.take, i))
            for i, parcel in enumerate(parcels)
        ]
        attended = [keys for keys, parcel in zip(got, parcels, strict=True) if parcel.attended]
        if not attended:
            # Nothing for this rank: yet the others wait for it in the backward, so it must stay in the graph.
            k_, v_ = tensors[-2:]
            attended = [FarKeys(0, self.start, self.start, k_, v_, there.land, back.nothing)]
        return attended, got

    def views(self, parcel: Parcel, kv_heads: int) -> Iterator[SpanViews]:
        return span_views(self.pattern, parcel.span, self.num_heads, parcel.start, kv_heads)

    def shape(self, parcel: Parcel, like: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a parcel's k and v, (2, B, rows, lanes, D), for keys of the shape `like` (B, n, H, D)."""
        return 2, like[0], parcel.rows, _lanes(self.pattern, parcel.span.level, self.num_heads, like[2]), like[3]

    def sizes(self, parcels: Sequence[Sequence[Parcel]], like: Sequence[int]) -> list[int]:
        """Numbers that go to, or come from, each rank."""
        return [sum(prod(self.shape(parcel, like)) for parcel in found) for found in parcels]

    def _document(self, position: int) -> tuple[int, int]:
        """Begin and end of the document that holds a position."""
        index = bisect_right(self.starts, position)
        return self.starts[index - 1], self.starts[index] if index < len(self.starts) else self.edges[-1]

    def _wanted(self, reader: int) -> list[tuple[Span, bool]]:
        """Return what a rank keeps (False), then what the first document of its shard sees (True), whoever made it."""
        document, end = self._document(self.edges[reader])
        start, stop = self.edges[reader] - document, min(self.edges[reader + 1], end) - document
        kept = open_spans(self.pattern, self.edges[-1] - document) if self.cached else []
        seen = far_spans(self.pattern, start, stop, self.causal, end - document) if start < stop else []
        return [*((span, False) for span in kept), *((span, True) for span in seen)]

    def _parcels(self, maker: int, reader: int, wanted: Sequence[tuple[Span, bool]]) -> list[Parcel]:
        """Of what `reader` wants, the rows of `maker`."""
        if maker == reader:
            return []
        document, end = self._document(self.edges[reader])
        # the maker's part of that document
        a, b = max(self.edges[maker], document) - document, min(self.edges[maker + 1], end) - document
        found: dict[tuple[int, int], Parcel] = {}
        for span, attended in wanted:
            part = Span(span.level, max(span.start, a), min(span.stop, b))
            if part.start < part.stop and (rows := max(span_rows(self.pattern, part, self.num_heads))):
                segment = part.start // level_of(self.pattern, span.level)[0]
                # what is kept of a segment has all that is seen of it
                parcel = found.get((span.level, segment), Parcel(part, self.edges[maker] - document, rows, attended))
                found[span.level, segment] = parcel._replace(attended=attended)
        return list(found.values())


class _Flight:
    """An exchange under way."""

    def __init__(self) -> None:
        self.work: Any = None
        self.held: Tensor | None = None  # what is being sent must live until it has been

    def start(self, got: Tensor, sent: Tensor, sizes: tuple[list[int], list[int]], group: Any) -> None:
        self.held = sent
        self.work = dist.all_to_all_single(got, sent, *sizes, group=group, async_op=True)

    def land(self) -> None:
        if self.work is not None:
            self.work.wait()
        self.work = self.held = None


class _WayBack:
    """The gradients of far rows: on their way to those who made them as soon as the attended ones are all known."""

    def __init__(self, exchange: Exchange, k: Tensor, attended: Sequence[int]) -> None:
        self.exchange, self.attended, self.like = exchange, attended, k[:, :0].detach()
        self.grads: dict[int, tuple[Tensor, Tensor]] = {}  # of the parcels received, by index
        self.flight = _Flight()
        self.got: Tensor | None = None

    def take(self, index: int, dk: Tensor, dv: Tensor) -> None:
        self.grads[index] = (dk, dv)
        if len(self.grads) == len(self.attended):
            self.depart()

    def nothing(self, dk: Tensor, dv: Tensor) -> None:
        self.depart()

    def depart(self) -> None:
        exchange, like = self.exchange, self.like
        sent, rooms = _buffer(exchange, exchange.received, like)
        for index, (room, _) in enumerate(rooms):
            if index in self.grads:
                for into, grad in zip(room, self.grads[index], strict=True):
                    into.copy_(grad)
            else:
                room.zero_()
        self.grads = {}
        self.got, _ = _buffer(exchange, exchange.sent, like)
        sizes = exchange.sizes(exchange.sent, like.shape), exchange.sizes(exchange.received, like.shape)
        self.flight.start(self.got, sent, sizes, exchange.group)

    def land(self, grads: Sequence[Tensor]) -> Tensor:
        """Return what came back, flat; `grads`, of all rows received, leave now where no attention sent them before."""
        if self.got is None:
            pairs = zip(grads[::2], grads[1::2], strict=True)
            self.grads = {i: pair for i, pair in enumerate(pairs) if i < sum(map(len, self.exchange.received))}
            self.depart()
        self.flight.land()
        got, self.got = self.got, None
        assert got is not None
        return got


class _AllToAll(torch.autograd.Function):
    """(k, v) -> k and v of every parcel received, (B, rows, lanes, D) each, and two tensors of level 0 without rows."""

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, flight: _Flight, back: _WayBack, k: Tensor, v: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.back, ctx.shape, ctx.dtype = exchange, back, k.shape, k.dtype
        sent, rooms = _buffer(exchange, exchange.sent, k)
        for room, parcel in rooms:
            for views in exchange.views(parcel, k.shape[2]):
                strided_view(room[0], views.packed).copy_(strided_view(k, views.shard))
                strided_view(room[1], views.packed).copy_(strided_view(v, views.shard))
        got, places = _buffer(exchange, exchange.received, k)
        sizes = exchange.sizes(exchange.received, k.shape), exchange.sizes(exchange.sent, k.shape)
        flight.start(got, sent, sizes, exchange.group)
        nothing = k.new_empty(exchange.shape(Parcel(Span(0, 0, 0), 0, 0, False), k.shape))
        return tuple(x for room in (*(room for room, _ in places), nothing) for x in room)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exchange = ctx.exchange
        got = ctx.back.land(grads)
        wide = torch.float64 if ctx.dtype is torch.float64 else torch.float32
        dk, dv = (torch.zeros(ctx.shape, dtype=wide, device=got.device) for _ in range(2))
        for room, parcel in _places(exchange, exchange.sent, got, ctx.shape):
            for views in exchange.views(parcel, ctx.shape[2]):
                strided_view(dk, views.shard).add_(strided_view(room[0], views.packed))
                strided_view(dv, views.shard).add_(strided_view(room[1], views.packed))
        return None, None, None, dk.to(ctx.dtype), dv.to(ctx.dtype)


def _buffer(
    exchange: Exchange, parcels: Sequence[Sequence[Parcel]], like: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Parcel]]]:
    """One flat tensor for all parcels, rank by rank, and each one's place in it: (2, B, rows, lanes, D), k and v."""
    flat = like.new_empty(sum(exchange.sizes(parcels, like.shape)))
    return flat, _places(exchange, parcels, flat, like.shape)


def _places(
    exchange: Exchange, parcels: Sequence[Sequence[Parcel]], flat: Tensor, like: Sequence[int]
) -> list[tuple[Tensor, Parcel]]:
    places, offset = [], 0
    for parcel in chain(*parcels):
        shape = exchange.shape(parcel, like)
        places.append((flat[offset : offset + prod(shape)].view(shape), parcel))
        offset += prod(shape)
    return places


@lru_cache(maxsize=256)
def _lanes(pattern: Pattern, level: int, num_heads: int, kv_heads: int) -> int:
    return len(lanes(pattern, level, num_heads, kv_heads).offsets)


def even_edges(start: int, tokens: int, ranks: int) -> list[int]:
    """P + 1 edges of shards that differ by at most one token."""
    return [start + tokens * rank // ranks for rank in range(ranks + 1)]
