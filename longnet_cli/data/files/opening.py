"""File formats, known by contents: Arrow IPC file or stream, Parquet, HDF5, JSON Lines, UTF-8 text.

Any of them may be compressed: the unpacked data is then read as from a pipe. A new format is one more case of
`open_input`, in `_OF_TABLES`, `_open_remote` and `_open_pipe`. Every failure is one line that names the file and the
batch.
"""

import codecs
import gzip
import io
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa

from longnet_cli.basics.errors import DataError, first_line, is_of_system

from . import arrow
from .column_choice import Wanted
from .file_kinds import (
    FASTA_SUFFIXES,
    JSON_SUFFIXES,
    PACKED_KINDS,
    SHARD_SUFFIXES,
    bare_name,
    begins_json_lines,
    sniff,
)
from .hdf5 import open_hdf5
from .input_files import STDIN, InputFile
from .jsonlines import open_json_lines
from .local_files import LocalFile, spooling
from .opened_inputs import (
    BYTE_ORDER_MARK,
    Pipe,
    StdinPipe,
    Table,
    Text,
    pick,
    reading,
)

PARQUET_BATCH_BYTES = 64 << 20
PARQUET_BATCH_ROWS = 1 << 20  # a row that repeats may take almost no bytes of a file
TEXT_BUFFER = 1 << 20  # bytes per read of a text, or of unpacked data
TEXT_PART = 16 << 20  # bytes of a text in memory at a time; a longer text is read in parts
BUSY_ANSWER = 4096  # bytes
REMOTE_BUFFER = 8 << 20  # bytes per request to a store
_ADVICE = {
    b"%PDF": ": pdftotext makes text of a PDF",
    b"PARE": ": Parquet with an encrypted footer is not read",
    b"\xfd7zXZ": ": unpack it first (xz -d)",
    b"BZh": ": unpack it first (bzip2 -d)",
    b"version ": ": it is a pointer of Git LFS, and `git lfs pull` fetches the file",
}
STEP = 1 << 12  # bytes unpacked at a time: so many or fewer are lost before damage


def open_input(input_file: InputFile, wanted: Wanted) -> Text | Table:
    """Open one input. JSON Lines are recognised by the column in `wanted`, otherwise by the usual keys.

    Raises DataError for an input that is missing, empty, damaged, or neither a table nor UTF-8 text.
    """
    with reading(input_file.where):
        if input_file.filesystem is not None:
            return _open_remote(input_file, wanted)
        if input_file.path is None:
            pipe = StdinPipe(TEXT_BUFFER)
            opened = _open_pipe(input_file, pipe, wanted)
            return replace(opened, ready=pipe.ready) if isinstance(opened, Table) else opened
        # A named pipe, the shell's <(command), or a kernel file (/proc), whose size is 0.
        if not input_file.size:
            return _open_pipe(input_file, Pipe(open(input_file.path, "rb")), wanted)
        file = LocalFile.open(input_file.path, input_file.where)
        opened = _open_file(input_file, sniff(file.read(8)), file, wanted)
        if isinstance(opened, Text):
            return opened
        if input_file.path == STDIN:
            opened = replace(opened, ready=lambda: True)
        if opened.format in ("Parquet", "HDF5"):  # which are not read in order
            return opened
        return replace(opened, fraction=lambda rows: file.tell() / file.size)


def _open_remote(input_file: InputFile, wanted: Wanted) -> Text | Table:
    """Open a file in a store."""
    # imported late: 20 ms that local input does not need
    from .remote import open_remote

    file = open_remote(input_file.filesystem, str(input_file.path), input_file.where)
    # A store that is busy answers with some lines. pyarrow tries again only if they fit what it asked for.
    kind = sniff(file.read(BUSY_ANSWER)[:8])
    file.seek(0)
    # The reader of Parquet asks for the columns that it needs; a buffer would read more
    if kind == "parquet":
        return _open_parquet(input_file.name, input_file.where, file)
    buffered = io.BufferedReader(file, REMOTE_BUFFER)
    if kind == "hdf5":
        return open_hdf5(input_file.name, input_file.where, buffered)
    return _open_pipe(input_file, Pipe(buffered), wanted)


def _open_file(input_file: InputFile, kind: str, file: LocalFile, wanted: Wanted) -> Text | Table:
    """Open a file on this machine."""
    file.seek(0)
    if opens := _OF_TABLES.get(kind):
        return opens(input_file.name, input_file.where, file)
    return _open_pipe(input_file, Pipe(io.BufferedReader(file, TEXT_BUFFER)), wanted)


def _open_pipe(input_file: InputFile, pipe: Pipe, wanted: Wanted) -> Text | Table:
    """Open a pipe, or text in a file. It is unpacked once: a file may unpack to itself, for ever."""
    kind = sniff(pipe.peek(8))
    if kind in PACKED_KINDS:
        unpacked = _Unpacked(kind, pipe, input_file.where)
        pipe = Pipe(io.BufferedReader(unpacked, TEXT_BUFFER))
        kind = sniff(pipe.peek(8))
    if kind in ("text", *PACKED_KINDS):
        return _open_text(input_file, pipe, wanted)
    if kind == "stream":
        return arrow.open_ipc_stream(input_file.name, input_file.where, pipe)
    if kind == "file" and arrow.is_sequential(pipe.peek(12)):
        return arrow.open_pipe(input_file.name, input_file.where, pipe)
    # its index may be at its end
    return _open_file(input_file, kind, LocalFile(_copy(pipe), input_file.where), wanted)


def _copy(pipe: Pipe) -> int:
    """Copy everything in a pipe to an unnamed temporary file, and return its descriptor."""
    with spooling(), tempfile.TemporaryFile() as copy:
        copy.writelines(iter(partial(pipe.read, REMOTE_BUFFER), b""))
        copy.flush()
        return os.dup(copy.fileno())


def _open_text(input_file: InputFile, pipe: Pipe, wanted: Wanted) -> Text | Table:
    """Open JSON Lines, otherwise one document, byte for byte: no newline translation, no normalisation."""
    name = bare_name(input_file.name)
    where = input_file.where
    head = pipe.peek(8)
    is_file = input_file.filesystem is not None or input_file.status is not None
    if not head:
        if not is_file:
            raise DataError(f"{where}: nothing came")
        if name.endswith((*SHARD_SUFFIXES, *JSON_SUFFIXES)):
            raise DataError(f"{where}: the file is empty (0 bytes)")
    # as a text, its headers would be read as if they were letters
    if name.endswith(FASTA_SUFFIXES):
        raise DataError(
            f"{where}: FASTA is not read: make JSON Lines of it, an object for each record"
        )
    if name.endswith(JSON_SUFFIXES) or begins_json_lines(head):
        return open_json_lines(input_file, pipe, wanted)
    if name.endswith(SHARD_SUFFIXES):
        advice = _advice(head) or ": is it truncated or damaged?"
        raise DataError(f"{where}: it does not begin as the table that its name says{advice}")
    parts = _decoded(pipe, where)
    return Text(input_file.name, next(parts, ""), where, rest=parts)  # also an empty one


def _advice(head: bytes) -> str:
    return next((advice for magic, advice in _ADVICE.items() if head.startswith(magic)), "")


def _decoded(pipe: Pipe, where: str) -> Iterator[str]:
    """Yield the text in a pipe, in parts of TEXT_PART bytes. Raises DataError for invalid UTF-8 and for a NUL."""

    def read(size: int) -> bytes:
        with reading(where):
            return pipe.read(size)

    first = read(TEXT_PART)
    data = first.removeprefix(BYTE_ORDER_MARK)
    position = len(first) - len(data)
    data += read(position)
    while data:
        following = read(TEXT_PART)
        bad = data.find(b"\0")
        try:
            text, used = codecs.utf_8_decode(data, "strict", not following)
        except UnicodeDecodeError as error:
            bad = error.start if bad < 0 else min(bad, error.start)
        if bad >= 0:
            what = f"the byte at offset {position + bad} is 0x{data[bad]:02x}"
            raise DataError(
                f"{where}: neither Arrow, Parquet nor UTF-8 text: {what}{_advice(data)}"
            )
        yield text
        position += used
        data = data[used:] + following


def _open_parquet(name: str, where: str, file: Any) -> Table:
    import pyarrow.parquet as pq  # imported late: 30 ms that Arrow input does not need

    # Threads of pyarrow would read ahead, and one that still holds `file` when the interpreter ends aborts the process.
    parquet = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
    _ = parquet.schema_arrow.names  # raises UnicodeDecodeError for a name that is not UTF-8
    metadata = parquet.metadata
    groups = [*map(metadata.row_group, range(metadata.num_row_groups))]
    if sum(group.num_rows for group in groups) != metadata.num_rows:
        raise DataError(f"{where}: the data is damaged or truncated (its row groups do not add up)")
    size = sum(group.total_byte_size for group in groups)
    rows = PARQUET_BATCH_BYTES * metadata.num_rows // max(1, size)
    rows = min(max(1, rows), PARQUET_BATCH_ROWS)

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        rows_so_far = 0
        values = 0  # in the documents' column
        for batch in parquet.iter_batches(rows, columns=columns, use_threads=False):
            values += _leaf_values(pick(batch, columns[0]))
            rows_so_far += batch.num_rows
            yield batch
        names = [*parquet.schema_arrow.names, columns[0]]
        leaves = map(metadata.schema.column, range(metadata.num_columns))
        roots = [_root(leaf.path, names) for leaf in leaves]
        first_leaf = roots.index(columns[0])
        expected = sum(group.column(first_leaf).num_values for group in groups)
        # A damaged page may hold fewer values than its column declares, which Parquet's reader does not report.
        if (rows_so_far, values) != (metadata.num_rows, expected):
            raise DataError(
                f"{where}: truncated: {rows_so_far} rows of {values} values, of the "
                f"{metadata.num_rows} rows of {expected} that it should hold"
            )

    def fraction(rows: int) -> float:
        return rows / max(1, metadata.num_rows)

    return Table(name, where, parquet.schema_arrow, batches, "Parquet", fraction=fraction)


_OF_TABLES = {
    "file": arrow.open_file,
    "stream": arrow.open_ipc_stream,
    "parquet": _open_parquet,
    "hdf5": open_hdf5,
}


def _root(path: str, names: Sequence[str]) -> str:
    """Return the table column, whose name may have dots, of a Parquet path such as `input_ids.list.element`."""
    return max((name for name in names if f"{path}.".startswith(f"{name}.")), key=len, default="")


def _leaf_values(column: pa.Array) -> int:
    """Return the number of values that Parquet counts in a column: an empty or missing list is one of them."""
    if not pa.types.is_nested(column.type) or pa.types.is_struct(column.type):
        return len(column)
    import pyarrow.compute as pc  # imported late: 20 ms that text does not need

    lengths = pc.fill_null(pc.list_value_length(column), 0)
    empty = pc.sum(pc.equal(lengths, 0), min_count=0).as_py()
    return int(empty) + _leaf_values(column.flatten())


class _Steps(Pipe):
    """A packed file that is read in steps: pyarrow unpacks all that one read has returned before it hands on any."""

    def read(self, size: int) -> bytes:
        return bytes(self._raw.read(min(size, STEP)))


class _Unpacked(io.RawIOBase):
    """A raw file that unpacks a binary file. Reading raises DataError, with `where`, for damaged or cut data."""

    def __init__(self, kind: str, packed: Any, where: str) -> None:
        self._kind = kind
        self._where = where
        self._damage: DataError | None = None
        if kind == "gzip":
            # `read` joins steps, and would lose all of them
            self._read = gzip.GzipFile(fileobj=packed, mode="rb").read1
        else:
            steps = pa.PythonFile(_Steps(packed), mode="r")
            self._read = pa.CompressedInputStream(steps, "zstd").read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        out = memoryview(buffer).cast("B")
        if self._damage:
            raise self._damage
        try:
            data = self._read(min(len(out), STEP))
        except (OSError, EOFError, zlib.error, pa.ArrowException, ValueError) as error:
            if is_of_system(error):
                raise  # an error of the disk
            self._damage = DataError(
                f"{self._where}: the {self._kind} data is damaged or truncated ({first_line(error)})"
            )
            raise self._damage from error
        out[: len(data)] = data
        return len(data)
