"""The forward passes that a `Reader` would run on windows, counted before any of them is computed."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from longnet_cli.attention.spans import far_spans
from longnet_cli.model.net import NetConfig
from longnet_cli.runtime.reader import batches_by_length


class Shape(NamedTuple):
    """The shape of a forward pass: rows, and tokens per row, padding included."""

    rows: int
    tokens: int


class Forwards:
    """A counter of forward passes. It takes the lengths of windows as `Reader.read` takes windows, and keeps only sums.

    `read` are the tokens of all forward passes, padding included; `wanted` are the tokens whose hidden states are
    wanted. `longest` is the longest window, `largest` the most tokens of a forward pass, and `together` the most tokens
    of windows that wait for each other.
    """

    def __init__(self, config: NetConfig, chunk: int) -> None:
        self.config, self.chunk = config, chunk
        self.read = self.wanted = self.longest = self.largest = self.together = 0
        self.twice = 0  # tokens whose keys are computed twice: of long windows, layer by layer
        self._waiting: list[int] = []
        self._tokens = 0  # that wait
        self._lengths: Counter[int] = Counter()  # of the rows of all forward passes; a long window is one row
        # by the bit length of a row's tokens: the tokens of such forward passes, and the shape of the last one
        self._shapes: dict[int, tuple[int, Shape]] = {}

    def add(self, tokens: int, wanted: int, *, alone: bool = False) -> None:
        """Count the next window; `alone` says that it shares no forward pass."""
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
        """Count the windows that wait. Call it after the last window."""
        self.together = max(self.together, self._tokens)
        for batch in batches_by_length(self._waiting, self.chunk):
            shape = Shape(len(batch), self._waiting[batch[0]])
            self._count(shape, shape.rows * shape.tokens)
            self._lengths[shape.tokens] += shape.rows
        self._waiting, self._tokens = [], 0

    @property
    def usual(self) -> Shape:
        """The shape of the forward passes that most tokens go through. Raises ValueError where there is none."""
        return max(self._shapes.values())[1]

    def flops(self, scores: bool) -> float:
        """Return the FLOPs of all forward passes, with the logits of the wanted tokens if `scores`."""
        config = self.config
        matrices = config.layer_flops() * self.read + self.twice * 6 * config.num_layers * config.dim**2
        attended = sum(rows * config.attention_flops(tokens) for tokens, rows in self._lengths.items())
        return matrices + attended + (config.vocabulary_flops() * self.wanted if scores else 0)

    def _sees_outside(self, tokens: int) -> bool:
        """Return whether the chunks of a window in a bidirectional net see keys of each other."""
        places = ((start, min(start + self.chunk, tokens)) for start in (0, self.chunk))
        return any(far_spans(self.config.pattern, start, stop, False, tokens) for start, stop in places)

    def _count(self, shape: Shape, tokens: int) -> None:
        self.read += tokens
        self.largest = max(self.largest, shape.rows * shape.tokens)
        before, _ = self._shapes.get(shape.tokens.bit_length(), (0, shape))
        self._shapes[shape.tokens.bit_length()] = before + tokens, shape
