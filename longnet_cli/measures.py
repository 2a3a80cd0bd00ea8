"""The results of scoring: sums of nats, their standard errors over documents, the loss by position and by recall."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa


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
        found, self._waiting = self._waiting, []
        if score.n_tokens:
            self.clusters.add([*(each.score.nll_sum for each in found), score.n_bytes or 0, score.n_tokens])
        keys = [each.key for each in found if each.key]
        if keys:
            self.keys = self.keys or Clusters(len(self.contexts) + 2)
            if keys[0].n_tokens:
                self.keys.add([*(key.nll_sum for key in keys), 0, keys[0].n_tokens])
        tables = [each.by_recall.table for each in found if each.by_recall]
        for row in np.flatnonzero(tables[0][:, 1]) if tables else ():
            self.recall[row].add([*(table[row, 0] for table in tables), 0, tables[0][row, 1]])

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return a dict for each context, with the keys of the machine formats."""
        return [self._as_dict(index) for index in range(len(self.contexts))]

    def _as_dict(self, index: int) -> dict[str, Any]:
        score, nats = self.scores[index], np.eye(len(self.contexts) + 2)[index]
        tables = {key: _cluster_rows(*found, 0) for key, found in self.places[index].items()}
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
