"""The documents of columns of token ids: lists, a document each, and flat columns that an end-of-text id cuts."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from longnet_cli.data.columns import Columns
from longnet_cli.data.documents import Part, collect
from longnet_cli.data.grouping import DocumentRows, Label, group_rows, read_batches
from longnet_cli.data.lists import list_bounds, numbers
from longnet_cli.data.manifest import is_manifest
from longnet_cli.data.tables import Table, reading
from longnet_cli.errors import ConfigError, DataError

FLAT_BLOCK = 1 << 22  # ids of a flat column searched for document ends in one go


def list_documents(table: Table, columns: Columns, skip_bad: bool) -> Iterator[DocumentRows]:
    """Yield the documents of a list column, with their parts as values."""

    def rows() -> Iterator[tuple[Label, Part]]:
        for batch in read_batches(table, columns, skip_bad):
            ids, valid = numbers(table, batch.column.values)
            bounds = zip(*(each.tolist() for each in list_bounds(batch.column)), strict=True)
            for index, (start, stop) in enumerate(bounds):
                present = valid.slice(start, stop - start) if valid is not None else None
                yield batch.label(index), Part(ids[start:stop], present, batch.first + index)

    yield from group_rows(table, rows())


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
            all_ids, _ = numbers(table, batch.column)  # nulls have been refused
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
