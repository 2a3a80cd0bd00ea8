"""The pooling of the hidden states of a document, or of its spans, into vectors, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longnet_cli.data.documents import Document

Pool = Literal["mean", "last", "first", "cls"]


@dataclass(frozen=True)
class Row:
    """The vector (dim,) of the tokens [start, end), span number `span` of a document."""

    document: Document
    span: int
    start: int
    end: int
    vector: Tensor
    layers: Tensor | None = None  # (num_layers + 1, dim), with all_layers


class Pooling:
    """The pooling of one document: takes hidden states in order, in pieces of any size; yields the finished rows.

    The first span also has the hidden states of `before` tokens that stand before the document.
    """

    def __init__(self, document: Document, pool: Pool, span: int | None, before: int = 0) -> None:
        self.document, self.pool = document, pool
        self.length = span or len(document)
        self.position, self.first = -before, -before  # the next token; the first one of the open span
        self.layers: Callable[[], Tensor | None] = lambda: None
        self.state: Tensor | None = None  # of the open span: the sum so far (float64), or the first or last state

    def add(self, hidden: Tensor) -> Iterator[Row]:
        """Take the next hidden states (n, dim). A span ends every `span` tokens and with the document."""
        while len(hidden):
            index = max(0, self.position) // self.length
            start, end = index * self.length, min((index + 1) * self.length, len(self.document))
            part, hidden = hidden[: end - self.position], hidden[end - self.position :]
            self.position += len(part)
            if self.pool == "mean":
                new = part.sum(0, dtype=torch.float64)
                self.state = new if self.state is None else self.state + new
            elif self.pool == "last" or self.state is None:
                self.state = part[-1 if self.pool == "last" else 0]
            if self.position == end:
                vector = self.state / (end - self.first) if self.pool == "mean" else self.state
                yield Row(self.document, index, start, end, vector.float(), self.layers())
                self.state, self.first = None, end


class ClsPooling(Pooling):
    """The pooling of one document by CLS: takes hidden states from CLS on; yields the row of CLS."""

    def add(self, hidden: Tensor) -> Iterator[Row]:
        if self.state is None:
            self.state = hidden[0]
        self.position += len(hidden)
        if self.position == len(self.document) + 1:
            yield Row(self.document, 0, 0, len(self.document), self.state.float(), self.layers())
