r"""One sequence over several ranks: each holds a contiguous shard, and one all-to-all per layer carries the far rows.

    rank 0     [ shard 0 ]
                    \  \                     a level wider than a shard: its rows go to the ranks whose shards
    rank 1     [ shard 1 ] \                  lie in the same segment, or in one that looks back at it; causal ones
                         \  |                 only to later ranks; sinks go to every rank that sees them from afar
    rank 2     [ shard 2 ]

A rank receives the rows that its queries see outside its shard: at most `sum of (1 + look_back) w / r` rows and the
sinks, twice that where attention looks both ways, whatever the length of the sequence.
The backward pass reverses the exchange: gradients of far rows go back to the rank that made the rows, which adds them
up in fp32. The net is the same as on one device: it is handed far keys.

The caller provides the data and handles the parameters' gradients. The same code runs with NCCL on GPUs and with gloo
on CPUs.

B batch, H heads of keys, D head dim, P ranks.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate, chain, pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.attention import FarKeys, FarSpan, Outside
from longnet_cli.attention.spans import Layout, far_spans, level_of, open_spans
from longnet_cli.attention.views import accumulator
from longnet_cli.basics.errors import LongNetError
from longnet_cli.nets.config import NetConfig

_agreeing: weakref.WeakSet[Any] = weakref.WeakSet()  # groups whose first exchange is over


class Parcel(NamedTuple):
    """Rows that go from one rank to another: the rows of `span` in a shard that starts at `start` of the document.

    If `attended`, the reader's shard attends to them; otherwise they are only kept in its cache.
    """

    span: FarSpan
    start: int
    rows: int
    attended: bool


class Exchange:
    """The exchange of rows between ranks whose shards have these `edges`. Call it once per layer, with its keys.

    `edges` are P + 1 positions: rank i holds [edges[i], edges[i + 1]), which may be empty. `cuts` are the positions at
    which documents start: rows never cross them, and spans count from the start of their document. With `cached`, the
    shards are a chunk of a document that started at 0, and every rank also gets all rows of the segments that are open
    at the end, for its KVCache. Raises ValueError for cuts with a bidirectional net:
    the last document of a shard would need far keys as well as the first. An error on one rank ends the job: the others
    would wait for it.
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
        self.edges, self.cached, self.ranks = list(edges), cached, len(edges) - 1
        self.pattern, self.num_heads, self.causal, self.group = (
            config.pattern,
            config.num_heads,
            config.causal,
            group,
        )
        begin = 0 if cached else self.edges[0]
        self.starts = sorted(
            {begin, *(cut for cut in cuts if self.edges[0] < cut < self.edges[-1])}
        )  # of documents
        if not self.causal and len({*cuts} - {edges[0], edges[-1]}):
            raise ValueError("documents over several ranks are for causal nets")
        self._reach = max(
            (1 + b) * w
            for w, b in zip(self.pattern.segment_lengths, self.pattern.look_backs, strict=True)
        )
        # of each reader, the same on every rank: a collective is entered by all or by none
        self._wanted = [self._outside(reader) for reader in range(self.ranks)]
        self.needed = any(self._wanted)
        self.rank = rank = dist.get_rank(group) if rank is None else rank
        self.sent = [self._parcels(rank, reader) for reader in range(self.ranks)]
        self.received = [self._parcels(maker, rank) for maker in range(self.ranks)]
        self.joined = [
            Parcel(span, 0, self._rows(span), attended) for span, attended in self._wanted[rank]
        ]
        if not any(parcel.attended for parcel in self.joined):
            # this rank attends to none, yet the others wait for it in the backward: it must stay in the graph
            self.joined.append(Parcel(FarSpan(0, self.start, self.start), 0, 0, True))
        self._maps: dict[tuple[torch.Size, torch.device], _Maps] = {}

    @property
    def mine(self) -> tuple[int, int]:
        """The edges of this rank's shard."""
        return self.edges[self.rank], self.edges[self.rank + 1]

    @property
    def start(self) -> int:
        """Position of this rank's first token in its document."""
        return self.mine[0] - self.document(self.mine[0])[0]

    @property
    def documents(self) -> list[int] | None:
        """Lengths of the documents in this rank's shard; None for a single document."""
        start, stop = self.mine
        inside = [start, *(cut for cut in self.starts if start < cut < stop), stop]
        return [b - a for a, b in pairwise(inside)] if len(inside) > 2 else None

    def document(self, position: int) -> tuple[int, int]:
        """Return the start and the end of the document that holds a position."""
        index = bisect_right(self.starts, position)
        return self.starts[index - 1], self.starts[index] if index < len(
            self.starts
        ) else self.edges[-1]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Outside:
        """Send a layer's keys and values (B, n, H, D); return what the shard sees outside, as a `FarProvider` does."""
        return Outside(self.run(k, v)[0])

    def run(self, k: Tensor, v: Tensor) -> tuple[list[FarKeys], list[FarKeys]]:
        """Exchange rows as in a call, and return (far keys that the shard attends to, all rows received)."""
        if not self.needed:
            return [], []
        self._agree(k.shape)
        there, back = _Flight(), _WayBack(self, k)
        tensors = _AllToAll.apply(self, there, back, k, v)
        got = [
            FarKeys(
                *parcel.span, tensors[2 * i], tensors[2 * i + 1], there.land, partial(back.take, i)
            )
            for i, parcel in enumerate(self.joined)
        ]
        return [keys for keys, parcel in zip(got, self.joined, strict=True) if parcel.attended], got

    def _agree(self, like: Sequence[int]) -> None:
        """Compare what ranks send and expect, in a group's first exchange, given the shape of keys (B, n, H, D).

        Raises LongNetError on all ranks if two do not agree: they would wait for each other until a timeout.
        """
        group = self.group or dist.group.WORLD
        if group in _agreeing:
            return
        _agreeing.add(group)
        # by how much more a maker (row) sends than its reader (column) expects
        more = torch.zeros(self.ranks, self.ranks, dtype=torch.int64)
        more[self.rank] += torch.tensor(self.sizes(self.sent, like))
        more[:, self.rank] -= torch.tensor(self.sizes(self.received, like))
        dist.all_reduce(more, group=self.group)
        if more.any():
            maker, reader = more.nonzero()[0].tolist()
            raise LongNetError(
                f"rank {maker} of a group sends {more[maker, reader]:+} numbers beside those that rank {reader} "
                "expects: start all ranks with the same version, model, inputs and options"
            )

    def maps(self, like: Tensor) -> _Maps:
        """Return the indices of rows, for keys of this shape: (B, n, H, D), or (B, n, levels, H, D).

        They are the same in all layers.
        """
        key = like.shape, like.device
        if key not in self._maps:
            self._maps[key] = _Maps.of(self, *key)
        return self._maps[key]

    def layout(self, kv_heads: int) -> Layout:
        return Layout(self.pattern, self.num_heads, kv_heads)

    def lanes(self, parcel: Parcel, kv_heads: int) -> int:
        return len(self.layout(kv_heads).lanes(parcel.span.level).offsets)

    def shapes(self, batch: int, kv_heads: int, width: int) -> list[tuple[int, int, int, int]]:
        """Return the shapes (B, rows, lanes, D) of the joined parcels' keys."""
        return [(batch, parcel.rows, self.lanes(parcel, kv_heads), width) for parcel in self.joined]

    def sizes(self, parcels: Sequence[Sequence[Parcel]], like: Sequence[int]) -> list[int]:
        """Return how many numbers go to, or come from, each rank: k and v of all rows, for keys (B, n, H, D)."""
        batch, kv_heads, head_dim = like[0], *like[-2:]
        of_row = 2 * batch * head_dim
        return [
            of_row * sum(parcel.rows * self.lanes(parcel, kv_heads) for parcel in of_rank)
            for of_rank in parcels
        ]

    def _outside(self, reader: int) -> list[tuple[FarSpan, bool]]:
        """Return the spans of a segment before and after a rank's shard that it wants from others, if they have rows.

        The first document of the shard sees some of them (True), and the rank keeps others.
        """
        document, end = self.document(self.edges[reader])
        start, stop = (min(edge, end) - document for edge in self.edges[reader : reader + 2])
        earliest = max(0, self.edges[0] - document)  # earlier rows are in caches
        kept = open_spans(self.pattern, self.edges[-1] - document) if self.cached else []
        seen = (
            far_spans(self.pattern, start, stop, self.causal, end - document)
            if start < stop
            else []
        )
        found: dict[tuple[int, int, bool], tuple[FarSpan, bool]] = {}
        for (level, begin, last), attended in chain(
            ((span, False) for span in kept), ((span, True) for span in seen)
        ):
            segment, _ = level_of(self.pattern, level)
            for side, part in enumerate(
                ((max(begin, earliest), min(last, start)), (max(begin, stop), last))
            ):
                if self._rows(span := FarSpan(level, *part)):
                    key = level, begin // segment, bool(side)
                    found[key] = (
                        found.get(key, (span, attended))[0],
                        attended,
                    )  # what is kept holds what is seen
        return [*found.values()]

    def _reaches(self, maker: int, reader: int) -> bool:
        """Return whether `reader` may want rows of `maker`. With a thousand ranks, most pairs are far apart."""
        if maker == reader or self.cached or self.pattern.sinks:
            return maker != reader
        if maker > reader:
            return not self.causal and self.edges[maker] < self.edges[reader + 1] + self._reach
        return self.edges[maker + 1] > self.edges[reader] - self._reach

    def _parcels(self, maker: int, reader: int) -> list[Parcel]:
        """Return the rows of `maker` that `reader` wants."""
        if not self._reaches(maker, reader):
            return []
        document, end = self.document(self.edges[reader])
        start, stop = self.edges[maker] - document, min(self.edges[maker + 1], end) - document
        parts = (
            (FarSpan(x.level, max(x.start, start), min(x.stop, stop)), seen)
            for x, seen in self._wanted[reader]
        )
        return [
            Parcel(part, start, rows, seen) for part, seen in parts if (rows := self._rows(part))
        ]

    def _rows(self, span: FarSpan) -> int:
        """Return the rows of the lane that has the most."""
        return _most_rows(self.layout(self.num_heads), span) if span.start < span.stop else 0


class _Maps(NamedTuple):
    """The indices, (rows,) int64, of rows of D numbers that are sent and received.

    `sent` has the rows of k or v (B, n, H, D), in the order in which they are sent. `joined` has, for each row of the
    joined parcels (B, rows, lanes, D), one parcel after the other, the received row that fills it. `received` is the
    inverse of `joined`; for a received row that nobody reads, it is one past the end.
    """

    sent: Tensor
    joined: Tensor
    received: Tensor

    @classmethod
    def of(cls, exchange: Exchange, like: Sequence[int], device: torch.device) -> _Maps:
        sent = _sent_rows(exchange, like[0], like[1], prod(like[2:-2]), like[-2])
        received, total = _received_rows(exchange, like[0], like[-2])
        joined = np.zeros(total + 1, np.int64)
        joined[received] = np.arange(len(received))
        maps = sent, joined[:-1], received
        return cls(*(torch.from_numpy(rows).to(device) for rows in maps))


def _sent_rows(
    exchange: Exchange, batch: int, tokens: int, levels: int, kv_heads: int
) -> np.ndarray:
    """Return `_Maps.sent`. A lane with one row fewer sends an arbitrary row, which nobody reads.

    `levels` is 1 where all levels have the same keys.
    """
    sent = [np.empty(0, np.int64)]
    sequences = np.arange(batch)[:, None, None] * tokens
    for parcel in chain(*exchange.sent):
        of_lanes = exchange.layout(kv_heads).of_span(parcel.span, parcel.start)
        places = (
            np.array(of_lanes.first_tokens) + of_lanes.row_step * np.arange(parcel.rows)[:, None]
        )  # (rows, lanes)
        of_level = (sequences + np.minimum(places, tokens - 1)) * levels + (
            parcel.span.level if levels > 1 else 0
        )
        sent.append((of_level * kv_heads + np.array(of_lanes.heads)).ravel())
    return np.concatenate(sent)


def _received_rows(exchange: Exchange, batch: int, kv_heads: int) -> tuple[np.ndarray, int]:
    """Return `_Maps.received`, and the number of rows of the joined parcels.

    The parcels of a joined one come in order, so that each of its lanes is filled from its beginning.
    """
    shapes = exchange.shapes(batch, kv_heads, 1)
    begins = [0, *accumulate(map(prod, shapes))]
    filled = [np.zeros(held, np.int64) for _, _, held, _ in shapes]  # rows of each lane so far
    received = [np.empty(0, np.int64)]
    for parcel in chain(*exchange.received):
        index = next(i for i, whole in enumerate(exchange.joined) if _holds(whole, parcel))
        _, rows, held, _ = shapes[index]
        of_lanes = np.array(exchange.layout(kv_heads).counts(parcel.span))
        number, sequences = np.arange(parcel.rows)[:, None], np.arange(batch)[:, None, None] * rows
        places = begins[index] + (sequences + filled[index] + number) * held + np.arange(held)
        places[:, number >= of_lanes] = begins[-1]  # a lane with fewer rows
        received.append(places.ravel())
        filled[index] += of_lanes
    return np.concatenate(received), begins[-1]


def _holds(whole: Parcel, part: Parcel) -> bool:
    (level, start, stop), (of, begin, end) = whole.span, part.span
    return (level, whole.attended) == (of, part.attended) and start <= begin and end <= stop


class _Flight:
    """An exchange under way."""

    def __init__(self) -> None:
        self.work: Any = None
        self.held: Tensor | None = None  # keeps what is being sent alive until it has been sent
        self.unpack: Callable[[], None] | None = None  # copies what was received to its place

    def start(
        self, got: Tensor, sent: Tensor, sizes: tuple[list[int], list[int]], group: Any
    ) -> None:
        self.held = sent
        self.work = dist.all_to_all_single(
            got.view(-1), sent.view(-1), *sizes, group=group, async_op=True
        )

    def land(self) -> None:
        if self.work is not None:
            self.work.wait()
        if self.unpack is not None:
            self.unpack()
        self.work = self.held = self.unpack = None


class _WayBack:
    """The gradients of far rows. They go back to the ranks that made the rows once all attended parcels have theirs."""

    def __init__(self, exchange: Exchange, k: Tensor) -> None:
        self.exchange, self.like, self.maps = exchange, k[:, :0].detach(), exchange.maps(k)
        self.sizes = (
            exchange.sizes(exchange.sent, k.shape),
            exchange.sizes(exchange.received, k.shape),
        )
        self.grads: dict[int, tuple[Tensor, Tensor]] = {}  # of the joined parcels, by index
        self.flight = _Flight()
        self.got: Tensor | None = None

    def take(self, index: int, dk: Tensor, dv: Tensor) -> None:
        self.grads[index] = (dk, dv)
        if len(self.grads) == sum(parcel.attended for parcel in self.exchange.joined):
            self.depart()

    def depart(self) -> None:
        like, batch, (kv_heads, width) = self.like, len(self.like), self.like.shape[-2:]
        of_parcels: list[tuple[Tensor, Tensor]] = []
        for index, shape in enumerate(self.exchange.shapes(batch, kv_heads, width)):
            none = like.new_zeros(1).expand(shape)
            of_parcels.append(self.grads.get(index, (none, none)))
        self.grads = {}
        sent = like.new_empty(len(self.maps.received), 2, width)
        for place, grads in enumerate(zip(*of_parcels, strict=True)):
            flat = torch.cat(
                [*(d.reshape(-1, width).to(like.dtype) for d in grads), like.new_zeros(1, width)]
            )
            sent[:, place] = flat[self.maps.received]
        self.got = like.new_empty(len(self.maps.sent), 2, width)
        self.flight.start(self.got, sent, self.sizes, self.exchange.group)

    def land(self, grads: Sequence[Tensor]) -> Tensor:
        """Return the gradients that came back, (rows sent, 2, D).

        If no attention has sent any yet, send `grads`, the gradients of all joined parcels, now.
        """
        if self.got is None:
            self.grads = dict(enumerate(zip(grads[::2], grads[1::2], strict=True)))
            self.depart()
        self.flight.land()
        got, self.got = self.got, None
        assert got is not None
        return got


class _AllToAll(torch.autograd.Function):
    """The map (k, v) -> k and v of every joined parcel, (B, rows, lanes, D) each."""

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, flight: _Flight, back: _WayBack, k: Tensor, v: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.back, ctx.shape, ctx.dtype = back, k.shape, k.dtype
        maps, batch, (kv_heads, width) = back.maps, len(k), k.shape[-2:]
        sent = k.new_empty(
            len(maps.sent), 2, width
        )  # k and v of a row side by side: each rank's rows lie together
        for place, x in enumerate((k, v)):
            torch.index_select(x.reshape(-1, width), 0, maps.sent, out=sent[:, place])
        got = k.new_empty(len(maps.received), 2, width)
        joined = [k.new_empty(len(maps.joined), width) for _ in range(2)]

        def unpack() -> (
            None
        ):  # into `data`: autograd has the tensors already, and must not see a change
            for place, into in enumerate(joined):
                torch.index_select(got[:, place], 0, maps.joined, out=into.data)

        flight.unpack = unpack
        flight.start(got, sent, back.sizes[::-1], exchange.group)
        shapes = exchange.shapes(batch, kv_heads, width)
        parts = [x.split([prod(shape[:3]) for shape in shapes]) for x in joined]
        return (
            *chain(
                *(
                    (k_.view(shape), v_.view(shape))
                    for k_, v_, shape in zip(*parts, shapes, strict=True)
                )
            ),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        got, maps = ctx.back.land(grads), ctx.back.maps
        wide = accumulator(ctx.dtype)
        dk, dv = (torch.zeros(ctx.shape, dtype=wide, device=got.device) for _ in range(2))
        for place, d in enumerate((dk, dv)):
            d.view(-1, ctx.shape[-1]).index_add_(0, maps.sent, got[:, place].to(wide))
        return None, None, None, dk.to(ctx.dtype), dv.to(ctx.dtype)


@lru_cache(maxsize=1 << 16)
def _most_rows(layout: Layout, span: FarSpan) -> int:
    return max(layout.counts(span))
