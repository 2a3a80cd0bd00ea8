"""Arrow IPC files and streams, which pyarrow reads from a map, and the checks that it leaves out.

    file: what its index lists     ┐
    stream or pipe: as they come   ┴--_ArrowBytes--> pyarrow --> batches, whose token ids stay in the file

pyarrow reads a file as a stream, too. Its own reader of files reads the index in another thread, which may still hold
our Python object when the interpreter ends: then the process aborts. A stream is read by the thread that asks for it.

A batch is a slice of the map, of which nothing is read until it is needed. The address of an array in the slice tells
where the array lies in the file. Token ids are read from there, not through the map: a file that shrinks under a map
kills the process. Small batches are read whole instead.
"""

import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc

from longnet_cli.basics.errors import DataError
from longnet_cli.data.files import StoredFile, StoredIds
from longnet_cli.data.tables import Table, numpy_dtype, reading

MAGIC = b"ARROW1"  # at both ends of a file, padded to 8 bytes at its start
INDEX_BYTES = 256 << 20  # more than any index of a file, which takes 24 bytes per batch
CONTINUATION = (
    b"\xff\xff\xff\xff"  # starts a message, which before Arrow 0.15 started with its length
)
END = CONTINUATION + bytes(4)  # of a stream
PADDING = 64  # more than the bytes between two messages of a file
MAPPED_BYTES = 1 << 16  # a disk reads as many ahead when one byte is touched


def open_ipc_stream(name: str, where: str, stream: Any) -> Table:
    """Open an Arrow stream as a table. Its batches stay in a StoredFile."""

    def end(count: int) -> None:
        if stream.read(1):
            raise DataError(
                f"{where}: more data follows the end of the Arrow stream; put each into its own file"
            )

    source = _ArrowBytes(where, stream)
    return source.table(name, "Arrow IPC stream", *source.sequence(end))


def open_pipe(name: str, where: str, pipe: Any) -> Table:
    """Open an Arrow file that comes through a pipe: between its magic and its index, it is an Arrow stream."""

    def end(count: int) -> None:
        tail = pipe.read(INDEX_BYTES)
        index = _read_index(where, tail)
        if not 0 <= len(tail) - 10 - int.from_bytes(tail[-10:-6], "little") < PADDING:
            raise DataError(
                f"{where}: more data follows the end of the Arrow file; give one file at a time"
            )
        _check_count(count, index)

    pipe.read(8)
    source = _ArrowBytes(where, pipe)
    return source.table(name, "Arrow IPC file", *source.sequence(end))


def open_file(name: str, where: str, stream: Any) -> Table:
    """Open an Arrow file that can seek, by the index at its end, which must account for every byte of its batches."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - 10))
    start = size - 10 - int.from_bytes(stream.read(10)[:4], "little")  # of the index
    stream.seek(start if start >= max(0, size - INDEX_BYTES) else max(0, size - 10))
    tail = stream.read(INDEX_BYTES)
    index = _read_index(where, tail)
    schema, messages = _listed(tail)
    stream.seek(0)
    covered = [(start, start)]
    if is_sequential(stream.read(12)):
        stream.seek(8)
        if not ipc.read_schema(stream).equals(index.schema, check_metadata=True):
            raise ValueError("the file has two different schemas")
        covered.append((8, stream.tell()))
    for (_, stop), (following, _) in pairwise(sorted([*covered, *messages])):
        if not 0 <= following - stop < PADDING:
            raise ValueError("its index has lost a batch, or lists one twice")

    def end(count: int) -> None:
        _check_count(count, index)
        stream.seek(0)
        stream.read(1)  # raises an error if the file has changed while the last batch was looked at

    source = _ArrowBytes(where, stream, schema, messages)
    return source.table(name, "Arrow IPC file", *source.sequence(end))


def _read_index(where: str, tail: bytes) -> ipc.RecordBatchFileReader:
    """Return the index in the last bytes of a file, for its schema and the number of its batches."""
    if not tail.endswith(MAGIC):
        raise DataError(f"{where}: truncated: the index at the end of the Arrow file is missing")
    return ipc.open_file(pa.BufferReader(MAGIC + b"\0\0" + tail))  # of memory, it starts no thread


def _check_count(count: int, index: ipc.RecordBatchFileReader) -> None:
    if count != index.num_record_batches:
        raise ValueError(
            f"{count} batches were read, and its index lists {index.num_record_batches}"
        )


def _listed(tail: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    """Return the message of the schema in an index, and where the messages that it lists start and stop in the file.

    These are the dictionaries, and then the batches. pyarrow has checked the index, the last bytes of a file. It is a
    table of FlatBuffers: a table starts with the distance to a list of where its fields are, and a reference is the
    distance to what it refers to. So a message that refers to the schema can be put before the index.
    """
    index = tail[-10 - int.from_bytes(tail[-10:-6], "little") : -10]

    def number(kind: str, place: int) -> int:
        return struct.unpack_from(f"<{kind}", index, place)[0]

    table = number("I", 0)
    fields = table - number("i", table)
    count = number("H", fields) // 2 - 2
    version, schema, *blocks = (
        table + number("H", fields + 4 + 2 * which) for which in range(min(count, 4))
    )
    messages: list[tuple[int, int]] = []
    for place in blocks:
        if place > table:  # not left out
            start = place + number("I", place)
            listed = struct.iter_unpack("<qi4xq", index[start + 4 :][: 24 * number("I", start)])
            messages += ((first, first + head + body) for first, head, body in listed)
    # the list of fields at 4, the table at 16: version at 24, kind (a schema) at 26, the reference at 20
    schema += number("I", schema) + 32 - 20
    head = struct.pack("<I5H2xiIhB5x", 16, 10, 12, 8, 10, 4, 12, schema, number("h", version), 1)
    message = head + index + bytes(-len(index) % 8)
    return CONTINUATION + len(message).to_bytes(4, "little") + message, messages


def is_sequential(head: bytes) -> bool:
    """Return whether an Arrow file is a stream after its magic, by its first 12 bytes. Polars files are not."""
    return head[8:] == CONTINUATION


class _ArrowBytes:
    """A binary file for pyarrow, `stream`. If it is a StoredFile, it is also `file`, and large reads are mapped.

    With `messages`, the stream is of the bytes `head` and of these places in the file. `last` is what pyarrow has read
    last, and `start` where that is in the file.
    """

    closed = False

    def __init__(
        self, where: str, stream: Any, head: bytes = b"", messages: Iterable[tuple[int, int]] = ()
    ) -> None:
        self.where, self.stream, self.tell = where, stream, stream.tell
        self.file = stream if isinstance(stream, StoredFile) else None
        self.map: pa.Buffer | None = pa.py_buffer(self.file.map()) if self.file else None
        self.last: pa.Buffer | None = None
        self.start = 0
        self.head, self.messages = head, iter(messages)
        self.stop: int | None = None  # of the message that is read
        if head:
            self._go_on()

    def _go_on(self) -> None:
        """Go to the next message, and after the last one to the mark for the end of a stream."""
        place = next(self.messages, None)
        if place is None:
            self.head, self.stop = self.head + END, sys.maxsize
        else:
            self.stop = place[1]
            self.stream.seek(place[0])

    def _check_place(self) -> None:
        if self.stop is not None and (beyond := self.tell() - self.stop) >= 0:
            if beyond:
                raise ValueError("a batch is longer than its index says")
            self._go_on()

    def read(self, size: int) -> bytes:
        if self.head:
            data, self.head = self.head[:size], self.head[size:]
            return data
        data = bytes(self.stream.read(size))
        self._check_place()
        return data

    def read_buffer(self, size: int) -> pa.Buffer:
        """Return the next bytes; pyarrow calls this instead of `read` for messages and their bodies."""
        self.start = self.tell()
        if self.head or self.map is None or size < MAPPED_BYTES:
            self.last = pa.py_buffer(self.read(size))
        else:
            self.last = self.map.slice(self.start, size)
            self.stream.seek(max(self.start, self.start + self.last.size - 1))
            self.stream.read(1)  # raises an error if the file has changed
            self._check_place()
        return self.last

    def sequence(self, end: Callable[[int], None]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """Return the schema and the batches of a stream. `end` gets their number, and checks what follows them."""
        reader = ipc.open_stream(self)

        def batches() -> Iterator[pa.RecordBatch]:
            count, place = 0, self.tell()
            for batch in reader:
                if self.stop is not None and reader.stats.num_replaced_dictionaries:
                    raise ValueError("it has two dictionaries for one column")
                yield batch
                count, place = count + 1, self.tell()
            if (
                self.stop is None and self.tell() == place
            ):  # pyarrow takes the end of the data for the marker
                raise DataError(
                    f"{self.where}: truncated after {count} batches: the end-of-stream marker is missing"
                )
            end(count)

        return reader.schema, batches()

    def table(
        self, name: str, format: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]
    ) -> Table:
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
        if (
            self.file is None
            or data is None
            or last is None
            or not 0 <= data.address - last.address < last.size
        ):
            return (
                None  # compressed, in another byte order, or not aligned: pyarrow has made a copy
            )
        dtype = numpy_dtype(array.type)
        start = self.start + data.address - last.address
        return StoredIds(self.file, start + array.offset * dtype.itemsize, dtype, len(array))


def _refuse_overlap(batch: pa.RecordBatch) -> None:
    """Raise ValueError when two buffers share memory: one of their offsets is wrong, which Arrow does not check."""
    buffers = (buffer for column in batch.columns for buffer in column.buffers() if buffer)
    for (address, size), (following, _) in pairwise(
        sorted((buffer.address, buffer.size) for buffer in buffers)
    ):
        if address + size > following:
            raise ValueError("two buffers overlap")
