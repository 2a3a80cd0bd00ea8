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

import hashlib
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
from longnet_cli.attention.spans import Lanes, far_spans, open_spans, whole_segment
from longnet_cli.attention.views import accumulator
from longnet_cli.basics.errors import LongNetError
from longnet_cli.nets.config import NetConfig


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
        first = self.edges[0]
        last = self.edges[-1]
        inside = {cut for cut in cuts if first < cut < last}
        if inside and not self.causal:
            raise ValueError("documents over several ranks are for causal nets")
        first_document = 0 if cached else first
        self.starts = sorted({first_document, *inside})  # of documents
        # by each reader, the same on every rank: a collective is entered by all or by none
        self._wanted = [self._wanted_by(reader) for reader in range(self.ranks)]
        self.needed = any(self._wanted)
        self.sent = [self._parcels(self.rank, reader) for reader in range(self.ranks)]
        self.received = [self._parcels(maker, self.rank) for maker in range(self.ranks)]
        self.joined = []  # what is received, the rows of all makers in one parcel
        for span, attended in self._wanted[self.rank]:
            rows = self._rows(span)
            self.joined.append(Parcel(span, 0, rows, attended))
        # An empty parcel: so a rank that attends to no far key has far keys, too, and its backward pass sends what the
        # others wait for.
        nothing = FarSpan(0, self.start, self.start)
        self.joined.append(Parcel(nothing, 0, 0, attended=True))
        self._maps: dict[tuple[torch.Size, torch.device], _Maps] = {}
        self._agreed = False

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
        """Return [start, stop) of the document that holds a position."""
        index = bisect_right(self.starts, position)
        stops = [*self.starts[1:], self.edges[-1]]
        return self.starts[index - 1], stops[index - 1]

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Outside:
        """Send a layer's keys and values (B, n, H, D); return what the shard sees outside, as a `FarProvider` does."""
        return Outside(self.send(k, v))

    def send(
        self,
        k: Tensor,
        v: Tensor,
        on_arrival: Callable[[list[FarKeys]], None] = lambda keys: None,
    ) -> list[FarKeys]:
        """Send a layer's keys and values as a call does; return the far keys that the shard attends to.

        `on_arrival` gets all rows that the rank receives, once they are there.
        """
        if not self.needed:
            return []
        self._agree(k)
        trip = _RoundTrip(self, k)
        rows = _AllToAll.apply(trip, k, v)
        received = []
        for index, parcel in enumerate(self.joined):
            of_k, of_v = rows[2 * index : 2 * index + 2]
            received.append(FarKeys(*parcel.span, of_k, of_v, source=trip))
        trip.on_arrival = partial(on_arrival, received)
        of_parcels = zip(received, self.joined, strict=True)
        return [keys for keys, parcel in of_parcels if parcel.attended]

    def _agree(self, k: Tensor) -> None:
        """Compare the plans of all ranks, before the first rows of this exchange leave. `k` are keys (B, n, H, D).

        It takes one collective of the hosts, whatever the number of layers. Raises LongNetError on all ranks if two do
        not agree: they would wait for each other until a timeout, or take rows of other tokens for theirs.
        """
        if self._agreed:
            return
        plan = self.edges, self.starts, self.cached, self.pattern, self.num_heads, self._wanted
        of_keys = k.shape[0], k.shape[2:], k.dtype
        digest = hashlib.blake2b(repr((plan, of_keys)).encode(), digest_size=7)
        plans = torch.zeros(self.ranks, 3, dtype=torch.int64)
        plans[self.rank] = torch.tensor(
            [int.from_bytes(digest.digest(), "big"), self.edges[0], self.edges[-1]]
        )
        dist.all_reduce(plans, group=self.group)
        for rank, (plan_of_rank, start, stop) in enumerate(plans.tolist()):
            if plan_of_rank != plans[0, 0]:
                _, first_start, first_stop = plans[0].tolist()
                raise LongNetError(
                    f"rank {rank} of a group is at the tokens {start} to {stop} with another plan than rank 0 at "
                    f"{first_start} to {first_stop}: start all ranks with the same version, model, inputs and options"
                )
        self._agreed = True

    def maps(self, like: Tensor) -> _Maps:
        """Return the indices of rows, for keys of this shape: (B, n, H, D), or (B, n, levels, H, D).

        They are the same in all layers.
        """
        key = like.shape, like.device
        if key not in self._maps:
            self._maps[key] = _Maps.of(self, *key)
        return self._maps[key]

    def lanes(self, kv_heads: int) -> Lanes:
        return Lanes(self.pattern, self.num_heads, kv_heads)

    def shape(self, parcel: Parcel, like: Sequence[int]) -> tuple[int, int, int, int]:
        """Return the shape (B, rows, lanes, D) of a parcel's keys, for keys (B, n, H, D)."""
        lanes = self.lanes(like[-2]).number(parcel.span.level)
        return like[0], parcel.rows, lanes, like[-1]

    def sizes(self, parcels: Sequence[Sequence[Parcel]], like: Sequence[int]) -> list[int]:
        """Return how many numbers go to, or come from, each rank: k and v of all rows, for keys (B, n, H, D)."""
        sizes = []
        for of_rank in parcels:
            shapes = [self.shape(parcel, like) for parcel in of_rank]
            sizes.append(2 * sum(map(prod, shapes)))
        return sizes

    def _wanted_by(self, reader: int) -> list[tuple[FarSpan, bool]]:
        """Return the spans that a rank wants from others, and whether its shard attends to them.

        It keeps what is open at the end of a cached chunk, and the first document of its shard attends to what it sees
        outside the shard. What it keeps of a segment holds what it sees of that, and comes once, for both.
        """
        first, last = self.edges[reader : reader + 2]
        document_start, document_stop = self.document(first)
        # of the shard, in its first document
        start = min(first, document_stop) - document_start
        stop = min(last, document_stop) - document_start
        open_at_end: list[FarSpan] = []
        if self.cached:
            open_at_end = open_spans(self.pattern, self.edges[-1] - document_start)
        seen_outside: list[FarSpan] = []
        if start < stop:
            length = document_stop - document_start
            seen_outside = far_spans(self.pattern, start, stop, self.causal, length)
        earliest = max(0, self.edges[0] - document_start)  # earlier rows are in caches
        kept = self._of_others(open_at_end, earliest, start, stop)
        attended = self._of_others(seen_outside, earliest, start, stop)
        all_places = kept | attended
        return [(kept.get(place, span), place in attended) for place, span in all_places.items()]

    def _of_others(
        self,
        spans: Sequence[FarSpan],
        earliest: int,
        start: int,
        stop: int,
    ) -> dict[tuple[FarSpan, bool], FarSpan]:
        """Return the parts of spans, from `earliest` on, that lie before and after a shard [start, stop) and have rows.

        The keys are the whole segment, and True for the part before the shard.
        """
        parts: dict[tuple[FarSpan, bool], FarSpan] = {}
        for span in spans:
            segment = whole_segment(self.pattern, span)
            before = span.part(earliest, start)
            after = span.part(stop, span.stop)
            for part in (before, after):
                if self._rows(part):
                    parts[segment, part is before] = part
        return parts

    def _parcels(self, maker: int, reader: int) -> list[Parcel]:
        """Return the rows of `maker` that `reader` wants; of itself, a rank wants none."""
        document_start, document_stop = self.document(self.edges[reader])
        first, last = self.edges[maker : maker + 2]
        start = first - document_start
        stop = min(last, document_stop) - document_start
        parcels = []
        for wanted, attended in self._wanted[reader]:
            span = wanted.part(start, stop)
            if rows := self._rows(span):
                parcels.append(Parcel(span, start, rows, attended))
        return parcels

    def _rows(self, span: FarSpan) -> int:
        """Return the rows of the lane that has the most."""
        return self.lanes(self.num_heads).most_rows(span)


class _Maps(NamedTuple):
    """The rows of D numbers that a message has: indices, (rows,) int64.

        k or v of the maker                the message              far keys of the reader
        (B, n, H, D)                                                (B, rows, lanes, D), parcel by parcel
        row 0  1  2  3  4  5    sent       row 0  1  2    joined    row 0  1  2
            a  b  c  d  e  f    = 1 3 4        b  d  e    = 2 0 1       e  b  d

    The way back takes the same indices, and adds: a gradient of far keys goes to the row of the message that filled
    them, and from there to the row of k or v. `arriving` is the number of rows of the message that arrives.
    """

    sent: Tensor
    joined: Tensor
    arriving: int

    @classmethod
    def of(cls, exchange: Exchange, like: Sequence[int], device: torch.device) -> _Maps:
        """Return the indices for keys of this shape: the numbers of all rows, packed as the rows are to be."""
        lanes = exchange.lanes(like[-2])
        of_rows = (*like[:-1], 1)

        def unfilled(parcel: Parcel) -> SegmentRows:
            shape = exchange.shape(parcel, of_rows)
            no_numbers = torch.full(shape, -1)
            return SegmentRows(lanes, parcel.span, no_numbers)

        rows = torch.arange(prod(of_rows)).view(of_rows)
        leaving = []
        for parcel in chain(*exchange.sent):
            segment = unfilled(parcel)
            segment.put([rows], parcel.start)
            leaving.append(segment)

        joining = [unfilled(parcel) for parcel in exchange.joined]
        arriving = 0
        for parcel in chain(*exchange.received):
            shape = exchange.shape(parcel, of_rows)
            size = prod(shape)
            numbers = arriving + torch.arange(size).view(shape)
            arriving += size
            for whole in joining:
                if whole.span.level == parcel.span.level:
                    whole.put_packed([numbers], parcel.span)
        return cls(_numbers(leaving).to(device), _numbers(joining).to(device), arriving)


def _numbers(segments: Sequence[SegmentRows]) -> Tensor:
    """Return all numbers of packed rows, one segment after the other.

    A lane with one row fewer has an arbitrary row in its place, which nobody reads, and whose gradient is 0.
    """
    none = torch.zeros(0, dtype=torch.int64)
    return torch.cat([none, *(segment.packed.flatten() for segment in segments)]).clamp(min=0)


class _Message:
    """Rows on their way between the ranks, (rows, k and v, D): a rank sends some, and gets others."""

    def __init__(
        self,
        sent: Tensor,
        rows: int,
        sizes: tuple[list[int], list[int]],
        group: Any,
    ) -> None:
        """Start. `rows` are to come. `sizes` count the numbers that come from each rank, and that go to it."""
        self._sent = sent  # alive until it has been sent
        self._received = sent.new_empty(rows, *sent.shape[1:])
        flat = self._received.view(-1), sent.view(-1)
        self._work = dist.all_to_all_single(*flat, *sizes, group=group, async_op=True)

    def land(self) -> Tensor:
        """Wait for the rows that come, and return them."""
        self._work.wait()
        return self._received


class _RoundTrip:
    """The rows of a layer on their way to other ranks, and the gradients of these rows on their way back.

        forward     leave ---> attention to near keys ---> arrive ---> attention to far keys
        backward    gradients of far keys: take_gradients, .. ---> gradients of near keys ---> come_back

    A message travels while near keys are attended to, or get their gradients. It leaves with `leave`, and on the way
    back with the last `take_gradients`. Autograd calls `leave` and `come_back` (`_AllToAll`). Attention calls `arrive`
    and `take_gradients`: the trip is the `FarSource` of its far keys.
    """

    def __init__(self, exchange: Exchange, k: Tensor) -> None:
        """Make room for the far keys. `k` has the shape of keys, (B, n, H, D)."""
        joined = exchange.joined
        self.maps = exchange.maps(k)
        self.shape = k.shape
        self.width = k.shape[-1]
        self.spans = [parcel.span for parcel in joined]
        self.shapes = [exchange.shape(parcel, k.shape) for parcel in joined]
        self.attended = sum(parcel.attended for parcel in joined)
        self.to_others = exchange.sizes(exchange.sent, k.shape)
        self.from_others = exchange.sizes(exchange.received, k.shape)
        self.group = exchange.group
        far_rows = len(self.maps.joined)
        self.far = k.new_empty(2, far_rows, self.width)  # k and v of all joined parcels
        self.on_arrival: Callable[[], None] = lambda: None
        self.message: _Message | None = None  # under way
        self.gradients: list[tuple[FarSpan, Tensor, Tensor]] = []  # of attended parcels

    def leave(self, k: Tensor, v: Tensor) -> list[Tensor]:
        """Send rows of k and v; return k and v of every joined parcel, whose numbers come when they `arrive`."""
        sent = self.maps.sent
        # k and v of a row side by side: each rank's rows lie together
        rows = k.new_empty(len(sent), 2, self.width)
        for place, x in enumerate((k, v)):
            rows_of_x = x.reshape(-1, self.width)
            torch.index_select(rows_of_x, 0, sent, out=rows[:, place])
        sizes = self.from_others, self.to_others
        self.message = _Message(rows, self.maps.arriving, sizes, self.group)
        # through `data`, so that autograd does not notice that the memory is filled later
        parcels = self._views(self.far.data)
        return [*chain(*parcels)]

    def arrive(self) -> None:
        """Wait for the rows of other ranks, and fill the far keys. Do nothing if they have arrived already."""
        if self.message:
            received = self.message.land()
            self.message = None
            for place, rows in enumerate(self.far):
                torch.index_select(received[:, place], 0, self.maps.joined, out=rows)
            on_arrival = self.on_arrival
            # It holds the far keys, and they hold this trip: the circle would keep memory that the next chunk needs.
            self.on_arrival = lambda: None
            on_arrival()

    def take_gradients(self, span: FarSpan, dk: Tensor, dv: Tensor) -> None:
        """Take the gradients of a joined parcel. All of them leave with those of the last attended one."""
        self.gradients.append((span, dk, dv))
        if len(self.gradients) < self.attended:
            return
        joined = self.maps.joined
        gradients = self.far.new_zeros(len(joined), 2, self.width)
        parcels = self._views(gradients.transpose(0, 1))
        for span_of_parcel, *of_parcel in self.gradients:
            number = self.spans.index(span_of_parcel)
            for place, gradient in zip(parcels[number], of_parcel, strict=True):
                place.copy_(gradient)
        self.gradients = []
        rows = self.far.new_zeros(self.maps.arriving, 2, self.width)
        rows.index_add_(0, joined, gradients)
        sizes = self.to_others, self.from_others
        self.message = _Message(rows, len(self.maps.sent), sizes, self.group)

    def come_back(self) -> list[Tensor]:
        """Return the gradients of k and v, (B, n, H, D) each. They are summed in fp32 or fp64."""
        assert self.message
        rows = self.message.land()
        self.message = None
        wide = rows.to(accumulator(rows.dtype))
        own_rows = self.shape[:-1].numel()
        sums = wide.new_zeros(own_rows, 2, self.width)
        sums.index_add_(0, self.maps.sent, wide)
        of_keys, of_values = sums.to(rows.dtype).unbind(1)
        return [of_keys.reshape(self.shape), of_values.reshape(self.shape)]

    def _views(self, rows: Tensor) -> list[tuple[Tensor, ...]]:
        """Return views of k and v of each joined parcel, (B, rows, lanes, D), in rows (k and v, rows of all, D)."""
        sizes = [prod(shape[:-1]) for shape in self.shapes]
        pairs = zip(rows.split(sizes, 1), self.shapes, strict=True)
        return [part.view(2, *shape).unbind() for part, shape in pairs]


class _AllToAll(torch.autograd.Function):
    """The map (k, v) -> k and v of every joined parcel, (B, rows, lanes, D) each.

    Attention gives their gradients to the trip before autograd asks for those of k and v.
    """

    @staticmethod
    def forward(ctx: Any, trip: _RoundTrip, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.trip = trip
        return tuple(trip.leave(k, v))

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.trip.come_back()
