"""Arrow IPC files and streams, which pyarrow reads from a map, and the checks that it leaves out.

    stream, and a file from its 9th byte on    as the batches come   ┐
    file of Polars, which is no stream inside  by its index          ┴--> batches, whose token ids stay in the file

The index at the end of a file is read from memory, and so are the batches of a file of Polars. pyarrow would read them
from a Python object in another thread, which may still hold the object when the interpreter ends: then the process
aborts. A stream is read by the thread that asks for it.

A batch is a slice of the map, of which nothing is read until it is needed. The address of an array in the slice tells
where the array lies in the file. Token ids are read from there, not through the map: a file that shrinks under a map
kills the process. Small batches are read whole instead.
"""

from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from longnet_cli.basics.errors import DataError

from .local_files import LocalFile, LocalIds
from .opened_inputs import Table, numbers_in_memory, numpy_dtype

MAGIC = b"ARROW1"  # at both ends of a file, padded to 8 bytes at its start
INDEX_BYTES = 256 << 20  # more than any index of a file, which takes 24 bytes per batch
CONTINUATION = b"\xff\xff\xff\xff"  # starts a message of a stream
PADDING = 64  # more than the bytes between the stream in a file and the index
MAPPED_BYTES = 1 << 16  # a disk reads as many ahead when one byte is touched


def open_ipc_stream(name: str, where: str, stream: Any) -> Table:
    """Open an Arrow stream as a table. Its batches stay in a LocalFile."""

    def end(count: int) -> None:
        if stream.read(1):
            raise DataError(
                f"{where}: more data follows the end of the Arrow stream; put each into its own file"
            )

    arrow_bytes = _ArrowBytes(where, stream)
    return arrow_bytes.table(name, "Arrow IPC stream", *arrow_bytes.sequence(end))


def open_pipe(name: str, where: str, pipe: Any) -> Table:
    """Open an Arrow file that `is_sequential` from its start on, without seeking: it is a stream, then an index."""

    def end(count: int) -> None:
        tail = bytes(pipe.read(INDEX_BYTES))
        index = _read_index(where, tail)
        if not 0 <= len(tail) - _index_bytes(tail) < PADDING:
            raise DataError(
                f"{where}: more data follows the end of the Arrow file; give one file at a time"
            )
        if count != index.num_record_batches:
            raise ValueError(
                f"{count} batches were read, and its index lists {index.num_record_batches}"
            )

    pipe.read(8)
    arrow_bytes = _ArrowBytes(where, pipe)
    return arrow_bytes.table(name, "Arrow IPC file", *arrow_bytes.sequence(end))


def open_file(name: str, where: str, file: LocalFile) -> Table:
    """Open an Arrow file. A damaged index is found before the first batch."""
    file.seek(max(0, file.size - 10))
    file.seek(max(0, file.size - min(INDEX_BYTES, _index_bytes(file.read()))))
    index = _read_index(where, file.read())
    file.seek(0)
    sequential = is_sequential(file.read(12))
    file.seek(0)
    if sequential:
        table = open_pipe(name, where, file)
        if not table.schema.equals(index.schema, check_metadata=True):
            raise ValueError("the file has two different schemas")
        return table
    arrow_bytes = _ArrowBytes(where, file)
    return arrow_bytes.table(name, "Arrow IPC file", *arrow_bytes.listed())


def _index_bytes(tail: bytes) -> int:
    """Return how many bytes the index takes at the end of a file, by the last of them: its length and the magic."""
    return 10 + int.from_bytes(tail[-10:-6], "little")


def _read_index(where: str, tail: bytes) -> ipc.RecordBatchFileReader:
    """Return the index in the last bytes of a file, for its schema and the number of its batches."""
    if not tail.endswith(MAGIC):
        raise DataError(f"{where}: truncated: the index at the end of the Arrow file is missing")
    return ipc.open_file(pa.BufferReader(MAGIC + b"\0\0" + tail))  # of memory, it starts no thread


def is_sequential(head: bytes) -> bool:
    """Return whether an Arrow file is a stream after its magic, by its first 12 bytes. Polars files are not."""
    return head[8:] == CONTINUATION


class _ArrowBytes:
    """A binary file for pyarrow, `stream`. If it is a LocalFile, it is also `file`, and large reads are mapped.

    `last` is what pyarrow has read last, and `start` where that is in the file.
    """

    closed = False

    def __init__(self, where: str, stream: Any) -> None:
        self.where = where
        self.stream = stream
        self.tell = stream.tell
        self.file: LocalFile | None = None
        self.map: pa.Buffer | None = None
        self.last: pa.Buffer | None = None
        if isinstance(stream, LocalFile):
            self.file = stream
            self.map = pa.py_buffer(stream.map())
        self.start = 0

    def read(self, size: int) -> bytes:
        return bytes(self.stream.read(size))

    def read_buffer(self, size: int) -> pa.Buffer:
        """Return the next bytes; pyarrow calls this instead of `read` for messages and their bodies."""
        self.start = self.tell()
        if self.map is None or size < MAPPED_BYTES:
            self.last = pa.py_buffer(self.read(size))
        else:
            self.last = self.map.slice(self.start, size)
            self.stream.seek(max(self.start, self.start + self.last.size - 1))
            self.stream.read(1)  # raises an error if the file has changed
        return self.last

    def sequence(self, end: Callable[[int], None]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """Return the schema and the batches of a stream. `end` gets their number, and checks what follows them."""
        reader = ipc.open_stream(self)

        def batches() -> Iterator[pa.RecordBatch]:
            count = 0
            place = self.tell()
            for batch in reader:
                yield batch
                count += 1
                place = self.tell()
            if self.tell() == place:  # pyarrow takes the end of the data for the marker
                raise DataError(
                    f"{self.where}: truncated after {count} batches: the end-of-stream marker is missing"
                )
            end(count)

        return reader.schema, batches()

    def listed(self) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """Return the schema and the batches of a file, which its index lists: slices of the map of the whole file."""
        reader = ipc.open_file(
            pa.BufferReader(self.map), options=ipc.IpcReadOptions(use_threads=False)
        )
        self.last = self.map

        def batches() -> Iterator[pa.RecordBatch]:
            count = reader.num_record_batches
            for index in range(count):
                yield reader.get_batch(index)
                # raises an error if the file has changed, and tells how much of it was read
                self.stream.seek(self.stream.size * (index + 1) // count - 1)
                self.stream.read(1)

        return reader.schema, batches()

    def table(
        self,
        name: str,
        format: str,
        schema: pa.Schema,
        batches: Iterator[pa.RecordBatch],
    ) -> Table:
        _ = schema.names  # raises UnicodeDecodeError for a name that is not UTF-8

        def checked(columns: list[str]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                _refuse_overlap(batch)
                yield batch
            self.map = self.last = None  # documents keep this object, and a map keeps its file open

        return Table(name, self.where, schema, checked, format, self.numbers)

    def numbers(self, array: pa.Array) -> LocalIds | np.ndarray:
        """Return a view of (tokens,) ids of the last batch, in the file if they are not in memory. Ignore nulls."""
        data = array.buffers()[-1]
        last = self.last
        if self.file is None or data is None or last is None:
            return numbers_in_memory(array)
        offset = data.address - last.address
        if not 0 <= offset < last.size:
            # compressed, in another byte order, or not aligned: pyarrow made a copy
            return numbers_in_memory(array)
        dtype = numpy_dtype(array.type)
        start = self.start + offset
        return LocalIds(self.file, start + array.offset * dtype.itemsize, dtype, len(array))


def _refuse_overlap(batch: pa.RecordBatch) -> None:
    """Raise ValueError when two buffers share memory: one of their offsets is wrong, which Arrow does not check."""
    buffers = chain.from_iterable(column.buffers() for column in batch.columns)
    places = sorted((buffer.address, buffer.size) for buffer in buffers if buffer)
    for (address, size), (following, _) in pairwise(places):
        if address + size > following:
            raise ValueError("two buffers overlap")
