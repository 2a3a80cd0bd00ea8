"""Results out: Arrow, Parquet or JSON Lines files that appear whole or not at all, and Arrow streams on stdout."""

import errno
import fcntl
import io
import json
import math
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from longnet_cli.errors import ConfigError, LongNetError

SHARD_VERSION = 1
OUTPUT_SUFFIXES = (".arrow", ".feather", ".parquet", ".jsonl")  # what names one file; any other name is a folder

_JSON_ROWS = 1024  # as Python objects at a time, which take some 40 bytes a number


@contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Turn a failed write (a full disk, a file too large) into a LongNetError that names what was being written.

    A closed pipe stays what it is: the reader has what it wants.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise LongNetError(f"{what}: cannot write: {error.strerror or error}") from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing under a temporary name in its folder; rename it when the block ends without an error.

    Missing folders are made. A reader, or a crash, sees the old file or the whole new one; what a killed writer of the
    same file left under its temporary name is removed. A device or a named pipe
    is written to directly. Raises ConfigError when the path cannot be opened, LongNetError when the end of the file
    cannot be written.
    """
    target = Path(path)
    try:
        direct = target.exists() and not stat.S_ISREG(target.stat().st_mode)
        if not direct:
            target = Path(os.path.realpath(path))  # not of the shell's >(command), whose name leads nowhere
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target)
        temporary, file = (target, open(target, "wb")) if direct else _new_temporary(target)  # noqa: SIM115
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (LongNetError if full else ConfigError)(f"{path}: cannot write: {error.strerror}") from error
    try:
        yield file
        with writing(path):
            file.flush()
            if not direct:
                os.fsync(file.fileno())
            file.close()
            if not direct:
                os.replace(temporary, target)
                sync_folder(target.parent)
    except BaseException:
        with suppress(OSError):  # on a full disk closing fails once more, and leaves the file closed
            file.close()
        if not direct:
            temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(target: Path) -> None:
    """Delete the temporary files of writers of `target` that were killed: a living one holds a lock on its own."""
    leftover = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.tmp")
    for name in filter(leftover.fullmatch, os.listdir(target.parent)):
        with suppress(OSError), open(target.parent / name, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (target.parent / name).unlink()


def _new_temporary(target: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `target`, open and locked, so that it is not taken for a leftover."""
    while True:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            file = open(temporary, "xb")  # noqa: SIM115 (its user closes it)
            with suppress(OSError):  # a network file system without locks, on which no leftover can be locked either
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:  # else another writer removed it before it was locked
                return temporary, file
            file.close()
        except FileExistsError:
            continue
        except BaseException:  # Ctrl-C and SIGTERM may come between any two lines
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_file(path: str | Path, data: bytes) -> None:
    """Write a whole small file, or leave the old one; errors as for `atomic_write`."""
    with atomic_write(path) as file, writing(path):
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_folder(output: str | Path) -> bool:
    """Whether an output names a folder of shards: neither `-` nor a file by its suffix, nor a pipe or a device.

    Raises ConfigError for an empty name.
    """
    if not str(output):  # in a script, a variable that is not set
        raise ConfigError("-o is empty: name a folder or a file")
    path = Path(output)
    special = path.exists() and not (path.is_file() or path.is_dir())
    return str(output) != "-" and not str(output).endswith(OUTPUT_SUFFIXES) and not special


class ShardWriter:
    """A context manager that writes record batches of one schema, each as it comes, to a path or to stdout.

    `NAME.parquet` is Parquet, `NAME.jsonl` JSON Lines (an object a row, null for what is not finite), any other name
    an uncompressed Arrow IPC file, and `-` an Arrow IPC stream on stdout. After an error nothing is left under the
    final name, and a stream on stdout ends without its end-of-stream marker, so that its reader knows. Raises
    ConfigError when stdout is a terminal or the path cannot be opened, LongNetError when a write fails.
    """

    def __init__(self, output: str | Path, schema: pa.Schema) -> None:
        self.output = output
        self.schema = schema
        self.rows = 0

    def __enter__(self) -> "ShardWriter":
        self._file = _open_output(self.output)
        self._sink = self._file.__enter__()
        try:
            with writing(self._name):
                self._writer = self._open_writer()
        except BaseException as error:
            self._file.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        """Append one batch (rows, columns as in the schema)."""
        with writing(self._name):
            self._writer.write_batch(batch)
            self._sink.flush()
        self.rows += batch.num_rows

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            try:
                with writing(self._name):
                    self._writer.close()
                    self._sink.flush()
            except BaseException as failure:
                self._file.__exit__(type(failure), failure, failure.__traceback__)
                raise
        elif str(self.output) != "-":  # a Parquet writer closes itself later, into a file that is gone
            with suppress(Exception):
                self._writer.close()
        self._file.__exit__(kind, error, traceback)

    @property
    def _name(self) -> str:
        return "stdout" if str(self.output) == "-" else str(self.output)

    def _open_writer(self) -> Any:  # each kind has write_batch and close
        if str(self.output) == "-":
            return ipc.new_stream(self._sink, self.schema)
        if str(self.output).endswith(".parquet"):
            import pyarrow.parquet as pq  # 30 ms that IPC output need not pay

            return pq.ParquetWriter(self._sink, self.schema, write_page_checksum=True)  # which reading verifies
        if str(self.output).endswith(".jsonl"):
            return _JsonLines(self._sink)
        return ipc.new_file(self._sink, self.schema)


def _open_output(output: str | Path) -> AbstractContextManager[BinaryIO]:
    if str(output) != "-":
        return atomic_write(output)
    if sys.stdout is None:
        raise ConfigError("stdout is closed: name an output file")
    if sys.stdout.isatty():
        raise ConfigError("Arrow data is binary and stdout is a terminal: pipe it, or name an output file")
    sys.stdout.flush()
    return nullcontext(cast(BinaryIO, _Stdout()))


class _Stdout(io.RawIOBase):
    """Stdout without a buffer, whose lock would crash the interpreter's end when a thread hangs in a write."""

    def __init__(self) -> None:
        self._handle = sys.stdout.fileno()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Write all of it, unlike a raw file, which a signal may stop half way."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            rest = rest[os.write(self._handle, rest) :]
        return size


class _JsonLines:
    """Writes batches as JSON Lines, behind the two methods that pyarrow's writers have."""

    def __init__(self, sink: BinaryIO) -> None:
        self._sink = sink

    def write_batch(self, batch: pa.RecordBatch) -> None:
        for start in range(0, batch.num_rows, _JSON_ROWS):
            rows = batch.slice(start, _JSON_ROWS).to_pylist()
            self._sink.write("".join(f"{_json_line(row)}\n" for row in rows).encode())

    def close(self) -> None:
        """JSON Lines have no end to write."""


def _json_line(row: Mapping[str, Any]) -> str:
    try:
        return json.dumps(row, allow_nan=False, ensure_ascii=False)
    except ValueError:  # the rare row that has a number which JSON has not
        return json.dumps(_finite(row), allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def token_schema(*, vocab_size: int, eos_id: int | None, tokenizer_sha256: str | None) -> pa.Schema:
    """The schema of a token shard: `doc_id: string, part: int32, input_ids: large_list<uint16 or int32> not null`.

    A document is one row, or neighbouring rows of one doc_id with `part` 0, 1, 2 ... uint16 where the vocabulary
    fits, as it halves the file. The metadata keys are `longnet.*`, values in decimal; what is not known is left out.
    """
    known: Mapping[str, object] = {
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
    return pa.schema(fields, metadata={key: str(value) for key, value in known.items() if value is not None})


def token_batch(
    schema: pa.Schema, doc_ids: Sequence[str], parts: Sequence[int], ends: Sequence[int], values: np.ndarray
) -> pa.RecordBatch:
    """Make one batch for a schema from `token_schema`: row i has the ids values[ends[i-1]:ends[i]].

    `values` is (tokens,) of the schema's id type; the batch is a view of it.
    """
    offsets = pa.array(np.array([0, *ends], np.int64))
    ids = pa.LargeListArray.from_arrays(offsets, pa.array(values), type=schema.field("input_ids").type)
    return pa.record_batch([pa.array(doc_ids, pa.string()), pa.array(parts, pa.int32()), ids], schema=schema)
