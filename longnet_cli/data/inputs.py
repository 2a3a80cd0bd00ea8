"""Which files an input names: a file, a folder, a glob, an @list or stdin, in a stable, natural order."""

import glob
import json
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longnet_cli.errors import ConfigError, DataError

SHARD_SUFFIXES = (".arrow", ".feather", ".parquet")


@dataclass(frozen=True)
class Source:
    """One file to read, or stdin where `path` is None. `name` becomes the doc_id, `where` goes into messages."""

    path: Path | None
    name: str
    where: str


def find_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """Expand folders, globs and lists into files; a name that occurs twice becomes the whole path."""
    if not inputs:
        raise ConfigError("no input: name a file, a folder, a glob, @list.txt, or - for stdin")
    if sum(str(item) == "-" for item in inputs) > 1:
        raise ConfigError("stdin (-) can be read only once")
    found = [source for item in inputs for source in _expand(str(item), in_list=False)]
    times = Counter(source.name for source in found)
    return [source if times[source.name] == 1 else Source(source.path, source.where, source.where) for source in found]


def _expand(item: str, *, in_list: bool) -> list[Source]:
    path = Path(item)
    if item == "-":
        return [_stdin_source()]
    if path.is_dir():
        return [Source(file, file.relative_to(path).as_posix(), str(file)) for file in _folder_files(path)]
    if path.exists():
        return [Source(path, path.name, item)]
    if item.startswith("@") and not in_list:
        return _list_sources(Path(item[1:]))
    if glob.has_magic(item):
        files = sorted((match for match in glob.glob(item, recursive=True) if os.path.isfile(match)), key=_natural)
        if files:
            return [Source(Path(file), Path(file).name, file) for file in files]
        raise DataError(f"{item}: no file matches")
    raise DataError(f"{item}: no such file or folder")


def _stdin_source() -> Source:
    """`< file` is a file like any other, which can be memory-mapped; anything else is read once, forwards."""
    try:
        handle = sys.stdin.fileno()
        regular = stat.S_ISREG(os.fstat(handle).st_mode) and os.lseek(handle, 0, os.SEEK_CUR) == 0
    except (OSError, ValueError):
        regular = False
    return Source(Path("/dev/stdin") if regular else None, "stdin", "stdin")


def _list_sources(path: Path) -> list[Source]:
    """One input a line, as typed on the command line; blank lines and # comments are skipped."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"@{path}: cannot read the list: {error}") from error
    items = [line for line in lines if line and not line.startswith("#")]
    if not items:
        raise DataError(f"@{path}: the list names no input")
    return [source for item in items for source in _expand(item, in_list=True)]


def _folder_files(folder: Path) -> list[Path]:
    """The shards of a data set in its own order, or else every text file below the folder, naturally sorted."""
    state = folder / "state.json"
    if state.exists():  # written by `datasets.save_to_disk`, beside caches that are no part of it
        try:
            shards = [folder / entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        except (ValueError, KeyError, TypeError):
            shards = []
        missing = next((shard for shard in shards if not shard.exists()), None)
        if missing:
            raise DataError(f"{missing}: no such file, but {state} lists it")
        if shards:
            return shards
    if (folder / "dataset_dict.json").exists():
        splits = ", ".join(sorted(str(child) for child in folder.iterdir() if child.is_dir()))
        raise ConfigError(f"{folder} holds several splits of a data set: name one of {splits}")
    files = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    files = sorted((file for file in files if file.is_file()), key=lambda file: _natural(file.as_posix()))
    shards = [file for file in files if file.suffix in SHARD_SUFFIXES]
    shards = [shard for shard in shards if shard.parent == folder] or shards
    chosen = shards or [file for file in files if _looks_like_text(file)]
    if not chosen:
        raise DataError(f"{folder}: the folder holds nothing readable (Arrow, Parquet or text files)")
    return chosen


def _looks_like_text(file: Path) -> bool:
    """Whether a file met in a folder is worth opening: images and empty `__init__.py` files are passed over."""
    try:
        with file.open("rb") as opened:
            head = opened.read(8192)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
    return bool(head) and (b"\0" not in head or sniff(head) != "text")


def _natural(name: str) -> list[str | int]:
    """Sort key that puts part-2 before part-10."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"([0-9]+)", name))]


def sniff(head: bytes) -> str:
    """`file`, `stream` (Arrow IPC), `parquet` or `text`, from at least the first 8 bytes."""
    if head.startswith(b"ARROW1\0\0"):
        return "file"
    if head.startswith(b"\xff\xff\xff\xff"):
        return "stream"
    return "parquet" if head.startswith(b"PAR1") else "text"
