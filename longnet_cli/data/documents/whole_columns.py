"""Lengths and ids of the documents of a list column, many rows at a time, where nothing needs a single row."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from longnet_cli.data.files.column_choice import Columns
from longnet_cli.data.files.local_files import reading_row
from longnet_cli.data.files.opened_inputs import Table, plain, reading

from .column_documents import list_bounds, numbers, read_batches
from .token_documents import NO_LIMIT, STEP, id_bounds


class NeedsRowsError(Exception):
    """Only single rows tell what is in a column: an error, or lists that do not follow each other."""


class Read(NamedTuple):
    """The ids (n,) that were read, and the lengths (documents,) int64 of the documents that have ended."""

    ids: np.ndarray
    lengths: np.ndarray


NO_LENGTHS = np.empty(0, np.int64)


def whole_columns(table: Table, columns: Columns, limit: int | None) -> Iterator[Read]:
    """Yield the documents of a column of lists of ids below `limit`, STEP ids at a time.

    The documents are those of `list_documents`. Raises NeedsRowsError where a row has an error or is not the next part
    of its document, DataError for a damaged file.
    """
    if table.rows_alone:
        raise NeedsRowsError
    # of the document that the next row may continue
    last_name: Any = None
    open_rows = 0
    open_tokens = 0
    ids = np.empty(0, np.uint8)
    for first_row, arrays, errors in read_batches(table, columns):
        lists = arrays[columns.documents]
        size = len(lists)
        if errors or not size:
            raise NeedsRowsError
        begins = np.ones(size, bool)
        if columns.doc_id:
            with reading(table.where):
                begins, last_name = _begins(plain(arrays[columns.doc_id]), last_name)
            begins[0] |= not open_rows
        places = np.arange(size)
        # of each row, in its document
        parts = places - np.maximum.accumulate(np.where(begins, places, -open_rows))
        if columns.part and (parts != arrays[columns.part].to_numpy()).any():
            raise NeedsRowsError
        starts, stops = list_bounds(lists)
        for ids in _ids(table, lists, starts, stops, first_row, limit):
            yield Read(ids, NO_LENGTHS)
        tokens_before = np.concatenate(([0], np.cumsum(stops - starts)))
        firsts = np.flatnonzero(begins)
        lengths = np.diff(tokens_before[firsts], append=tokens_before[-1])
        before = tokens_before[firsts[0]] if len(firsts) else tokens_before[-1]
        lengths = np.concatenate(([open_tokens + before], lengths))
        yield Read(ids[:0], lengths[0 if open_rows else 1 : -1])
        open_tokens = int(lengths[-1])
        open_rows = int(parts[-1]) + 1
    yield Read(ids[:0], np.array([open_tokens]))


def _begins(names: pa.Array, last_name: Any) -> tuple[np.ndarray, Any]:
    """Return which rows (rows,) bool have another name than the row before, and the name of the last row."""
    import pyarrow.compute as pc  # imported late: 20 ms that text does not need

    changes = pc.not_equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False)
    begins = np.concatenate(([names[0].as_py() != last_name], changes))
    return begins, names[-1].as_py()


def _ids(
    table: Table,
    lists: pa.Array,
    starts: np.ndarray,
    stops: np.ndarray,
    first_row: int,
    limit: int | None,
) -> Iterator[np.ndarray]:
    """Yield the ids of lists that follow each other, in steps. Raises NeedsRowsError for others, and for a bad id."""
    if lists.values.null_count or (starts[1:] != stops[:-1]).any():
        raise NeedsRowsError
    ids = numbers(table, lists.values).ids
    for start in range(starts[0], stops[-1], STEP):
        with reading_row(first_row + int(np.searchsorted(stops, start, "right"))):
            step = np.asarray(ids[start : min(start + STEP, stops[-1])])
        unsigned, highest = id_bounds(step.dtype, NO_LIMIT if limit is None else limit)
        if int(np.maximum.reduce(step.view(unsigned))) > highest:
            raise NeedsRowsError
        yield step
