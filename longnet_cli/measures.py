"""What scoring reports: sums of nats, their standard errors over documents, and the loss by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Score:
    """What some tokens cost: `nll_sum` in nats, over `n_tokens` scored tokens, which stand for `n_bytes` of UTF-8.

    `n_bytes` is None where it is unknown. Scores add up.
    """

    nll_sum: float
    n_tokens: int
    n_bytes: int | None

    @property
    def ppl(self) -> float | None:
        """Perplexity, exp(nats a token); None without tokens, or past what a float holds."""
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
        """The keys of the machine formats."""
        return {**asdict(self), "ppl": self.ppl, "bpb": self.bpb}


@dataclass
class ByPosition:
    """Nats and tokens by how much a prediction was made from, and by its place in the segments of the first level.

    A target whose input is the i-th of its window (from 0) has seen i + 1 tokens, and lies at i mod `segment`. `seen`
    has a row for 1, 2..3, 4..7, ... tokens; `inside` one for each of eight equal parts of the segment: (rows, 2)
    float64, nats and tokens.
    """

    segment: int
    seen: np.ndarray = field(default_factory=lambda: np.zeros((64, 2)))
    inside: np.ndarray = field(default_factory=lambda: np.zeros((8, 2)))

    def add(self, first: int, nll: np.ndarray) -> None:
        """Count the (n,) nats of targets whose inputs are the positions first, first + 1, ... of a window."""
        i = np.arange(first, first + len(nll))
        places = (np.frexp(i + 1.0)[1] - 1, i % self.segment * 8 // self.segment)  # frexp: exact floor of log2
        for table, place in zip((self.seen, self.inside), places, strict=True):
            table[:, 0] += np.bincount(place, nll, len(table))
            table[:, 1] += np.bincount(place, minlength=len(table))

    def __iadd__(self, other: ByPosition) -> ByPosition:
        self.seen += other.seen
        self.inside += other.inside
        return self

    def as_dict(self) -> dict[str, list[dict[str, float | int]]]:
        """The keys of the machine formats: for each range that has tokens its first, last, count and mean nats."""
        starts = [-(-part * self.segment // 8) for part in range(9)]
        return {
            "by_position": _rows(self.seen, [(2**b, 2 ** (b + 1) - 1) for b in range(64)]),
            "by_segment_position": _rows(self.inside, [(a, b - 1) for a, b in pairwise(starts)]),
        }


def _rows(table: np.ndarray, ranges: Sequence[tuple[int, int]]) -> list[dict[str, float | int]]:
    return [
        {"from": first, "to": last, "n_tokens": int(count), "nll": float(nats / count)}
        for (first, last), (nats, count) in zip(ranges, table, strict=True)
        if count
    ]


@dataclass(frozen=True)
class DocumentScore:
    """The score of one document; `where` is its file and row, `context` that of the scoring (None: all)."""

    doc_id: str
    where: str
    score: Score
    context: int | None = None
    by_position: ByPosition | None = None


class Total:
    """The sum over documents that were scored once for each of `contexts`, with standard errors.

    Tokens of one document are correlated, so an error that takes them as independent is too small. Documents are taken
    as independent instead: for a ratio R = sum x / sum y over D documents, of nats x and tokens or bytes y, its
    standard error is sqrt(D / (D - 1) * sum (x - R y)^2) / sum y, the linearised one of a ratio over clusters (Cochran,
    Sampling Techniques); that of ppl = exp R is ppl times it. None for fewer than two documents.

    Contexts are compared document by document: ppl over that of the first context, with the error of this ratio, much
    smaller than those of the two.
    """

    def __init__(self, contexts: Sequence[int | None]) -> None:
        self.contexts = list(contexts)
        self.scores = [Score(0.0, 0, 0) for _ in contexts]
        self.positions: list[ByPosition | None] = [None] * len(self.contexts)
        size = len(self.contexts) + 2  # nats for each context, tokens, bytes
        self.documents = 0  # that have tokens
        self.mean, self.spread = np.zeros(size), np.zeros((size, size))  # sum of products of deviations from the mean
        self._waiting: list[float] = []

    def add(self, document: DocumentScore) -> None:
        """The next result of `score`: a document's, for each context in turn."""
        index, score = len(self._waiting), document.score
        self.scores[index] += score
        if document.by_position:
            if self.positions[index] is None:
                self.positions[index] = ByPosition(document.by_position.segment)
            self.positions[index] += document.by_position  # type: ignore[operator]
        self._waiting.append(score.nll_sum)
        if len(self._waiting) < len(self.contexts):
            return
        values = np.array([*self._waiting, score.n_tokens, score.n_bytes or 0])
        self._waiting = []
        if score.n_tokens:
            self.documents += 1
            deviation = values - self.mean
            self.mean += deviation / self.documents
            self.spread += np.outer(deviation, values - self.mean)

    def as_dicts(self) -> list[dict[str, Any]]:
        """For each context the keys of the machine formats."""
        return [self._as_dict(index) for index in range(len(self.contexts))]

    def _as_dict(self, index: int) -> dict[str, Any]:
        score, positions = self.scores[index], self.positions[index]
        nats = np.eye(len(self.mean))[index]
        found = {
            **score.as_dict(),
            "context": self.contexts[index],
            "n_docs": self.documents,
            "ppl_se": _times(score.ppl, self._error(nats, -2)),
            "bpb_se": None if score.bpb is None else _times(1 / math.log(2), self._error(nats, -1)),
        }
        if index:
            more = nats - np.eye(len(self.mean))[0]
            ratio = Score(score.nll_sum - self.scores[0].nll_sum, score.n_tokens, None).ppl
            found |= {"ppl_ratio": ratio, "ppl_ratio_se": _times(ratio, self._error(more, -2))}
        return found | (positions.as_dict() if positions else {})

    def _error(self, numerator: np.ndarray, denominator: int) -> float | None:
        """The standard error of sum x / sum y, x a combination of what is counted, y one of it."""
        if self.documents < 2 or not self.mean[denominator]:
            return None
        residual = numerator.copy()
        residual[denominator] -= numerator @ self.mean / self.mean[denominator]
        squares = max(0.0, float(residual @ self.spread @ residual))
        return math.sqrt(squares * self.documents / (self.documents - 1)) / (self.documents * self.mean[denominator])


def _times(factor: float | None, error: float | None) -> float | None:
    return None if factor is None or error is None else factor * error
