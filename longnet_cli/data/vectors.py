"""Documents as vectors, which stay in their file if possible and are read and checked slice by slice."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from longnet_cli.data.documents import BLOCK, Document, Part
from longnet_cli.errors import DataError


class Vectors(Document):
    """A document as (len, width) numbers, which are checked only when they are read.

    `doc_id` is its name, `where` its file and first row. `coords` (len, 2) float64 are in pixels, None where the
    table has none. `tile_size` is the side of a tile in the same pixels, None where the file does not say.
    """

    has_vectors = True

    def __init__(
        self,
        doc_id: str,
        where: str,
        width: int,
        parts: Sequence[Part],
        coords: np.ndarray | None,
        tile_size: float | None,
        place: Callable[[int], str],
        kept: Mapping[str, pa.Scalar],
    ) -> None:
        """Make a document of `parts`, with `width` numbers per vector. In a `flat` part, each vector is a row."""
        self.width, self.coords, self.tile_size, self._row = width, coords, tile_size, place
        self.block = max(1, BLOCK // max(1, width))
        super().__init__(doc_id, parts, None, where, kept=kept)

    def __repr__(self) -> str:
        return f"Vectors({self.doc_id!r}, {len(self)} of {self.width} numbers, {self.where})"

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the vectors [start, stop), bounds as in a Python slice, as a (stop - start, width) float32 copy.

        Raises DataError, naming file and row, for a number that is null, NaN, infinite or too large for float32, and
        for a file that has changed since it was opened.
        """
        start, stop, _ = slice(start, stop).indices(len(self))
        out = np.empty((max(0, stop - start), self.width), np.float32)
        for done, part, first, flat in self._stretches(start, stop):
            numbers = flat.reshape(-1, self.width)
            block = out[done : done + len(numbers)]
            with np.errstate(over="ignore"):  # reported below
                block[:] = numbers
            present = None if part.valid is None else part.valid.slice(first * self.width, len(flat))
            if present is not None and present.false_count:
                bad = first + present.index(False).as_py() // self.width
                raise DataError(f"{self._row((part.row or 0) + part.flat * bad)}: a number of the vector is null")
            if not (finite := np.isfinite(block)).all():
                bad, place = (int(found[0]) for found in np.nonzero(~finite))
                number = numbers[bad, place]
                raise DataError(f"{self.place(start + done + bad)}: number {place} of the vector is {number}")
        return out

    def place(self, index: int) -> str:
        """Return the file and row of a vector, for a message."""
        part = self.parts[at := bisect_right(self._starts, index) - 1]
        row, inside = part.row or 0, index - self._starts[at]
        return self._row(row + inside) if part.flat else f"{self._row(row)}, vector {inside}"
