"""The documents of columns of token ids: lists, a document each, and flat columns that an end-of-text id cuts."""

from collections.abc import Iterator
from itertools import groupby, pairwise

import numpy as np
import pyarrow as pa

from longnet_cli.data.columns import Columns
from longnet_cli.data.documents import Part, collect
from longnet_cli.data.files import StoredIds
from longnet_cli.data.grouping import DocumentRows, Label, group_rows, read_batches
from longnet_cli.data.manifest import is_manifest
from longnet_cli.data.tables import Table, reading
from longnet_cli.errors import ConfigError, DataError

FLAT_BLOCK = 1 << 22  # ids of a flat column searched for document ends in one go


def list_documents(table: Table, columns: Columns, skip_bad: bool) -> Iterator[DocumentRows]:
    """Yield the documents of a list column, with their parts as values."""

    def rows() -> Iterator[tuple[Label, Part]]:
        for batch in read_batches(table, columns, skip_bad):
            # `values` ignores that the column may be a slice; the bounds are positions in all of it.
            ids, valid = _views(table, batch.column.values)
            for index, (start, stop) in enumerate(_bounds(batch.column)):
                present = valid.slice(start, stop - start) if valid is not None else None
                yield batch.label(index), Part(ids[start:stop], present, batch.first + index)

    yield from group_rows(table, rows())


def _bounds(column: pa.Array) -> Iterator[tuple[int, int]]:
    """Return the start and stop of each list of a column in its `values`."""
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        places = range(column.offset * kind.list_size, (column.offset + len(column) + 1) * kind.list_size)
        return pairwise(places[:: kind.list_size] if kind.list_size else [0] * (len(column) + 1))
    starts = column.offsets.to_numpy().tolist()
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        sizes = column.sizes.to_numpy().tolist()
        return ((start, start + size) for start, size in zip(starts, sizes, strict=True))
    return pairwise(starts)


def flat_documents(table: Table, columns: Columns, eos_id: int | None) -> Iterator[DocumentRows]:
    """Yield the documents of a flat column. EOS ids separate them, and adjacent EOS ids have none in between."""
    name = columns.documents
    if eos_id is None:
        raise ConfigError(
            f"{table.where}: column {name!r} is one stream of ids, which only an end-of-text id can cut into "
            "documents: give a tokenizer that has one, or the token or id itself (--eos)"
        )

    def stretches() -> Iterator[tuple[int, Part]]:
        """Yield (number of EOS ids so far, a stretch of ids without EOS)."""
        count = 0
        for batch in read_batches(table, columns, skip_bad=False):
            first = batch.first
            all_ids, _ = _views(table, batch.column)  # nulls have been refused
            for block in range(0, len(all_ids), FLAT_BLOCK):
                ids = all_ids[block : block + FLAT_BLOCK]
                begin = 0
                with reading(table.where, row=first + block):
                    ends = np.flatnonzero(np.asarray(ids) == eos_id).tolist()
                for end in [*ends, len(ids)]:
                    if end > begin:
                        yield count, Part(ids[begin:end], None, first + block + begin, flat=True)
                    count += end < len(ids)
                    begin = end + 1

    index = -1
    for index, (_, members) in enumerate(groupby(stretches(), key=lambda stretch: stretch[0])):
        parts = collect(part for _, part in members)
        row = parts[0].row
        assert row is not None
        yield DocumentRows(f"{table.name}:{index}", row, parts, {}, None)
    if index < 0 and not is_manifest(table.schema):
        raise DataError(f"{table.where}: column {name!r} holds nothing but end-of-text ids")


def _views(table: Table, values: pa.Array) -> tuple[np.ndarray | StoredIds, pa.BooleanArray | None]:
    """Return the (tokens,) ids, a view of their file or of Arrow's memory, and their validity, None for all valid."""
    valid = None
    if values.null_count:
        bitmap, data = values.buffers()
        bare, valid = (
            pa.Array.from_buffers(kind, len(values), [None, buffer], offset=values.offset)
            for kind, buffer in ((values.type, data), (pa.bool_(), bitmap))
        )
        values = bare
    stored = table.stored(values)
    return values.to_numpy(zero_copy_only=True) if stored is None else stored, valid
