"""Writers of rows: Arrow, Parquet or JSON Lines files that appear whole or not at all, and streams on stdout.

The schemas of rows of tokens, and the columns that documents carry to an output (`--keep`).
"""

import io
import os
import select
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from longnet_cli.basics.atomic import atomic_write, writing
from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.basics.finite_json import to_json
from longnet_cli.data.documents.token_documents import Document, Unread

from .output_paths import name_of_output

SHARD_VERSION = 1
_JSON_ROWS = 1024  # turned into Python objects at a time, at some 40 bytes per number


class ShardWriter:
    """A context manager that writes record batches of one schema, each as it comes, to a path or to stdout.

    `NAME.parquet` is Parquet. `NAME.jsonl` is JSON Lines: one object per row, null for a number that is not finite.
    `NAME.npy` has the column `embedding` alone, as an array of NumPy.
    Any other name is an uncompressed Arrow IPC file, and `-` an Arrow IPC stream on stdout, or JSON Lines if `lines`.
    After an error nothing is left under the final name, and a stream on stdout ends in the middle of a message, so that
    its reader notices: pyarrow takes the end of the data for the end of a stream. Raises ConfigError when stdout is a
    terminal or the path cannot be opened, LongNetError when a write fails.
    """

    def __init__(self, output: str | Path, schema: pa.Schema, *, lines: bool = False) -> None:
        self.output = str(output)
        self.schema = schema
        self.lines = lines
        self.rows = 0
        self._between_messages = True
        self._name = name_of_output(output)  # in messages

    def __enter__(self) -> "ShardWriter":
        with ExitStack() as stack:
            self._sink = stack.enter_context(_open_output(self.output, self.lines))
            with writing(self._name):
                self._writer = self._open_writer()
            self._file = stack.pop_all()
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        """Append one batch (rows, columns as in the schema)."""
        self._between_messages = False
        with writing(self._name):
            self._writer.write_batch(batch)
            self._sink.flush()
        self._between_messages = True
        self.rows += batch.num_rows

    def describe(self, metadata: Mapping[bytes, str]) -> None:
        """Store metadata once, unlike that of the schema: of a batch without rows, or of a Parquet file."""
        with writing(self._name):
            if isinstance(self._writer, ipc.RecordBatchFileWriter):
                empty = pa.RecordBatch.from_pylist([], schema=self.schema)
                self._writer.write_batch(empty, custom_metadata=metadata)
            else:
                self._writer.add_key_value_metadata(metadata)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            with self._file, writing(self._name):
                self._writer.close()
                self._sink.flush()
            return
        if self.output != "-":
            # a Parquet writer closes itself later, into a file that is gone
            with suppress(Exception):
                self._writer.close()
        elif self._between_messages and not self.lines:
            cast(_Stdout, self._sink).cut()
        self._file.__exit__(kind, error, traceback)

    def _open_writer(self) -> Any:  # each kind has write_batch and close
        if self.lines:
            return _JsonLines(self._sink, self.schema)
        if self.output == "-":
            return ipc.new_stream(self._sink, self.schema)
        _, dot, ending = self.output.rpartition(".")
        opens = _WRITERS.get(f"{dot}{ending}", ipc.new_file)
        try:
            return opens(self._sink, self.schema)
        except pa.ArrowNotImplementedError as error:  # Arrow files hold all types
            problem = f"Parquet does not hold a column ({error})"
            advice = "write Arrow, or leave it out of --keep"
            raise ConfigError(f"{self.output}: {problem}: {advice}") from error


def _parquet_writer(sink: BinaryIO, schema: pa.Schema) -> Any:
    import pyarrow.parquet as pq  # imported late: 30 ms that IPC output does not need

    return pq.ParquetWriter(sink, schema, write_page_checksum=True)  # verified on reading


def _open_output(output: str, lines: bool) -> AbstractContextManager[BinaryIO]:
    if output != "-":
        return atomic_write(output)
    if sys.stdout is None:
        raise ConfigError("stdout is closed: name an output file")
    if sys.stdout.isatty() and not lines:
        raise ConfigError(
            "Arrow data is binary and stdout is a terminal: pipe it, or name an output file"
        )
    sys.stdout.flush()
    return nullcontext(cast(BinaryIO, _Stdout(sys.stdout.fileno(), "wb", closefd=False)))


class _Stdout(io.FileIO):
    """Stdout without a buffer: the buffer's lock would crash the interpreter at exit if a thread hangs in a write."""

    def write(self, data: Any) -> int:
        """Write all of `data`. A raw file may stop half way when a signal comes."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            rest = rest[os.write(self.fileno(), rest) :]
        return size

    def cut(self) -> None:
        """Write the beginning of a message, unless the reader has left or does not read."""
        with suppress(OSError):
            if select.select([], [self], [], 0)[1]:
                self.write(b"\xff\xff\xff\xff\x08\0\0\0")  # a message of 8 bytes, which do not come


class _JsonLines:
    """A writer of batches as JSON Lines, which is made and used as pyarrow's writers are."""

    def __init__(self, sink: BinaryIO, schema: pa.Schema) -> None:
        self._sink = sink

    def write_batch(self, batch: pa.RecordBatch) -> None:
        for start in range(0, batch.num_rows, _JSON_ROWS):
            rows = batch.slice(start, _JSON_ROWS).to_pylist()
            self._sink.write(
                "".join(f"{to_json(row, ensure_ascii=False)}\n" for row in rows).encode()
            )

    def close(self) -> None:
        """Do nothing: JSON Lines have no end to write."""


class _NumpyArray:
    """A writer of the column `embedding` as an array (rows, dim), made and used as pyarrow's writers are."""

    def __init__(self, sink: BinaryIO, schema: pa.Schema) -> None:
        if "embedding" not in schema.names:
            raise ConfigError(
                "an array of NumPy (.npy) holds one vector for each row: name an .arrow file"
            )
        self._sink = sink
        self._kind = schema.field("embedding").type
        self._rows = 0
        self._write_header()

    def _write_header(self) -> None:  # it has room for any number of rows
        dtype = np.dtype(self._kind.value_type.to_pandas_dtype())
        shape = (self._rows, self._kind.list_size)
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._sink, header)

    def write_batch(self, batch: pa.RecordBatch) -> None:
        self._sink.write(batch["embedding"].flatten().to_numpy().tobytes())
        self._rows += batch.num_rows

    def close(self) -> None:
        self._sink.seek(0)
        self._write_header()


# By the ending of a file's name; files of any other name are Arrow IPC files
_WRITERS = {".jsonl": _JsonLines, ".npy": _NumpyArray, ".parquet": _parquet_writer}


def token_schema(
    *,
    vocab_size: int,
    eos_id: int | None,
    tokenizer_sha256: str | None,
    kept: Sequence[pa.Field] = (),
) -> pa.Schema:
    """Return the schema of a token shard.

    Its columns are `doc_id: string`, `part: int32 not null` and `input_ids: large_list<uint16 or int32> not null`, and
    then the `kept` ones. Raises ConfigError for a kept one of these names. A
    document is one row, or neighbouring rows of one doc_id with `part` 0, 1, 2 ... Ids are uint16 where the
    vocabulary fits, which halves the file. The metadata keys are `longnet.*`, with numbers in decimal; unknown values
    are left out.
    """
    known = {
        "longnet.version": SHARD_VERSION,
        "longnet.tokenizer_sha256": tokenizer_sha256,
        "longnet.vocab_size": vocab_size,
        "longnet.eos_id": eos_id,
    }
    ids = pa.uint16() if vocab_size <= 1 << 16 else pa.int32()
    fields = [
        pa.field("doc_id", pa.string()),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("input_ids", pa.large_list(ids), nullable=False),
    ]
    return row_schema(fields, kept, known)


def token_batch(
    schema: pa.Schema,
    doc_ids: Sequence[str],
    parts: Sequence[int],
    ends: Sequence[int],
    values: np.ndarray,
    kept: Sequence[pa.Array] = (),
) -> pa.RecordBatch:
    """Make one batch for a schema from `token_schema`: row i has the ids values[ends[i-1]:ends[i]].

    `values` is (tokens,) of the schema's id type; the batch is a view of it. `kept` are its other columns.
    """
    offsets = pa.array(np.array([0, *ends], np.int64))
    ids = pa.LargeListArray.from_arrays(
        offsets,
        pa.array(values),
        type=schema.field("input_ids").type,
    )
    return pa.record_batch(
        [pa.array(doc_ids, pa.string()), pa.array(parts, pa.int32()), ids, *kept], schema=schema
    )


def first_kept(
    documents: Iterable[Document], of_text: Sequence[pa.Field] = ()
) -> tuple[list[pa.Field], Iterator[Document]]:
    """Return the columns that the first readable document carries along, and all documents.

    If that document was made from text, the columns `of_text` come first.
    """
    taken: list[Document] = []
    fields: list[pa.Field] = []
    remaining = iter(documents)
    for document in remaining:
        taken.append(document)
        if not isinstance(document, Unread):
            fields += of_text if getattr(document, "tokenizer", None) else ()
            fields += [pa.field(name, value.type) for name, value in document.kept.items()]
            break
    return fields, chain(taken, remaining)


def row_schema(
    fields: Iterable[pa.Field],
    kept: Sequence[pa.Field],
    known: Mapping[str, object],
) -> pa.Schema:
    """Return the schema of an output: `fields`, then `kept`, and the metadata `known` without unknown values.

    Raises ConfigError for a name that two of them have.
    """
    metadata = {key: str(value) for key, value in known.items() if value is not None}
    schema = pa.schema([*fields, *kept], metadata=metadata)
    if taken := Counter(schema.names) - Counter({*schema.names}):
        raise ConfigError(f"--keep {min(taken)}: the output has a column of this name")
    return schema


def kept_columns(carriers: Sequence[Any], fields: Sequence[pa.Field]) -> list[pa.Array]:
    """Return the columns `fields` of rows. Raises DataError for a value of another type.

    A carrier is a document, or a result for one: `where` is its file and row, `kept` the values that it carries along.
    """
    return [_kept_column(carriers, field) for field in fields]


def _kept_column(carriers: Sequence[Any], field: pa.Field) -> pa.Array:
    cells = [pa.nulls(0, field.type)]  # `pa.array` would refuse null lists
    for carrier in carriers:
        value = carrier.kept[field.name]
        try:
            same = value.type == field.type
            cells.append(pa.repeat(value if same else value.cast(field.type), 1))
        except pa.ArrowException as error:
            raise DataError(
                f"{carrier.where}: {field.name!r} is {value.type}, and {field.type} in the first document"
            ) from error
    return pa.concat_arrays(cells)
