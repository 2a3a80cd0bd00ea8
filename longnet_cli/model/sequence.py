"""A document as a net reads it: the rows that come first, then the document's own; and who refuses a long one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

from longnet_cli.errors import TooLongError

# What a model reads before each document: nothing, one id, or several, as in some tokenizers' templates
Bos = int | Sequence[int] | None


def bos_ids(bos: Bos) -> tuple[int, ...]:
    """Return the ids of a `Bos`, in order."""
    return () if bos is None else (bos,) if isinstance(bos, int) else tuple(bos)


class Readable(Protocol):
    """Token ids, or vectors that a net reads in their place. Any slice can be read."""

    def read(self, start: int, stop: int, /) -> np.ndarray: ...  # (stop - start,) int64, or (stop - start, n) float32


class DocumentLike(Readable, Protocol):
    """A document, as `data.documents.Document` and `data.vectors.Vectors` are."""

    where: str
    has_vectors: bool  # in place of token ids

    @property
    def width(self) -> int: ...  # the numbers of a vector
    def __len__(self) -> int: ...


D = TypeVar("D", bound=DocumentLike)


@dataclass(frozen=True, eq=False)
class InputSequence(Generic[D]):
    """The rows that a net reads for a document: its `start_rows`, then, from index `first` on, the document's own.

    `limit` is the most rows that the net reads, None for no limit; `choices` is as in `Net`. `cells`
    (len(document), 2) float32 are read after each vector of the document.
    """

    document: D
    start_rows: np.ndarray
    limit: int | None
    choices: str
    cells: np.ndarray | None = None

    @property
    def first(self) -> int:
        return len(self.start_rows)

    def __len__(self) -> int:
        return self.first + len(self.document)

    def read(self, start: int, stop: int, /) -> np.ndarray:
        """Return the rows [start, stop), (stop - start,) int64 or (stop - start, n) float32."""
        begin, end = max(0, start - self.first), max(0, stop - self.first)
        rows = self.document.read(begin, end)
        if self.cells is not None:
            rows = np.concatenate((rows, self.cells[begin:end]), 1)
        return rows if start >= self.first else np.concatenate((self.start_rows[start:stop], rows))

    def check(self, instead: str, tokens: int | None = None, *, skips: bool = True) -> InputSequence[D]:
        """Return this sequence. Raises TooLongError if the net cannot read it, or `tokens` of its rows at once.

        `instead` says what to do then; with `skips`, the message mentions --skip-bad as well.
        """
        tokens = len(self) if tokens is None else tokens
        if self.limit is not None and tokens > self.limit:
            has = f"was trained on {self.limit}" if self.choices else f"has {self.limit} positions"
            instead += f", or give {self.choices}" if self.choices else ""
            instead += "; --skip-bad leaves such documents out" if skips else ""
            raise TooLongError(f"{self.document.where}: {tokens} tokens, and the model {has}", instead)
        return self
