"""The measures of scoring: sums of nats, their standard errors over documents, and gains.

The gain of a document is how many nats per token its longest context saves over its shortest one.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from longnet_cli.basics.errors import DataError
from longnet_cli.data.files.local_files import spooling


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
        if not self.n_bytes:
            return None
        bits = self.nll_sum / math.log(2)
        return bits / self.n_bytes

    def __add__(self, other: Score) -> Score:
        nll_sum = self.nll_sum + other.nll_sum
        n_tokens = self.n_tokens + other.n_tokens
        if self.n_bytes is None or other.n_bytes is None:
            return Score(nll_sum, n_tokens, None)
        return Score(nll_sum, n_tokens, self.n_bytes + other.n_bytes)

    def as_dict(self) -> dict[str, float | int | None]:
        """Return a dict with the keys of the machine formats."""
        return {**asdict(self), "ppl": self.ppl, "bpb": self.bpb}


class Gain(NamedTuple):
    """The gain of a document from the longest of several contexts over the shortest one. All are None without tokens.

    `gain` is the nats per token at the shortest context minus the nats at the longest, `gain_se` its standard error
    over blocks of 128 tokens (None for fewer than two blocks), `gain_share` the share of tokens that gain more than 2
    nats.
    """

    gain: float | None
    gain_se: float | None
    gain_share: float | None


class Clusters:
    """The sums of some quantities over documents, and the standard errors of their ratios.

    Tokens of one document are correlated, so a standard error that takes tokens as independent is too small. Documents
    are taken as independent instead. For D documents of nats x and tokens or bytes y, the ratio R = sum x / sum y has
    the standard error sqrt(D / (D - 1) * sum (x - R y)^2) / sum y, linearised for a ratio over clusters (Cochran,
    Sampling Techniques). It is None for fewer than two documents.
    """

    def __init__(self, size: int) -> None:
        self.documents = 0
        self.sums = np.zeros(size)
        self.spread = np.zeros((size, size))  # products of deviations from the mean

    def add(self, values: Sequence[float]) -> None:
        """Add the (size,) quantities of the next document."""
        self.extend(np.array([values], float))

    def extend(self, values: np.ndarray) -> None:
        """Add the (documents, size) float64 quantities of the next documents (Chan, Golub and LeVeque's update)."""
        if not len(values):
            return
        before = self.documents
        mean = values.mean(0)
        shift = mean - self.sums / max(1, before)
        deviations = values - mean
        self.documents += len(values)
        self.sums += values.sum(0)
        weight = before * len(values) / self.documents
        within = deviations.T @ deviations
        between = np.outer(shift, shift) * weight
        self.spread += within + between

    def error(self, numerator: np.ndarray, denominator: int) -> float | None:
        """Return the standard error of sum x / sum y.

        x is the linear combination of the quantities with weights `numerator` (size,), y is quantity `denominator`.
        """
        if self.documents < 2 or not self.sums[denominator]:
            return None
        total = float(self.sums[denominator])
        ratio = numerator @ self.sums / self.sums[denominator]
        residual = numerator.copy()
        residual[denominator] -= ratio
        squares = max(0.0, float(residual @ self.spread @ residual))
        variance = squares * self.documents / (self.documents - 1)
        return math.sqrt(variance) / total


# indices among a document's quantities, after the nats at each context
BYTES_AT = -2
TOKENS_AT = -1
OF_FIRST = np.array([1.0, 0.0])  # of two quantities


class Total:
    """The sum over documents that were scored once at each of `contexts`, with standard errors (see `Clusters`).

    The standard error of ppl = exp R is ppl times the standard error of R. Contexts are compared document by document:
    the ratio of a context's ppl to the first context's has a much smaller standard error than either ppl.
    """

    def __init__(self, contexts: Sequence[int | None]) -> None:
        self.contexts = list(contexts)
        self.scores = [Score(0.0, 0, 0)] * len(self.contexts)
        self.clusters = Clusters(len(self.contexts) + 2)  # of documents that have tokens

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the row of the next document, with the columns of `Scorer.schema`."""
        tokens = row["n_tokens"]
        n_bytes = row["n_bytes"]
        nats = [row[column("nll_sum", context, self.contexts)] for context in self.contexts]
        if tokens:
            self.clusters.add([*nats, n_bytes or 0, tokens])
        for index, nll_sum in enumerate(nats):
            self.scores[index] += Score(nll_sum, tokens, n_bytes)

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return a dict for each context, with the keys of the machine formats."""
        return [*map(self._as_dict, range(len(self.contexts)))]

    def _as_dict(self, index: int) -> dict[str, Any]:
        score = self.scores[index]
        clusters = self.clusters
        units = np.eye(len(self.contexts) + 2)
        nats = units[index]
        total: dict[str, Any] = {
            **score.as_dict(),
            "context": self.contexts[index],
            "n_docs": clusters.documents,
            "ppl_se": _times(score.ppl, clusters.error(nats, TOKENS_AT)),
            "bpb_se": None,
        }
        if score.bpb is not None:
            total["bpb_se"] = _times(1 / math.log(2), clusters.error(nats, BYTES_AT))
        if index:  # the others are compared with the first context
            more = nats - units[0]
            more_nats = float(more @ clusters.sums)
            tokens = int(clusters.sums[TOKENS_AT])
            ratio = Score(more_nats, tokens, None).ppl
            total["ppl_ratio"] = ratio
            total["ppl_ratio_se"] = _times(ratio, clusters.error(more, TOKENS_AT))
        return total


MOST_GROUPS = 100_000  # some 2 KB each


class GroupTotals:
    """A Total for each value of the column `by` that documents carry along."""

    def __init__(self, contexts: Sequence[int | None], by: str) -> None:
        self.contexts = contexts
        self.by = by
        self.totals: dict[Any, Total] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the row of the next document to its group. Raises DataError for too many groups, or a list as a value."""
        value = row[self.by]
        if isinstance(value, (list, dict)):
            raise DataError(
                f"--by {self.by}: the column holds lists or structs: name one of values"
            )
        if value not in self.totals:
            if len(self.totals) == MOST_GROUPS:
                raise DataError(
                    f"--by {self.by}: the column has more than {MOST_GROUPS:,} values: name one with fewer"
                )
            self.totals[value] = Total(self.contexts)
        self.totals[value].add(row)

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the dicts of each group's Total, with the column and its value, in the order of first documents."""
        return [
            {"by": self.by, "group": value, **numbers}
            for value, total in self.totals.items()
            for numbers in total.as_dicts()
        ]


def column(name: str, context: int | None, contexts: Sequence[int | None]) -> str:
    """Return the name of a column that a row has once for each of `contexts`."""
    if len(contexts) == 1:
        return name
    return f"{name}_{context}"


def _times(factor: float | None, error: float | None) -> float | None:
    if factor is None or error is None:
        return None
    return factor * error


SPOOL_BYTES = 1 << 24  # of nats in memory: little beside a net
GAIN_BLOCK = 128  # neighbouring tokens gain together; blocks are taken as independent
MANY_NATS = 2.0  # a token that gains this much is exp(2), about 7, times as likely


class GainTally:
    """The gain of one document that is scored at each of several `contexts`, in turn.

    The nats at the shortest or the longest context, whichever comes first, are kept: 4 bytes per token, in a file in
    $TMPDIR if they are many. `tokens` is the number of tokens that have been compared.
    """

    def __init__(self, contexts: Sequence[int]) -> None:
        self.longest = max(contexts)
        # in the order in which they come
        self._ends = sorted((min(contexts), self.longest), key=contexts.index)
        self._kept: Any = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 (float32 nats, closed at the end)
        self._open = np.empty(0)  # gains in the block that is not full yet
        self._blocks = Clusters(2)  # of each, the sum of gains and the number of tokens
        self._many = self.tokens = 0

    def add(self, context: int | None, nats: np.ndarray) -> None:
        """Take the next (n,) float32 nats at a context. Raises LongNetError if the disk is full."""
        if context == self._ends[0]:
            with spooling():
                self._kept.write(nats.tobytes())
        elif context == self._ends[1] and len(nats):
            self._kept.seek(nats.itemsize * self.tokens)
            kept = self._kept.read(nats.nbytes)
            earlier = np.frombuffer(kept, np.float32).astype(np.float64)
            less = earlier - nats
            self._compare(less if context == self.longest else -less)

    def result(self) -> Gain:
        """Return the gain. Call it when all tokens have been compared."""
        self._kept.close()
        if not self.tokens:
            return Gain(None, None, None)
        if len(self._open):
            self._end_blocks(self._open[None])
        total, tokens = self._blocks.sums
        error = self._blocks.error(OF_FIRST, TOKENS_AT)
        return Gain(float(total / tokens), error, self._many / float(tokens))

    def _compare(self, gained: np.ndarray) -> None:
        """Add the gains of the next (n,) tokens."""
        self.tokens += len(gained)
        self._many += int(np.count_nonzero(gained > MANY_NATS))
        joined = np.concatenate((self._open, gained))
        whole = len(joined) // GAIN_BLOCK * GAIN_BLOCK
        blocks = joined[:whole].reshape(-1, GAIN_BLOCK)
        self._end_blocks(blocks)
        self._open = joined[whole:]

    def _end_blocks(self, gained: np.ndarray) -> None:
        """Add blocks of gains, (blocks, tokens per block): full ones or, at the end, one that is shorter."""
        blocks, tokens_of_block = gained.shape
        sums = gained.sum(1)
        tokens = np.full(blocks, tokens_of_block)
        self._blocks.extend(np.column_stack((sums, tokens)))
