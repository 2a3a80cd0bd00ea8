"""Documents as vectors: features of tiles, frames or chunks, and their coordinates, from the columns of tables.

Vectors stay in their file if possible, and are read and checked slice by slice.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from longnet_cli.basics.errors import DataError
from longnet_cli.data.files.column_choice import (
    FLOATS,
    INTEGERS,
    Columns,
    is_list,
    is_vectors,
)
from longnet_cli.data.files.local_files import Part
from longnet_cli.data.files.opened_inputs import Table

from .column_documents import (
    BadRowError,
    Batch,
    DocumentRows,
    group_rows,
    list_bounds,
    numbers,
    read_documents,
)
from .token_documents import STEP, Document, collect


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
        self.width = width
        self.coords = coords
        self.tile_size = tile_size
        self.step = max(1, STEP // max(1, width))
        super().__init__(doc_id, parts, None, where, place=place, kept=kept)

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the vectors [start, stop), bounds as in a Python slice, as a (stop - start, width) float32 copy.

        Raises DataError, naming file and row, for a number that is null, NaN, infinite or too large for float32, and
        for a file that has changed since it was opened.
        """
        start, stop, _ = slice(start, stop).indices(len(self))
        out = np.empty((max(0, stop - start), self.width), np.float32)
        for done, part, offset, flat in self._stretches(start, stop):
            numbers = flat.reshape(-1, self.width)
            block = out[done : done + len(numbers)]
            with np.errstate(over="ignore"):  # reported below
                block[:] = numbers
            null = part.is_null(offset * self.width, len(flat))
            if null.any():
                bad = offset + int(null.argmax()) // self.width
                raise DataError(f"{self._place(part.row_of(bad))}: a number of the vector is null")
            if not (finite := np.isfinite(block)).all():
                bad, place = np.argwhere(~finite)[0]
                raise DataError(
                    f"{self.place(start + done + bad)}: number {place} of the vector is {numbers[bad, place]}"
                )
        return out

    def place(self, index: int) -> str:
        """Return the file and row of a vector, for a message."""
        number = bisect_right(self._starts, index) - 1
        part = self.parts[number]
        inside = index - self._starts[number]
        if part.flat:
            return self._place(part.row + inside)
        return f"{self._place(part.row)}, vector {inside}"


TILE_SIZE = "longnet.tile_size"  # in a schema's metadata: the side of a tile, in the units of its coordinates


class _VectorRow(NamedTuple):
    """A row of a batch that starts at row `start`. `numbers` are those of all vectors of the batch."""

    start: int
    arrays: Batch
    numbers: Part
    row: int


def vector_documents(table: Table, columns: Columns) -> Iterator[Document]:
    """Return the documents of a column of vectors, a row each, or of lists of vectors, a row per document.

    In a table that has no column for names, all vectors are one document, which may be empty. A document that has a
    null, vectors of several sizes, or coordinates that do not fit its vectors, is Unread.
    """
    nested = is_vectors(columns.type)
    tile_size = _tile_size(table)
    for name in columns.coords:
        _check_type(table, name, lists=nested + (name == "coords"))

    def rows(start: int, arrays: Batch) -> Iterator[_VectorRow]:
        column = arrays[columns.documents]
        vectors = column.values if nested else column
        values = numbers(table, vectors.values)
        return map(partial(_VectorRow, start, arrays, values), range(len(column)))

    whole = table.document
    if whole is None and not nested and not columns.doc_id:
        whole = table.name
    groups = group_rows(table, columns, rows, whole)
    read = partial(_document, table, columns, tile_size)
    return read_documents(groups, read)


def _document(
    table: Table,
    columns: Columns,
    tile_size: float | None,
    group: DocumentRows,
) -> Vectors:
    nested = is_vectors(columns.type)
    width = None
    points = list[np.ndarray]()

    def parts() -> Iterator[Part]:
        nonlocal width
        for _, run in groupby(group.values, key=lambda row: (row.start, nested and row.row)):
            part, width, places = _part(table, columns, list(run), width)
            points.extend(places)
            yield part

    collected = collect(parts())
    coords = np.concatenate(points) if points else None
    return Vectors(
        group.doc_id,
        table.place(group.row),
        width or 0,
        collected,
        coords,
        tile_size,
        table.place,
        group.kept,
    )


def _part(
    table: Table,
    columns: Columns,
    run: Sequence[_VectorRow],
    width: int | None,
) -> tuple[Part, int | None, list[np.ndarray]]:
    """Return the part of a row of vectors, or of neighbouring vectors in a batch, their width and their coordinates.

    `width` is the width of the document's vectors so far.
    """
    nested = is_vectors(columns.type)
    batch_start, arrays, values, first = run[0]
    first_row = batch_start + first

    def place(vector: int) -> str:
        return table.place(first_row + (0 if nested else vector))

    vectors = arrays[columns.documents].slice(first, len(run))
    axes = [arrays[name].slice(first, len(run)) for name in columns.coords]
    if nested:
        vectors = vectors.flatten()
        axes = [axis.flatten() for axis in axes]
        if vectors.null_count:
            raise BadRowError(f"{place(0)}: the value is null")
    start = stop = 0
    if len(vectors):
        starts, stops = list_bounds(vectors)
        start = starts[0]
        stop = stops[-1]
        widths = stops - starts
        width = int(widths[0]) if width is None else width
        for other in np.flatnonzero(widths != width)[:1]:
            raise BadRowError(
                f"{place(other)}: its vector has {widths[other]} numbers, those before it have {width}"
            )
    points = [_points(axes, len(vectors), place)] if axes else []
    return values.cut(start, stop, first_row, flat=not nested), width, points


def _points(axes: Sequence[pa.Array], count: int, place: Callable[[int], str]) -> np.ndarray:
    """Return the coordinates of vectors, (`count`, 2) float64, from a column of pairs or from columns x and y."""
    for values in axes:
        if len(values) != count:
            raise BadRowError(f"{place(0)}: {count} vectors and {len(values)} coordinates")
    if len(axes) == 1:
        import pyarrow.compute as pc  # imported late: 20 ms that text does not need

        sizes = pc.fill_null(pc.list_value_length(axes[0]), 0).to_numpy(zero_copy_only=False)
        if (bad := np.flatnonzero(sizes != 2)).size:
            raise BadRowError(f"{place(bad[0])}: coords needs two numbers for each vector")
        axes = [axes[0].flatten()]
    points = np.stack(
        [values.to_numpy(zero_copy_only=False).astype(np.float64) for values in axes], 1
    ).reshape(-1, 2)
    if (bad := np.flatnonzero(~np.isfinite(points).all(1))).size:  # a null is NaN here
        raise BadRowError(f"{place(bad[0])}: coordinates {points[bad[0]].tolist()} are no place")
    return points


def _check_type(table: Table, name: str, lists: int) -> None:
    """Raise DataError unless a column holds numbers in so many levels of lists."""
    kind = table.schema.field(name).type
    for _ in range(lists):
        if not is_list(kind):
            raise DataError(f"{table.where}: {name} has type {kind}: lists of numbers are needed")
        kind = kind.value_type
    if kind not in (*INTEGERS, *FLOATS):
        raise DataError(f"{table.where}: {name} has type {kind}: numbers are needed")


def _tile_size(table: Table) -> float | None:
    written = table.metadata.get(TILE_SIZE)
    if written is None:
        return None
    with suppress(ValueError):
        if 0 < float(written) < np.inf:
            return float(written)
    raise DataError(f"{table.where}: {TILE_SIZE} in its metadata is no size of a tile")
