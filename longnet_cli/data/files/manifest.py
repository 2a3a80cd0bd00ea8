"""The manifest of a folder of shards: one file, which other tools read as one more shard, without rows.

    _unfinished.json    while more shards are to come; readers refuse the folder
    _manifest.arrow     (or _manifest.parquet) when all are there: a table with the schema of the shards and 0 rows,
                        with the same JSON under `longnet.manifest` in the metadata of a batch (or of the file)

The metadata of the schema has the key alone: a schema stands in its file twice, and the JSON has the tokenizer.

So a finished folder holds only tables of one schema, and a tool that reads all its files reads the data set.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc

from longnet_cli.basics.errors import DataError, first_line
from longnet_cli.basics.events import LeftOut
from longnet_cli.basics.sealed_manifests import seal, unseal

from .local_files import read_error

UNFINISHED = "_unfinished.json"
MANIFESTS = (UNFINISHED, "_manifest.arrow", "_manifest.parquet")  # the first that there is counts
MANIFEST_VERSION = 1
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
        totals = +Counter(self.left_out)  # without those that are 0
        for shard in self.shards:
            totals.update({name: count for name, count in shard.items() if name != "name"})
        return totals

    def to_json(self) -> str:
        known = {"tokenizer": self.tokenizer, "contents": self.contents}
        content = {"settings": self.settings, "totals": dict(self.totals), "shards": self.shards}
        return seal(
            MANIFEST_VERSION, content | {name: value for name, value in known.items() if value}
        )


def differing(settings: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that two manifests do not share, those of the first one before the others."""
    return [name for name in {**settings, **others} if settings.get(name) != others.get(name)]


def marked(schema: pa.Schema) -> pa.Schema:
    """Return the schema of a manifest, a table without rows, whose batch or file has the JSON under KEY."""
    return schema.with_metadata({**(schema.metadata or {}), KEY: ""})


def read_manifest(folder: str | Path) -> Manifest | None:
    """Return the manifest of a folder of shards, or None. Raises DataError for one that cannot be read."""
    for name in MANIFESTS:
        path = Path(folder, name)
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                return parse_manifest(name, path.read_bytes())
        except OSError as error:
            raise read_error(str(path), error) from error
        except ValueError as error:
            raise DataError(f"{path}: not a manifest of shards ({first_line(error)})") from error
    return None


def parse_manifest(name: str, data: bytes) -> Manifest:
    """Return the manifest in a file of this name and these bytes. Raises ValueError if it was changed or damaged."""
    try:
        content = unseal(_json_in(name, data), MANIFEST_VERSION)
        totals = content.pop("totals")
        left_out = {kind: totals[kind] for kind in LeftOut.KINDS if kind in totals}
        manifest = Manifest(finished=not name.endswith(UNFINISHED), **content, left_out=left_out)
        named = all(isinstance(shard["name"], str) for shard in manifest.shards)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(first_line(error)) from error
    if not named or manifest.totals != Counter(totals):
        raise ValueError("its shards have no names, or other totals than it says")
    return manifest


def _json_in(name: str, data: bytes) -> str:
    """Return the JSON in a manifest of this file name. Raises ValueError and KeyError for other data."""
    if name.endswith(".json"):
        return data.decode()
    if name.endswith(".arrow"):
        table = ipc.open_file(pa.BufferReader(data))
        metadata = table.get_batch_with_custom_metadata(0).custom_metadata
    else:
        import pyarrow.parquet as pq  # imported late: 30 ms that IPC does not need

        metadata = pq.read_metadata(pa.BufferReader(data)).metadata
    return str((metadata or {})[KEY].decode())


def manifest_in(names: Iterable[str]) -> str | None:
    """Return the name of the manifest among the file names of a folder, or None."""
    present = set(names)
    return next((name for name in MANIFESTS if name in present), None)
