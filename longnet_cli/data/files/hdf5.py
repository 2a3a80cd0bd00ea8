"""HDF5 files of tile features, from TRIDENT or CLAM, read as tables: a dataset is a column, a file one slide."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from longnet_cli.basics.errors import ConfigError, DataError, extra, first_line

from .opened_inputs import Table, reading

BATCH_BYTES = 16 << 20
MOST_CHUNK_BYTES = 1 << 30  # HDF5 unpacks a chunk whole, whatever its size in the file


def open_hdf5(name: str, where: str, file: Any) -> Table:
    """Open an HDF5 `file` that can seek as a table. Its columns are the datasets of rows of numbers, and `slide_id`.

    `slide_id` is the file's name without its suffix. The side of a tile, from the attributes of `coords`, goes into
    the schema's metadata as `longnet.tile_size`. Data outside the file, behind a link or in a virtual dataset, is not
    read. Raises ConfigError without h5py.
    """
    try:
        import h5py
    except ImportError:
        raise ConfigError(f"{where}: HDF5 files need h5py: {extra('h5')}") from None
    with _reading(where):
        content = h5py.File(file, "r")
        datasets = {key: rows for key in content if (rows := _rows(content, key, h5py))}
        columns = [pa.field(key, rows.type) for key, rows in datasets.items()]
        size = _tile_size(datasets["coords"].dataset.attrs) if "coords" in datasets else 0
    metadata = {"longnet.tile_size": f"{size:g}"} if size else {}
    schema = pa.schema([*columns, pa.field("slide_id", pa.string())], metadata=metadata)
    slide = str(PurePosixPath(name).with_suffix(""))

    def batches(names: list[str]) -> Iterator[pa.RecordBatch]:
        wanted = {key: datasets[key] for key in names if key in datasets}
        counts = {rows.count for rows in wanted.values()}
        if len(counts) > 1:
            sizes = ", ".join(f"{key} {rows.count}" for key, rows in wanted.items())
            raise DataError(f"{where}: its datasets have different numbers of rows: {sizes}")
        for key, rows in wanted.items():
            with _reading(f"{where}: {key}"):
                rows.check(f"{where}: {key}")
        total = max(counts)
        row_bytes = sum(rows.width * rows.dtype.itemsize for rows in wanted.values())
        step = max(1, BATCH_BYTES // max(1, row_bytes))
        for start in range(0, total, step):
            stop = min(start + step, total)
            with _reading(f"{where}, rows {start} to {stop - 1}"):
                arrays = {key: rows.read(start, stop) for key, rows in wanted.items()}
            arrays["slide_id"] = pa.array([slide] * (stop - start), pa.string())
            yield pa.RecordBatch.from_pydict(arrays)

    return Table(name, where, schema, batches, "HDF5", document=slide)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Do as `opened_inputs.reading`, and also handle the other errors that h5py raises for a damaged file."""
    with reading(what):
        try:
            yield
        except (KeyError, RuntimeError, AttributeError) as error:
            raise ValueError(first_line(error)) from error


class _RowsDataset:
    """A dataset of rows of numbers, (rows, width). An outer batch dimension of 1 is ignored."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.count, self.width = dataset.shape[-2:]
        self.dtype = dataset.dtype.newbyteorder("=")
        self.type = pa.list_(pa.from_numpy_dtype(self.dtype), self.width)

    def check(self, where: str) -> None:
        """Raise DataError if the file lacks some of the rows, for which HDF5 gives zeros, or has too large chunks."""
        stored = self.dataset.id
        sides = self.dataset.chunks
        if sides is None:
            if stored.get_storage_size() < self.dataset.nbytes:
                raise DataError(f"{where}: the file lacks some of its rows")
            return
        size = math.prod(sides) * self.dtype.itemsize
        if size > MOST_CHUNK_BYTES:
            problem = f"its chunks have {size:,} bytes each, and {MOST_CHUNK_BYTES:,} are the most"
            raise DataError(f"{where}: {problem}: write smaller ones")
        lengths = zip(self.dataset.shape, sides, strict=True)
        declared = math.prod(-(-length // side) for length, side in lengths)
        present = stored.get_num_chunks()
        if present < declared:
            raise DataError(f"{where}: the file has {present:,} of its {declared:,} chunks")

    def read(self, start: int, stop: int) -> pa.Array:
        rows = self.dataset[..., start:stop, :]
        return pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(rows, self.dtype).ravel()), self.width
        )


def _rows(content: Any, key: str, h5py: Any) -> _RowsDataset | None:
    """Return the rows of numbers under `key`; None for anything else, and for data outside of the file."""
    if not isinstance(content.get(key, getlink=True), h5py.HardLink):
        return None
    dataset = content[key]
    is_rows_of_numbers = (
        isinstance(dataset, h5py.Dataset)
        and not dataset.is_virtual
        and not dataset.external
        and dataset.ndim > 1
        and dataset.shape[:-2] in ((), (1,))
        and dataset.shape[-1] > 0
        and dataset.dtype.kind in "fiu"
    )
    return _RowsDataset(dataset) if is_rows_of_numbers else None


def _tile_size(attributes: Any) -> float:
    """Return the side of a tile, in the pixels of its coordinates; 0 if unknown.

    TRIDENT gives it directly. CLAM gives it in pixels of a smaller image.
    """

    def number(name: str) -> float:
        values = np.asarray(attributes.get(name, ())).reshape(-1)
        first = values[:1].tolist() if values.dtype.kind in "fiu" else []
        return float(max([0.0, *first]))

    size = number("patch_size")
    return number("patch_size_level0") or size * number("downsample") or size
