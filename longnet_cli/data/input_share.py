"""The share of the inputs that has been handed out as documents, by the bytes of files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import pyarrow as pa

from longnet_cli.data.names import Source
from longnet_cli.data.tables import Table, Text


class InputShare:
    """A watch over the files of `Inputs`. `share` is from 0 to 1; None if the size of a file is not known.

    Within a batch of a table, each document counts alike; a batch counts by its bytes, or in Parquet by its rows.
    """

    def __init__(self) -> None:
        self._total: int | None = None
        self._before = self._size = 0  # bytes of the files before, and of the one that is read
        self._begin = self._end = 0.0  # shares of that file before and after the batch that is read
        self._rows = self._documents = 0  # of the batch, and handed out of it

    @property
    def share(self) -> float | None:
        if not self._total:
            return None
        inside = min(1.0, self._documents / self._rows) if self._rows else 1.0
        return (self._before + self._size * (self._begin + (self._end - self._begin) * inside)) / self._total

    def begin(self, sources: Sequence[Source]) -> None:
        """Start with the first of these files."""
        sizes = [_size(source) for source in sources]
        self._total = None if None in sizes else sum(size or 0 for size in sizes)
        self._before = self._size = 0

    def open(self, source: Source) -> None:
        """Go on to the next file."""
        self._before, self._size = self._before + self._size, _size(source) or 0
        self._batch(0.0, 0.0, 0)

    def watched(self, opened: Text | Table) -> Text | Table:
        """Return the opened file, whose batches are counted when they are read. A text is one document."""
        if isinstance(opened, Text):
            self._batch(0.0, 1.0, 1)
            return opened

        def read(columns: list[str]) -> Iterator[pa.RecordBatch]:
            rows = 0
            for batch in opened.read(columns):
                rows += batch.num_rows
                self._batch(self._end, max(self._end, min(1.0, opened.share(rows))), batch.num_rows)
                yield batch
            self._batch(1.0, 1.0, 0)

        return replace(opened, read=read)

    def count(self) -> None:
        """Count a document that is handed out."""
        self._documents += 1

    def _batch(self, begin: float, end: float, rows: int) -> None:
        self._begin, self._end, self._rows, self._documents = begin, end, rows, 0


def _size(source: Source) -> int | None:
    """Return the bytes of a file on this machine, None for a pipe and for a file in a store."""
    if source.path is not None and source.filesystem is None:
        with suppress(OSError):
            if source.path.is_file():
                return source.path.stat().st_size
    return None
