"""Bidirectional sequences longer than memory: layer by layer, chunk by chunk, exact.

A layer makes two passes over the chunks. The first collects the keys and values of the segments that a chunk sees
outside itself; the second computes each chunk with its own keys and, as far keys, the collected rows. Between the
layers, hidden states wait on the GPU if it has the room, otherwise in host memory or in an unnamed file (`spill`). The
system removes that file when the process ends, however it ends.

Several ranks take the chunks in turn, and each keeps the hidden states of its own chunks. Between the passes they add
up the collected rows. `LayerStates` pools the outputs of every layer, however chunks and ranks divide a sequence.

N tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from longnet_cli.attention import SINKS, FarKeys, FarSpan, Outside
from longnet_cli.attention.spans import Layout, common_span, far_spans, segment_start
from longnet_cli.attention.views import strided_view
from longnet_cli.basics.errors import MemoryLimitError
from longnet_cli.nets.longnet import Layer, LongNet, Placement
from longnet_cli.running.device import DTYPES, free_memory, precision, resolve_dtype, to_device
from longnet_cli.running.memory_maps import MappedMemory, aligned
from longnet_cli.running.ranks.ranks import Ranks

ROWS_AT_A_TIME = 1 << 16  # of keys and values that ranks add up; a device holds them beside a chunk


def hidden_in_chunks(
    model: LongNet,
    read: Callable[[int, int], Tensor],
    tokens: int,
    chunk: int,
    *,
    spill: str | Path | None = None,
    dtype: str = "fp32",
    ranks: Ranks | None = None,
    on_chunk: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """Yield hidden (1, n, dim) after the final norm, chunk by chunk, equal to one forward pass over the whole sequence.

    read: (start, stop) -> ids (1, stop - start) on any device, read once.
    spill: a folder on a disk for the hidden states and collected rows. Without it they are in host memory. A GPU with
        room for them keeps them itself.
    dtype: as in `running.device`.
    ranks: rank i of P yields only the chunks i, i + P, ...; every rank must use up the iterator.
    on_chunk: called after each chunk of each layer, with the number of tokens that all ranks together read in that
        turn.

    Raises MemoryLimitError before any work when the memory or, with `spill`, the disk does not have the room.
    """
    run = _Layers(model, tokens, chunk, dtype, ranks or Ranks())
    allocate: Callable[..., Tensor]
    if run.device.type != "cpu" and fits_beside(
        model.config.forward_bytes(chunk), run.nbytes, run.device
    ):
        allocate = partial(torch.empty, device=run.device)
    else:
        free = free_memory(torch.device("cpu"))
        if spill is None and free is not None and run.nbytes > free:
            raise MemoryLimitError(
                f"the hidden states take {run.nbytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are free: "
                "keep them on a disk, with --spill FOLDER"
            )
        allocate = MappedMemory(run.nbytes, spill).empty
    yield from run.hidden(read, allocate, on_chunk)


def kept_bytes(model: LongNet, tokens: int, chunk: int, ranks: Ranks) -> int:
    """Return the bytes that `hidden_in_chunks` keeps between layers on one rank, in memory or in the spill file."""
    return _Layers(model, tokens, chunk, "fp32", ranks).nbytes


def fits_beside(forward: int, size: int, device: torch.device) -> bool:
    """Return whether a device has room for `size` bytes beside twice the bytes of a chunk's `forward` pass."""
    free = free_memory(device)
    return free is not None and size + 2 * forward <= free


class _Layers:
    """The layout of one net over one sequence: the chunks, and the segments that they see outside themselves.

    In a LongNet every query head has its own key head, so all levels have H lanes.
    """

    def __init__(self, model: LongNet, tokens: int, chunk: int, dtype: str, ranks: Ranks) -> None:
        self.model, self.pattern, self.tokens, self.dtype = (
            model,
            model.config.pattern,
            tokens,
            dtype,
        )
        self.device, self.ranks = next(model.parameters()).device, ranks
        self.layout = Layout(self.pattern, model.config.num_heads, model.config.num_heads)
        self.chunks = [(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]
        self.mine: list[
            tuple[int, int, slice, int]
        ] = []  # start, stop, place in `hidden`, tokens of the turn
        held = 0
        for index in range(ranks.rank, len(self.chunks), ranks.world):
            start, stop = self.chunks[index]
            turn = self.chunks[index - ranks.rank : index - ranks.rank + ranks.world]
            self.mine.append(
                (start, stop, slice(held, held + stop - start), turn[-1][1] - turn[0][0])
            )
            held += stop - start
        self.held = held
        self.places: dict[
            tuple[int, int], slice
        ] = {}  # (level, start of a segment) -> its rows in `collected`
        self.rows = 0
        for span in (span for start, stop in self.chunks for span in self._spans(start, stop)):
            key = (span.level, segment_start(self.pattern, span))
            if key not in self.places:
                whole = common_span(self.pattern, *key, key[1], tokens)
                count = max(self.layout.counts(whole))
                self.places[key] = slice(self.rows, self.rows + count)
                self.rows += count

    def _spans(self, start: int, stop: int) -> list[FarSpan]:
        """Return the spans that a chunk sees outside itself."""
        return far_spans(self.pattern, start, stop, False, self.tokens)

    @property
    def nbytes(self) -> int:
        """The most bytes that hidden states and collected rows take: no number is wider than a weight."""
        numbers = next(self.model.parameters()).itemsize * self.model.config.dim
        return sum(aligned(numbers * rows) for rows in (self.held, 2 * self.rows))

    def hidden(
        self,
        read: Callable[[int, int], Tensor],
        allocate: Callable[..., Tensor],
        on_chunk: Callable[[int], None] | None,
    ) -> Iterator[Tensor]:
        """Yield this rank's chunks of the final hidden states. `allocate(shape, dtype=...)` makes a tensor anywhere."""
        config = self.model.config
        hidden = allocate((1, self.held, config.dim), dtype=next(self.model.parameters()).dtype)
        for start, stop, place, _ in self.mine:
            with torch.no_grad():
                hidden[:, place] = self.model.embed(to_device(read(start, stop), self.device))
        collected: Tensor | None = None  # (2, 1, rows, H, D), k and v, of one layer at a time
        if self.rows:
            # not that of keys which were made: a rank may have no chunk to compute any from
            name = resolve_dtype(self.dtype, self.device)
            dtype = hidden.dtype if name == "fp32" else DTYPES[name]
            collected = allocate((2, 1, self.rows, config.num_heads, config.head_dim), dtype=dtype)
        for index, layer in enumerate(cast(Iterable[Layer], self.model.layers)):
            if collected is not None:
                if self.ranks.world > 1:
                    collected.zero_()
                for start, _, place, _ in self.mine:
                    self._collect(collected, start, *self._keys(layer, hidden[:, place], start))
                self._add_up(collected)
            for start, stop, place, turn in self.mine:
                far = Outside() if collected is None else self._far(collected, start, stop)
                last = index == config.num_layers - 1
                x = self._compute(layer, hidden[:, place], start, far, last)
                if on_chunk:
                    on_chunk(turn)
                if last:
                    yield x
                else:
                    hidden[:, place] = x

    def _add_up(self, collected: Tensor) -> None:
        """Give every rank all rows. Each row was made by one rank, and is zero on the others."""
        if self.ranks.world > 1:
            for rows in collected.split(ROWS_AT_A_TIME, 2):
                sums = rows.to(self.device).contiguous()
                self.ranks.sum(sums)
                rows.copy_(sums)

    @torch.no_grad()
    def _keys(self, layer: Layer, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
        x = x.to(self.device)
        with precision(self.dtype, self.device):
            _, k, v = layer.attention.project(
                layer.attention_norm(x), self.model.positions(x, start)
            )
        return k, v

    @torch.no_grad()
    def _compute(self, layer: Layer, x: Tensor, start: int, far: Outside, last: bool) -> Tensor:
        x = x.to(self.device)
        with precision(self.dtype, self.device):
            place = Placement(start, total=self.tokens)
            x = layer(x, self.model.positions(x, start), place, lambda q, k, v: far)
            return self.model.final_norm(x) if last else x

    def _collect(self, collected: Tensor, start: int, k: Tensor, v: Tensor) -> None:
        """Copy the chunk's rows to all `places` that hold some of them."""
        tokens = k.shape[1]
        levels = [(level, w) for level, (w, _) in enumerate(self.pattern.levels)]
        for level, w in [
            *levels,
            (SINKS, self.tokens),
        ]:  # all sinks lie in one segment, the sequence
            for segment in range(start // w * w, start + tokens, w):
                if place := self.places.get((level, segment)):
                    span = common_span(self.pattern, level, segment, start, start + tokens)
                    for views in self.layout.views(span, start):
                        for rows, x in zip(collected[:, :, place], (k, v), strict=True):
                            strided_view(rows, views.segment).copy_(strided_view(x, views.shard))

    def _far(self, collected: Tensor, start: int, stop: int) -> Outside:
        """Return the collected rows that the chunk sees."""
        far_keys = []
        for span in self._spans(start, stop):
            if count := max(self.layout.counts(span)):
                segment = segment_start(self.pattern, span)
                first_rows = self.layout.rows_before(span.level, span.start - segment)
                rows = _from_row(
                    collected[:, :, self.places[span.level, segment]], first_rows, count
                )
                far_keys.append(FarKeys(*span, *rows.to(self.device)))
        return Outside(far_keys)


def _from_row(rows: Tensor, first_rows: list[int], count: int) -> Tensor:
    """Return `count` rows of (2, 1, rows, H, D) from each head's first row on. Rows past the end are never read."""
    if min(first_rows) == max(first_rows):
        return rows[:, :, first_rows[0] : first_rows[0] + count]
    index = (torch.arange(count)[:, None] + torch.tensor(first_rows)).clamp_(
        max=rows.shape[2] - 1
    )  # (count, H)
    return rows[
        :, :, to_device(index, rows.device), torch.arange(len(first_rows), device=rows.device)
    ]
