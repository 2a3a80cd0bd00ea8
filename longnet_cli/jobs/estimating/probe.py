"""Samples that an estimate is made from: a few texts that are tokenized, and short reads of a net on this machine.

    texts --Sample.add--> bytes of each, and tokens of some --tokens_per_byte--> tokens of all

Every text is read, which is fast, and its UTF-8 bytes are counted. Only a uniform sample of the texts is tokenized.
The estimate is the bytes of all texts, times the tokens per byte of the sample. This ratio estimate is close where
documents differ in length but are alike in tokens per byte.

A probe reads as a job would, and its time and memory are measured.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Sequence

import numpy as np
import torch

from longnet_cli.attention.cache import cached_rows
from longnet_cli.attention.spans import lanes, segment_rows
from longnet_cli.data.tables import Text
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.jobs.estimating.estimate import Extent, PlanSums, Shape
from longnet_cli.nets.config import NetConfig
from longnet_cli.nets.net import Net
from longnet_cli.running.device import PeakMemory, precision, resident_memory, resolve_dtype
from longnet_cli.running.ranks.ranks import Ranks
from longnet_cli.running.reader import Reader, Window

SEED = 0  # every run draws the same documents
NORMAL = 1.96  # standard errors to either side: 95 % of a normal distribution


class Sample:
    """A uniform sample of `size` texts, drawn while they go by (Vitter's algorithm R, in size * ln(texts) steps).

    `bytes` has the size of each text so far, in 8 bytes of memory per text. `seconds` is the time spent tokenizing.
    """

    def __init__(self, size: int, tokenizer: Tokenizer) -> None:
        self.size, self.tokenizer = size, tokenizer
        self.bytes = array("q")
        self._drawn: list[tuple[int, int]] = []  # tokens and bytes of each text in the sample
        self.seconds = 0.0
        self._tokenized = 0  # bytes
        self._random = np.random.default_rng(SEED)

    def add(self, text: Text) -> None:
        """Count the next text, and tokenize it if it is drawn."""
        place = len(self.bytes) if len(self.bytes) < self.size else int(self._random.integers(len(self.bytes) + 1))
        if place < self.size:
            tokens, size, begin = 0, 0, time.perf_counter()
            for ids, n_bytes, _ in self.tokenizer.encode_long(text.parts):
                tokens, size = tokens + len(ids), size + n_bytes
            self._drawn[place : place + 1] = [(tokens, size)]
            self._tokenized += size
            self.seconds += time.perf_counter() - begin
        else:
            size = sum(len(part.encode()) for part in text.parts)
        self.bytes.append(size)

    @property
    def sampled(self) -> int:
        return min(self.size, len(self.bytes))

    @property
    def tokens_per_byte(self) -> float:
        tokens, size = (sum(each) for each in zip(*self._drawn, strict=True)) if self._drawn else (0, 0)
        return float(tokens / size) if size else 0.0

    @property
    def seconds_of_all(self) -> float:
        """The time that tokenizing all texts would take, in seconds."""
        return self.seconds * sum(self.bytes) / (self._tokenized or 1)

    @property
    def error(self) -> float:
        """Half the width of the 95 % interval around the tokens of all texts; 0 where all are in the sample.

        It comes from the linearised standard error of a ratio, for a sample without replacement (Cochran, Sampling
        Techniques). Each residual is relative to the ratio of the other texts, as in a jackknife, because a long text
        pulls the ratio towards itself. A normal distribution is assumed, which suits samples of 30 and more. The
        interval is too narrow where a few texts hold most of the bytes, and infinite where one holds all.
        """
        number, texts = self.sampled, len(self.bytes)
        if number == texts:
            return 0.0
        tokens, size = np.array(self._drawn, float).T
        shares = size / (size.sum() or 1)
        if shares.max() == 1:
            return math.inf
        residuals = (tokens - self.tokens_per_byte * size) / (1 - shares)
        spread = float(residuals @ residuals) * (1 - number / texts)
        return NORMAL * math.sqrt(spread) / float(size.sum() or 1) * sum(self.bytes)


SECONDS = 0.5  # that a forward pass takes, or repetitions of a read
WARM_UP = 64  # tokens of a read before the first measurement
FIRST_TOKENS = 256  # of a forward pass of the first read; later ones grow until they take that long
STEPS = 3  # forward passes of a read: the process grows in the first ones, which leave memory of other sizes behind


class _Noise:
    """Random ids, or vectors of zeros, as `net` reads them."""

    def __init__(self, net: Net) -> None:
        self.net = net

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.net.inputs_like((1, stop - start))[0].cpu().numpy()


class Probe:
    """A `Reader` of random ids, or of vectors of zeros, that computes their logits if the job `scores`.

    `before` has the bytes of the process before the first measurement, when torch and its libraries are loaded,
    `weights` those of the net.
    """

    def __init__(self, net: Net, scores: bool, dtype: str) -> None:
        self.net, self.scores, self.dtype = net, scores, dtype
        self.device = next(net.parameters()).device
        self.weights = sum(x.numel() * x.element_size() for x in (*net.parameters(), *net.buffers()))
        self.wide = 8 if resolve_dtype(dtype, self.device) == "fp32" else 10  # logits and logarithms; 16-bit logits
        warm_up = min(WARM_UP, net.config.max_tokens or WARM_UP)
        self._read([warm_up], warm_up, scores)
        self.before = resident_memory(self.device)
        self.tokens = self.elements = 0  # of the last read: of its largest forward pass, and of their logits
        self.activations = self.logits = 0  # bytes by which it made the process grow, without what it keeps
        self.far = 0  # of the activations, those for keys outside a chunk

    def measure(self, usual: Shape, longest: int, room: float) -> tuple[float, Shape]:
        """Measure a read; return its FLOP/s and the shape of its forward passes, at most the `usual` one.

        The read has `STEPS` forward passes of the shape that `_grown` finds or, if `longest` exceeds the usual tokens,
        a window of as many chunks; where they are slow, only one, with its logits. `room` is in bytes.
        """
        shape, rate, seconds = self._grown(usual, room)
        steps = STEPS if seconds < 4 * SECONDS else 1
        if steps == 1 and not self.scores:
            return rate, shape
        chunk, of_one = shape.rows * shape.tokens, self.activations
        in_chunks = steps > 1 and longest > usual.tokens
        lengths = [min(longest, steps * chunk)] if in_chunks else [shape.tokens] * steps * shape.rows
        rate, _ = self._measure(lengths, chunk, SECONDS, self.scores)
        self.far = max(0, self.activations - of_one) if in_chunks else 0
        return rate, shape

    def _grown(self, usual: Shape, room: float) -> tuple[Shape, float, float]:
        """Read forward passes of ever more tokens, until one is `usual`, takes `SECONDS`, or needs much of the `room`.

        Return its shape, FLOP/s and seconds.
        """
        most, tokens = usual.rows * usual.tokens, FIRST_TOKENS
        while True:
            tokens = min(tokens, most)
            shape = Shape(max(1, tokens // usual.tokens), min(tokens, usual.tokens))
            rate, seconds = self._measure([shape.tokens] * shape.rows, shape.rows * shape.tokens, 0.0, False)
            if tokens == most or seconds >= SECONDS or 4 * self.activations > room:
                return shape, rate, seconds
            tokens *= 2 if seconds > SECONDS / 8 else 4

    def _measure(self, lengths: Sequence[int], chunk: int, least: float, scores: bool) -> tuple[float, float]:
        """Read windows of these lengths for `least` seconds or longer; return the FLOP/s and the seconds of one read.

        The first read, without logits, shows what the activations take: its peak, without what the process had before
        and what is kept between forward passes. Where the system tells no peak, they are counted.
        """
        sums = PlanSums(self.net, chunk)
        sums.add(Extent(length, length) for length in lengths)
        self.tokens, self.elements = sums.tokens_at_once(chunk), sums.logits_at_once(chunk)
        peak_of_layers = self._read(lengths, chunk, False) if scores else 0
        begin = time.perf_counter()
        peak, times = max(peak_of_layers, self._read(lengths, chunk, scores)), 1
        while time.perf_counter() < begin + least:
            self._read(lengths, chunk, scores)
            times += 1
        seconds = (time.perf_counter() - begin) / times
        kept = sums.kept_bytes(chunk, self.dtype, False, Ranks())
        if "cache" in kept and not self.net.stream():
            kept["cache"] = round(kept["cache"] * _written_share(self.net.config, sums.longest))
        peak_of_layers = peak_of_layers or peak
        self.activations = max(0, peak_of_layers - self.before - sum(kept.values()))
        self.logits = peak - peak_of_layers
        if not peak:
            self.activations, self.logits = self.net.config.forward_bytes(self.tokens), self.wide * self.elements
        return sums.flops(scores) / seconds, seconds

    def bytes(self, tokens: int, elements: int) -> dict[str, int]:
        """Return the bytes of a forward pass of so many tokens, and those that so many `elements` of logits add.

        Of the keys outside it, a longer chunk sees no more if the pattern is a window, and in proportion if it is
        dense. Most patterns lie between: the root does, too.
        """
        part = tokens / self.tokens
        kinds = {"activations": round((self.activations - self.far) * part + self.far * part**0.5)}
        logits = min(self.logits / self.elements, self.wide) if self.scores else 0
        return kinds | {"logits": round(logits * elements)}

    @torch.inference_mode()
    def _read(self, lengths: Sequence[int], chunk: int, scores: bool) -> int:
        """Read windows of these lengths, with their logits if `scores`. Return the peak of memory."""
        windows = [Window(_Noise(self.net), 0, length, 0) for length in lengths]
        with PeakMemory(self.device) as peak:
            for pieces in Reader(self.net, chunk=chunk, dtype=self.dtype).read(windows):
                if scores:
                    hidden = torch.cat([piece.hidden for piece in pieces if piece.hidden is not None])
                    with precision(self.dtype, self.device):
                        self.net.nll(hidden, torch.zeros(len(hidden), dtype=torch.int64, device=self.device))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        return peak.bytes or 0


def _written_share(config: NetConfig, tokens: int) -> float:
    """Return the share of a cache's rows that so many tokens have written: the others take no memory so far."""
    pattern, heads, kv_heads = config.pattern, config.num_heads, config.kv_heads
    rows = pattern.sinks * kv_heads
    for level, ((_, r), back) in enumerate(zip(pattern.levels, pattern.look_backs, strict=True)):
        of_lane = min((1 + back) * segment_rows(pattern, level, tokens), -(-tokens // r))
        rows += of_lane * len(lanes(pattern, level, heads, kv_heads).offsets)
    return rows / cached_rows(pattern, heads, kv_heads, tokens)
