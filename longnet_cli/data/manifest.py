"""The manifest of a folder of shards: one file, which other tools read as one more shard, without rows.

    _unfinished.json    while more shards are to come; readers refuse the folder
    _manifest.arrow     (or _manifest.parquet) when all are there: a table with the schema of the shards and 0 rows,
                        with the same JSON under `longnet.manifest` in the metadata of a batch (or of the file)

The metadata of the schema has the key alone: a schema stands in its file twice, and the JSON has the tokenizer.
Folders written before this was so have the JSON there, and are read.

So a finished folder holds only tables of one schema, and a tool that reads all its files reads the data set.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc

from longnet_cli.basics.configuration import read_text
from longnet_cli.basics.errors import DataError, LongNetError
from longnet_cli.basics.sealed import seal, unseal
from longnet_cli.data.files import read_error
from longnet_cli.data.tables import first_line

UNFINISHED = "_unfinished.json"
FINISHED = ("_manifest.arrow", "_manifest.parquet")
MANIFEST_VERSION = 1
LEFT_OUT = ("skipped", "skipped_files", "empty")  # counts of documents that no shard has
KEY = b"longnet.manifest"


@dataclass
class Manifest:
    """The record of a folder's shards.

    `settings` holds everything that decides the bytes of the shards: inputs and options. `shards` has one dict per
    shard, in order: `name`, `rows`, and the counts that were given to `ShardFolder.write`, such as `documents`.
    `left_out` counts what no shard has, as a LeftOut does. `tokenizer` is the value of `Tokenizer.description`.
    `contents` has the digest of each input that was opened, in order (`content_digest`).
    """

    settings: dict[str, Any]
    finished: bool = False
    shards: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    tokenizer: dict[str, str] | None = None
    contents: list[str | None] = field(default_factory=list)

    @property
    def totals(self) -> Counter[str]:
        """The sums of `rows`, `documents` and other counts over finished shards, and of what is left out unless 0."""
        totals = Counter({kind: count for kind, count in self.left_out.items() if count})
        for shard in self.shards:
            totals.update({name: count for name, count in shard.items() if name != "name"})
        return totals

    def to_json(self) -> str:
        known = {"tokenizer": self.tokenizer, "contents": self.contents}
        content = {"settings": self.settings, "totals": dict(self.totals), "shards": self.shards}
        return seal(
            MANIFEST_VERSION, content | {name: value for name, value in known.items() if value}
        )


def marked(schema: pa.Schema) -> pa.Schema:
    """Return the schema of a manifest, a table without rows, whose batch or file has the JSON under KEY."""
    return schema.with_metadata({**(schema.metadata or {}), KEY: ""})


def read_manifest(folder: str | Path) -> Manifest | None:
    """Return the manifest of a folder of shards, or None. Raises DataError for one that cannot be read."""
    for name in (UNFINISHED, *FINISHED):
        path = Path(folder, name)
        try:
            text = read_text(path) if name == UNFINISHED else manifest_text(name, path.read_bytes())
            content = unseal(text, MANIFEST_VERSION)
            totals = content.pop("totals")
            left_out = {kind: totals[kind] for kind in LEFT_OUT if kind in totals}
            manifest = Manifest(finished=name != UNFINISHED, **content, left_out=left_out)
            named = all(isinstance(shard["name"], str) for shard in manifest.shards)
            if not named or manifest.totals != Counter(totals):
                raise ValueError("its shards have no names, or other totals than it says")
            return manifest
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise read_error(str(path), error) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: not a manifest of shards ({first_line(error)})") from error
    return None


def manifest_text(name: str, data: bytes) -> str:
    """Return the JSON in a manifest of this file name and bytes. Raises ValueError and KeyError for other data."""
    if name.endswith(".json"):
        return data.decode()
    if name.endswith(".arrow"):
        table = ipc.open_file(pa.BufferReader(data))
        of_schema = table.schema.metadata or {}
        metadata = (
            of_schema
            if of_schema.get(KEY)
            else table.get_batch_with_custom_metadata(0).custom_metadata
        )
    else:
        import pyarrow.parquet as pq  # imported late: 30 ms that IPC does not need

        metadata = pq.read_metadata(pa.BufferReader(data)).metadata
    return str((metadata or {})[KEY].decode())


def is_manifest(schema: pa.Schema) -> bool:
    """Return whether a table is a manifest, by its metadata."""
    return KEY in (schema.metadata or {})


def manifest_in(names: Iterable[str]) -> str | None:
    """Return the name of the manifest among the file names of a finished folder, or None."""
    present = set(names)
    return next((name for name in FINISHED if name in present), None)


OnSkip = Callable[
    [Any, LongNetError], None
]  # called with a document or a text that is left out, and the reason


class LeftOut:
    """The number of documents that have no row: `skipped` ones, which cannot be read, and `empty` ones.

    `skipped_files` of the skipped ones are files, whose documents nobody has counted.

    A job calls `skip` with each document, row or file that it cannot read, and this calls `on_skip`. Without `on_skip`,
    `skip` is None: such a document ends the run.
    """

    skipped = skipped_files = empty = 0

    def __init__(self, on_skip: OnSkip | None = None) -> None:
        self.skip: OnSkip | None = partial(self._skip, on_skip) if on_skip else None

    def pass_over(self, document: Any) -> None:
        """Count an empty document."""
        self.empty += 1

    def take(self, totals: Mapping[str, int]) -> None:
        """Take the counts from the totals of a manifest instead."""
        for kind in LEFT_OUT:
            setattr(self, kind, totals.get(kind, 0))

    def counts(self) -> dict[str, int]:
        """Return the counts for a manifest."""
        return {kind: getattr(self, kind) for kind in LEFT_OUT}

    def __str__(self) -> str:
        """Return what was skipped, such as `2 documents and 1 file left out`."""
        counts = {"document": self.skipped - self.skipped_files, "file": self.skipped_files}
        counted = [f"{count} {what}{'s' * (count > 1)}" for what, count in counts.items() if count]
        return f"{' and '.join(counted)} left out"

    def _skip(self, on_skip: OnSkip, document: Any, error: LongNetError) -> None:
        self.skipped += 1
        self.skipped_files += getattr(document, "file", False)  # an Unread has it
        on_skip(document, error)
