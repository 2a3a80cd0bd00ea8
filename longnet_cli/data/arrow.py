"""Arrow IPC files and streams, which pyarrow reads from a map, and the checks that it leaves out.

    file: each batch in its index  ┐
    stream or pipe: as they come   ┴--_ArrowBytes--> pyarrow --> batches, whose token ids stay in the file

A batch is a slice of the map, of which nothing is read until it is needed. The address of an array in the slice tells
where the array lies in the file. Token ids are read from there, not through the map: a file that shrinks under a map
kills the process. Small batches are read whole instead.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc

from longnet_cli.basics.errors import DataError
from longnet_cli.data.files import StoredFile, StoredIds
from longnet_cli.data.tables import Table, numpy_dtype, reading

MAGIC = b"ARROW1"  # at both ends of a file, padded to 8 bytes at its start
INDEX_BYTES = 256 << 20  # more than any index of a file, which takes 24 bytes per batch
CONTINUATION = b"\xff\xff\xff\xff"  # starts a message, which before Arrow 0.15 started with its length
PADDING = 64  # more than the bytes between two messages of a file
MAPPED_BYTES = 1 << 16  # a disk reads as many ahead when one byte is touched


def open_ipc_stream(name: str, where: str, stream: Any) -> Table:
    """Open an Arrow stream as a table. Its batches stay in a StoredFile."""

    def end(count: int) -> None:
        if stream.read(1):
            raise DataError(f"{where}: more data follows the end of the Arrow stream; put each into its own file")

    source = _ArrowBytes(where, stream)
    return source.table(name, "Arrow IPC stream", *source.sequence(end))


def open_pipe(name: str, where: str, pipe: Any) -> Table:
    """Open an Arrow file that comes through a pipe: between its magic and its index, it is an Arrow stream."""

    def end(count: int) -> None:
        tail = pipe.read(INDEX_BYTES)
        if not tail.endswith(MAGIC):
            raise DataError(f"{where}: truncated: the index at the end of the Arrow file is missing")
        if not 0 <= len(tail) - 10 - int.from_bytes(tail[-10:-6], "little") < PADDING:
            raise DataError(f"{where}: more data follows the end of the Arrow file; give one file at a time")
        listed = ipc.open_file(pa.BufferReader(MAGIC + b"\0\0" + tail)).num_record_batches
        if listed != count:
            raise ValueError(f"{count} batches were read, and its index lists {listed}")

    pipe.read(8)
    source = _ArrowBytes(where, pipe)
    return source.table(name, "Arrow IPC file", *source.sequence(end))


def open_file(name: str, where: str, stream: Any) -> Table:
    """Open an Arrow file that can seek, by the index at its end, which must account for every byte of its batches."""
    source = _ArrowBytes(where, stream)
    index = ipc.open_file(source)
    stream.seek(0)
    if is_sequential(stream.read(12)):
        stream.seek(8)
        if not ipc.read_schema(stream).equals(index.schema, check_metadata=True):
            raise ValueError("the file has two different schemas")
        source.reads.append((8, stream.tell()))

    def batches() -> Iterator[pa.RecordBatch]:
        yield from map(index.get_batch, range(index.num_record_batches))
        stream.seek(0)
        stream.read(1)  # raises an error if the file has changed while the last batch was looked at
        for (_, stop), (start, _) in pairwise(sorted(source.reads)):
            if not 0 <= start - stop < PADDING:
                raise ValueError("its index has lost a batch, or lists one twice")

    return source.table(name, "Arrow IPC file", index.schema, batches())


def is_sequential(head: bytes) -> bool:
    """Return whether an Arrow file is a stream after its magic, by its first 12 bytes. Polars files are not."""
    return head[8:] == CONTINUATION


class _ArrowBytes:
    """A binary file for pyarrow, `stream`. If it is a StoredFile, it is also `file`, and large reads are mapped.

    `last` is what pyarrow has read last, `reads` where all that it has read starts and stops.
    """

    closed = False

    def __init__(self, where: str, stream: Any) -> None:
        self.where, self.stream = where, stream
        self.file = stream if isinstance(stream, StoredFile) else None
        self.tell, self.seek = stream.tell, getattr(stream, "seek", None)
        self.map: pa.Buffer | None = pa.py_buffer(self.file.map()) if self.file else None
        self.last: pa.Buffer | None = None
        self.reads: list[tuple[int, int]] = []

    def read(self, size: int) -> bytes:
        return bytes(self.stream.read(size))

    def read_buffer(self, size: int) -> pa.Buffer:
        """Return the next bytes; pyarrow calls this instead of `read` for messages and their bodies."""
        start = self.tell()
        if self.map is None or size < MAPPED_BYTES:
            last = pa.py_buffer(self.stream.read(size))
        else:
            last = self.map.slice(start, size)
            self.stream.seek(max(start, start + last.size - 1))
            self.stream.read(1)  # raises an error if the file has changed
        self.last = last
        self.reads.append((start, start + last.size))
        return last

    def sequence(self, end: Callable[[int], None]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """Return the schema and the batches of a stream. `end` gets their number, and checks what follows them."""
        reader = ipc.open_stream(self)

        def batches() -> Iterator[pa.RecordBatch]:
            count, place = 0, self.tell()
            for batch in reader:
                yield batch
                count, place = count + 1, self.tell()
                del self.reads[:-1]  # of a stream without end
            if self.tell() == place:  # pyarrow takes the end of the data for the marker
                raise DataError(f"{self.where}: truncated after {count} batches: the end-of-stream marker is missing")
            end(count)

        return reader.schema, batches()

    def table(self, name: str, format: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Table:
        _ = schema.names  # raises UnicodeDecodeError for a name that is not UTF-8

        def read(columns: list[str]) -> Iterator[pa.RecordBatch]:
            count = rows = 0
            while True:
                with reading(f"{self.where}, batch {count}", row=rows):
                    if (batch := next(batches, None)) is None:
                        break
                    _refuse_overlap(batch)
                yield batch
                count, rows = count + 1, rows + batch.num_rows
            self.map = self.last = None  # documents keep this object, and a map keeps its file open

        return Table(name, self.where, schema, read, format, self.stored)

    def stored(self, array: pa.Array) -> StoredIds | None:
        """Return the place in the file of (tokens,) ids of the last batch; None if they are in memory. Ignore nulls."""
        data, last = array.buffers()[-1], self.last
        if self.file is None or data is None or last is None or not 0 <= data.address - last.address < last.size:
            return None  # compressed, in another byte order, or not aligned: pyarrow has made a copy
        dtype = numpy_dtype(array.type)
        start = self.reads[-1][0] + data.address - last.address
        return StoredIds(self.file, start + array.offset * dtype.itemsize, dtype, len(array))


def _refuse_overlap(batch: pa.RecordBatch) -> None:
    """Raise ValueError when two buffers share memory: one of their offsets is wrong, which Arrow does not check."""
    buffers = (buffer for column in batch.columns for buffer in column.buffers() if buffer)
    for (address, size), (following, _) in pairwise(sorted((buffer.address, buffer.size) for buffer in buffers)):
        if address + size > following:
            raise ValueError("two buffers overlap")
