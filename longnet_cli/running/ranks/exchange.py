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
from functools import partial
from itertools import chain, pairwise
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.attention import FarKeys, FarSpan, Outside
from longnet_cli.attention.segment_rows import SegmentRows
from longnet_cli.attention.spans import Layout, far_spans, open_spans, whole_segment
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
        self.edges = list(edges)
        self.ranks = len(edges) - 1
        self.rank = dist.get_rank(group) if rank is None else rank
        self.group = group
        self.cached = cached
        self.pattern = config.pattern
        self.num_heads = config.num_heads
        self.causal = config.causal
        first, last = self.edges[0], self.edges[-1]
        if not self.causal and {*cuts} - {first, last}:
            raise ValueError("documents over several ranks are for causal nets")
        inside = {cut for cut in cuts if first < cut < last}
        self.starts = sorted({0 if cached else first, *inside})  # of documents
        levels = zip(self.pattern.segment_lengths, self.pattern.look_backs, strict=True)
        self._reach = max((1 + look_back) * w for w, look_back in levels)
        # of each reader, the same on every rank: a collective is entered by all or by none
        self._wanted = [self._wanted_by(reader) for reader in range(self.ranks)]
        self.needed = any(self._wanted)
        self.sent = [self._parcels(self.rank, reader) for reader in range(self.ranks)]
        self.received = [self._parcels(maker, self.rank) for maker in range(self.ranks)]
        self.joined = []  # what is received, the rows of all makers in one parcel
        for span, attended in self._wanted[self.rank]:
            self.joined.append(Parcel(span, 0, self._rows(span), attended))
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
        inside = [cut for cut in self.starts if start < cut < stop]
        if not inside:
            return None
        return [after - before for before, after in pairwise([start, *inside, stop])]

    def document(self, position: int) -> tuple[int, int]:
        """Return the start and the end of the document that holds a position."""
        index = bisect_right(self.starts, position)
        ends = [*self.starts[1:], self.edges[-1]]
        return self.starts[index - 1], ends[index - 1]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Outside:
        """Send a layer's keys and values (B, n, H, D); return what the shard sees outside, as a `FarProvider` does."""
        return Outside(self.run(k, v))

    def run(
        self, k: Tensor, v: Tensor, on_arrival: Callable[[list[FarKeys]], None] | None = None
    ) -> list[FarKeys]:
        """Send a layer's keys and values as a call does; return the far keys that the shard attends to.

        `on_arrival` gets all rows that the rank receives, once they are there.
        """
        if not self.needed:
            return []
        self._agree(k.shape)
        flight = _Flight()
        way_back = _WayBack(self, k)
        rows = _AllToAll.apply(self, flight, way_back, k, v)
        received = []
        for index, parcel in enumerate(self.joined):
            of_k, of_v = rows[2 * index : 2 * index + 2]
            back = partial(way_back.take, index)
            received.append(FarKeys(*parcel.span, of_k, of_v, ready=flight.land, back=back))
        if on_arrival:
            flight.after.append(partial(on_arrival, received))
        of_parcels = zip(received, self.joined, strict=True)
        return [keys for keys, parcel in of_parcels if parcel.attended]

    def _agree(self, like: Sequence[int]) -> None:
        """Compare what ranks send and expect, in a group's first exchange, given the shape of keys (B, n, H, D).

        Raises LongNetError on all ranks if two do not agree: they would wait for each other until a timeout.
        """
        group = self.group or dist.group.WORLD
        if group in _agreeing:
            return
        _agreeing.add(group)
        # by how much more a maker (row) sends than its reader (column) expects
        sent = torch.tensor(self.sizes(self.sent, like))
        expected = torch.tensor(self.sizes(self.received, like))
        more = torch.zeros(self.ranks, self.ranks, dtype=torch.int64)
        more[self.rank] += sent
        more[:, self.rank] -= expected
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

    def shape(self, parcel: Parcel, like: Sequence[int]) -> tuple[int, int, int, int]:
        """Return the shape (B, rows, lanes, D) of a parcel's keys, for keys (B, n, H, D)."""
        lanes = self.layout(like[-2]).lanes(parcel.span.level).offsets
        return like[0], parcel.rows, len(lanes), like[-1]

    def sizes(self, parcels: Sequence[Sequence[Parcel]], like: Sequence[int]) -> list[int]:
        """Return how many numbers go to, or come from, each rank: k and v of all rows, for keys (B, n, H, D)."""
        sizes = []
        for of_rank in parcels:
            shapes = [self.shape(parcel, like) for parcel in of_rank]
            sizes.append(2 * sum(map(prod, shapes)))
        return sizes

    def _wanted_by(self, reader: int) -> list[tuple[FarSpan, bool]]:
        """Return the spans that a rank wants from others, before and after its shard, if they have rows.

        The first document of the shard attends to some of them (True), and the rank only keeps others.
        """
        document, end = self.document(self.edges[reader])
        start = min(self.edges[reader], end) - document
        stop = min(self.edges[reader + 1], end) - document
        earliest = max(0, self.edges[0] - document)  # earlier rows are in caches
        wanted: dict[tuple[FarSpan, str], tuple[FarSpan, bool]] = {}

        def want(spans: Sequence[FarSpan], attended: bool) -> None:
            for span in spans:
                segment = whole_segment(self.pattern, span)
                before = span.part(earliest, start)
                after = span.part(stop, span.stop)
                for side, part in (("before", before), ("after", after)):
                    if self._rows(part):
                        kept, _ = wanted.get((segment, side), (part, False))
                        wanted[segment, side] = kept, attended  # what is kept holds what is seen

        if self.cached:
            last = self.edges[-1] - document
            want(open_spans(self.pattern, last), attended=False)
        if start < stop:
            seen = far_spans(self.pattern, start, stop, self.causal, end - document)
            want(seen, attended=True)
        return [*wanted.values()]

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
        start = self.edges[maker] - document
        stop = min(self.edges[maker + 1], end) - document
        parcels = []
        for wanted, attended in self._wanted[reader]:
            span = wanted.part(start, stop)
            if rows := self._rows(span):
                parcels.append(Parcel(span, start, rows, attended))
        return parcels

    def _rows(self, span: FarSpan) -> int:
        """Return the rows of the lane that has the most."""
        return self.layout(self.num_heads).most_rows(span)


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
        """Return the indices for keys of this shape: the numbers of all rows, packed as the rows are to be."""
        layout = exchange.layout(like[-2])
        of_rows = (*like[:-1], 1)

        def unfilled(parcel: Parcel) -> SegmentRows:
            shape = exchange.shape(parcel, of_rows)
            return SegmentRows(layout, parcel.span, torch.full(shape, -1))

        rows = torch.arange(prod(of_rows)).view(of_rows)
        leaving = []
        for parcel in chain(*exchange.sent):
            segment = unfilled(parcel)
            segment.put([rows], parcel.start)
            leaving.append(segment)
        sent = _numbers(leaving)

        arriving = [unfilled(parcel) for parcel in chain(*exchange.received)]
        joining = [unfilled(parcel) for parcel in exchange.joined]
        first = 0
        for part in arriving:
            last = first + part.packed.numel()
            numbers = torch.arange(first, last).view_as(part.packed)
            first = last
            for whole in joining:
                if whole.span.level == part.span.level:
                    whole.put_packed([numbers], part.span)
        joined = _numbers(joining)
        filled = (joined >= 0).nonzero().flatten()
        received = torch.full((first,), len(joined))
        received[joined[filled]] = filled
        # a lane with one row fewer has an arbitrary row in its place, which nobody reads
        sent = sent.clamp(min=0).to(device)
        joined = joined.clamp(min=0).to(device)
        return cls(sent, joined, received.to(device))


def _numbers(segments: Sequence[SegmentRows]) -> Tensor:
    """Return all numbers of packed rows, one segment after the other."""
    none = torch.zeros(0, dtype=torch.int64)
    return torch.cat([none, *(segment.packed.flatten() for segment in segments)])


class _Flight:
    """An exchange under way. `after` is called when it has landed."""

    def __init__(self) -> None:
        self.work: Any = None
        self.held: Tensor | None = None  # keeps what is being sent alive until it has been sent
        self.after: list[Callable[[], object]] = []

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
            self.work = self.held = None
            for call in self.after:
                call()
            self.after = []


class _WayBack:
    """The gradients of far rows. They go back to the ranks that made the rows once all attended parcels have theirs."""

    def __init__(self, exchange: Exchange, k: Tensor) -> None:
        self.exchange = exchange
        self.like = k.detach()[:, :0]
        self.shape = k.shape
        self.maps = exchange.maps(k)
        self.sent_back = exchange.sizes(exchange.received, k.shape)
        self.coming_back = exchange.sizes(exchange.sent, k.shape)
        self.gradients: dict[int, tuple[Tensor, Tensor]] = {}  # of the joined parcels, by index
        self.flight = _Flight()
        self.rows = self.like.new_empty(0)  # that came back, (rows sent, 2, D)

    def take(self, index: int, dk: Tensor, dv: Tensor) -> None:
        """Take the gradients of a joined parcel. All of them leave with those of the last attended one."""
        self.gradients[index] = (dk, dv)
        if len(self.gradients) == sum(parcel.attended for parcel in self.exchange.joined):
            self._depart()

    def _depart(self) -> None:
        width = self.shape[-1]
        sent = self.like.new_empty(len(self.maps.received), 2, width)
        for place in range(2):
            of_rows = []
            for index, parcel in enumerate(self.exchange.joined):
                if index in self.gradients:
                    gradient = self.gradients[index][place].to(sent.dtype)
                else:
                    shape = self.exchange.shape(parcel, self.shape)
                    gradient = sent.new_zeros(1).expand(shape)
                of_rows.append(gradient.reshape(-1, width))
            of_rows.append(sent.new_zeros(1, width))  # of received rows that nobody reads
            sent[:, place] = torch.cat(of_rows)[self.maps.received]
        self.gradients = {}
        self.rows = self.like.new_empty(len(self.maps.sent), 2, width)
        sizes = self.coming_back, self.sent_back
        self.flight.start(self.rows, sent, sizes, self.exchange.group)

    def land(self) -> Tensor:
        """Return the gradients that came back, (rows sent, 2, D)."""
        self.flight.land()
        return self.rows


class _AllToAll(torch.autograd.Function):
    """The map (k, v) -> k and v of every joined parcel, (B, rows, lanes, D) each.

    Their gradients come back through `FarKeys.back`, before autograd asks for them.
    """

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, flight: _Flight, way_back: _WayBack, k: Tensor, v: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.way_back = way_back
        ctx.dtype = k.dtype
        maps = way_back.maps
        width = k.shape[-1]
        # k and v of a row side by side: each rank's rows lie together
        sent = k.new_empty(len(maps.sent), 2, width)
        for place, x in enumerate((k, v)):
            torch.index_select(x.reshape(-1, width), 0, maps.sent, out=sent[:, place])
        received = k.new_empty(len(maps.received), 2, width)
        joined = [k.new_empty(len(maps.joined), width) for _ in range(2)]

        def unpack() -> None:
            for place, rows in enumerate(joined):
                # into `data`: autograd has the tensors already, and must not see a change
                torch.index_select(received[:, place], 0, maps.joined, out=rows.data)

        flight.after.append(unpack)
        sizes = way_back.sent_back, way_back.coming_back
        flight.start(received, sent, sizes, exchange.group)
        far_rows = []
        first = 0
        for parcel in exchange.joined:
            shape = exchange.shape(parcel, k.shape)
            last = first + prod(shape[:3])
            far_rows += [rows[first:last].view(shape) for rows in joined]
            first = last
        return tuple(far_rows)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        rows = ctx.way_back.land()
        maps = ctx.way_back.maps
        shape = ctx.way_back.shape
        wide = accumulator(ctx.dtype)
        sums = torch.zeros(2, *shape, dtype=wide, device=rows.device)
        for place in range(2):
            of_rows = sums[place].view(-1, shape[-1])
            of_rows.index_add_(0, maps.sent, rows[:, place].to(wide))
        dk, dv = sums.to(ctx.dtype)
        return None, None, None, dk, dv
