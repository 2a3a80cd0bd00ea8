"""The manifest of a folder of shards, in one file that other tools take for one more shard, without rows.

    _unfinished.json    as long as more shards are to come; readers refuse the folder
    _manifest.arrow     when all are there, or _manifest.parquet: a table of their schema and 0 rows, whose metadata
                        has the same JSON under `longnet.manifest`

So a finished folder holds nothing but tables of one schema: whoever reads all that is in it reads the data set.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc

from longnet_cli.configuration import parse, read_text
from longnet_cli.data.files import read_error
from longnet_cli.data.sinks import ShardWriter
from longnet_cli.data.tables import one_line
from longnet_cli.errors import DataError, LongNetError

UNFINISHED = "_unfinished.json"
FINISHED = ("_manifest.arrow", "_manifest.parquet", "_manifest.json")  # the last of folders written until 2026
MANIFEST_VERSION = 1
_KEY = b"longnet.manifest"


@dataclass
class Manifest:
    """The account of a folder's shards.

    `settings` is whatever decides the bytes of the shards: inputs and options. `shards` has a dict a shard, in order:
    `name`, `rows`, and the counts that were given to `ShardFolder.write`, `documents` among them. `skipped` documents
    are in none, because they could not be read, and `empty` ones, because there is nothing in them. `tokenizer` is what
    `Tokenizer.description` returns.
    """

    settings: dict[str, Any]
    finished: bool = False
    shards: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0
    empty: int = 0
    tokenizer: dict[str, str] | None = None

    @property
    def totals(self) -> Counter[str]:
        """`rows`, `documents` and the other counts, over all finished shards, and `skipped` and `empty`, unless 0."""
        others = {"skipped": self.skipped, "empty": self.empty}
        totals = Counter({name: count for name, count in others.items() if count})
        for shard in self.shards:
            totals.update({name: count for name, count in shard.items() if name != "name"})
        return totals

    def to_json(self) -> str:
        content = {
            "version": MANIFEST_VERSION,
            "settings": self.settings,
            "totals": dict(self.totals),
            "shards": self.shards,
            **({"tokenizer": self.tokenizer} if self.tokenizer else {}),
        }
        return json.dumps(content, indent=1) + "\n"

    def write_finished(self, folder: Path, schema: pa.Schema, suffix: str) -> None:
        """Write the table without rows, whole or not at all; `schema` and `suffix` are those of the shards."""
        known = schema.with_metadata({**(schema.metadata or {}), _KEY: self.to_json()})
        with ShardWriter(folder / f"_manifest{suffix}", known):
            pass


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of a folder of shards, None where there is none; DataError for one that cannot be read."""
    for name in (UNFINISHED, *FINISHED):
        path = Path(folder, name)
        try:
            text = read_text(path) if name.endswith(".json") else manifest_text(name, path.read_bytes())
            content = parse(text)
            if content["version"] != MANIFEST_VERSION:
                raise DataError(f"{path}: version {content['version']} of the manifest is not known to this longnet")
            shards = [{**shard, "name": str(shard["name"]), "rows": int(shard["rows"])} for shard in content["shards"]]
            skipped, empty = (int(content["totals"].get(name, 0)) for name in ("skipped", "empty"))
            tokenizer = content.get("tokenizer")
            return Manifest(
                dict(content["settings"]), name != UNFINISHED, shards, skipped, empty, tokenizer and dict(tokenizer)
            )
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise read_error(str(path), error) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: not a manifest of shards ({one_line(error)})") from error
    return None


def tokens_in(inputs: Iterable[str | Path]) -> int | None:
    """Return how many token ids the inputs hold, where all are folders whose manifests tell; None otherwise."""
    total = 0
    for folder in inputs:
        try:
            manifest = read_manifest(folder)
        except LongNetError:  # whoever reads the data says what is wrong
            return None
        if manifest is None or not manifest.finished or manifest.tokenizer is None:
            return None
        total += manifest.totals["tokens"]
    return total


def manifest_text(name: str, data: bytes) -> str:
    """The JSON in a manifest of this file name, whose bytes are `data`. ValueError, KeyError where it is none."""
    if name.endswith(".json"):
        return data.decode()
    if name.endswith(".arrow"):
        schema = ipc.open_file(pa.BufferReader(data)).schema
    else:
        import pyarrow.parquet as pq  # 30 ms that IPC need not pay

        schema = pq.read_schema(pa.BufferReader(data))
    return str((schema.metadata or {})[_KEY].decode())


def is_manifest(schema: pa.Schema) -> bool:
    """Return whether a table is a manifest, by its metadata."""
    return _KEY in (schema.metadata or {})


def manifest_in(names: Iterable[str]) -> str | None:
    """The name of the manifest of a finished folder, of the names of its files; None where there is none."""
    found = set(names)
    return next((name for name in FINISHED if name in found), None)
