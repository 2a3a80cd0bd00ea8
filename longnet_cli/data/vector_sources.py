"""Input documents of vectors: columns of tables with features of tiles, frames or chunks, and their coordinates.

inputs --open_source--> Table --> runs of rows with one id, or rows of many vectors --> Vectors
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from longnet_cli.data.columns import FLOATS, INTEGERS, is_text, is_vector, is_vectors
from longnet_cli.data.documents import Part, collect
from longnet_cli.data.files import StoredIds
from longnet_cli.data.formats import open_source
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.tables import Table, Text, reading
from longnet_cli.data.vectors import Vectors
from longnet_cli.errors import ConfigError, DataError

VECTOR_COLUMNS = ("features", "embedding", "embeddings")
VECTOR_ID_COLUMNS = ("slide_id", "doc_id")
COORDS: tuple[tuple[str, ...], ...] = (("coords",), ("x", "y"))
TILE_SIZE = b"longnet.tile_size"  # in a schema's metadata: the side of a tile, in the units of its coordinates


def read_vectors(inputs: Inputs, *, coords: bool = True) -> Iterator[Vectors]:
    """Yield the documents of every input, in order, as vectors.

    Either a row is a vector: neighbouring rows with one `id_column` (without it `slide_id` or `doc_id`) are a
    document, and a `part` column must count them 0, 1, 2, .... A table without an id column is one document. Or a row
    is a document, a list of vectors. Coordinates are in a column `coords` of pairs, or in `x` and `y`; without
    `coords` they are not read.

    Raises ConfigError for a missing column, DataError for text and for missing, empty or damaged data.
    """
    for source in inputs.sources:
        opened = open_source(source, inputs.wanted)
        if isinstance(opened, Text):
            raise DataError(
                f"{opened.where}: this is text, and the model reads vectors: give Arrow, Parquet or HDF5 files with a "
                f"column {', '.join(VECTOR_COLUMNS)}"
            )
        yield from _documents(opened, _choose(opened, inputs.column, inputs.id_column, coords))


@dataclass(frozen=True)
class _Layout:
    """The names of the columns to read from a table. With `nested`, a row is a document."""

    name: str
    nested: bool
    doc_id: str | None
    part: bool
    coords: tuple[str, ...]
    tile_size: float | None

    @property
    def columns(self) -> list[str]:
        return [self.name, *filter(None, [self.doc_id]), *["part"] * self.part, *self.coords]


def _choose(table: Table, column: str | None, id_column: str | None, places: bool) -> _Layout:
    kinds = {field.name: field.type for field in table.schema}

    def refuse(problem: str) -> ConfigError:
        columns = ", ".join(f"{field.name}: {field.type}" for field in table.schema)
        return ConfigError(f"{table.where}: {problem}; its columns are {columns}")

    for name in (column, id_column):
        if name is not None and name not in kinds:
            raise refuse(f"there is no column {name!r}")
    names = [column] if column is not None else [name for name in VECTOR_COLUMNS if name in kinds]
    found = [name for name in names if is_vector(kinds[name]) or is_vectors(kinds[name])]
    if len(found) > 1:
        raise refuse(f"several columns may hold the vectors ({', '.join(found)}): choose one (--column)")
    if not found:
        wanted = f"column {column!r} does not hold" if column else f"no column named {', '.join(VECTOR_COLUMNS)} holds"
        raise refuse(f"{wanted} vectors, lists of float16, float32 or float64, which the model reads")
    doc_id = id_column or next((name for name in VECTOR_ID_COLUMNS if name in kinds), None)
    coords = next((names for names in COORDS if places and {*names} <= kinds.keys()), ())
    part = doc_id is not None and "part" in kinds and pa.types.is_integer(kinds["part"])
    layout = _Layout(found[0], is_vectors(kinds[found[0]]), doc_id, part, coords, _tile_size(table))
    for name in layout.columns:
        if table.schema.names.count(name) > 1:
            raise DataError(f"{table.where}: several columns are named {name!r}: rename them, or leave the others out")
    if doc_id and not (is_text(kinds[doc_id]) or pa.types.is_integer(kinds[doc_id])):
        raise DataError(f"{table.where}: {doc_id} has type {kinds[doc_id]}: text or whole numbers are needed")
    return layout


def _tile_size(table: Table) -> float | None:
    written = (table.schema.metadata or {}).get(TILE_SIZE)
    try:
        size = None if written is None else float(written)
    except ValueError:
        size = 0.0
    if size is not None and not 0 < size < np.inf:
        raise DataError(f"{table.where}: {TILE_SIZE.decode()} in its metadata is no size of a tile")
    return size


@dataclass(frozen=True)
class _VectorRun:
    """Neighbouring vectors of one document, in one batch."""

    doc_id: str
    part: Part
    width: int
    coords: np.ndarray | None


class _Runs:
    """The runs of a document: an iterator over their parts. Once it has ended, `document` makes the document."""

    def __init__(self, table: Table, runs: Iterator[_VectorRun]) -> None:
        self.table, self.runs = table, runs
        self.row, self.width = -1, 0
        self.coords: list[np.ndarray] = []

    def __iter__(self) -> Iterator[Part]:
        for run in self.runs:
            row = run.part.row or 0
            if len(run.part.ids) and self.width and run.width != self.width:
                raise _wrong_width(self.table, row, run.width, self.width)
            self.row, self.width = row if self.row < 0 else self.row, self.width or run.width
            if run.coords is not None:
                self.coords.append(run.coords)
            yield run.part

    def document(self, doc_id: str, parts: Sequence[Part], tile_size: float | None) -> Vectors:
        coords, place = np.concatenate(self.coords) if self.coords else None, self.table.place
        return Vectors(doc_id, place(self.row), self.width, parts, coords, tile_size, place)


def _documents(table: Table, layout: _Layout) -> Iterator[Vectors]:
    count = 0
    for doc_id, runs in groupby(_runs(table, layout), key=lambda run: run.doc_id):
        runs_of_document = _Runs(table, runs)
        found = collect(runs_of_document)
        yield runs_of_document.document(doc_id, found, layout.tile_size)
        count += 1
    if not count:
        raise DataError(f"{table.where}: the table has 0 rows")


def _runs(table: Table, layout: _Layout) -> Iterator[_VectorRun]:
    """Yield the runs of each batch, checked for damage and nulls."""
    first, seen, last = 0, 0, None  # rows before the batch; rows so far of the document `last`
    for index, batch in enumerate(table.read(layout.columns)):
        with reading(f"{table.where}, batch {index}"):
            for name in layout.columns:
                # List offsets that point outside the data would crash, not raise. This reads no number.
                batch.column(name).validate(full=True)
        ids = _ids(table, layout, batch, first)
        parts = _numbers(table, batch.column("part"), first, "part") if layout.part else None
        if layout.nested:
            yield from _nested_runs(table, layout, batch, first, ids)
        elif batch.num_rows:
            flat, edges = _flat(table, batch.column(layout.name), first)
            width = int(edges[1] - edges[0])
            if (wrong := np.flatnonzero(np.diff(edges) != width)).size:
                row = int(wrong[0])
                raise _wrong_width(table, first + row, int(edges[row + 1] - edges[row]), width)
            coords = _points(table, layout, batch, first)
            cuts = [0, *(i for i in range(1, len(ids)) if ids[i] != ids[i - 1]), len(ids)]
            for start, stop in pairwise(cuts):
                seen = seen if ids[start] == last else 0
                last = ids[start]
                if parts is not None and (parts[start:stop] != np.arange(seen, seen + stop - start)).any():
                    raise DataError(
                        f"{table.place(first + start)}: the parts of document {last!r} do not count on from {seen}: "
                        "rows are missing, repeated or out of order"
                    )
                seen += stop - start
                part = Part(flat[int(edges[start]) : int(edges[stop])], None, first + start, flat=True)
                yield _VectorRun(last, part, width, None if coords is None else coords[start:stop])
        first += batch.num_rows


def _nested_runs(
    table: Table, layout: _Layout, batch: pa.RecordBatch, first: int, ids: Sequence[str]
) -> Iterator[_VectorRun]:
    """Yield a run for each row, which is a list of vectors."""
    inner, outer = _unnested(table, batch.column(layout.name), first)
    flat, edges = _flat(table, inner, first, outer)
    for index, (start, stop) in enumerate(pairwise(outer.tolist())):
        widths = np.diff(edges[start : stop + 1])
        if (widths != (width := int(widths[0]) if len(widths) else 0)).any():
            raise _wrong_width(table, first + index, int(widths[widths != width][0]), width)
        coords = _points(table, layout, batch.slice(index, 1), first + index)
        if coords is not None and len(coords) != stop - start:
            raise DataError(f"{table.place(first + index)}: {stop - start} vectors and {len(coords)} coordinates")
        part = Part(flat[int(edges[start]) : int(edges[stop])], None, first + index)
        yield _VectorRun(ids[index], part, width, coords)


def _ids(table: Table, layout: _Layout, batch: pa.RecordBatch, first: int) -> list[str]:
    """Return the document of each row."""
    if layout.doc_id is None:
        rows = range(first, first + batch.num_rows)
        return [f"{table.name}:{row}" for row in rows] if layout.nested else [table.name] * batch.num_rows
    found = batch.column(layout.doc_id).to_pylist()
    if None in found:
        raise DataError(f"{table.place(first + found.index(None))}, {layout.doc_id}: the value is null")
    return [str(value) for value in found]


def _unnested(
    table: Table, column: pa.Array, first: int, rows: np.ndarray | None = None
) -> tuple[pa.Array, np.ndarray]:
    """Return the values of a column of lists, and the bounds of the lists in them: (lists + 1,) int64.

    List i is `values[bounds[i] : bounds[i + 1]]`. If `column` is the inside of another column, `rows` says where each
    row of the table starts in it.
    """
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        edges = (np.arange(len(column) + 1, dtype=np.int64) + column.offset) * kind.list_size
    else:
        edges = column.offsets.to_numpy().astype(np.int64)
    begin, end = (0, len(column)) if rows is None else (int(rows[0]), int(rows[-1]))
    used = column.slice(begin, end - begin)
    if used.null_count:
        at = begin + int(np.flatnonzero(used.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{table.place(first + _row_of(at, rows))}: the value is null")
    return column.values, edges


def _flat(
    table: Table, column: pa.Array, first: int, rows: np.ndarray | None = None
) -> tuple[np.ndarray | StoredIds, np.ndarray]:
    """Return the numbers of a column of vectors, in their file if possible, and where each vector starts in them."""
    values, edges = _unnested(table, column, first, rows)
    used = values.slice(int(edges[0]), int(edges[-1] - edges[0]))
    if used.null_count:
        at = int(edges[0]) + int(np.flatnonzero(used.is_null().to_numpy(zero_copy_only=False))[0])
        vector = int(np.searchsorted(edges, at, "right")) - 1
        raise DataError(f"{table.place(first + _row_of(vector, rows))}: a number of the vector is null")
    stored = table.stored(values)
    return (values.to_numpy(zero_copy_only=False) if stored is None else stored), edges


def _row_of(index: int, rows: np.ndarray | None) -> int:
    return index if rows is None else int(np.searchsorted(rows, index, "right")) - 1


def _points(table: Table, layout: _Layout, batch: pa.RecordBatch, first: int) -> np.ndarray | None:
    """Return the coordinates of the vectors of a batch, (vectors, 2) float64; None where there are none."""
    if not layout.coords:
        return None
    found = [batch.column(name) for name in layout.coords]
    if layout.nested:
        found = [_inside(table, column, first, name) for column, name in zip(found, layout.coords, strict=True)]
    if len(found) == 2:
        x, y = (_numbers(table, column, first, name) for column, name in zip(found, layout.coords, strict=True))
        if len(x) != len(y):
            raise DataError(f"{table.place(first)}: {len(x)} numbers x and {len(y)} numbers y")
        points = np.stack([x, y], 1)
    else:
        points = _numbers(table, _inside(table, found[0], first, "coords", pairs=True), first, "coords").reshape(-1, 2)
    if not (finite := np.isfinite(points).all(1)).all():
        row = first + (0 if layout.nested else int(np.argmin(finite)))
        raise DataError(f"{table.place(row)}: coordinates {points[np.argmin(finite)].tolist()} are no place")
    return points.astype(np.float64)


def _inside(table: Table, column: pa.Array, first: int, name: str, *, pairs: bool = False) -> pa.Array:
    """Return the values of a column of lists. With `pairs`, raise DataError unless each list has two values."""
    if not any(test(column.type) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        raise DataError(f"{table.where}: {name} has type {column.type}: lists of numbers are needed")
    values, edges = _unnested(table, column, first)
    if pairs and (np.diff(edges) != 2).any():
        row = first + int(np.flatnonzero(np.diff(edges) != 2)[0])
        raise DataError(f"{table.place(row)}: {name} needs two numbers for each vector")
    return values.slice(int(edges[0]), int(edges[-1] - edges[0]))


def _numbers(table: Table, column: pa.Array, first: int, name: str) -> np.ndarray:
    if column.type not in (*INTEGERS, *FLOATS):
        raise DataError(f"{table.where}: {name} has type {column.type}: numbers are needed")
    if column.null_count:
        raise DataError(f"{table.place(first)}: {name} has nulls, from here on")
    return column.to_numpy(zero_copy_only=False)


def _wrong_width(table: Table, row: int, found: Any, wanted: Any) -> DataError:
    return DataError(f"{table.place(row)}: its vector has {found} numbers, those before it have {wanted}")
