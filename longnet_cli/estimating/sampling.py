"""An estimate of the tokens in many texts, with an interval, from a uniform sample that is tokenized.

    texts --Sample.add--> bytes of each, and tokens of some --tokens_per_byte--> tokens of all

Every text is read, which is fast, and its UTF-8 bytes are counted. Only a uniform sample of the texts is tokenized.
The estimate is the bytes of all texts, times the tokens per byte of the sample. This ratio estimate is close where
documents differ in length but are alike in tokens per byte.
"""

from __future__ import annotations

import math
import time
from array import array

import numpy as np

from longnet_cli.data.tables import Text
from longnet_cli.data.tokenizer import Tokenizer

SEED = 0  # every run draws the same documents
NORMAL = 1.96  # standard errors to either side: 95 % of a normal distribution


class Sample:
    """A uniform sample of `size` texts, drawn while they go by (Vitter's algorithm R, in size * ln(texts) steps).

    `bytes` has the size of each text so far, in 8 bytes of memory per text. `seconds` is the time spent tokenizing.
    """

    def __init__(self, size: int, tokenizer: Tokenizer) -> None:
        self.size, self.tokenizer = size, tokenizer
        self.bytes = array("q")
        self._found = np.zeros((size, 2))  # tokens and bytes of each text in the sample
        self.seconds = 0.0
        self._tokenized = 0  # bytes
        self._random = np.random.default_rng(SEED)

    def add(self, text: Text) -> None:
        """Count the next text, and tokenize it if it is drawn."""
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
        """Half the width of the 95 % interval around the tokens of all texts; 0 where all are in the sample.

        It comes from the linearised standard error of a ratio, for a sample without replacement (Cochran, Sampling
        Techniques). Each residual is relative to the ratio of the other texts, as in a jackknife, because a long text
        pulls the ratio towards itself. A normal distribution is assumed, which suits samples of 30 and more. The
        interval is too narrow where a few texts hold most of the bytes, and infinite where one holds all.
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
