"""Pooling: the hidden states of a document, or of its spans, become vectors.

windows_of(tokens) --> windows of a document, and whose states are taken where they overlap
hidden states, in order --> Pooling --> a Row for each span
a Row for each window --> WindowMean --> a Row for the document, where a window has one vector
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longnet_cli.data.documents.token_documents import Document
from longnet_cli.running.device import to_device

from .job_options import ONE_STATE

SUMS = {"mean", "sqrt", "weighted"}
SHORT = 16  # tokens up to which a CPU pools documents faster together than one by one
SUMMED = ONE_STATE | SUMS  # poolings of a whole that are the sums of those of its parts


@dataclass(frozen=True)
class Row:
    """The vector (dim,) of the tokens [start, end), span number `span` of a document."""

    document: Document
    span: int
    start: int
    end: int
    vector: Tensor

    @property
    def n_tokens(self) -> int:
        return self.end - self.start


def windows_of(tokens: int, size: int, stride: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (start, stop, wanted, wanted_stop) of each window of a document of so many tokens.

    A window reads the tokens [start, stop), and the states of [wanted, wanted_stop) are taken from it. Window i begins
    at `i stride`, and holds `size` tokens or fewer. The last one is the first that reaches the end. Where windows
    overlap, a token takes the state of the one in which it is farther from the nearer edge; the document's own ends are
    no edges, and ties go to the earlier window.
    """
    wanted = start = 0
    while start + size < tokens:
        # as far from this window's end as from the next one's start
        middle = (2 * start + stride + size - 1) // 2 + 1
        yield start, start + size, wanted, middle
        wanted = middle
        start += stride
    yield start, tokens, wanted, tokens


class Pooling:
    """The pooling of a document's tokens from `begin` on: takes hidden states in order, yields the finished rows.

    The results of all `pools` are joined. Each span ends before one of the tokens `ends`; the last span ends with the
    document. The first span has number `number`, and also has the states of `before` tokens that stand before the
    document; the last span also has those of `after` tokens that stand behind it. `skipped` tokens that are not pooled
    stand before them all; `weighted` counts them.
    """

    def __init__(
        self,
        document: Document,
        pools: Sequence[str],
        ends: Sequence[int],
        before: int = 0,
        after: int = 0,
        *,
        skipped: int = 0,
        begin: int = 0,
        number: int = 0,
    ) -> None:
        self.document = document
        self.pools = pools
        self.number = number
        self.begin = begin
        self.ends = ends
        self.after = after
        self.end = min(ends[-1], len(document))
        self.position = begin - before  # the next token; less than `begin` before the document
        self.vector: Tensor | None = None  # of the whole document, if `pool_together` has made it
        self._reset(skipped)

    def is_whole(self, hidden: Tensor, most: int) -> bool:
        """Return whether these states (n, dim), `most` at most, are all that is pooled, for one vector, by sums."""
        rest = self.end + self.after - self.position
        return (
            self.ends[0] >= self.end
            and not self._count
            and hidden.shape[0] == rest
            and 0 < rest <= most
            and SUMS.issuperset(self.pools)
        )

    def add(self, hidden: Tensor) -> Iterator[Row]:
        """Take the next hidden states (n, dim)."""
        if self.vector is not None:
            yield Row(self.document, self.number, self.begin, self.end, self.vector)
            return
        while hidden.shape[0]:  # `len` of a tensor takes as long as a sum
            # tokens before the document belong to its first span, and those behind it to the last one
            inside = min(max(self.position, self.begin), self.end - 1)
            index = bisect_right(self.ends, inside)
            start = self.ends[index - 1] if index else self.begin
            end = min(self.ends[index], self.end)
            stop = end + self.after if end == self.end else end
            missing = stop - self.position
            part, hidden = hidden[:missing], hidden[missing:]
            self.position += part.shape[0]
            self._take(part)
            if self.position == stop:
                yield Row(self.document, self.number + index, start, end, self._vector())
                self._reset()

    def _reset(self, skipped: int = 0) -> None:
        self._count = 0
        self._weight = skipped
        # of the open span, by pooling: a sum (float64), a maximum or one state
        self._sums: dict[str, Tensor] = {}

    def _take(self, part: Tensor) -> None:
        sums = self._sums
        for pool in dict.fromkeys(self.pools):
            if pool == "last":
                sums[pool] = part[-1]
            elif pool in ONE_STATE:
                sums.setdefault(pool, part[0])
            elif pool == "max":
                most = part.amax(0)
                sums[pool] = torch.maximum(sums.get(pool, most), most)
            elif pool == "weighted":
                weights = to_device(self.weights(len(part)), part.device)
                sums[pool] = sums.get(pool, 0) + weights @ part.double()
            else:
                total = part.sum(0, dtype=torch.float64)
                sums[pool] = sums[pool] + total if pool in sums else total
        self._count += part.shape[0]
        self._weight += part.shape[0]

    def weights(self, tokens: int) -> Tensor:
        """Return the weights of the next tokens if they are `weighted`, float64 on the host."""
        return torch.arange(1, tokens + 1, dtype=torch.float64) + self._weight

    def divisors(self, more: int = 0) -> list[float]:
        """Return what the sums are divided by, for each pooling, after `more` tokens."""
        count = self._count + more
        last = self._weight + more
        skipped = self._weight - self._count
        weights = (last * (last + 1) - skipped * (skipped + 1)) / 2
        of_sums = {"mean": count, "sqrt": count**0.5, "weighted": weights}
        return [of_sums.get(pool, 1) for pool in self.pools]

    def _vector(self) -> Tensor:
        sums = zip(self.pools, self.divisors(), strict=True)
        vectors = [(self._sums[pool] / divisor).float() for pool, divisor in sums]
        return torch.cat(vectors) if len(vectors) > 1 else vectors[0]


def pool_together(whole: Sequence[tuple[Pooling, Tensor]]) -> None:
    """Give poolings that end with their states (n, dim) their vectors, in as many calls as one document needs."""
    poolings, states = zip(*whole, strict=True)
    counts = [*map(len, states)]
    rows = torch.cat(states).double()
    device = rows.device
    sizes = to_device(torch.tensor(counts), device)
    # (documents, pools) float64
    of_documents = [
        pooling.divisors(count) for pooling, count in zip(poolings, counts, strict=True)
    ]
    divisors = to_device(torch.tensor(of_documents, dtype=torch.float64), device)
    vectors = []
    for index, pool in enumerate(poolings[0].pools):
        weighed = rows
        if pool == "weighted":
            weights = [
                pooling.weights(count) for pooling, count in zip(poolings, counts, strict=True)
            ]
            weighed = rows * to_device(torch.cat(weights), device)[:, None]
        sums = torch.segment_reduce(weighed, "sum", lengths=sizes, axis=0)
        vectors.append((sums / divisors[:, index, None]).float())
    for pooling, vector in zip(poolings, torch.cat(vectors, 1), strict=True):
        pooling.vector = vector


class WindowMean:
    """The mean of the vectors of a document's windows, weighted by their tokens: takes their rows in order."""

    def __init__(self) -> None:
        self._sum: Any = 0
        self._tokens = 0

    def add(self, row: Row) -> Iterator[Row]:
        """Take the row of the next window; yield the document's row after the last one."""
        self._sum = self._sum + row.vector.double() * row.n_tokens
        self._tokens += row.n_tokens
        if row.end == len(row.document):
            yield replace(row, span=0, start=0, vector=(self._sum / self._tokens).float())
