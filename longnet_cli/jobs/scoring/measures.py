"""The results of scoring: sums of nats, their standard errors over documents, the loss by position and by recall.

The gain of a document is how many nats per token its longest context saves over its shortest one. The recall distance
of a token is the number of tokens since the document last had the same bigram:

    ids        a  b  c  a  b  b  c
    bigram        ab bc ca ab bb bc
    distance      -  -  -  3  -  4      tokens since the same bigram; - where there was none
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from longnet_cli.data.documents import SPOOL_BYTES
from longnet_cli.data.files import no_place
from longnet_cli.nets.net import Readable


@dataclass(frozen=True)
class Score:
    """The cost of some tokens: `nll_sum` in nats over `n_tokens` scored tokens, which stand for `n_bytes` of UTF-8.

    `n_bytes` is None if it is unknown. Scores can be added.
    """

    nll_sum: float
    n_tokens: int
    n_bytes: int | None

    @property
    def ppl(self) -> float | None:
        """Perplexity, exp(nats per token); None without tokens, or past what a float holds."""
        try:
            return math.exp(self.nll_sum / self.n_tokens)
        except (ZeroDivisionError, OverflowError):
            return None

    @property
    def bpb(self) -> float | None:
        """Bits per byte of text: unlike perplexity, it compares models with different tokenizers."""
        return self.nll_sum / math.log(2) / self.n_bytes if self.n_bytes else None

    def __add__(self, other: Score) -> Score:
        known = self.n_bytes is not None and other.n_bytes is not None
        n_bytes = self.n_bytes + other.n_bytes if known else None  # type: ignore[operator]
        return Score(self.nll_sum + other.nll_sum, self.n_tokens + other.n_tokens, n_bytes)

    def as_dict(self) -> dict[str, float | int | None]:
        """Return a dict with the keys of the machine formats."""
        return {**asdict(self), "ppl": self.ppl, "bpb": self.bpb}


Range = tuple[int | None, int | None]  # the first and the last number of a range
Row = dict[str, float | int | None]
POWERS: Sequence[Range] = [(2**b, 2 ** (b + 1) - 1) for b in range(64)]


@dataclass
class ByPosition:
    """Nats and tokens of targets, by the number of tokens seen and by the place in the shortest segment.

    A target whose input is the i-th of its window (from 0) has seen i + 1 tokens, and its place is i mod `segment`.
    `seen` has one row for each of 1, 2..3, 4..7, ... tokens, and `inside` one row for each of eight equal parts of the
    segment. Both are (rows, 2) float64: nats and tokens.
    """

    segment: int
    seen: np.ndarray = field(default_factory=lambda: np.zeros((64, 2)))
    inside: np.ndarray = field(default_factory=lambda: np.zeros((8, 2)))

    def add(self, first: int, nll: np.ndarray) -> None:
        """Add the (n,) nats of targets whose inputs are the positions first, first + 1, ... of a window."""
        i = np.arange(first, first + len(nll))
        places = (np.frexp(i + 1.0)[1] - 1, i % self.segment * 8 // self.segment)  # frexp: exact floor of log2
        for table, place in zip((self.seen, self.inside), places, strict=True):
            table[:, 0] += np.bincount(place, nll, len(table))
            table[:, 1] += np.bincount(place, minlength=len(table))

    def tables(self) -> dict[str, tuple[np.ndarray, Sequence[Range]]]:
        """Return both tables, each with the ranges of its rows, by their keys in the machine formats."""
        starts = [-(-part * self.segment // 8) for part in range(9)]
        inside = [(a, b - 1) for a, b in pairwise(starts)]
        return {"by_position": (self.seen, POWERS), "by_segment_position": (self.inside, inside)}

    def as_dict(self) -> dict[str, list[Row]]:
        """Return a dict for the machine formats: the first, last, count and mean nats of each range with tokens."""
        return {key: _rows(table, ranges) for key, (table, ranges) in self.tables().items()}


@dataclass
class ByRecall:
    """Nats and tokens of targets, by how many tokens ago the document last had the same bigram (two tokens in a row).

    `table` is (rows, 2) float64, nats and tokens: one row for tokens whose bigram is new, then one row for each of the
    distances 1, 2..3, 4..7, ... tokens.
    """

    RANGES: ClassVar[Sequence[Range]] = [(None, None), *POWERS]
    table: np.ndarray = field(default_factory=lambda: np.zeros((len(ByRecall.RANGES), 2)))

    def add(self, distances: np.ndarray, nll: np.ndarray) -> None:
        """Add the (n,) nats of tokens whose bigrams were last seen `distances` (n,) tokens ago, 0 for never."""
        row = np.frexp(distances.astype(float))[1]  # 0 for 0, otherwise 1 + the exact floor of log2
        self.table[:, 0] += np.bincount(row, nll, len(self.table))
        self.table[:, 1] += np.bincount(row, minlength=len(self.table))

    def as_dict(self) -> dict[str, list[Row]]:
        """Return a dict for the machine formats, with rows as in `ByPosition`; new bigrams are from None to None."""
        return {"by_recall": _rows(self.table, self.RANGES)}


def _rows(table: np.ndarray, ranges: Sequence[Range]) -> list[Row]:
    return [
        {"from": first, "to": last, "n_tokens": int(count), "nll": float(nats / count)}
        for (first, last), (nats, count) in zip(ranges, table, strict=True)
        if count
    ]


class Gain(NamedTuple):
    """The gain of a document from the longest of several contexts over the shortest one. All are None without tokens.

    `gain` is the nats per token at the shortest context minus the nats at the longest, `gain_se` its standard error
    over blocks of 128 tokens (None for fewer than two blocks), `gain_share` the share of tokens that gain more than 2
    nats.
    """

    gain: float | None
    gain_se: float | None
    gain_share: float | None


@dataclass(frozen=True)
class DocumentScore:
    """The score of one document. `where` is its file and row, `context` the context of the scoring (None: all).

    `key` is the score of its key tokens, if a judge has named them.

    Of a document that is scored at several contexts, the score at the longest one has the `gain`.
    """

    doc_id: str
    where: str
    score: Score
    context: int | None = None
    by_position: ByPosition | None = None
    by_recall: ByRecall | None = None
    gain: Gain | None = None
    kept: Mapping[str, pa.Scalar] = field(default_factory=dict)  # columns that are carried to the output
    key: Score | None = None


class Clusters:
    """The sums of some quantities over documents, and the standard errors of their ratios.

    Tokens of one document are correlated, so a standard error that takes tokens as independent is too small. Documents
    are taken as independent instead. For D documents of nats x and tokens or bytes y, the ratio R = sum x / sum y has
    the standard error sqrt(D / (D - 1) * sum (x - R y)^2) / sum y, linearised for a ratio over clusters (Cochran,
    Sampling Techniques). It is None for fewer than two documents.
    """

    def __init__(self, size: int) -> None:
        self.documents = 0
        self.sums, self.spread = np.zeros(size), np.zeros((size, size))  # spread: products of deviations from the mean

    def add(self, values: Sequence[float]) -> None:
        """Add the (size,) quantities of the next document."""
        self.extend(np.array([values], float))

    def extend(self, values: np.ndarray) -> None:
        """Add the (documents, size) float64 quantities of the next documents (Chan, Golub and LeVeque's update)."""
        if not len(values):
            return
        before, mean = self.documents, values.mean(0)
        shift, inside = mean - self.sums / max(1, before), values - mean
        self.documents += len(values)
        self.sums += values.sum(0)
        self.spread += inside.T @ inside + np.outer(shift, shift) * (before * len(values) / self.documents)

    def error(self, numerator: np.ndarray, denominator: int) -> float | None:
        """Return the standard error of sum x / sum y.

        x is the linear combination of the quantities with weights `numerator` (size,), y is quantity `denominator`.
        """
        if self.documents < 2 or not self.sums[denominator]:
            return None
        residual = numerator.copy()
        residual[denominator] -= numerator @ self.sums / self.sums[denominator]
        squares = max(0.0, float(residual @ self.spread @ residual))
        return math.sqrt(squares * self.documents / (self.documents - 1)) / float(self.sums[denominator])


BYTES, TOKENS = -2, -1  # indices among a document's quantities, after the nats at each context


class Total:
    """The sum over documents that were scored once for each of `contexts`, with standard errors (see `Clusters`).

    The standard error of ppl = exp R is ppl times the standard error of R. Contexts are compared document by document:
    the ratio of a context's ppl to the first context's has a much smaller standard error than either ppl. The rows of
    `by_recall` are compared in the same way, each over the documents that have tokens in it. Rows by position are not
    compared, because at each context they hold other tokens.
    """

    def __init__(self, contexts: Sequence[int | None]) -> None:
        self.contexts = list(contexts)
        self.scores = [Score(0.0, 0, 0) for _ in contexts]
        self.places: list[dict[str, tuple[Sequence[Range], list[Clusters]]]] = [{} for _ in contexts]  # by position
        self.clusters = Clusters(len(self.contexts) + 2)  # of documents that have tokens
        self.recall = [Clusters(len(self.contexts) + 2) for _ in ByRecall.RANGES]
        self.keys: Clusters | None = None  # of documents that have key tokens
        self._waiting: list[DocumentScore] = []

    def add(self, document: DocumentScore) -> None:
        """Add the next result of `score`. Each document has one result for each context, in turn."""
        index, score = len(self._waiting), document.score
        self.scores[index] += score
        for key, (table, ranges) in (document.by_position.tables() if document.by_position else {}).items():
            _, clusters = self.places[index].setdefault(key, (ranges, [Clusters(2) for _ in ranges]))
            for row in np.flatnonzero(table[:, 1]):
                clusters[row].add(table[row])
        self._waiting.append(document)
        if len(self._waiting) < len(self.contexts):
            return
        at_all_contexts, self._waiting = self._waiting, []
        if score.n_tokens:
            self.clusters.add([*(each.score.nll_sum for each in at_all_contexts), score.n_bytes or 0, score.n_tokens])
        keys = [each.key for each in at_all_contexts if each.key]
        if keys:
            self.keys = self.keys or Clusters(len(self.contexts) + 2)
            if keys[0].n_tokens:
                self.keys.add([*(key.nll_sum for key in keys), 0, keys[0].n_tokens])
        tables = [each.by_recall.table for each in at_all_contexts if each.by_recall]
        for row in np.flatnonzero(tables[0][:, 1]) if tables else ():
            self.recall[row].add([*(table[row, 0] for table in tables), 0, tables[0][row, 1]])

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return a dict for each context, with the keys of the machine formats."""
        return [self._as_dict(index) for index in range(len(self.contexts))]

    def _as_dict(self, index: int) -> dict[str, Any]:
        score, nats = self.scores[index], np.eye(len(self.contexts) + 2)[index]
        tables = {key: _cluster_rows(*of_key, 0) for key, of_key in self.places[index].items()}
        if any(row.documents for row in self.recall):
            compare = partial(self._compare, index=index)
            tables["by_recall"] = _cluster_rows(ByRecall.RANGES, self.recall, index, compare)
        return {
            **score.as_dict(),
            "context": self.contexts[index],
            "n_docs": self.clusters.documents,
            "ppl_se": _times(score.ppl, self.clusters.error(nats, TOKENS)),
            "bpb_se": None if score.bpb is None else _times(1 / math.log(2), self.clusters.error(nats, BYTES)),
            **self._compare(self.clusters, index),
            **tables,
            **({"key_tokens": self._of_keys(self.keys, index)} if self.keys else {}),
        }

    def _of_keys(self, keys: Clusters, index: int) -> dict[str, float | int | None]:
        """Return the perplexity of key tokens at a context, and their share of all tokens."""
        score = Score(float(keys.sums[index]), int(keys.sums[TOKENS]), None)
        return {
            "n_tokens": score.n_tokens,
            "share": score.n_tokens / max(1, self.scores[index].n_tokens),
            "n_docs": keys.documents,
            "ppl": score.ppl,
            "ppl_se": _times(score.ppl, keys.error(np.eye(len(keys.sums))[index], TOKENS)),
            **self._compare(keys, index),
        }

    def _compare(self, clusters: Clusters, index: int) -> dict[str, float | None]:
        """Return the ratio of ppl at a context to ppl at the first context, which itself has no ratio."""
        if not index:
            return {}
        nats = np.eye(len(clusters.sums))[index] - np.eye(len(clusters.sums))[0]
        ratio = Score(float(nats @ clusters.sums), int(clusters.sums[TOKENS]), None).ppl
        return {"ppl_ratio": ratio, "ppl_ratio_se": _times(ratio, clusters.error(nats, TOKENS))}


def _cluster_rows(
    ranges: Sequence[Range],
    rows: Sequence[Clusters],
    index: int,
    more: Callable[[Clusters], dict[str, float | None]] = lambda row: {},
) -> list[Row]:
    """Return the rows that have tokens, with documents and standard errors. Nats are the quantity `index` of a row."""
    return [
        {
            "from": first,
            "to": last,
            "n_tokens": int(row.sums[TOKENS]),
            "n_docs": row.documents,
            "nll": float(row.sums[index] / row.sums[TOKENS]),
            "nll_se": row.error(np.eye(len(row.sums))[index], TOKENS),
            **more(row),
        }
        for (first, last), row in zip(ranges, rows, strict=True)
        if row.documents
    ]


def _times(factor: float | None, error: float | None) -> float | None:
    return None if factor is None or error is None else factor * error


GAIN_BLOCK = 128  # neighbouring tokens gain together; blocks are taken as independent
MANY_NATS = 2.0  # a token that gains this much is exp(2), about 7, times as likely


class GainTally:
    """The gain of one document that is scored at each of several `contexts`, in turn.

    The nats at the shortest or the longest context, whichever comes first, are kept: 4 bytes per token, in a file in
    $TMPDIR if they are many. `tokens` is the number of tokens that have been compared.
    """

    def __init__(self, contexts: Sequence[int]) -> None:
        self.longest = max(contexts)
        self._ends = sorted((min(contexts), self.longest), key=contexts.index)  # in the order in which they come
        self._kept: Any = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 (float32 nats, closed at the end)
        self._open = np.empty(0)  # gains in the block that is not full yet
        self._blocks = Clusters(2)  # of each, the sum of gains and the number of tokens
        self._many = self.tokens = 0

    def add(self, context: int, nats: np.ndarray) -> None:
        """Take the next (n,) float32 nats at a context. Raises LongNetError if the disk is full."""
        if context == self._ends[0]:
            try:
                self._kept.write(nats.tobytes())
            except OSError as error:
                raise no_place(error) from error
        elif context == self._ends[1] and len(nats):
            self._kept.seek(nats.itemsize * self.tokens)
            saved = np.frombuffer(self._kept.read(nats.nbytes), np.float32).astype(np.float64) - nats
            self._compare(saved if context == self.longest else -saved)

    def result(self) -> Gain:
        """Return the gain. Call it when all tokens have been compared."""
        self._kept.close()
        if not self.tokens:
            return Gain(None, None, None)
        if len(self._open):
            self._end_blocks(self._open[None])
        total, tokens = self._blocks.sums
        return Gain(float(total / tokens), self._blocks.error(np.array([1.0, 0.0]), 1), self._many / float(tokens))

    def _compare(self, gained: np.ndarray) -> None:
        """Add the gains of the next (n,) tokens."""
        self.tokens += len(gained)
        self._many += int(np.count_nonzero(gained > MANY_NATS))
        gained = np.concatenate((self._open, gained))
        whole = len(gained) // GAIN_BLOCK * GAIN_BLOCK
        self._end_blocks(gained[:whole].reshape(-1, GAIN_BLOCK))
        self._open = gained[whole:]

    def _end_blocks(self, gained: np.ndarray) -> None:
        """Add full blocks of gains, (blocks, tokens per block)."""
        self._blocks.extend(np.stack((gained.sum(1), np.full(len(gained), float(gained.shape[1]))), axis=1))


BLOCK = 1 << 18  # bigrams sorted together: 2 MB of keys stay in the cache


class Bigrams:
    """The distinct bigrams of a sequence as far as it has been read, each with the place where it was last seen.

    A bigram is the key `before << 32 | id`. Sorted tables hold the distinct keys and their last places, 16 bytes per
    key, and each key is in one table. New keys make a new table. A table less than twice as long as the next is merged
    with it, so there are few tables, a key is copied a logarithmic number of times, and a sequence of n ids takes
    O(n log^2 n). Memory is 16 bytes per distinct bigram, twice that while the longest tables are merged, plus a block.
    """

    def __init__(self, ids: Readable) -> None:
        self.ids, self.end = ids, 1  # the bigrams that end before `end` were read; the first id ends none
        self.tables: list[tuple[np.ndarray, np.ndarray]] = []  # (keys, ascending; places), both (distinct,) int64

    def distances(self, start: int, stop: int) -> np.ndarray:
        """Return, for each of the ids [start, stop), how many ids ago its bigram was last seen, 0 if never.

        The bigram of an id ends at it. The result is (stop - start,) int64, and 1 <= start <= stop. All ids before
        `start` count as seen; unread ones are read now. `start` must not be less than the `stop` of the previous call.
        """
        while self.end < start:
            self._read(min(self.end + BLOCK, start))
        parts = [np.empty(0, np.int64)]
        while self.end < stop:
            parts.append(self._read(min(self.end + BLOCK, stop)))
        return np.concatenate(parts)

    def _read(self, stop: int) -> np.ndarray:
        """Read the bigrams that end in [self.end, stop), at least one, and return their distances."""
        ids = self.ids.read(self.end - 1, stop)
        keys = ids[:-1] << 32 | ids[1:]
        order = np.argsort(keys, kind="stable")  # the places of a bigram are then neighbours, in ascending order
        keys, places = keys[order], self.end + order
        first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))  # the first of each bigram
        before = np.concatenate(([-1], places[:-1]))
        before[first] = self._replace(keys[first], places[np.append(first[1:], len(keys)) - 1])
        distances = np.empty_like(places)
        distances[order] = np.where(before < 0, 0, places - before)
        self.end = stop
        return distances

    def _replace(self, keys: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Store the new places of distinct, ascending keys; return their old places, -1 for new keys."""
        before = np.full(len(keys), -1)
        new = np.arange(len(keys))
        for known, last in self.tables:
            at = np.minimum(known.searchsorted(keys[new]), len(known) - 1)
            hit = known[at] == keys[new]
            before[new[hit]] = last[at[hit]]
            last[at[hit]] = places[new[hit]]
            new = new[~hit]
        if len(new):
            self.tables.append((keys[new], places[new]))
        while len(self.tables) > 1 and len(self.tables[-2][0]) < 2 * len(self.tables[-1][0]):
            more, their = self.tables.pop()
            known, last = self.tables.pop()
            at = known.searchsorted(more)
            self.tables.append((np.insert(known, at, more), np.insert(last, at, their)))
        return before
