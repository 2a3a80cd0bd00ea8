"""What is in a file: Arrow IPC file or stream, Parquet, or UTF-8 text, seen from its first 8 bytes, never its name.

A new format is one more case in `open_source`. Every failure is one line that names the file and the batch.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc

from longnet_cli.data.inputs import Source, sniff
from longnet_cli.errors import DataError

PARQUET_BATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class Text:
    """A document as text; `where` is "file" or "file, row 3" (rows count from 0)."""

    doc_id: str
    text: str
    where: str


@dataclass(frozen=True)
class Table:
    """An opened Arrow or Parquet input; `read` yields batches that hold at least the columns it is given."""

    name: str
    where: str
    schema: pa.Schema
    read: Callable[[list[str]], Iterator[pa.RecordBatch]]


def open_source(source: Source) -> Text | Table:
    if source.path is None:
        return _open_pipe(source, sys.stdin.buffer)
    with reading(source.where):
        if not source.path.is_file():  # a named pipe, or the shell's <(command)
            return _open_pipe(source, open(source.path, "rb"))
        with open(source.path, "rb") as opened:
            kind = sniff(opened.peek(8))
            if kind == "text":
                return _decode(source, opened.read())
        if kind == "parquet":
            return _open_parquet(source, str(source.path))
        mapped = pa.memory_map(str(source.path))
        if kind == "stream":
            return _open_stream(source, mapped)
        reader = ipc.open_file(mapped)
    return Table(source.name, source.where, reader.schema, lambda columns: _file_batches(reader, source.where))


def _open_pipe(source: Source, raw: Any) -> Text | Table:
    pipe = _Pipe(raw)
    with reading(source.where):
        kind = sniff(pipe.peek(8))
        if kind == "text":
            return _decode(source, pipe.read())
        if kind == "parquet":  # its index is at its end
            return _open_parquet(source, pa.BufferReader(pipe.read()))
        if kind == "file":  # after its magic, an IPC file is a stream and then an index
            pipe.read(8)
        return _open_stream(source, pipe, index_follows=kind == "file")


class _Pipe:
    """A pipe as a file object for pyarrow, which takes a short read for the end of the data: these reads are whole."""

    closed = False

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._head = b""
        self._position = 0

    def peek(self, size: int) -> bytes:
        """The first bytes, fewer only at the end; they stay in the pipe."""
        self._head = self.read(size)
        self._position = 0
        return self._head

    def read(self, size: int = -1) -> bytes:
        wanted = sys.maxsize if size is None or size < 0 else size
        parts = [self._head[:wanted]] if self._head else []
        self._head = self._head[wanted:]
        missing = wanted - sum(map(len, parts))
        while missing and (part := self._raw.read(min(missing, 1 << 30))):
            parts.append(part)
            missing -= len(part)
        self._position += wanted - missing
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True


def _decode(source: Source, data: bytes) -> Text:
    """A text file is one document, byte for byte: no newline translation, no normalisation."""
    if not data:
        raise DataError(f"{source.where}: the file is empty (0 bytes)")
    bad = data.find(b"\0")
    if bad < 0:
        try:
            return Text(source.name, data.decode("utf-8"), source.where)
        except UnicodeDecodeError as error:
            bad = error.start
    raise DataError(
        f"{source.where}: neither Arrow, Parquet nor UTF-8 text: the byte at offset {bad} is 0x{data[bad]:02x}"
    )


def _file_batches(reader: "ipc.RecordBatchFileReader", where: str) -> Iterator[pa.RecordBatch]:
    for index in range(reader.num_record_batches):
        with reading(f"{where}, batch {index}"):
            batch = reader.get_batch(index)
        yield batch


def _open_stream(source: Source, stream: Any, *, index_follows: bool = False) -> Table:
    where = source.where
    reader = ipc.open_stream(stream)

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        index = 0
        while True:
            before = stream.tell()
            with reading(f"{where}, batch {index}"):
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    break
            yield batch
            index += 1
        # pyarrow takes the end of the data for the end of the stream. Only a marker tells the two apart.
        if stream.tell() == before:
            raise DataError(f"{where}: truncated after {index} batches: the end-of-stream marker is missing")
        tail = stream.read(8)
        if index_follows:
            while piece := stream.read(1 << 20):
                tail = (tail + piece)[-8:]
            if not tail.endswith(b"ARROW1"):
                raise DataError(f"{where}: truncated: the index at the end of the Arrow file is missing")
        elif tail:
            raise DataError(f"{where}: more data follows the end of the Arrow stream; give one stream a file")

    return Table(source.name, where, reader.schema, batches)


def _open_parquet(source: Source, place: Any) -> Table:
    import pyarrow.parquet as pq  # 30 ms that Arrow input need not pay

    file = pq.ParquetFile(place, memory_map=isinstance(place, str))
    group_bytes = [file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups)]
    rows = max(1, PARQUET_BATCH_BYTES * file.metadata.num_rows // max(1, sum(group_bytes)))

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        reader = file.iter_batches(batch_size=rows, columns=columns)
        index = 0
        while True:
            with reading(f"{source.where}, batch {index}"):
                batch = next(reader, None)
            if batch is None:
                return
            yield batch
            index += 1

    return Table(source.name, source.where, file.schema_arrow, batches)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what pyarrow or the system says about an input into one line that names it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
            raise DataError(f"{what}: {error.strerror}") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{what}: the data is damaged or truncated ({reason})") from error
