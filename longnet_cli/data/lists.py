"""The lists of Arrow columns: where each list lies in the column's values, and these values as numbers."""

import numpy as np
import pyarrow as pa

from longnet_cli.data.files import StoredIds
from longnet_cli.data.tables import Table


def list_bounds(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return where each list of a column starts and stops in its `values`, (lists,) int64 each.

    `values` ignores that a column may be a slice; the bounds are positions in all of it.
    """
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        starts = (np.arange(len(column), dtype=np.int64) + column.offset) * kind.list_size
        return starts, starts + kind.list_size
    starts = column.offsets.to_numpy().astype(np.int64)
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return starts, starts + column.sizes.to_numpy()
    return starts[:-1], starts[1:]


def numbers(table: Table, values: pa.Array) -> tuple[np.ndarray | StoredIds, pa.BooleanArray | None]:
    """Return the numbers of the last batch, a view of their file or of Arrow's memory, and which are not null.

    Both have the shape (values,); the second is None if no number is null.
    """
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
