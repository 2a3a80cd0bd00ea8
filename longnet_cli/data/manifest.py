"""The manifest of a folder of shards: one file, which other tools read as one more shard, without rows.

    _unfinished.json    while more shards are to come; readers refuse the folder
    _manifest.arrow     (or _manifest.parquet) when all are there: a table with the schema of the shards and 0 rows,
                        whose metadata has the same JSON under `longnet.manifest`

So a finished folder holds only tables of one schema, and a tool that reads all its files reads the data set.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc

from longnet_cli.basics.atomic import seal, unseal
from longnet_cli.basics.configuration import read_text
from longnet_cli.basics.errors import DataError
from longnet_cli.data.files import read_error
from longnet_cli.data.outputs import ShardWriter
from longnet_cli.data.tables import one_line

UNFINISHED = "_unfinished.json"
FINISHED = ("_manifest.arrow", "_manifest.parquet")
MANIFEST_VERSION = 1
_KEY = b"longnet.manifest"


@dataclass
class Manifest:
    """The record of a folder's shards.

    `settings` holds everything that decides the bytes of the shards: inputs and options. `shards` has one dict per
    shard, in order: `name`, `rows`, and the counts that were given to `ShardFolder.write`, such as `documents`.
    `skipped` counts the documents that could not be read, `skipped_files` those of them that are files, `empty` the
    documents with nothing in them; no shard has any of them. `tokenizer` is the value of `Tokenizer.description`.
    `contents` has the digest of each input that was opened, in order (`content_digest`).
    """

    settings: dict[str, Any]
    finished: bool = False
    shards: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0
    empty: int = 0
    tokenizer: dict[str, str] | None = None
    contents: list[str | None] = field(default_factory=list)
    skipped_files: int = 0

    @property
    def totals(self) -> Counter[str]:
        """The sums of `rows`, `documents` and other counts over finished shards, and of what is left out unless 0."""
        left_out = {"skipped": self.skipped, "skipped_files": self.skipped_files, "empty": self.empty}
        totals = Counter({name: count for name, count in left_out.items() if count})
        for shard in self.shards:
            totals.update({name: count for name, count in shard.items() if name != "name"})
        return totals

    def to_json(self) -> str:
        known = {"tokenizer": self.tokenizer, "contents": self.contents}
        content = {"settings": self.settings, "totals": dict(self.totals), "shards": self.shards}
        return seal(MANIFEST_VERSION, content | {name: value for name, value in known.items() if value})

    def write_finished(self, folder: Path, schema: pa.Schema, suffix: str) -> None:
        """Write the table without rows, whole or not at all, with the `schema` and `suffix` of the shards."""
        known = schema.with_metadata({**(schema.metadata or {}), _KEY: self.to_json()})
        with ShardWriter(folder / f"_manifest{suffix}", known):
            pass


def read_manifest(folder: str | Path) -> Manifest | None:
    """Return the manifest of a folder of shards, or None. Raises DataError for one that cannot be read."""
    for name in (UNFINISHED, *FINISHED):
        path = Path(folder, name)
        try:
            text = read_text(path) if name == UNFINISHED else manifest_text(name, path.read_bytes())
            content = unseal(text, MANIFEST_VERSION)
            totals = content.pop("totals")
            left_out = {kind: totals.get(kind, 0) for kind in ("skipped", "skipped_files", "empty")}
            return Manifest(finished=name != UNFINISHED, **content, **left_out)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise read_error(str(path), error) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: not a manifest of shards ({one_line(error)})") from error
    return None


def manifest_text(name: str, data: bytes) -> str:
    """Return the JSON in a manifest of this file name and bytes. Raises ValueError and KeyError for other data."""
    if name.endswith(".json"):
        return data.decode()
    if name.endswith(".arrow"):
        schema = ipc.open_file(pa.BufferReader(data)).schema
    else:
        import pyarrow.parquet as pq  # imported late: 30 ms that IPC does not need

        schema = pq.read_schema(pa.BufferReader(data))
    return str((schema.metadata or {})[_KEY].decode())


def is_manifest(schema: pa.Schema) -> bool:
    """Return whether a table is a manifest, by its metadata."""
    return _KEY in (schema.metadata or {})


def manifest_in(names: Iterable[str]) -> str | None:
    """Return the name of the manifest among the file names of a finished folder, or None."""
    present = set(names)
    return next((name for name in FINISHED if name in present), None)
