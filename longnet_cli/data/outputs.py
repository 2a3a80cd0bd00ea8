"""Outputs: Arrow, Parquet or JSON Lines files that appear whole or not at all, and Arrow streams on stdout."""

import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from longnet_cli.basics.atomic import atomic_write, writing
from longnet_cli.basics.errors import ConfigError
from longnet_cli.basics.finite_json import to_json

SHARD_VERSION = 1
OUTPUT_SUFFIXES = (".arrow", ".feather", ".parquet", ".jsonl")  # names of one file; any other name is a folder
# Endings of files that we do not write. Any other ending, as in run.v2, may be a folder's.
_OTHER_SUFFIX = re.compile(
    r"\.(csv|tsv|txt|json|ndjson|npy|npz|pt|pth|bin|safetensors|h5|hdf5|pkl|pickle|gz|bz2|xz|zst|zip|tar|tgz|7z|ipc|pq|orc"
    r"|avro|lance|db|sqlite3?|duckdb|xlsx?|html|md|ya?ml|toml|xml|log)",
    re.IGNORECASE,
)

_JSON_ROWS = 1024  # turned into Python objects at a time, at some 40 bytes per number


def is_folder(output: str | Path, *, resume: bool = False) -> bool:
    """Return whether an output names a folder of shards, and not `-`, a file (by its suffix), a pipe or a device.

    Raises ConfigError for an empty name, for the name of a file of another kind, and where something else than a folder
    is to `resume`.
    """
    if not str(output):  # such as an unset variable in a script
        raise ConfigError("-o is empty: name a folder or a file")
    refuse_other_suffix("-o", output)
    path = Path(output)
    special = path.exists() and not (path.is_file() or path.is_dir())
    folder = str(output) != "-" and not str(output).endswith(OUTPUT_SUFFIXES) and not special
    if resume and not folder:
        raise ConfigError(f"{output}: only a folder of shards can be resumed: a single file or stream has no parts")
    return folder


def refuse_other_suffix(option: str, output: str | Path) -> None:
    """Raise ConfigError if an output, unless it exists, has the name of a kind of file that is not written."""
    suffix = Path(output).suffix
    other = _OTHER_SUFFIX.fullmatch(suffix) or suffix.lower() in {*OUTPUT_SUFFIXES} - {suffix}
    if other and not Path(output).exists():
        kinds = f"{', '.join(OUTPUT_SUFFIXES[:-1])} or {OUTPUT_SUFFIXES[-1]}"
        raise ConfigError(f"{option} {output}: {suffix} is not written: the name of a file ends in {kinds}")


class ShardWriter:
    """A context manager that writes record batches of one schema, each as it comes, to a path or to stdout.

    `NAME.parquet` is Parquet. `NAME.jsonl` is JSON Lines: one object per row, null for a number that is not finite.
    Any other name is an uncompressed Arrow IPC file, and `-` an Arrow IPC stream on stdout. After an error nothing is
    left under the final name, and a stream on stdout ends without its end-of-stream marker, so that its reader
    notices. Raises ConfigError when stdout is a terminal or the path cannot be opened, LongNetError when a write
    fails.
    """

    def __init__(self, output: str | Path, schema: pa.Schema) -> None:
        self.output = output
        self.schema = schema
        self.rows = 0

    def __enter__(self) -> "ShardWriter":
        with ExitStack() as stack:
            self._sink = stack.enter_context(_open_output(self.output))
            with writing(self._name):
                self._writer = self._open_writer()
            self._file = stack.pop_all()
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
            with self._file, writing(self._name):
                self._writer.close()
                self._sink.flush()
            return
        if str(self.output) != "-":  # otherwise a Parquet writer closes itself later, into a file that is gone
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
            import pyarrow.parquet as pq  # imported late: 30 ms that IPC output does not need

            try:
                return pq.ParquetWriter(self._sink, self.schema, write_page_checksum=True)  # verified on reading
            except pa.ArrowNotImplementedError as error:
                problem = f"Parquet does not hold a column ({error}): write Arrow, or leave it out of --keep"
                raise ConfigError(f"{self.output}: {problem}") from error
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
    """Stdout without a buffer: the buffer's lock would crash the interpreter at exit if a thread hangs in a write."""

    def __init__(self) -> None:
        self._handle = sys.stdout.fileno()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Write all of `data`. A raw file may stop half way when a signal comes."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            rest = rest[os.write(self._handle, rest) :]
        return size


class _JsonLines:
    """A writer of batches as JSON Lines, with the two methods that pyarrow's writers have."""

    def __init__(self, sink: BinaryIO) -> None:
        self._sink = sink

    def write_batch(self, batch: pa.RecordBatch) -> None:
        for start in range(0, batch.num_rows, _JSON_ROWS):
            rows = batch.slice(start, _JSON_ROWS).to_pylist()
            self._sink.write("".join(f"{to_json(row, ensure_ascii=False)}\n" for row in rows).encode())

    def close(self) -> None:
        """Do nothing: JSON Lines have no end to write."""


def token_schema(*, vocab_size: int, eos_id: int | None, tokenizer_sha256: str | None) -> pa.Schema:
    """Return the schema of a token shard.

    Its columns are `doc_id: string`, `part: int32 not null` and `input_ids: large_list<uint16 or int32> not null`. A
    document is one row, or neighbouring rows of one doc_id with `part` 0, 1, 2 ... Ids are uint16 where the
    vocabulary fits, which halves the file. The metadata keys are `longnet.*`, with numbers in decimal; unknown values
    are left out.
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
