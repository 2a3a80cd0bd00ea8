"""An estimate of the memory and the time of a job: the part that is common to every `--dry-run`.

Sums over the steps that a `Reader` plans are counted before any of them is run: tokens, FLOPs, bytes kept between them.
Tests compare them with real runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch

from longnet_cli.attention.spans import far_spans
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import LOGITS_LIMIT, Net
from longnet_cli.running.device import DTYPES, resolve_dtype
from longnet_cli.running.layerwise import fits_beside, kept_bytes
from longnet_cli.running.ranks.ranks import Ranks
from longnet_cli.running.reader import reading_steps


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The memory, FLOPs and time of a job. Sizes are in bytes, of one rank; `memory` has them by kind.

    `free` is the memory that is free besides the `program`, which is one of the kinds; None where the system does not
    say. `flops` counts all FLOPs of the whole job, on all ranks; `seconds` is its time. `chunk_that_fits` is a shorter
    chunk that fits where `chunk` does not.
    """

    parameters: int
    memory: dict[str, int]
    free: int | None
    flops_per_token: float
    tokens: int
    flops: float
    seconds: float
    dtype: str
    chunk: int
    chunk_that_fits: int | None
    spilled: int  # bytes of the file of --spill

    HELD: ClassVar[tuple[str, ...]] = ("program",)  # kinds that are in use already when `free` is measured

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def beyond(self) -> int:
        """Bytes that the job needs besides the kinds in `HELD`."""
        return sum(size for kind, size in self.memory.items() if kind not in self.HELD)

    @property
    def largest(self) -> str:
        """The largest kind of memory in `beyond`."""
        return max((size, kind) for kind, size in self.memory.items() if kind not in self.HELD)[1]

    @property
    def fits(self) -> bool:
        return self.free is None or self.beyond <= self.free

    @property
    def advice(self) -> str:
        """The advice for a job that does not fit: a shorter chunk or, where none fits, another change."""
        return f"--chunk {self.chunk_that_fits} fits" if self.chunk_that_fits else self._other_advice()

    def _other_advice(self) -> str:
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """Return the part of the machine format that all jobs have."""
        return {
            "parameters": self.parameters,
            "memory_bytes": self.memory,
            "peak_bytes": self.peak,
            "free_bytes": self.free,
            "fits": self.fits,
            "flops_per_token": self.flops_per_token,
            "tokens": self.tokens,
            "flops": self.flops,
            "seconds": self.seconds,
            "dtype": self.dtype,
            "chunk": self.chunk,
            "spill_bytes": self.spilled,
        }


class Shape(NamedTuple):
    """The shape of a forward pass: rows, and tokens per row, padding included."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class Extent:
    """The tokens of a window, and of these the tokens whose hidden states are wanted."""

    tokens: int
    wanted: int

    def __len__(self) -> int:
        return self.tokens


class PlanSums:
    """Sums over the plan of a `Reader` of `net`, which keep no window.

    `read` are the tokens of all forward passes, padding included, and `wanted` those whose hidden states are wanted.
    `longest` is the longest window, `largest` the most tokens of a forward pass, and `together` the most tokens of
    windows that wait for each other.
    """

    def __init__(self, net: Net, chunk: int) -> None:
        self.net, self.config, self.chunk = net, net.config, chunk
        self.read = self.wanted = self.longest = self.largest = self.together = 0
        self.twice = 0  # tokens whose keys are computed twice: of long windows, layer by layer
        self._lengths: Counter[int] = Counter()  # of the rows of all forward passes; a long window is one row
        # by the bit length of a row's tokens: the tokens of such forward passes, and the shape of the last one
        self._shapes: dict[int, tuple[int, Shape]] = {}

    def add(self, windows: Iterable[Extent]) -> None:
        """Count windows as one call of `Reader.read` reads them."""
        for step in reading_steps(windows, self.chunk, self.config.streams):
            self.wanted += sum(window.wanted for window in step.windows)
            self.longest = max(self.longest, *map(len, step.windows))
            if step.batches is None:
                tokens = len(*step.windows)
                self._count(Shape(1, self.chunk), tokens)
                self._lengths[tokens] += 1
                self.twice += 0 if self.config.causal or not self._sees_outside(tokens) else tokens
                continue
            self.together = max(self.together, sum(map(len, step.windows)))
            for batch in step.batches:
                shape = Shape(len(batch), len(step.windows[batch[0]]))
                self._count(shape, shape.rows * shape.tokens)
                self._lengths[shape.tokens] += shape.rows

    @property
    def usual(self) -> Shape:
        """The shape of the forward passes that most tokens go through. Raises ValueError where there is none."""
        return max(self._shapes.values())[1]

    def product_flops(self, scores: bool) -> float:
        """Return the FLOPs of the matrices in all forward passes, with the logits of wanted tokens if `scores`.

        A layer computes queries, keys and values, by three matrices (dim, dim), a second time for tokens `twice`.
        """
        config = self.config
        again = 3 * 2 * config.dim**2 * config.num_layers
        logits = config.vocabulary_flops() * self.wanted if scores else 0
        return config.layer_flops() * self.read + again * self.twice + logits

    def attention_flops(self) -> int:
        """Return the FLOPs of attention in all forward passes."""
        return sum(rows * self.config.attention_flops(tokens) for tokens, rows in self._lengths.items())

    def flops(self, scores: bool) -> float:
        """Return the FLOPs of all forward passes, with the logits of the wanted tokens if `scores`."""
        return self.product_flops(scores) + self.attention_flops()

    def in_chunks(self, chunk: int) -> bool:
        """Return whether a window is read in chunks of this many tokens."""
        return self.config.streams and self.longest > chunk

    def tokens_at_once(self, chunk: int) -> int:
        """Return the most tokens of a forward pass."""
        return min(self.largest, chunk) if self.config.streams else self.largest

    def logits_at_once(self, chunk: int) -> int:
        """Return the most elements of logits that exist at one time."""
        tokens = max(self.tokens_at_once(chunk), min(self.together, 2 * chunk))
        return min(tokens * self.config.vocab_size, LOGITS_LIMIT)

    def kept_bytes(self, chunk: int, dtype: str, spill: bool, ranks: Ranks) -> dict[str, int]:
        """Return the bytes that are kept between forward passes on one rank, by kind.

        hidden: float32 hidden states that wait, in pieces and joined: of windows that are read together, or of two
        chunks of a longer one. In a bidirectional net also all that `spilled_bytes` counts, unless they are on a disk
        or, because a GPU has no room, in the host's memory. cache: keys and values of the longest window in a causal
        net, without those on a disk.
        """
        config, device = self.config, next(self.net.parameters()).device
        in_chunks, spillable = self.in_chunks(chunk), self.spilled_bytes(chunk, dtype, ranks)
        waiting = 2 * chunk if in_chunks else min(self.together, 2 * chunk)
        kinds = {"hidden": 2 * 4 * config.dim * waiting}
        if in_chunks and config.causal:
            kept = config.cache_bytes(self.longest, _itemsize(dtype, device), ranks.sp)
            kinds["cache"] = kept - (spillable if spill else 0)
        elif not spill and (device.type == "cpu" or fits_beside(config.forward_bytes(chunk), spillable, device)):
            kinds["hidden"] += spillable
        return kinds

    def spilled_bytes(self, chunk: int, dtype: str, ranks: Ranks) -> int:
        """Return the bytes of the file of `--spill`; 0 if no window is read in chunks.

        A bidirectional net keeps hidden states there between its layers, a causal one the blocks that are chosen from.
        """
        if not self.in_chunks(chunk):
            return 0
        if self.config.causal:
            itemsize = _itemsize(dtype, next(self.net.parameters()).device)
            return self.config.spilled_bytes(self.longest, itemsize, ranks.sp)
        return kept_bytes(cast(LongNet, self.net), self.longest, chunk, ranks) if self.net.layer_by_layer else 0

    def _sees_outside(self, tokens: int) -> bool:
        """Return whether the chunks of a window in a bidirectional net see keys of each other."""
        places = ((start, min(start + self.chunk, tokens)) for start in (0, self.chunk))
        return any(far_spans(self.config.pattern, start, stop, False, tokens) for start, stop in places)

    def _count(self, shape: Shape, tokens: int) -> None:
        self.read += tokens
        self.largest = max(self.largest, shape.rows * shape.tokens)
        before, _ = self._shapes.get(shape.tokens.bit_length(), (0, shape))
        self._shapes[shape.tokens.bit_length()] = before + tokens, shape


def _itemsize(dtype: str, device: torch.device) -> int:
    return DTYPES[resolve_dtype(dtype, device)].itemsize
