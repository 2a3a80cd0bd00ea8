"""Training pairs: two spans of one document, or one row of two or three columns.

Order and state are those of `data.windows`.

Pair n of a run is a function of (seed, n): the document, and where in it the spans are.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from longnet_cli.data.documents import Document
from longnet_cli.data.windows import DIGEST_TOKENS, TokenStream, TokenWindows, shuffled
from longnet_cli.errors import ConfigError, DataError

SHORTEST = 16  # tokens of a span, if half of the document has as many


class PairText(NamedTuple):
    """A text as the net reads it: ids (n,) int64, of which those from index `first` on are pooled."""

    ids: np.ndarray
    first: int


class PairBatch(NamedTuple):
    """Pairs of texts. `keys` (pairs, 3) int64 are digests of the document and of both texts.

    Pairs with a key in common are not each other's negatives. Each pair may have a hard negative, a text that none of
    the first texts is to find, and its digest as a fourth key.
    """

    firsts: list[PairText]
    seconds: list[PairText]
    negatives: list[PairText]
    keys: np.ndarray

    @property
    def texts(self) -> list[PairText]:
        return [*self.firsts, *self.seconds, *self.negatives]

    def part(self, place: slice) -> "PairBatch":
        return PairBatch(self.firsts[place], self.seconds[place], self.negatives[place], self.keys[place])


class PairStream(TokenStream):
    """The documents of one source, which give a pair each.

    The pair is two spans of the document. With `others`, it is the document and the one at its place in the first of
    them; the second of them, if it is there, has the hard negatives.
    """

    def __init__(self, documents: Sequence[Document], eos_id: int, others: Sequence[Sequence[Document]] = ()) -> None:
        super().__init__(documents, eos_id)
        self.others = others
        for key, found in zip(("pair", "negative"), others, strict=False):
            if len(found) != len(documents):
                raise DataError(f"data.{key} has {len(found)} documents and data.column {len(documents)}")

    @cached_property
    def usable(self) -> np.ndarray:
        """The indices of documents that give a pair: two tokens, or a token in each column."""
        lengths = np.diff(self.starts) - 1
        if not self.others:
            return np.flatnonzero(lengths > 1)
        shortest = np.min([lengths, *(np.fromiter(map(len, found), np.int64) for found in self.others)], axis=0)
        return np.flatnonzero(shortest > 0)

    def pair(self, index: int, longest: Sequence[int], seed: Sequence[int]) -> tuple[list[np.ndarray], list[int]]:
        """Return the ids of the texts of a document, at most `longest` of each, and the keys of a `PairBatch`."""
        document = self.documents[index]
        if not self.others:
            texts = [document.read(*span) for span in draw_spans(len(document), longest[:2], seed)]
        else:
            columns = (document, *(found[index] for found in self.others))
            texts = [each.read(0, n) for each, n in zip(columns, longest, strict=False)]
        start = document.read(0, DIGEST_TOKENS)  # equal documents under two names are one
        return texts, [_key(start, len(document)), *map(_key, texts)]


class PairWindows(TokenWindows):
    """Endless batches of pairs of texts. A text has at most `seq_len` ids, with those of `before` that it starts with.

    An epoch of a source takes each of its documents once.
    """

    def __init__(self, *args: object, before: tuple[Sequence[int], Sequence[int]], **options: object) -> None:
        """`before` are the ids before first and second texts, of which only the first id is not pooled.

        Raises ConfigError if they leave no room for a text.
        """
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.before = [np.asarray(ids, np.int64) for ids in (*before, before[1])]  # a negative is a second text
        self.longest = [self.seq_len - len(ids) for ids in before]
        if min(self.longest) < 1:
            raise ConfigError(f"a text of {self.seq_len} tokens has no room after the tokens that it starts with")

    def batch(self, numbers: Sequence[int]) -> PairBatch:  # type: ignore[override]
        """Return these pairs of the run."""
        texts, keys = [], []
        for n in numbers:
            source, _, start = self.locate(n)
            stream = self.sources[source]
            assert isinstance(stream, PairStream)
            found, key = stream.pair(stream.locate(start), self.longest, (self.seed, n))
            texts.append(
                [PairText(np.concatenate(x), min(1, len(x[0]))) for x in zip(self.before, found, strict=False)]
            )
            keys.append(key)
        sides = [[*side] for side in zip(*texts, strict=True)]
        return PairBatch(sides[0], sides[1], sides[2] if len(sides) > 2 else [], np.array(keys, np.int64))

    def _check(self, stream: TokenStream, name: str) -> None:
        assert isinstance(stream, PairStream)
        if not len(stream.usable):
            raise DataError(f"{name} has no document that gives a pair: two tokens, or a token in each column")

    def _epoch(self, source: int, epoch: int) -> "_PairEpoch":  # type: ignore[override]
        stream = self.sources[source]
        assert isinstance(stream, PairStream)
        return _PairEpoch((self.seed, source, epoch), stream)


class _PairEpoch:
    """The documents of one source in one epoch: where they start, in the order they are visited."""

    def __init__(self, key: tuple[int, int, int], stream: PairStream) -> None:
        self.key, self.windows = key, len(stream.usable)
        bits = np.random.PCG64(np.random.SeedSequence(key[0], spawn_key=key[1:]))
        self.starts = stream.starts[stream.usable[shuffled(bits, self.windows)]]

    def start(self, position: int) -> int:
        return int(self.starts[position])


def draw_spans(tokens: int, longest: Sequence[int], seed: Sequence[int]) -> list[tuple[int, int]]:
    """Return two separate spans (start, stop) of a document of `tokens` (two or more), each at most as `longest` says.

    Lengths are even in their logarithm, from SHORTEST to half of the document. Either span may come first.
    """
    chances = (np.random.PCG64(np.random.SeedSequence(seed)).random_raw(5) >> np.uint64(11)) * 2.0**-53
    sizes = []
    for chance, most in zip(chances[:2], longest, strict=True):
        most = min(most, tokens // 2)
        least = min(SHORTEST, most)
        sizes.append(min(most, int(least * ((most + 1) / least) ** chance)))
    low, high = sorted(int(chance * (tokens - sum(sizes) + 1)) for chance in chances[2:4])
    swap = bool(chances[4] < 0.5)
    one, other = reversed(sizes) if swap else sizes
    spans = [(low, low + one), (high + one, high + one + other)]
    return spans[::-1] if swap else spans


def _key(ids: np.ndarray, more: int = 0) -> int:
    found = hashlib.blake2b(np.ascontiguousarray(ids, np.int64).tobytes(), digest_size=8, salt=more.to_bytes(8, "big"))
    return int.from_bytes(found.digest(), "big", signed=True)
