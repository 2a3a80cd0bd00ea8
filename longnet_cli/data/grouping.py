"""Rows of tables, grouped by document: neighbouring rows with one name are one document."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from longnet_cli.data.columns import Columns
from longnet_cli.data.manifest import is_manifest
from longnet_cli.data.tables import Table, pick, reading
from longnet_cli.errors import DataError


class ColumnBatch(NamedTuple):
    """The columns of a batch that starts at row `first`; None, or empty, for a column that the table lacks.

    `errors` holds the error of each row that has no document because a value is null, by its index in the batch.
    """

    first: int
    column: pa.Array
    doc_ids: list[Any] | None
    parts: list[Any] | None
    kept: dict[str, pa.Array]
    coords: list[pa.Array]
    errors: dict[int, DataError]

    def label(self, index: int) -> "Label":
        return Label(
            self.first + index,
            self.doc_ids[index] if self.doc_ids else None,
            self.parts[index] if self.parts else None,
            {name: column[index] for name, column in self.kept.items()},
            self.errors.get(index),
        )


class Label(NamedTuple):
    """The place of a row: its number, its document, and its part of the document; None if the table does not say."""

    row: int
    doc_id: Any
    part: int | None
    kept: Mapping[str, pa.Scalar]
    error: DataError | None


class DocumentRows(NamedTuple):
    """The rows of one document: the number of the first, the values that the first carries along, and all values.

    `error` says why the document cannot be read.
    """

    doc_id: str
    row: int
    values: Iterable[Any]
    kept: Mapping[str, pa.Scalar]
    error: DataError | None


def read_batches(table: Table, columns: Columns, skip_bad: bool) -> Iterator[ColumnBatch]:
    """Yield the columns of each batch, checked for damage.

    Raises DataError for a table of 0 rows, and for nulls unless `skip_bad`.
    """
    first = 0
    for index, batch in enumerate(table.read(columns.names)):
        with reading(f"{table.where}, batch {index}"):
            found = {name: pick(batch, name) for name in columns.names}
            column, kept = found[columns.documents], {name: _plain(found[name]) for name in columns.keep}
            values: dict[str, list[Any]] = {}
            for name in (columns.doc_id, columns.part):
                if name is not None:
                    values[name] = found[name].to_pylist()
        errors: dict[int, DataError] = {}
        for name, rows in [(None, _nulls(column)), *((name, _none(each)) for name, each in values.items())]:
            for row in rows:
                place, what = table.place(first + row), f", {name}" if name else ""
                problem = table.bad.pop(first + row, None)
                errors.setdefault(
                    row, DataError(f"{place}{what}: the value is null" if problem is None else f"{place}: {problem}")
                )
        if errors and not skip_bad:
            raise errors[min(errors)]
        ids, parts = (values.get(name) if name else None for name in (columns.doc_id, columns.part))
        names = ids and [None if each is None else str(each) for each in ids]
        yield ColumnBatch(first, column, names, parts, kept, [found[name] for name in columns.coords], errors)
        first += batch.num_rows
    if first == 0 and not is_manifest(table.schema):
        raise DataError(f"{table.where}: the table has 0 rows")


def _plain(column: pa.Array) -> pa.Array:
    """Return the same values in a plain type: no dictionary, extension type or string view."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return column.cast(pa.large_string()) if column.type == pa.string_view() else column


def _nulls(column: pa.Array) -> list[int]:
    """Return the rows without a document: the null may be in the column or in its dictionary."""
    if pa.types.is_dictionary(column.type):
        return _none(column.to_pylist()) if column.null_count or column.dictionary.null_count else []
    return np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist() if column.null_count else []


def _none(values: list[Any]) -> list[int]:
    return [row for row, value in enumerate(values) if value is None] if None in values else []


def group_rows(table: Table, rows: Iterator[tuple[Label, Any]]) -> Iterator[DocumentRows]:
    """Group (label, value) by document.

    Neighbours that share a doc_id are one document. Its parts, where known, must be 0, 1, 2, ...
    """

    def key(row: tuple[Label, Any]) -> Any:
        label = row[0]
        return label.row if label.doc_id is None or label.error else label.doc_id

    def values(doc_id: str, members: Iterator[tuple[Label, Any]]) -> Iterator[Any]:
        for expected, (label, value) in enumerate(members):
            if label.part is not None and label.part != expected:
                raise DataError(
                    f"{table.place(label.row)}: part {label.part} of document {doc_id!r} stands where part {expected} "
                    "should: rows are missing, repeated or out of order"
                )
            yield value

    for name, members in groupby(rows, key=key):
        head = next(members)
        label = head[0]
        doc_id = name if isinstance(name, str) else f"{table.name}:{label.row}"
        found = values(doc_id, chain((head,), members))  # noqa: B031 (used once, before the next group)
        yield DocumentRows(doc_id, label.row, found, label.kept, label.error)
