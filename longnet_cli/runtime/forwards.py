"""The forwards that a `Reader` would make of windows, counted before any of them is computed."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from longnet_cli.attention.pattern import far_spans
from longnet_cli.model.net import NetConfig
from longnet_cli.runtime.flops import attention_flops, layer_flops, vocabulary_flops
from longnet_cli.runtime.reading import batches_by_length


class Shape(NamedTuple):
    """The shape of a forward: rows, and tokens of each, with padding."""

    rows: int
    tokens: int


class Forwards:
    """Takes the lengths of windows as `Reader.read` takes windows, and counts: nothing is kept of each.

    `read` are the tokens of all forwards, with padding; `wanted` those whose hidden states are. `longest` is the
    longest window, `largest` the most tokens of a forward, `together` those of windows that wait for each other.
    """

    def __init__(self, config: NetConfig, chunk: int) -> None:
        self.config, self.chunk = config, chunk
        self.read = self.wanted = self.longest = self.largest = self.together = 0
        self.twice = 0  # of the tokens, those whose keys are computed twice: of long windows, layer by layer
        self._waiting: list[int] = []
        self._tokens = 0  # that wait
        self._lengths: Counter[int] = Counter()  # of the rows of all forwards; a long window is one
        self._shapes: dict[int, tuple[int, Shape]] = {}  # by their tokens' power of two: tokens of such, the last one

    def add(self, tokens: int, wanted: int, *, alone: bool = False) -> None:
        """Take the next window; `alone` where it shares no forward."""
        self.wanted += wanted
        self.longest = max(self.longest, tokens)
        if tokens > self.chunk and self.config.streams:
            self.end()
            self._count(Shape(1, self.chunk), tokens)
            self._lengths[tokens] += 1
            self.twice += 0 if self.config.causal or not self._sees_outside(tokens) else tokens
            return
        self._waiting.append(tokens)
        self._tokens += tokens
        if self._tokens >= self.chunk or alone:
            self.end()

    def end(self) -> None:
        """Count what waits; to be called after the last window."""
        self.together = max(self.together, self._tokens)
        for batch in batches_by_length(self._waiting, self.chunk):
            shape = Shape(len(batch), self._waiting[batch[0]])
            self._count(shape, shape.rows * shape.tokens)
            self._lengths[shape.tokens] += shape.rows
        self._waiting, self._tokens = [], 0

    @property
    def usual(self) -> Shape:
        """The shape of a forward as most tokens have it; raises ValueError where there is none."""
        return max(self._shapes.values())[1]

    def flops(self, scores: bool) -> float:
        """Return what all forwards execute, with logits of what is wanted if that `scores`."""
        matrices = layer_flops(self.config) * self.read + self.twice * 6 * self.config.num_layers * self.config.dim**2
        attended = sum(rows * attention_flops(self.config, tokens) for tokens, rows in self._lengths.items())
        return matrices + attended + (vocabulary_flops(self.config) * self.wanted if scores else 0)

    def _sees_outside(self, tokens: int) -> bool:
        """Return whether the chunks of a window that is seen in both directions see keys of each other."""
        places = ((start, min(start + self.chunk, tokens)) for start in (0, self.chunk))
        return any(far_spans(self.config.pattern, start, stop, False, tokens) for start, stop in places)

    def _count(self, shape: Shape, tokens: int) -> None:
        self.read += tokens
        self.largest = max(self.largest, shape.rows * shape.tokens)
        before, _ = self._shapes.get(shape.tokens.bit_length(), (0, shape))
        self._shapes[shape.tokens.bit_length()] = before + tokens, shape
