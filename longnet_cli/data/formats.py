"""What is in a file: Arrow IPC file or stream, Parquet, JSON Lines or UTF-8 text, seen from its bytes, not its name.

A new format is one more case in `open_source`. Every failure is one line that names the file and the batch.
"""

import io
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc as ipc

from longnet_cli.data.inputs import Source, sniff
from longnet_cli.data.jsonlines import open_json_lines
from longnet_cli.data.tables import Pipe, Table, Text, reading
from longnet_cli.errors import DataError

PARQUET_BATCH_BYTES = 64 << 20
INDEX_BYTES = 256 << 20  # an Arrow file's index is smaller: it takes 24 bytes a batch
MAGIC = b"ARROW1\0\0"
REMOTE_BUFFER = 8 << 20  # bytes of one request to a store


def open_source(source: Source, column: str | None = None) -> Text | Table:
    """Open one input; `column` is the one asked for, by which JSON Lines of other keys are known as such.

    Raises DataError for what is missing, empty, damaged, or neither a table nor UTF-8 text.
    """
    if source.path is None:
        return _open_pipe(source, sys.stdin.buffer, column)
    if source.filesystem is not None:
        from longnet_cli.data.remote import open_remote  # 20 ms that local input need not pay

        return _open_file(source, open_remote(source), None, column)
    with reading(source.where):
        # A named pipe, the shell's <(command), or a file of the kernel's (/proc), whose size is 0.
        if not source.path.is_file() or source.path.stat().st_size == 0:
            return _open_pipe(source, open(source.path, "rb"), column)
        file = pa.memory_map(str(source.path))
        mapped = file.read_buffer()
        file.seek(0)
    return _open_file(source, file, mapped, column)


def _open_file(source: Source, file: Any, mapped: pa.Buffer | None, column: str | None) -> Text | Table:
    """`file` is a pyarrow file that can seek, `mapped` its memory where it is mapped."""
    with reading(source.where):
        kind = sniff(file.read(8))
        file.seek(0)
        if kind == "text":
            return _open_text(source, Pipe(io.BufferedReader(file)), column)
        if kind == "parquet":
            return _open_parquet(source, file)
        index = ipc.open_file(file) if kind == "file" else None
        stream = file if mapped else Pipe(pa.BufferedInputStream(file, REMOTE_BUFFER))
        if index:
            file.seek(8)
        return _open_stream(source, stream, kind, mapped, index)


def _open_pipe(source: Source, raw: Any, column: str | None) -> Text | Table:
    pipe = Pipe(raw)
    with reading(source.where):
        kind = sniff(pipe.peek(8))
        if kind == "text":
            return _open_text(source, pipe, column)
        if kind == "parquet":  # its index is at its end
            return _open_parquet(source, pa.BufferReader(pipe.read()))
        if kind == "file":
            pipe.read(8)
        return _open_stream(source, pipe, kind)


def _open_text(source: Source, pipe: Pipe, column: str | None) -> Text | Table:
    """JSON Lines, or else one document, byte for byte: no newline translation, no normalisation."""
    table = open_json_lines(source, pipe, column)
    if table:
        return table
    data = pipe.read()
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


def _open_stream(
    source: Source,
    stream: Any,
    kind: str,
    mapped: pa.Buffer | None = None,
    index: "ipc.RecordBatchFileReader | None" = None,
) -> Table:
    """An Arrow stream, or the stream that an IPC file is between its magic and its index.

    Files are read as streams too: an index that lost or repeats a batch would be believed, but the stream tells.
    """
    where = source.where
    reader = ipc.open_stream(stream)
    _check_names(reader.schema)
    if index is not None and not index.schema.equals(reader.schema, check_metadata=True):
        raise DataError(f"{where}: the data is damaged or truncated (the file has two different schemas)")

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        count = 0
        while True:
            with reading(f"{where}, batch {count}"):
                before = stream.tell()
                try:
                    batch = reader.read_next_batch()
                except StopIteration:
                    break
                _refuse_overlap(batch)
            yield batch
            count += 1
        # pyarrow takes the end of the data for the end of the stream. Only a marker tells the two apart.
        with reading(where):
            if stream.tell() == before:
                raise DataError(f"{where}: truncated after {count} batches: the end-of-stream marker is missing")
            tail = stream.read(1 if kind == "stream" else INDEX_BYTES)
            if kind == "stream":
                if tail:
                    raise DataError(f"{where}: more data follows the end of the Arrow stream; give one stream a file")
                return
            if not tail.endswith(b"ARROW1"):
                raise DataError(f"{where}: truncated: the index at the end of the Arrow file is missing")
            index_size = int.from_bytes(tail[-10:-6], "little")  # it stands before the magic
            if not 0 <= len(tail) - 10 - index_size < 64:
                raise DataError(f"{where}: more data follows the end of the Arrow file; give one file at a time")
            listed = (index or ipc.open_file(pa.BufferReader(MAGIC + tail))).num_record_batches
        if listed != count:
            raise DataError(
                f"{where}: the data is damaged or truncated ({count} batches were read, and its index lists {listed})"
            )

    return Table(source.name, where, reader.schema, batches, f"Arrow IPC {kind}", mapped)


def _check_names(schema: pa.Schema) -> None:
    """UnicodeDecodeError, which would else come when somebody looks at it, for a name that is not UTF-8."""
    _ = schema.names


def _refuse_overlap(batch: pa.RecordBatch) -> None:
    """ValueError when two buffers share memory: one of their places in the file is wrong, and Arrow believes it."""
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


def _open_parquet(source: Source, file: Any) -> Table:
    import pyarrow.parquet as pq  # 30 ms that Arrow input need not pay

    parquet = pq.ParquetFile(file, page_checksum_verification=True)
    _check_names(parquet.schema_arrow)
    metadata = parquet.metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    if sum(group.num_rows for group in groups) != metadata.num_rows:
        raise DataError(f"{source.where}: the data is damaged or truncated (its row groups do not add up)")
    rows = max(1, PARQUET_BATCH_BYTES * metadata.num_rows // max(1, sum(group.total_byte_size for group in groups)))

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        reader = parquet.iter_batches(batch_size=rows, columns=columns)
        index = seen = values = 0
        while True:
            with reading(f"{source.where}, batch {index}"):
                batch = next(reader, None)
                if batch is None:
                    break
                values += _leaf_values(batch.column(columns[0]))
            yield batch
            index += 1
            seen += batch.num_rows
        paths = (metadata.schema.column(leaf).path for leaf in range(metadata.num_columns))
        leaves = [leaf for leaf, path in enumerate(paths) if _root(path, parquet.schema_arrow.names) == columns[0]]
        expected = sum(group.column(leaves[0]).num_values for group in groups)
        # A page that is damaged may hold fewer values than its column says, which Parquet's reader does not mind.
        if (seen, values) != (metadata.num_rows, expected):
            raise DataError(
                f"{source.where}: truncated: {seen} rows of {values} values, of the {metadata.num_rows} rows of "
                f"{expected} that it should hold"
            )

    return Table(source.name, source.where, parquet.schema_arrow, batches, "Parquet")


def _root(path: str, names: Sequence[str]) -> str:
    """The column of a table, whose name may have dots, that one of Parquet (`input_ids.list.element`) belongs to."""
    return max((name for name in names if f"{path}.".startswith(f"{name}.")), key=len, default="")


def _leaf_values(column: pa.Array) -> int:
    """How many values Parquet counts in a column: an empty or missing list is one of them."""
    if not pa.types.is_nested(column.type):
        return len(column)
    return pc.sum(pc.max_element_wise(pc.list_value_length(column), 1)).as_py() or 0
