"""Arrow IPC files and streams: a check that every message is there, and batches whose token ids stay on disk.

    file: index -> its messages ┐
    stream or pipe: as they come ┴--_MessageFile--> pyarrow's stream reader --> batches

pyarrow reads every message. For a batch in a local file, it gets a body whose memory is reserved but not filled. The
addresses of the batch's arrays in that memory tell where each array lies in the file. The requested columns are then
filled in, except token ids, which are read from the file when they are needed.
"""

import mmap
import struct
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.ipc as ipc

from longnet_cli.basics.errors import DataError
from longnet_cli.data.columns import stays_in_file
from longnet_cli.data.files import StoredFile, StoredIds
from longnet_cli.data.tables import Table, find_column, numpy_dtype, reading

MAGIC = b"ARROW1"  # at both ends of a file, padded to 8 bytes at its start
INDEX_BYTES = 256 << 20  # more than any index of a file, which takes 24 bytes per batch
CONTINUATION = b"\xff\xff\xff\xff"  # starts a message, which before Arrow 0.15 started with its length
PADDING = 64  # more than the bytes between two messages of a file

_SCHEMA, _BATCH = 1, 3  # from Arrow's MessageHeader
# in Python's mmap from 3.13 on; other systems than Linux reserve nothing, or have another number
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Message(NamedTuple):
    """An Arrow message: `head`, which is its prefix and metadata, and its `body`.

    If `place` is given, the body is not filled: its bytes start at that offset in the file. `size` is the size of head
    and body in the file.
    """

    head: bytes
    body: pa.Buffer
    size: int
    place: int | None = None


class _IndexEntry(NamedTuple):
    """An entry in the index of a file: the start of a message, and the sizes of its head and body."""

    start: int
    head: int
    body: int

    @property
    def stop(self) -> int:
        return self.start + self.head + self.body


def open_ipc_stream(name: str, where: str, stream: Any, file: StoredFile | None = None) -> Table:
    """Open an Arrow stream as a table. If it is a local file, pass it as `file` too: bodies can stay in it."""

    def messages() -> Iterator[Message]:
        yield from _Messages(where, stream, file)
        if stream.read(1):
            raise DataError(
                f"{where}: more data follows the end of the Arrow stream; put each stream into its own file"
            )

    return _Batches(name, where, messages(), file).table("Arrow IPC stream")


def open_pipe(name: str, where: str, pipe: Any) -> Table:
    """Open an Arrow file that comes through a pipe: between its magic and its index, it is an Arrow stream."""

    def messages() -> Iterator[Message]:
        pipe.read(8)
        reader = _Messages(where, pipe)
        yield from reader
        tail = pipe.read(INDEX_BYTES)
        if not tail.endswith(MAGIC):
            raise DataError(f"{where}: truncated: the index at the end of the Arrow file is missing")
        if not 0 <= len(tail) - 10 - int.from_bytes(tail[-10:-6], "little") < PADDING:
            raise DataError(f"{where}: more data follows the end of the Arrow file; give one file at a time")
        listed = ipc.open_file(pa.BufferReader(MAGIC + b"\0\0" + tail)).num_record_batches
        if listed != reader.batches:
            raise ValueError(f"{reader.batches} batches were read, and its index lists {listed}")

    return _Batches(name, where, messages(), None).table("Arrow IPC file")


def open_file(name: str, where: str, stream: Any, file: StoredFile | None = None) -> Table:
    """Open an Arrow file that can seek, by the index at its end, which must account for every byte."""
    schema, blocks = _read_index(stream)
    reader = _Messages(where, stream, file if _describe(schema.head[8:]).native else None)

    def messages() -> Iterator[Message]:
        yield schema
        for block in blocks:
            stream.seek(block.start)
            message = reader.next()
            if message is None or (message.size, message.body.size) != (block.head + block.body, block.body):
                raise ValueError("its index and its batches do not agree")
            yield message

    return _Batches(name, where, messages(), file).table("Arrow IPC file")


def is_sequential(head: bytes) -> bool:
    """Return whether an Arrow file is a stream after its magic, by its first 12 bytes. Polars files are not."""
    return head[8:] == CONTINUATION


class _Batches:
    """The batches in a sequence of messages, in order."""

    def __init__(self, name: str, where: str, messages: Iterator[Message], file: StoredFile | None) -> None:
        self.name, self.where, self.file = name, where, file
        self.feed = _MessageFile(messages)
        self.reader = ipc.open_stream(self.feed)
        self.schema = self.reader.schema
        _ = self.schema.names  # raises UnicodeDecodeError for a name that is not UTF-8

    def table(self, format: str) -> Table:
        return Table(self.name, self.where, self.schema, self.read, format, self.stored)

    def read(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the batches with `columns` filled in, except the ids of the first column if these stay in the file."""
        count = rows = 0
        while True:
            with reading(f"{self.where}, batch {count}", row=rows):
                try:
                    batch = self.reader.read_next_batch()
                    _refuse_overlap(batch)
                    self._fill(batch, columns)
                except StopIteration:
                    return
            yield batch
            count += 1
            rows += batch.num_rows

    def stored(self, array: pa.Array) -> StoredIds | None:
        """Return the place in the file of (tokens,) ids of the last batch; None if they are in memory. Ignore nulls."""
        place, body, data = self.feed.last.place, self.feed.last.body, array.buffers()[-1]
        if self.file is None or place is None or data is None or not _is_within(data, body):
            return None
        dtype = numpy_dtype(array.type)
        start = place + data.address - body.address + array.offset * dtype.itemsize
        return StoredIds(self.file, start, dtype, len(array))

    def _fill(self, batch: pa.RecordBatch, columns: Sequence[str]) -> None:
        """Read the columns of a batch into the reserved memory of the last message."""
        place, body = self.feed.last.place, self.feed.last.body
        if self.file is None or place is None:
            return
        memory = memoryview(body)
        for index, column in enumerate(columns):
            column_place = find_column(self.schema, column)
            assert column_place is not None
            buffers = batch.column(column_place.root).buffers()
            if index == 0 and not column_place.fields and stays_in_file(column_place.type):
                buffers.pop()  # the ids, or the numbers of vectors, stay in the file
            for buffer in buffers:
                if buffer is None or not buffer.size:
                    continue
                if _is_within(buffer, body):
                    start = buffer.address - body.address
                    self.file.read_at(place + start, memory[start : start + buffer.size])
                elif batch.num_rows:  # pyarrow made it from memory that is not filled
                    raise ValueError("a buffer is not where it should be")


class _MessageFile:
    """A file object that passes messages to pyarrow's stream reader. `last` is the message that it passed last."""

    closed = False

    def __init__(self, messages: Iterator[Message]) -> None:
        self._messages = messages
        self._rest: list[pa.Buffer] = []
        self.last = Message(b"", pa.py_buffer(b""), 0)

    def read_buffer(self, size: int) -> pa.Buffer:
        while not self._rest:
            message = next(self._messages, None)
            if message is None:
                return pa.py_buffer(b"")
            self.last = message
            self._rest = [buffer for buffer in (pa.py_buffer(message.head), message.body) if buffer.size]
        buffer = self._rest.pop(0)
        if size < buffer.size:
            self._rest.insert(0, buffer.slice(size))
        return buffer.slice(0, size)

    def read(self, size: int) -> bytes:
        return bytes(self.read_buffer(size))

    def readable(self) -> bool:
        return True


class _Messages:
    """The messages of a stream, up to the marker at its end. `batches` counts the record batches so far."""

    def __init__(self, where: str, stream: Any, file: StoredFile | None = None) -> None:
        """Read from `stream`, whose `read` is short only at the end. Pass it as `file` too if bodies can stay in it."""
        self.where, self.stream, self.file = where, stream, file
        self.batches = 0

    def __iter__(self) -> Iterator[Message]:
        while message := self.next():
            yield message

    def next(self) -> Message | None:
        """Return the next message, or None for the end marker.

        Raises DataError if the data ends without the marker, ValueError for a message that is cut short or damaged.
        """
        prefix = mark = self.stream.read(4)
        if not mark:
            raise DataError(
                f"{self.where}: truncated after {self.batches} batches: the end-of-stream marker is missing"
            )
        if mark == CONTINUATION:
            mark = self.stream.read(4)
            prefix += mark
        size = int.from_bytes(mark, "little", signed=True)
        if len(mark) < 4 or size < 0:
            raise ValueError("expected an Arrow message, found other data")
        if size == 0:
            return None
        metadata = _read_whole(self.stream, size)
        kind, body_size, native = _describe(metadata)
        if kind == _SCHEMA and not native:
            self.file = None  # pyarrow swaps the bytes of each number, so it needs them in memory
        self.batches += kind == _BATCH
        head, size = CONTINUATION + mark + metadata, len(prefix) + size + body_size
        if self.file is None or kind != _BATCH or not native or not body_size:
            return Message(head, pa.py_buffer(_read_whole(self.stream, body_size)), size)
        place = self.file.tell()
        if body_size > self.file.size - place:
            raise ValueError(f"{self.file.size - place} bytes are left of the {body_size} of a batch")
        self.file.seek(place + body_size)
        body = mmap.mmap(-1, body_size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        return Message(head, pa.py_buffer(body), size, place)


def _read_whole(stream: Any, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise ValueError(f"{len(data)} bytes are left of the {size} of a message")
    return data


def _read_index(stream: Any) -> tuple[Message, list[_IndexEntry]]:
    """Return the schema of a file as a message, and the blocks that its index lists: dictionaries, then batches.

    Raises ValueError for a missing index, and for a byte of the file that belongs to two blocks or to none.
    """
    stream.seek(0, 2)
    size = stream.tell()
    stream.seek(max(0, size - 10))
    tail = stream.read(10)
    index_size = int.from_bytes(tail[:4], "little", signed=True)
    if not tail.endswith(MAGIC) or not 0 < index_size <= size - 18:
        raise ValueError("truncated: the index at the end of the Arrow file is missing")
    stop = size - 10 - index_size
    stream.seek(stop)
    index = _read_whole(stream, index_size)
    listed = ipc.open_file(pa.BufferReader(MAGIC + b"\0\0" + index + tail))  # verifies the index
    root = _root(index)
    blocks = [block for slot in (2, 3) for block in _blocks(index, root, slot)]
    ordered = sorted(blocks)
    first = ordered[0].start if ordered else stop
    if not 8 < first <= stop:
        raise ValueError("its index lists a batch outside of the file")
    stream.seek(8)
    front = _read_whole(stream, first - 8)
    schema = _front_schema(front)
    if not listed.schema.equals(ipc.read_schema(pa.py_buffer(schema.head)), check_metadata=True):
        raise ValueError("the file has two different schemas")
    for block, following in pairwise([_IndexEntry(8, 0, schema.size), *ordered, _IndexEntry(stop, 0, 0)]):
        if not block.stop <= following.start < block.stop + PADDING:
            raise ValueError("its index has lost a batch, or lists one twice")
        stream.seek(block.stop)
        between = _read_whole(stream, following.start - block.stop)
        if between.strip(b"\0") not in (b"", CONTINUATION if following.start == stop else b""):
            raise ValueError("its index has lost a batch")
    return schema, blocks


def _front_schema(front: bytes) -> Message:
    """Return the schema message of a file. `front` holds the bytes between the file's magic and its first block.

    Polars leaves out the prefix with the length of a message.
    """
    for prefix in (CONTINUATION, b""):
        start = len(prefix) + 4
        size = int.from_bytes(front[start - 4 : start], "little", signed=True)
        rest = len(front) - start - size
        if front.startswith(prefix) and size > 0 and rest >= 0 and (prefix or rest < PADDING):
            return Message(CONTINUATION + front[start - 4 : start + size], pa.py_buffer(b""), start + size)
    return Message(CONTINUATION + len(front).to_bytes(4, "little") + front, pa.py_buffer(b""), len(front))


# --- the few fields of Arrow's flatbuffers that pyarrow does not expose -----------------------------------------------


class _MessageHeader(NamedTuple):
    """The kind of a message, the bytes of its body, and `native`.

    A native batch is not compressed. A native schema has the byte order of this machine.
    """

    kind: int
    body: int
    native: bool


def _describe(metadata: bytes) -> _MessageHeader:
    """Describe a message by its metadata. Raises ValueError for an offset that points outside of the metadata.

    pyarrow verifies the rest when it gets the message.
    """
    try:
        root = _root(metadata)
        kind, header, body = (_field(metadata, root, slot) for slot in (1, 2, 3))
        message = _MessageHeader(
            metadata[kind] if kind else 0, struct.unpack_from("<q", metadata, body)[0] if body else 0, False
        )
        if header and message.kind in (_SCHEMA, _BATCH):
            table = header + struct.unpack_from("<I", metadata, header)[0]
            if message.kind == _BATCH:
                return message._replace(native=_field(metadata, table, 3) is None)  # compression
            big = _field(metadata, table, 0)  # endianness
            return message._replace(native=bool(big and metadata[big]) == (sys.byteorder == "big"))
        return message
    except (struct.error, IndexError):
        raise ValueError("expected an Arrow message, found other data") from None


def _root(data: bytes) -> int:
    return int(struct.unpack_from("<I", data)[0])


def _field(data: bytes, table: int, slot: int) -> int | None:
    """Return the offset in `data` of a field of a table, or None where the field has its default."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    entry = 4 + 2 * slot
    if entry + 2 > struct.unpack_from("<H", data, fields)[0]:
        return None
    offset = struct.unpack_from("<H", data, fields + entry)[0]
    return table + offset if offset else None


def _blocks(index: bytes, root: int, slot: int) -> list[_IndexEntry]:
    """Return the blocks in a field of a verified index."""
    field = _field(index, root, slot)
    if field is None:
        return []
    vector = field + struct.unpack_from("<I", index, field)[0]
    count = struct.unpack_from("<I", index, vector)[0]
    return [_IndexEntry(*struct.unpack_from("<qi4xq", index, vector + 4 + 24 * item)) for item in range(count)]


def _is_within(buffer: pa.Buffer, memory: pa.Buffer) -> bool:
    return 0 <= buffer.address - memory.address <= memory.size - buffer.size


def _refuse_overlap(batch: pa.RecordBatch) -> None:
    """Raise ValueError when two buffers share memory: one of their offsets is wrong, which Arrow does not check."""
    places = [
        (buffer.address, buffer.size)
        for column in batch.columns
        for buffer in column.buffers()
        if buffer is not None and buffer.size
    ]
    places.sort()
    for (address, size), (following, _) in pairwise(places):
        if address + size > following:
            raise ValueError("two buffers overlap")
