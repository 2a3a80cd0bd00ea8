"""Results out: Arrow or Parquet files that appear whole or not at all, and Arrow streams on stdout."""

import os
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from longnet_cli.errors import ConfigError

SHARD_VERSION = 1


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing under a temporary name in its folder; rename it when the block ends without an error.

    Missing folders are made. A reader, or a crash, sees the old file or the whole new one. A device or a named pipe
    is written to directly. Raises ConfigError when the path cannot be written.
    """
    target = Path(os.path.realpath(path))
    try:
        direct = target.exists() and not stat.S_ISREG(target.stat().st_mode)
        if not direct:
            target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target if direct else target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        file = open(temporary, "wb" if direct else "xb")  # noqa: SIM115 (closed below, before the rename)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write: {error.strerror}") from error
    if direct:
        with file:
            yield file
        return
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class ShardWriter:
    """A context manager that writes record batches of one schema, each as it comes, to a path or to stdout.

    `NAME.parquet` is Parquet, any other name an uncompressed Arrow IPC file, and `-` an Arrow IPC stream on stdout.
    After an error nothing is left under the final name, and a stream on stdout ends without its end-of-stream
    marker, so that its reader knows. Raises ConfigError when stdout is a terminal or the path cannot be written.
    """

    def __init__(self, output: str | Path, schema: pa.Schema) -> None:
        self.output = output
        self.schema = schema
        self.rows = 0

    def __enter__(self) -> "ShardWriter":
        self._file = _open_output(self.output)
        self._sink = self._file.__enter__()
        try:
            self._writer = self._open_writer()
        except BaseException as error:
            self._file.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        """Append one batch (rows, columns as in the schema)."""
        self._writer.write_batch(batch)
        self._sink.flush()
        self.rows += batch.num_rows

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self._writer.close()
                self._sink.flush()
            except BaseException as failure:
                self._file.__exit__(type(failure), failure, failure.__traceback__)
                raise
        elif str(self.output) != "-":  # a Parquet writer closes itself later, into a file that is gone
            with suppress(Exception):
                self._writer.close()
        self._file.__exit__(kind, error, traceback)

    def _open_writer(self) -> "ipc.RecordBatchStreamWriter":  # or a file or Parquet writer: all three write_batch
        if str(self.output) == "-":
            return ipc.new_stream(self._sink, self.schema)
        if str(self.output).endswith(".parquet"):
            import pyarrow.parquet as pq  # 30 ms that IPC output need not pay

            return pq.ParquetWriter(self._sink, self.schema)
        return ipc.new_file(self._sink, self.schema)


def _open_output(output: str | Path) -> AbstractContextManager[BinaryIO]:
    if str(output) != "-":
        return atomic_write(output)
    if sys.stdout.isatty():
        raise ConfigError("Arrow data is binary and stdout is a terminal: pipe it, or name an output file")
    sys.stdout.flush()
    return nullcontext(cast(BinaryIO, sys.stdout.buffer))


def token_schema(
    *, vocab_size: int, eos_id: int | None, tokenizer_sha256: str | None, total_tokens: int | None = None
) -> pa.Schema:
    """The schema of a token shard: `doc_id: string, input_ids: large_list<uint16 or int32> not null`.

    uint16 where the vocabulary fits, as it halves the file. The metadata keys are `longnet.*`, values in decimal;
    what is not known is left out.
    """
    known: Mapping[str, object] = {
        "longnet.version": SHARD_VERSION,
        "longnet.tokenizer_sha256": tokenizer_sha256,
        "longnet.vocab_size": vocab_size,
        "longnet.eos_id": eos_id,
        "longnet.total_tokens": total_tokens,
    }
    ids = pa.uint16() if vocab_size <= 1 << 16 else pa.int32()
    fields = [pa.field("doc_id", pa.string()), pa.field("input_ids", pa.large_list(ids), nullable=False)]
    return pa.schema(fields, metadata={key: str(value) for key, value in known.items() if value is not None})


def token_batch(schema: pa.Schema, rows: Sequence[tuple[str, np.ndarray]]) -> pa.RecordBatch:
    """Make one batch of (doc_id, (tokens,) integer ids) rows, for a schema from `token_schema`."""
    ids_type = schema.field("input_ids").type
    dtype = ids_type.value_type.to_pandas_dtype()
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(ids) for _, ids in rows], out=offsets[1:])
    values = np.empty(int(offsets[-1]), dtype)
    for row, (_, ids) in enumerate(rows):
        values[offsets[row] : offsets[row + 1]] = ids
    column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values), type=ids_type)
    return pa.record_batch([pa.array([doc_id for doc_id, _ in rows], pa.string()), column], schema=schema)
