"""Bidirectional sequences longer than memory: layer by layer, chunk by chunk, exact.

A layer makes two passes over the chunks. The first collects the keys and values of the segments that a chunk sees
outside itself; the second computes each chunk with its own keys and, as far keys, the collected rows. Between the
layers, hidden states wait on the GPU if it has the room, otherwise in host memory or in an unnamed file (`spill`). The
system removes that file when the process ends, however it ends.

Several ranks take the chunks in turn, and each keeps the hidden states of its own chunks. Between the passes they add
up the collected rows. `LayerStates` pools the outputs of every layer, however chunks and ranks divide a sequence.

N tokens, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from longnet_cli.attention import SINKS, FarKeys, FarSpan, Outside
from longnet_cli.attention.segment_rows import SegmentRows
from longnet_cli.attention.spans import Lanes, far_spans, whole_segment
from longnet_cli.basics.errors import MemoryLimitError
from longnet_cli.nets.longnet import Layer, LongNet, Placement
from longnet_cli.running.device import DTYPES, free_memory, precision, resolve_dtype, to_device
from longnet_cli.running.memory_maps import MappedMemory, aligned
from longnet_cli.running.ranks.ranks import ALONE, Ranks

ROWS_AT_A_TIME = 1 << 20  # of a lane, which ranks add up; a device holds them beside a chunk


def hidden_in_chunks(
    model: LongNet,
    read: Callable[[int, int], Tensor],
    tokens: int,
    chunk: int,
    *,
    spill: str | Path | None = None,
    dtype: str = "fp32",
    ranks: Ranks = ALONE,
    on_chunk: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Tensor]:
    """Yield hidden (1, n, dim) after the final norm, chunk by chunk, equal to one forward pass over the whole sequence.

    read: (start, stop) -> ids (1, stop - start) on any device, read once.
    spill: a folder on a disk for the hidden states and collected rows. Without it they are in host memory. A GPU with
        room for them keeps them itself.
    dtype: as in `running.device`.
    ranks: rank i of P yields only the chunks i, i + P, ...; every rank must use up the iterator.
    on_chunk: called after each chunk of each layer, with the number of tokens that all ranks together read in that
        round.

    Raises MemoryLimitError before any work when the memory or, with `spill`, the disk does not have the room.
    """
    layers = _Layers(model, tokens, chunk, dtype, ranks)
    allocate: Callable[..., Tensor]
    device = layers.device
    forward = model.config.forward_bytes(chunk)
    if device.type != "cpu" and fits_beside(forward, layers.nbytes, device):
        allocate = partial(torch.empty, device=device)
    else:
        free = free_memory(torch.device("cpu"))
        if spill is None and layers.nbytes > free:
            needed = f"{layers.nbytes / 2**30:.1f} GiB"
            raise MemoryLimitError(
                f"the hidden states take {needed} and {free / 2**30:.1f} GiB of memory are free: "
                "keep them on a disk, with --spill FOLDER"
            )
        allocate = MappedMemory(layers.nbytes, spill).empty
    yield from layers.hidden(read, allocate, on_chunk)


def kept_bytes(model: LongNet, tokens: int, chunk: int, ranks: Ranks) -> int:
    """Return the bytes that `hidden_in_chunks` keeps between layers on one rank, in memory or in the spill file."""
    return _Layers(model, tokens, chunk, "fp32", ranks).nbytes


def fits_beside(forward: int, size: int, device: torch.device) -> bool:
    """Return whether a device has room for `size` bytes beside twice the bytes of a chunk's `forward` pass."""
    return size + 2 * forward <= free_memory(device)


class _RankChunk(NamedTuple):
    """The tokens [start, stop), which this rank computes while others compute the rest of a round of `of_round` tokens.

    Their hidden states are at `place` among those that the rank holds.
    """

    start: int
    stop: int
    place: slice
    of_round: int


# by the span of the whole segment, up to the end of the sequence
Segments = dict[FarSpan, SegmentRows]


class _Layers:
    """One net over one sequence: the chunks, and the segments that they see outside themselves."""

    def __init__(
        self,
        model: LongNet,
        tokens: int,
        chunk: int,
        dtype: str,
        ranks: Ranks,
    ) -> None:
        config = model.config
        self.model = model
        self.pattern = config.pattern
        self.lanes = Lanes(config.pattern, config.num_heads, config.kv_heads)
        self.tokens = tokens
        self.dtype = dtype
        self.device = next(model.parameters()).device
        self.ranks = ranks
        self.chunks: list[_RankChunk] = []  # of this rank
        self.held = 0  # tokens in them
        self.first_rows: dict[FarSpan, int] = {}  # of each segment, among the rows of all
        self.rows = 0  # of all lanes of all segments
        for index, start in enumerate(range(0, tokens, chunk)):
            stop = min(start + chunk, tokens)
            if index % ranks.world == ranks.rank:
                round_start = start - ranks.rank * chunk
                of_round = min(round_start + ranks.world * chunk, tokens) - round_start
                place = slice(self.held, self.held + stop - start)
                self.chunks.append(_RankChunk(start, stop, place, of_round))
                self.held = place.stop
            for span in self._spans(start, stop):
                whole = self._whole(span)
                if whole not in self.first_rows:
                    self.first_rows[whole] = self.rows
                    self.rows += math.prod(self._rows_and_lanes(whole))

    def _spans(self, start: int, stop: int) -> list[FarSpan]:
        """Return the spans that a chunk sees outside itself."""
        return far_spans(self.pattern, start, stop, False, self.tokens)

    def _whole(self, span: FarSpan) -> FarSpan:
        return whole_segment(self.pattern, span).part(0, self.tokens)

    def _rows_and_lanes(self, whole: FarSpan) -> tuple[int, int]:
        return self.lanes.most_rows(whole), self.lanes.number(whole.level)

    @property
    def nbytes(self) -> int:
        """The most bytes that hidden states and collected rows take: no number is wider than a weight."""
        config = self.model.config
        itemsize = next(self.model.parameters()).itemsize
        hidden = itemsize * self.held * config.dim
        return aligned(hidden) + aligned(itemsize * 2 * self.rows * config.head_dim)

    def hidden(
        self,
        read: Callable[[int, int], Tensor],
        allocate: Callable[..., Tensor],
        on_chunk: Callable[[int], None],
    ) -> Iterator[Tensor]:
        """Yield this rank's chunks of the final hidden states. `allocate(shape, dtype=...)` makes a tensor anywhere."""
        config = self.model.config
        hidden = allocate((1, self.held, config.dim), dtype=next(self.model.parameters()).dtype)
        for chunk in self.chunks:
            ids = to_device(read(chunk.start, chunk.stop), self.device)
            with torch.no_grad():
                hidden[:, chunk.place] = self.model.embed(ids)
        # the type of keys, even if this rank has no chunk to compute any from
        name = resolve_dtype(self.dtype, self.device)
        dtype = hidden.dtype if name == "fp32" else DTYPES[name]
        rows = None
        if self.rows:
            rows = allocate((2, self.rows, config.head_dim), dtype=dtype)
        for index, layer in enumerate(cast(Iterable[Layer], self.model.layers)):
            is_last = index == config.num_layers - 1
            segments = {} if rows is None else self._collect(layer, hidden, rows)
            for chunk in self.chunks:
                far = self._far(segments, chunk)
                x = self._compute(layer, hidden[:, chunk.place], chunk, far, is_last)
                on_chunk(chunk.of_round)
                if is_last:
                    yield x
                else:
                    hidden[:, chunk.place] = x

    def _collect(self, layer: Layer, hidden: Tensor, rows: Tensor) -> Segments:
        """Write a layer's keys and values of all chunks into `rows` (2, rows, D), and return them by segment."""
        segments: Segments = {}
        for whole, first_row in self.first_rows.items():
            rows_and_lanes = self._rows_and_lanes(whole)
            packed = rows[:, first_row : first_row + math.prod(rows_and_lanes)]
            segments[whole] = SegmentRows(self.lanes, whole, packed.unflatten(1, rows_and_lanes))
        if self.ranks.world > 1:
            rows.zero_()
        for chunk in self.chunks:
            keys = self._keys(layer, hidden[:, chunk.place], chunk)
            for whole in segments.keys() & self._touched(chunk):
                segments[whole].put(keys, chunk.start)
        if self.ranks.world > 1:
            # each row was made by one rank, and is zero on the others
            for some in rows.split(ROWS_AT_A_TIME, 1):
                sums = some.to(self.device).contiguous()
                self.ranks.sum(sums)
                some.copy_(sums)
        return segments

    def _touched(self, chunk: _RankChunk) -> Iterator[FarSpan]:
        """Yield the whole spans of the segments in which a chunk has tokens; all sinks lie in one segment."""
        for level, w in enumerate(self.pattern.segment_lengths):
            for position in range(chunk.start // w * w, chunk.stop, w):
                yield self._whole(FarSpan(level, position, position))
        yield self._whole(FarSpan(SINKS, 0, 0))

    @torch.no_grad()
    def _keys(self, layer: Layer, x: Tensor, chunk: _RankChunk) -> tuple[Tensor, Tensor]:
        x = x.to(self.device)
        with precision(self.dtype, self.device):
            table = self.model.positions(x, chunk.start)
            _, k, v = layer.attention.project(layer.attention_norm(x), table)
        return k, v

    @torch.no_grad()
    def _compute(
        self,
        layer: Layer,
        x: Tensor,
        chunk: _RankChunk,
        far: Outside,
        is_last: bool,
    ) -> Tensor:
        x = x.to(self.device)
        with precision(self.dtype, self.device):
            place = Placement(chunk.start, total=self.tokens)
            table = self.model.positions(x, chunk.start)
            x = layer(x, table, place, lambda q, k, v: far)
            return self.model.final_norm(x) if is_last else x

    def _far(self, segments: Segments, chunk: _RankChunk) -> Outside:
        """Return the collected rows that a chunk sees."""
        far_keys = []
        for span in self._spans(chunk.start, chunk.stop):
            if self.lanes.most_rows(span):
                k, v = segments[self._whole(span)].of(span).to(self.device).chunk(2)
                far_keys.append(FarKeys(*span, k, v))
        return Outside(far_keys)
