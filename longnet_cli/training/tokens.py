"""Token ids of a batch that need not be in memory, nor on the device, before they are computed with."""

from __future__ import annotations

import torch
from torch import Tensor

from longnet_cli.data.windows import Batch
from longnet_cli.runtime.chunks import Tokens


class StoredTokens:
    """The ids of a batch's windows from their token `first` on, `tokens` of each, read where they are indexed."""

    def __init__(self, batch: Batch, first: int, tokens: int, device: torch.device) -> None:
        self.batch, self.first, self.device = batch, first, device
        self.shape = (batch.shape[0], tokens)

    def __getitem__(self, index: tuple[int | slice, slice], /) -> Tensor:
        row, columns = index
        if isinstance(row, slice):
            return torch.stack([self[each, columns] for each in range(*row.indices(self.shape[0]))])
        start, stop, _ = columns.indices(self.shape[1])
        ids = self.batch.read(row, self.first + start, self.first + max(start, stop))
        return torch.from_numpy(ids).to(self.device)


class Pieces:
    """Pieces of (B, N) ids put together anew, (b, n): each row is runs (row, start, stop), one after the other."""

    def __init__(self, tokens: Tokens, rows: list[list[tuple[int, int, int]]]) -> None:
        self.tokens, self.rows, self.device = tokens, rows, tokens.device
        self.shape = (len(rows), sum(stop - start for _, start, stop in rows[0]))

    def __getitem__(self, index: tuple[int | slice, slice], /) -> Tensor:
        row, columns = index
        if isinstance(row, slice):
            return torch.stack([self[each, columns] for each in range(*row.indices(self.shape[0]))])
        first, last, _ = columns.indices(self.shape[1])
        parts: list[Tensor] = []
        offset = 0
        for source, start, stop in self.rows[row]:
            begin, end = max(start, start + first - offset), min(stop, start + last - offset)
            if begin < end:
                parts.append(self.tokens[source, begin:end])
            offset += stop - start
        return torch.cat(parts) if parts else self.tokens[0, 0:0]
