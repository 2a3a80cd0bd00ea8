"""Hidden states of sequences of any length, on one process or several: the part that scoring and encoding share.

    windows --+-- short: they wait until a forward is full --> padded forwards, dealt out to the ranks --+--> pieces
              +-- causal and longer than a chunk --> CausalStream; the ranks share each chunk -----------+
              +-- bidirectional and longer --> one forward shared by the ranks, or layer by layer -------+

A job says which windows it wants, and gets their hidden states in order. It knows nothing of chunks, batches or ranks,
with one exception: another rank may have computed a piece. So the job adds up its own numbers over the ranks. The
chunk of a job, the tokens that go through a net at once, is chosen here, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from longnet_cli.basics.errors import ConfigError
from longnet_cli.basics.events import Events
from longnet_cli.nets.config import NetConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import Net, Readable
from longnet_cli.running.causal_stream import open_stream
from longnet_cli.running.device import free_memory, precision, resolve_dtype, to_device
from longnet_cli.running.layerwise import hidden_in_chunks
from longnet_cli.running.ranks.exchange import Exchange
from longnet_cli.running.ranks.ranks import ALONE, Ranks

# for one chunk's activations; a GPU takes an eighth of its free memory if that is more
CHUNK_BYTES = 256 << 20
SHORTEST_CHUNK = 256  # below it, the calls cost more than the computation
# A recipe trains with TRAINING_CHUNK on every CPU. On a GPU, it takes the longest chunk that fits; beyond
# GPU_TRAINING_CHUNK, no chunk keeps the GPU busier. The rows of `bench` compare models and patterns, so all of them
# have one chunk; a GPU has a longer one, because with a shorter one it waits for the CPU.
TRAINING_CHUNK = 1 << 14
GPU_TRAINING_CHUNK = 1 << 17
BENCH_CHUNK = 1 << 16
GPU_BENCH_CHUNK = 1 << 20


def chunk_of(named: int | None, default: int, earlier: int = 0, ranks: Ranks = ALONE) -> int:
    """Return the tokens of a chunk of any job, the same on all `ranks`.

    The chunk that the user `named` counts first, then the chunk of the `earlier` run that this one continues, which
    only rank 0 needs to know (0 if there is none), then the smallest of the ranks' defaults. Raises ConfigError for a
    chunk below 1.
    """
    if named is not None:
        if named < 1:
            raise ConfigError(f"chunk must be 1 or more, not {named}")
        return named
    smallest = int(ranks.smallest(earlier or default))
    return int(ranks.largest(earlier)) or smallest


def default_chunk(config: NetConfig, device: torch.device) -> int:
    """Return the default for reading: a forward pass without gradients then takes a modest share of memory.

    A power of two, so that the edges of chunks and of segments mostly coincide.
    """
    return chunk_beside(config, free_memory(device) if device.type == "cuda" else 0)


def chunk_beside(config: NetConfig, free: float) -> int:
    """Return the default chunk for reading on a GPU with so many bytes free; 0 for a CPU."""
    budget = max(CHUNK_BYTES, int(free) // 8)
    return max(SHORTEST_CHUNK, 1 << (budget // config.forward_bytes(1)).bit_length() - 1)


def fitting_chunk(
    needed: Callable[[int], float],
    longest: int,
    free: float,
    shortest: int = SHORTEST_CHUNK,
) -> int | None:
    """Return `longest`, or the longest power of two below it and at least `shortest`, whose `needed` bytes are free.

    Returns None if none fits.
    """
    chunk = longest
    while needed(chunk) > free:
        chunk = (1 << (chunk - 1).bit_length()) >> 1  # the power of two below
        if chunk < shortest:
            return None
    return chunk


PORTION_CHUNKS = 4  # full forward passes per portion that is dealt out


@dataclass(frozen=True)
class Window:
    """The ids [start, stop) of a sequence, which a net reads as a sequence of their own, from position 0 on.

    Hidden states are wanted for the ids [wanted, wanted_stop); the others only serve as context.
    """

    sequence: Readable
    start: int
    stop: int
    wanted: int
    wanted_stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def counted(self) -> int:
        """The tokens that `events.progress` counts for the window."""
        return self.wanted_stop - self.wanted


W = TypeVar("W", bound=Window)
Z = TypeVar("Z", bound=Sized)


@dataclass(frozen=True)
class Piece(Generic[W]):
    """The hidden states (stop - start, dim) of the ids [start, stop) of a window; None if another rank has them."""

    window: W
    start: int
    stop: int
    hidden: Tensor | None

    def __len__(self) -> int:
        return self.stop - self.start


def reading_steps(windows: Iterable[Z], chunk: int, streams: bool) -> Iterator[list[Z]]:
    """Yield the windows that are read at a time by a net that `streams` or not; only their lengths count.

    Short windows wait until they fill a forward pass of `chunk` tokens. A longer window that streams is alone. Every
    window is in one step, in order. This is the rule for `Reader.read`, and so for all jobs; `--dry-run` counts its
    steps.
    """
    step: list[Z] = []
    tokens = 0
    for window in windows:
        if step and streams and len(window) > chunk:
            yield step
            step = []
            tokens = 0
        step.append(window)
        tokens += len(window)
        if tokens >= chunk or not tokens:
            yield step
            step = []
            tokens = 0
    if step:
        yield step


def forward_passes(step: Sequence[Sized], chunk: int, streams: bool) -> list[list[int]] | None:
    """Return the indices of the windows of a step that share a forward pass; None for one that goes chunk by chunk."""
    lengths = [len(window) for window in step]
    if streams and max(lengths) > chunk:
        return None
    # a quarter of a chunk, whose matrices stay in a CPU's cache: that is faster than a whole one
    return [*batches_by_length(lengths, max(1, chunk // 4), chunk // 32)]


class Reader:
    """A net that reads windows of any length.

    `chunk` is the most tokens of one forward pass; the default is `earlier_chunk`, that of the run which this one
    continues, otherwise `default_chunk`. Short windows share a forward pass.
    A longer window goes chunk by chunk, with the same result. A causal net needs no more memory for it, unless its
    pattern has chosen blocks: then it keeps the window's keys and values. A bidirectional net keeps the hidden states,
    in memory or, with `spill`, in a file in that folder. A net that does not stream reads any window in one
    forward pass.

    With several ranks (`all_ranks`), all have one chunk. Those of a group (`ranks`) must read the same windows: they
    share every long window, `chunk` tokens each, and divide the forward passes over short windows. `dtype` is as in
    `running.device`. On every rank, `events.progress` gets the number of wanted tokens of each forward pass.
    """

    def __init__(
        self,
        model: Net,
        *,
        chunk: int | None = None,
        earlier_chunk: int = 0,
        dtype: str = "auto",
        spill: str | Path | None = None,
        ranks: Ranks = ALONE,
        events: Events | None = None,
    ) -> None:
        """Raise ConfigError for a chunk below 1."""
        self.model = model
        self.spill = spill
        self.device = next(model.parameters()).device
        self.dtype = resolve_dtype(dtype, self.device)
        self.chunk = chunk_of(chunk, default_chunk(model.config, self.device), earlier_chunk, ranks)
        self.all_ranks = ranks
        self.ranks = ranks.of_group()
        self.events = events or Events()

    def read(self, windows: Iterable[W]) -> Iterator[list[Piece[W]]]:
        """Return the wanted hidden states of all windows, in order, as lists of pieces.

        A list has the pieces of one or more forward passes. Every rank gets the same pieces. A window without ids gives
        a piece without hidden states. Raises what reading ids raises, and MemoryLimitError as `hidden_in_chunks` does.
        """
        steps = reading_steps(windows, self.chunk, self.model.config.streams)
        return chain.from_iterable(map(self._read, steps))

    def _read(self, step: list[W]) -> Iterable[list[Piece[W]]]:
        batches = forward_passes(step, self.chunk, self.model.config.streams)
        if batches is not None:
            return (self._together(step, batches),)
        return self._stream(*step) if self.model.config.causal else self._whole(*step)

    @torch.inference_mode()
    def _together(self, windows: Sequence[W], batches: Sequence[Sequence[int]]) -> list[Piece[W]]:
        """Read short windows in padded forward passes of similar lengths."""
        hidden: dict[int, Tensor] = {}
        for number, batch in enumerate(batches):
            if number % self.ranks.world == self.ranks.rank:
                lengths = [len(windows[i]) for i in batch]
                read = [self._ids(windows[i], windows[i].start, windows[i].stop) for i in batch]
                padded = torch.nn.utils.rnn.pad_sequence(read, batch_first=True)
                with precision(self.dtype, self.device):
                    # padding is on the right, where a causal net does not see it
                    options: dict[str, Any] = {}
                    if not self.model.config.causal:
                        options["lengths"] = lengths
                    rows = self.model(to_device(padded, self.device), **options)
                    hidden.update(zip(batch, rows, strict=True))
            self.events.progress(sum(windows[i].counted for i in batch))
        pieces = []
        for index, window in enumerate(windows):
            wanted = None
            if index in hidden:
                rows = slice(window.wanted - window.start, window.wanted_stop - window.start)
                wanted = hidden[index][rows]
            pieces.append(Piece(window, window.wanted, window.wanted_stop, wanted))
        return pieces

    def _stream(self, window: W) -> Iterator[list[Piece[W]]]:
        """Read a causal window chunk by chunk.

        Nothing here waits for a GPU: while it computes a chunk, the ids of the next chunk are read and sent to it.
        Reading takes less than a hundredth of the computing time, too little for a thread of its own.
        """
        stream = open_stream(self.model)
        ranks = self.ranks
        for edges in self._chunks(window):
            ids = self._ids_of_rank(window, edges)
            options: dict[str, Any] = {}
            if ranks.group:
                options["exchange"] = self._exchange(window, edges, cached=True)
            with torch.inference_mode(), precision(self.dtype, self.device):
                hidden = stream(ids, **options)
            yield self._shared(window, edges, hidden[0])

    def _whole(self, window: W) -> Iterator[list[Piece[W]]]:
        """Read a bidirectional window: in one forward pass if it fits all ranks together, otherwise layer by layer."""
        ranks = self.ranks
        total = len(window)
        chunks = self._chunks(window)
        if len(chunks) == 1 and ranks.group:
            exchange = self._exchange(window, chunks[0], cached=False)
            ids = self._ids_of_rank(window, chunks[0])
            with torch.inference_mode(), precision(self.dtype, self.device):
                hidden = self.model(ids, start=exchange.start, far=exchange, total=total)
            yield self._shared(window, chunks[0], hidden[0])
            return
        done = 0
        layers = self.model.config.num_layers

        def count(tokens: int) -> None:
            """Report one token for as many of single layers as there are layers."""
            nonlocal done
            before = done // layers
            done += tokens
            self.events.progress(done // layers - before)

        mine = hidden_in_chunks(
            cast(LongNet, self.model),  # no other net goes layer by layer
            lambda start, stop: self._ids(window, window.start + start, window.start + stop)[None],
            total,
            self.chunk,
            spill=self.spill,
            dtype=self.dtype,
            ranks=ranks,
            on_chunk=count,
        )
        for start in range(window.start, window.stop, self.chunk * ranks.world):
            edges = [min(start + self.chunk * rank, window.stop) for rank in range(ranks.world + 1)]
            has_tokens = edges[ranks.rank] < edges[ranks.rank + 1]
            yield self._pieces(window, edges, next(mine)[0] if has_tokens else None)

    def _chunks(self, window: Window) -> list[list[int]]:
        """Return the edges of the ranks' shards, chunk by chunk."""
        chunk = self.chunk * self.ranks.world
        starts = range(window.start, window.stop, chunk)
        return [self.ranks.edges(start, min(chunk, window.stop - start)) for start in starts]

    def _exchange(self, window: Window, edges: Sequence[int], *, cached: bool) -> Exchange:
        """Return the exchange of a group whose shards of a window have these edges."""
        of_window = [edge - window.start for edge in edges]
        return Exchange(self.model.config, of_window, group=self.ranks.group, cached=cached)

    def _shared(self, window: W, edges: Sequence[int], hidden: Tensor) -> list[Piece[W]]:
        counted = min(edges[-1], window.wanted_stop) - max(edges[0], window.wanted)
        self.events.progress(max(0, counted))
        return self._pieces(window, edges, hidden)

    def _pieces(self, window: W, edges: Sequence[int], hidden: Tensor | None) -> list[Piece[W]]:
        """Return the wanted part of each rank's shard. `hidden` belongs to this rank's shard."""
        pieces = []
        for rank in range(self.ranks.world):
            start = max(edges[rank], window.wanted)
            stop = min(edges[rank + 1], window.wanted_stop)
            if start < stop:
                wanted = None
                if rank == self.ranks.rank and hidden is not None:
                    wanted = hidden[start - edges[rank] : stop - edges[rank]]
                pieces.append(Piece(window, start, stop, wanted))
        return pieces

    def _ids_of_rank(self, window: Window, edges: Sequence[int]) -> Tensor:
        """Return the ids (1, n) of this rank's shard, on the device."""
        start, stop = edges[self.ranks.rank : self.ranks.rank + 2]
        return to_device(self._ids(window, start, stop)[None], self.device)

    @staticmethod
    def _ids(window: Window, start: int, stop: int) -> Tensor:
        return torch.from_numpy(window.sequence.read(start, stop))


def batches_by_length(
    lengths: Sequence[int],
    limit: int,
    least: float = math.inf,
) -> Iterator[list[int]]:
    """Group sequences for padded forward passes of at most `limit` tokens; yield indices into `lengths`, longest first.

    A group of `least` tokens or more has at most a sixteenth of padding. A sequence longer than `limit` is a group of
    its own. A sequence without tokens is in no group.
    """
    order = sorted(
        (index for index, length in enumerate(lengths) if length), key=lambda index: -lengths[index]
    )
    while order:
        longest = lengths[order[0]]
        rows = 1
        for index in order[1 : max(1, limit // longest)]:
            if rows * longest >= least and 16 * lengths[index] < 15 * longest:
                break
            rows += 1
        yield order[:rows]
        order = order[rows:]
