"""The tokens of texts of which a few are tokenized: an estimate with an interval, out of a uniform sample.

    texts --Sample.add--> bytes of each, and tokens of some --tokens--> tokens of all

Every text is read, which is fast, and its UTF-8 bytes are counted. Of a uniform sample of them the tokens are counted,
too. The tokens of all are the bytes of all, times tokens per byte of the sample: a ratio estimate, which is close where
documents differ in length and are alike in tokens per byte.
"""

from __future__ import annotations

import math
import time
from array import array

import numpy as np

from longnet_cli.data.tables import Text
from longnet_cli.data.tokenizer import Tokenizer

SEED = 0  # the same documents whenever it is asked
NORMAL = 1.96  # standard errors to either side: 95 % of a normal distribution


class Sample:
    """A uniform sample of `size` texts, drawn while they go by (Vitter's algorithm R, in size * ln(texts) steps).

    `bytes` are those of each text that has come, 8 bytes of memory a text. `seconds` is what tokenizing took.
    """

    def __init__(self, size: int, tokenizer: Tokenizer) -> None:
        self.size, self.tokenizer = size, tokenizer
        self.bytes = array("q")
        self._found = np.zeros((size, 2))  # tokens and bytes of those in the sample
        self.seconds = 0.0
        self._tokenized = 0  # bytes
        self._random = np.random.default_rng(SEED)

    def add(self, text: Text) -> None:
        """Take the next text."""
        place = len(self.bytes) if len(self.bytes) < self.size else int(self._random.integers(len(self.bytes) + 1))
        if place < self.size:
            tokens, size, begin = 0, 0, time.perf_counter()
            for ids, n_bytes in self.tokenizer.encode_long(text.parts):
                tokens, size = tokens + len(ids), size + n_bytes
            self._found[place] = tokens, size
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
        tokens, size = self._found[: self.sampled].sum(0)
        return float(tokens / size) if size else 0.0

    @property
    def seconds_of_all(self) -> float:
        """The time that tokenizing all texts would take, in seconds."""
        return self.seconds * sum(self.bytes) / (self._tokenized or 1)

    @property
    def error(self) -> float:
        """Half of the 95 % interval around the tokens of all texts; 0 where all are in the sample.

        The linearised standard error of a ratio, for a sample without replacement (Cochran, Sampling Techniques). Each
        residual counts as it is to the ratio of the others, as in a jackknife, since long texts draw the ratio to
        themselves. A normal distribution is assumed: for samples of 30 and more, and too narrow where a few texts hold
        most of the bytes. Infinite where one holds all.
        """
        number, texts = self.sampled, len(self.bytes)
        if number == texts:
            return 0.0
        tokens, size = self._found[:number].T
        shares = size / (size.sum() or 1)
        if shares.max() == 1:
            return math.inf
        residuals = (tokens - self.tokens_per_byte * size) / (1 - shares)
        spread = float(residuals @ residuals) * (1 - number / texts)
        return NORMAL * math.sqrt(spread) / float(size.sum() or 1) * sum(self.bytes)
