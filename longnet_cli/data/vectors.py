"""Documents as vectors, which stay in their file if possible and are read and checked slice by slice."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np

from longnet_cli.data.documents import BLOCK, Part
from longnet_cli.data.files import FileChangedError
from longnet_cli.errors import DataError


class Vectors:
    """A document as (len, width) numbers, which are checked only when they are read.

    `doc_id` is its name, `where` its file and first row. `coords` (len, 2) float64 are in pixels, None where the
    table has none. `tile_size` is the side of a tile in the same pixels, None where the file does not say.
    """

    def __init__(
        self,
        doc_id: str,
        where: str,
        width: int,
        parts: Sequence[Part],
        coords: np.ndarray | None,
        tile_size: float | None,
        place: Callable[[int], str],
    ) -> None:
        """Make a document of `parts`, with `width` numbers per vector. In a `flat` part, each vector is a row."""
        self.doc_id, self.where, self.width, self.parts = doc_id, where, width, parts
        self.coords, self.tile_size, self._place = coords, tile_size, place
        self.block = max(1, BLOCK // max(1, width))  # vectors per step of a pass over the document
        self._starts = [0]  # of each part, and the end
        for part in parts:
            self._starts.append(self._starts[-1] + len(part.ids) // max(1, width))
        self._length = self._starts.pop()

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"Vectors({self.doc_id!r}, {len(self)} of {self.width} numbers, {self.where})"

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the vectors [start, stop), bounds as in a Python slice, as a (stop - start, width) float32 copy.

        Raises DataError, naming file and row, for a number that is NaN, infinite or too large for float32, and for a
        file that has changed since it was opened.
        """
        start, stop, _ = slice(start, stop).indices(self._length)
        out = np.empty((max(0, stop - start), self.width), np.float32)
        index = bisect_right(self._starts, start) - 1
        done = 0
        while done < len(out):
            part = self.parts[index]
            first = start + done - self._starts[index]
            end = min(len(part.ids) // self.width, first + min(len(out) - done, self.block))
            if end <= first:
                index += 1
                continue
            try:
                numbers = np.asarray(part.ids[first * self.width : end * self.width]).reshape(-1, self.width)
            except FileChangedError as error:
                raise error.at((part.row or 0) + (first if part.flat else 0)) from None
            block = out[done : done + len(numbers)]
            with np.errstate(over="ignore"):  # reported below
                block[:] = numbers
            if not (finite := np.isfinite(block)).all():
                bad, place = (int(found[0]) for found in np.nonzero(~finite))
                number = numbers[bad, place]
                raise DataError(f"{self.place(start + done + bad)}: number {place} of the vector is {number}")
            done += len(numbers)
        return out

    def place(self, index: int) -> str:
        """Return the file and row of a vector, for a message."""
        part = self.parts[at := bisect_right(self._starts, index) - 1]
        row, inside = part.row or 0, index - self._starts[at]
        return self._place(row + inside) if part.flat else f"{self._place(row)}, vector {inside}"
