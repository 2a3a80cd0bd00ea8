"""Token ids of a batch that are read, and sent to the device, only when they are needed."""

from __future__ import annotations

import torch
from torch import Tensor

from longnet_cli.data.windows import Batch
from longnet_cli.runtime.chunks import Tokens
from longnet_cli.runtime.device import to_device


class _ReadTokens:
    """`runtime.chunks.Tokens` that are read when they are indexed."""

    shape: tuple[int, int]
    device: torch.device

    def __getitem__(self, index: tuple[int | slice, slice], /) -> Tensor:
        row, columns = index
        start, stop, _ = columns.indices(self.shape[1])
        if isinstance(row, int):
            return self.read(row, start, stop)
        return torch.stack([self.read(each, start, stop) for each in range(*row.indices(self.shape[0]))])

    def read(self, row: int, start: int, stop: int) -> Tensor:
        """Return the ids [start, stop) of a row, (stop - start,) int64."""
        raise NotImplementedError


class StoredTokens(_ReadTokens):
    """The ids of a batch's windows: `tokens` of each window, from its token `first` on."""

    def __init__(self, batch: Batch, first: int, tokens: int, device: torch.device) -> None:
        self.batch, self.first, self.device = batch, first, device
        self.shape = (batch.shape[0], tokens)

    def read(self, row: int, start: int, stop: int) -> Tensor:
        return to_device(torch.from_numpy(self.batch.read(row, self.first + start, self.first + stop)), self.device)


class RegroupedTokens(_ReadTokens):
    """Ids (B, N) grouped into new rows (b, n): each row is a list of runs (row, start, stop) in order."""

    def __init__(self, tokens: Tokens, rows: list[list[tuple[int, int, int]]]) -> None:
        self.tokens, self.rows, self.device = tokens, rows, tokens.device
        self.shape = (len(rows), sum(stop - start for _, start, stop in rows[0]))

    def read(self, row: int, start: int, stop: int) -> Tensor:
        parts: list[Tensor] = []
        offset = 0
        for source, first, last in self.rows[row]:
            begin, end = max(first, first + start - offset), min(last, first + stop - offset)
            if begin < end:
                parts.append(self.tokens[source, begin:end])
            offset += last - first
        return torch.cat(parts) if parts else self.tokens[0, 0:0]
