"""A data set of many shards in one folder, written so that `kill -9` at any moment loses at most one shard's work.

    shard-00000.arrow ...   finished shards: a shard gets its name only when it is whole
    _unfinished.json        a manifest of them, while more are to come; readers should refuse the folder
    _manifest.arrow         replaces it when the data set is complete (see `data.files.manifest`)

The manifest is the only record of progress. It is rewritten, atomically, after each shard. A shard that it does not
list does not count, and is written again. A resumed run skips as many documents as the listed shards hold.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import pyarrow as pa

from longnet_cli.basics.atomic import (
    check_unused,
    flush,
    locked_folder,
    remove_leftovers,
    write_file,
    writing,
)
from longnet_cli.basics.errors import ConfigError, DataError, LongNetError
from longnet_cli.basics.events import LeftOut
from longnet_cli.data.files import arrow
from longnet_cli.data.files.local_files import LocalFile
from longnet_cli.data.files.manifest import (
    KEY,
    UNFINISHED,
    Manifest,
    differing,
    marked,
    read_manifest,
)
from longnet_cli.data.files.opened_inputs import reading

from .row_writer import ShardWriter

ShardFormat = Literal["arrow", "parquet"]
T = TypeVar("T")


# Settings that are options, and written as these are
_OPTIONS = ("share", "pool", "span", "pattern", "chunk", "dtype")


def run_to_resume(folder: str | Path, *, resume: bool) -> Manifest | None:
    """Return the manifest of an earlier run that has finished shards in `folder`; None if there is none to resume.

    Raises ConfigError for a folder with other files, and for one with shards unless `resume`.
    """
    # A missing folder is made, or refused, when it is written. A link to itself cannot be.
    with writing(folder, ConfigError), suppress(FileNotFoundError, NotADirectoryError):
        Path(folder).stat()
    earlier = read_manifest(folder)
    if earlier is None:
        check_unused(folder)
        return None
    if not earlier.shards and not earlier.finished:
        return None
    if resume:
        return earlier
    held = "an unfinished data set: go on with --resume"
    if earlier.finished:
        held = "a finished data set: name a new folder"
    raise ConfigError(f"{folder} holds {held}, or remove it first")


class ShardFolder:
    """A context manager that writes record batches of one schema to `NAME-00000.arrow` ... (or .parquet) in a folder.

    The folder must be new or empty. With `resume` it may also be the folder of an earlier run with the same
    `settings`, finished or not: `totals` then says how many documents to skip, and `finished` whether nothing is
    left to do. Shards are byte for byte the same as without the interruption, if batches depend only on the documents
    since the last `end_shard`. The manifest gets the counts of `left_out`, which a resumed run counts again; a folder
    that is finished already gives its own counts to `left_out`. The manifest also gets the digests in `opened` (see
    `DocumentPass`).

    Raises ConfigError for a folder in use, other settings or a folder that cannot be written, DataError for a damaged
    shard of the earlier run, LongNetError when a write fails. After an error or Ctrl-C, the finished shards
    stay and the open one goes; after Ctrl-C, `cli.output.say_what_is_kept` says so. After a LongNetError without a
    finished shard, the folder goes, too.
    """

    def __init__(
        self,
        folder: str | Path,
        schema: pa.Schema,
        *,
        settings: Mapping[str, Any],
        left_out: LeftOut,
        name: str = "shard",
        format: ShardFormat = "arrow",
        tokenizer: dict[str, str] | None = None,
        resume: bool = False,
        opened: Sequence[tuple[str, str | None]] = (),
    ) -> None:
        """Keep `tokenizer` in the manifest. A `format` other than the default becomes one of the settings."""
        self.folder = Path(folder)
        self.schema = schema
        self._name = name
        self._suffix = f".{format}"
        self._resume = resume
        decisive = dict(settings)
        if format != "arrow":
            decisive["shard_format"] = format
        as_read_back = json.loads(json.dumps(decisive))
        self._manifest = Manifest(as_read_back, tokenizer=tokenizer)
        self._open = ExitStack()  # holds the writer, so that an error discards its file
        self._writer: ShardWriter | None = None
        self._counts: Counter[str] = Counter()
        self._left_out = left_out
        self._opened = opened  # it grows

    @property
    def totals(self) -> Counter[str]:
        """The sums of `rows`, `documents` and other counts over all finished shards (see `Manifest.totals`)."""
        return self._manifest.totals

    @property
    def finished(self) -> bool:
        """Return whether the data set is complete."""
        return self._manifest.finished

    @property
    def paths(self) -> list[Path]:
        """The finished shards, in order."""
        return [self.folder / shard["name"] for shard in self._manifest.shards]

    def __enter__(self) -> "ShardFolder":
        with ExitStack() as stack:
            stack.enter_context(locked_folder(self.folder))
            with writing(self.folder):
                self._take_over()
            self._lock = stack.pop_all()
        return self

    def unread(self, documents: Iterator[T]) -> Iterator[T]:
        """Read the documents of finished shards, and return the others.

        Raises DataError if those come from files that have changed since they were read, or if there are fewer.
        """
        done = self.totals["documents"]
        count = sum(1 for _ in islice(documents, done))
        # either run may have opened more files
        both = zip(self._opened, self._manifest.contents, strict=False)
        for (where, now), then in both:
            if now and then and now != then:
                raise DataError(
                    f"{where}: cannot resume: the file has changed since {self.folder} was begun: give the same "
                    "contents, or a new folder"
                )
        if count < done:
            raise DataError(
                f"{self.folder}: cannot resume: finished shards hold {done} documents, and the inputs {count}"
            )
        return documents

    def write(self, batch: pa.RecordBatch, **counts: int) -> None:
        """Append a batch to the open shard, and add the `counts` (`documents=3`, ...) to the counts of that shard."""
        if self._writer is None:
            self._writer = ShardWriter(self._next_path(), self.schema)
            self._open.enter_context(self._writer)
        self._writer.write(batch)
        self.count(**counts)

    def count(self, **counts: int) -> None:
        """Add to the counts of the open shard."""
        self._counts.update(counts)

    def end_shard(self) -> None:
        """Finish the open shard, if any. Call it only where a document ends: a resumed run starts with the next one."""
        if self._writer is None:
            return
        shard = {
            "name": self._next_path().name,
            "rows": self._writer.rows,
            "documents": 0,
            **self._counts,
        }
        self._writer = None
        self._counts = Counter()
        self._open.close()  # gives the file its final name
        self._manifest.shards.append(shard)
        self._note_inputs()
        self._write_manifest()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                self._open.__exit__(kind, error, traceback)
                if isinstance(error, LongNetError) and not self._manifest.shards:  # nothing is kept
                    with suppress(OSError):
                        os.remove(self.folder / UNFINISHED)
                        os.rmdir(self.folder)
            elif not self._manifest.finished:
                self.end_shard()
                self._note_inputs()
                self._manifest.left_out = self._left_out.counts()
                with ShardWriter(
                    self.folder / f"_manifest{self._suffix}", marked(self.schema)
                ) as writer:
                    writer.describe({KEY: self._manifest.to_json()})
                with writing(self.folder):
                    os.remove(self.folder / UNFINISHED)
                    flush(self.folder)
                self._manifest.finished = True
        finally:
            self._lock.close()

    def _take_over(self) -> None:
        """Start in an empty folder, or where the earlier run ended."""
        earlier = run_to_resume(self.folder, resume=self._resume)
        if earlier is not None:
            self._refuse_other_settings(earlier)
            for index, shard in enumerate(earlier.shards):
                path = self._path(index)
                if shard["name"] != path.name:
                    listed = f"its manifest lists {shard['name']!r} and not {path.name}"
                    raise DataError(f"{self.folder}: cannot resume: {listed}")
                _check_shard(path, self.schema, shard["rows"])
            self._manifest = earlier
        if self._manifest.finished:
            self._left_out.take(self.totals)
        else:
            self._refuse_unlisted()
            self._write_manifest()
        remove_leftovers(self.folder)

    def _refuse_unlisted(self) -> None:
        """Raise ConfigError for files that would be replaced, but for the one shard that a killed run may have left."""
        named_alike = {*self.folder.glob(f"{self._name}-*{self._suffix}")}
        for path in sorted(named_alike.difference(self.paths)):
            if not path.stem.removeprefix(f"{self._name}-").isdecimal():
                continue
            with suppress(DataError):
                if path == self._next_path():
                    _check_shard(path, self.schema, None)
                    continue
            raise ConfigError(
                f"{path} would be replaced, and the manifest does not list it: move it elsewhere"
            )

    def _note_inputs(self) -> None:
        digests = [digest for _, digest in self._opened]
        self._manifest.contents[: len(digests)] = digests

    def _write_manifest(self) -> None:
        """Write the manifest of the finished shards."""
        write_file(self.folder / UNFINISHED, self._manifest.to_json().encode())

    def _refuse_other_settings(self, earlier: Manifest) -> None:
        old = earlier.settings
        new = self._manifest.settings
        for name in differing(new, old):
            needed = "the same inputs and options"
            if name in _OPTIONS and name in old:
                needed = f"--{name} {old[name]}"
            raise ConfigError(
                f"{self.folder}: cannot resume: {name} was {old.get(name)!r} and is now {new.get(name)!r}: "
                f"give {needed}, or a new folder"
            )

    def _next_path(self) -> Path:
        return self._path(len(self._manifest.shards))

    def _path(self, index: int) -> Path:
        return self.folder / f"{self._name}-{index:05d}{self._suffix}"


def _check_shard(path: Path, schema: pa.Schema, rows: int | None) -> None:
    """Raise DataError unless a finished shard still has its index, schema and rows; its data is not read.

    Without `rows`, it may have any number.
    """
    try:
        with reading(str(path)), LocalFile.open(path, str(path)) as file:
            if path.suffix == ".parquet":
                import pyarrow.parquet as pq  # imported late: 30 ms that IPC output does not need

                parquet = pq.ParquetFile(file)
                stored = parquet.metadata.num_rows
                written = parquet.schema_arrow
                pq.ParquetWriter(again := pa.BufferOutputStream(), schema).close()
                # Parquet names the items of lists its own way
                schema = pq.read_schema(pa.BufferReader(again.getvalue()))
            else:
                table = arrow.open_file(path.name, str(path), file)
                stored = sum(batch.num_rows for batch in table.read([]))
                written = table.schema
        if rows not in (None, stored):
            raise DataError(f"{stored} rows instead of {rows}")
        if not written.equals(schema, check_metadata=True):
            raise DataError("its schema differs")
    except DataError as error:
        reason = str(error).removeprefix(f"{path}, ").removeprefix(f"{path}: ")
        raise DataError(
            f"{path}: cannot resume: a finished shard is missing or damaged ({reason})"
        ) from error
