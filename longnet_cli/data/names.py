"""The files that an input names (a file, a folder, a glob, an @list or stdin), in a stable, natural order."""

import glob
import json
import os
import re
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from os.path import commonprefix
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TextIO
from urllib.parse import unquote

from longnet_cli.basics.errors import ConfigError, DataError, InputWarning, refuse_web_address
from longnet_cli.data.files import read_error
from longnet_cli.data.kinds import (
    FASTA_SUFFIXES,
    HDF5_SUFFIXES,
    JSON_SUFFIXES,
    PACKED_SUFFIXES,
    SHARD_SUFFIXES,
    bare_name,
    compression,
    is_named_text,
    sniff,
)
from longnet_cli.data.manifest import FINISHED, UNFINISHED, manifest_in, manifest_text

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

STDIN = Path("/dev/stdin")  # where stdin can seek

# The words by which Hugging Face knows a split in the name of a file
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation")

MOST_NAMED = 20  # kinds of files that are not read
_TEXTS = (*JSON_SUFFIXES, ".json", *FASTA_SUFFIXES)


class Apart:
    """Names of documents, one after the other: a name that repeats the one before would be read back with it as one."""

    last = written = ""
    repeats = 0

    def name(self, doc_id: str) -> str:
        """Return the name of the next document: `doc_id`, or `doc_id#1`, `doc_id#2` where it repeats."""
        self.repeats = self.repeats + 1 if doc_id == self.last else 0
        name = f"{doc_id}#{self.repeats}" if self.repeats else doc_id
        self.last, self.written = doc_id, f"{name}#1" if name == self.written else name
        return self.written


@dataclass(frozen=True)
class Source:
    """One file to read, or stdin where `path` is None. `name` becomes the doc_id, `where` goes into messages.

    Both are the path's UTF-8 text, in any locale. `filesystem` holds the path, None on this machine. `beside` names
    files of its folder that are not read.
    """

    path: Path | None
    name: str
    where: str
    filesystem: "FileSystem | None" = None
    beside: str = ""

    @property
    def size(self) -> int | None:
        """The bytes of a file on this machine, None for a pipe and for a file in a store."""
        if self.path is not None and self.filesystem is None:
            with suppress(OSError):
                return self.path.stat().st_size if self.path.is_file() else None
        return None


class Sources:
    """The files that `names` stand for, in order. Names are expanded when the files are first needed, and only once.

    Iterating raises the DataError of the first missing input, unless `skip_bad`.
    """

    def __init__(self, names: Sequence[str | Path], *, skip_bad: bool = False) -> None:
        self.names, self.skip_bad = names, skip_bad

    def __iter__(self) -> Iterator[Source]:
        if self.missing and not self.skip_bad:
            raise self.missing[0]
        return iter(self.found)

    @cached_property
    def _expanded(self) -> tuple[list[Source], list[DataError]]:
        return find_sources(self.names)

    @property
    def found(self) -> list[Source]:
        """The files that are there."""
        return self._expanded[0]

    @property
    def missing(self) -> list[DataError]:
        """The errors of the inputs that are missing."""
        return self._expanded[1]


def find_sources(names: Sequence[str | Path]) -> tuple[list[Source], list[DataError]]:
    """Expand folders, globs, lists and URIs into files; return these, and the errors of inputs that cannot be found.

    A name that occurs twice becomes the whole path. A file that is reached more than once, by another name or through a
    link, is read once, in its first place, and a warning names it. Raises ConfigError for no input and for stdin given
    twice.
    """
    if not names:
        raise ConfigError("no input: name a file, a folder, a glob, @list.txt, or - for stdin")
    if sum(str(name) in ("-", "@-") for name in names) > 1:
        raise ConfigError("stdin (-) can be read only once")
    found = [*_expand_all([_as_text(str(name)) for name in names], in_list=False)]
    sources = once(each for each in found if isinstance(each, Source))
    times = Counter(source.name for source in sources)
    missing = [each for each in found if isinstance(each, DataError)]
    return [source if times[source.name] == 1 else replace(source, name=source.where) for source in sources], missing


def once(sources: Iterable[Source]) -> list[Source]:
    """Return the sources, but leave out files that repeat an earlier one (same device and inode), with a warning."""
    first: dict[object, Source] = {}
    again: list[str] = []
    for source in sources:
        key: object = source.where
        if source.path is not None and source.filesystem is None:
            with suppress(OSError):
                status = source.path.stat()
                key = status.st_dev, status.st_ino
        earlier = first.setdefault(key, source)
        if earlier is not source:
            same = earlier.where == source.where
            again.append(source.where if same else f"{source.where}, which is {earlier.where},")
    if again:
        more = f" (and {len(again) - 1} more)" if again[1:] else ""
        warnings.warn(f"{again[0]} is read once, though it is named more than once{more}", InputWarning, stacklevel=2)
    return list(first.values())


def _expand_all(items: Iterable[str], *, in_list: bool) -> Iterator[Source | DataError]:
    """Yield the files that inputs name, and an error for each input that cannot be found."""
    for item in items:
        try:
            for source in _expand(item, in_list=in_list):
                if isinstance(source, Source) and any("\ud800" <= character <= "\udfff" for character in source.where):
                    yield DataError(f"{source.where!a}: the name is not UTF-8: rename it")
                else:
                    yield source
        except DataError as error:
            yield error


def _as_text(path: str) -> str:
    """Return a path as UTF-8 text, in any locale. A byte that is not UTF-8 becomes a surrogate."""
    try:
        return os.fsencode(path).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # text with characters that the locale's encoding lacks
        return path


def _as_path(text: str) -> str:
    """Return the path for the system: the inverse of `_as_text`."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def _expand(item: str, *, in_list: bool) -> Iterable[Source | DataError]:
    if not item:  # such as an unset variable in a script
        raise ConfigError("an input is empty: name a file, a folder, a glob, @list.txt, or - for stdin")
    refuse_web_address(item)
    if item.startswith("file://"):
        item, in_list = unquote(item.removeprefix("file://")), True  # in a URI, @ starts a name, not a list
    elif re.match(r"[a-z][a-z0-9+.-]*://", item):
        from longnet_cli.data.remote import find_remote  # imported late: 20 ms that local input does not need

        filesystem, remote = find_remote(item)
        return [Source(Path(path), name, where, filesystem) for path, name, where in remote]
    path = Path(_as_path(item))
    if item == "-":
        return [_stdin_source()]
    if path.is_dir():
        names, beside = _folder_files(path)
        paths = [path / _as_path(name) for name in names]
        return [Source(file, name, _as_text(str(file)), beside=beside) for file, name in zip(paths, names, strict=True)]
    if path.exists():
        return [Source(path, _as_text(path.name), item)]
    if item.startswith("@") and not in_list:
        return _expand_all(_listed(item[1:]), in_list=True)
    if glob.has_magic(item):
        matches = filter(os.path.isfile, glob.glob(_as_path(item), recursive=True))
        files = sorted(map(_as_text, matches), key=natural_order)
        if files:
            return [Source(Path(_as_path(file)), file.rpartition("/")[2], file) for file in files]
        raise DataError(f"{item}: no file matches")
    raise DataError(f"{item}: no such file or folder")


def _stdin_source() -> Source:
    """Return the source for stdin. `< file` can seek, like any other file; anything else is read once, forwards."""
    if sys.stdin is None:
        raise DataError("stdin is closed")
    try:
        handle = sys.stdin.fileno()
        regular = stat.S_ISREG(os.fstat(handle).st_mode) and os.lseek(handle, 0, os.SEEK_CUR) == 0
    except (OSError, ValueError):
        regular = False
    return Source(STDIN if regular else None, "stdin", "stdin")


@lru_cache(maxsize=1)
def _read_once(stream: TextIO) -> bytes:
    """Read all of stdin, and keep it: inputs may be expanded more than once."""
    return stream.buffer.read()


def _listed(name: str) -> list[str]:
    """Return the inputs in a list, or in stdin for `-`, written as on the command line, one per line that is not blank.

    In a list with NULs, as `find -print0` writes it, all up to a NUL is a name.
    """
    where = f"@{name}"
    try:
        data = _read_once(sys.stdin) if name == "-" else Path(_as_path(name)).read_bytes()
    except OSError as error:
        raise read_error(where, error, "cannot read the list") from error
    except AttributeError:
        raise DataError("stdin is closed") from None
    if b"\0" in data:
        items = [_as_text(os.fsdecode(item)) for item in data.split(b"\0") if item]
    else:
        try:
            lines = data.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: cannot read the list: {error}") from error
        items = [line.strip() for line in lines if line.strip()]
    if not items:
        raise DataError(f"{where}: the list names no input")
    return items


def _folder_files(folder: Path) -> tuple[list[str], str]:
    """Return what `choose_files` does. Folders that are links are followed, after all others, and each folder once."""
    paths, tops, seen = list[Path](), [str(folder)], set[tuple[int, int]]()
    for root, folders, names in chain.from_iterable(map(os.walk, tops)):  # tops grows
        status = os.stat(root)
        if (place := (status.st_dev, status.st_ino)) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [name for name in folders if not is_hidden(name)]
        tops += sorted(filter(os.path.islink, (os.path.join(root, name) for name in folders)))
        paths += [Path(root, name) for name in names]

    def read(name: str, size: int | None) -> bytes:
        try:
            with open(folder / _as_path(name), "rb") as file:
                return file.read(size)
        except OSError as error:
            raise read_error(_as_text(str(folder / _as_path(name))), error) from error

    names = [_as_text(file.relative_to(folder).as_posix()) for file in paths if file.is_file()]
    return choose_files(_as_text(str(folder)), names, read)


def choose_files(folder: str, names: Sequence[str], read: Callable[[str, int | None], bytes]) -> tuple[list[str], str]:
    """Choose the files to read below a folder: the shards of a data set in its order, otherwise every text.

    Return them, and a sentence that names the other files, with which it warns of them; empty if there are none.

    Files without an order of their own are sorted naturally. A data set or a run that `longnet` wrote below the folder
    is skipped if there are other files, because it may be the output that is being written. `names` are relative paths.
    `read(name, size)` returns the first `size` bytes of a file, or all bytes if `size` is None. Raises DataError for a
    folder without readable files, a missing shard and an unfinished or damaged data set, ConfigError for a data set of
    several splits, also by the names of its files.
    """

    def listed(index: str, key: str, name: str) -> list[str] | None:
        """Return the shards that an index file of the folder lists, or None if the file is no such index."""
        try:
            shards = [str(shard[name]) for shard in json.loads(manifest_text(index, read(index, None)))[key]]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        if missing := next((shard for shard in shards if shard not in names), None):
            raise DataError(f"{folder}/{missing}: no such file, but {folder}/{index} lists it")
        return shards

    # `datasets.save_to_disk` writes this index, and may leave caches beside the shards
    if "state.json" in names and (shards := listed("state.json", "_data_files", "filename")):
        return shards, ""
    if UNFINISHED in names:  # our writer keeps it until the last shard is there
        raise DataError(f"{folder}: the run that wrote this data did not end: finish it with its command and --resume")
    if manifest := manifest_in(names):
        if (shards := listed(manifest, "shards", "name")) is None:
            raise DataError(f"{folder}/{manifest}: changed or damaged after it was written")
        return shards, ""
    if "dataset_dict.json" in names:
        splits = sorted({name.split("/")[0] for name in names if "/" in name})
        raise _several(folder, splits)
    files = sorted((name for name in names if not any(map(is_hidden, name.split("/")))), key=natural_order)
    written = _written_folders(names)
    files = [file for file in files if not file.startswith(written)] or files
    for suffixes in (SHARD_SUFFIXES, JSON_SUFFIXES, FASTA_SUFFIXES):
        shards = [file for file in files if bare_name(file).endswith(suffixes)]
        if shards:
            shards = [shard for shard in shards if "/" not in shard] or shards
            _refuse_splits(folder, shards)
            return shards, _tell_unread(folder, files, shards)
    chosen, empty = [], True
    for file in files:
        head = read(file, 8192)
        if _looks_like_text(file, head):
            chosen.append(file)
            empty = empty and not head
    if empty:  # beside text, HDF5 files are its data
        chosen = [file for file in files if bare_name(file).endswith(HDF5_SUFFIXES)] or chosen
    if not chosen:
        raise DataError(f"{folder}: the folder holds nothing readable (Arrow, Parquet, JSON Lines, text or HDF5 files)")
    return chosen, _tell_unread(folder, files, chosen)


def _tell_unread(folder: str, files: Sequence[str], chosen: Sequence[str]) -> str:
    """Return a sentence that names the files beside the `chosen` ones, and warn with it; empty if there are none."""
    kinds: dict[str, list[str]] = {}
    for file in sorted({*files} - {*chosen}, key=natural_order):
        kinds.setdefault(PurePosixPath(bare_name(file)).suffix, []).append(file)
    if not kinds:
        return ""
    firsts = [f"{of[0]} and {len(of) - 1} like it" if of[1:] else of[0] for of in kinds.values()]
    named = ", ".join([*firsts[:MOST_NAMED], *["..."] * (len(firsts) > MOST_NAMED)])
    readable = [of for kind, of in kinds.items() if kind in (*SHARD_SUFFIXES, *_TEXTS) or is_named_text(of[0])]
    unread, how = max(readable, key=len, default=[]), ""
    if unread:
        pattern = f"{folder}/{'**/' * any('/' in file for file in unread)}*{PurePosixPath(unread[0]).suffix}"
        how = f"; '{pattern}' reads files of that kind"
    beside = f"the {len(chosen)} files like {chosen[0]}" if chosen[1:] else chosen[0]
    count = sum(map(len, kinds.values()))
    what = f"{count} files are" if count > 1 else "1 file is"
    said = f"{what} not read beside {beside}: {named}{how}"
    warnings.warn(f"{folder}: {said}", InputWarning, stacklevel=2)
    return said


def _refuse_splits(folder: str, shards: Sequence[str]) -> None:
    """Raise ConfigError if the names of shards say that they are several splits, as in a folder from a hub."""
    shards_of: dict[str, list[str]] = {}
    for shard in shards:
        top, _, name = shard.rpartition("/")
        words = [word for word in re.split(r"[-_. 0-9]+|of", bare_name(name).rpartition(".")[0].lower()) if word]
        split = next((_SPLITS[word] for word in (*words[:1], *words[-1:], top.lower()) if word in _SPLITS), None)
        if split:
            shards_of.setdefault(split, []).append(shard)
    if len(shards_of) > 1:
        raise _several(folder, [_glob(shards_of[split]) for split in sorted(shards_of)])


def _glob(names: Sequence[str]) -> str:
    """Return a glob for files that are all of one split."""
    start = commonprefix(names)  # noqa: RUF071 (of characters)
    ending = names[0].rpartition("/")[2].rpartition(".")[2]
    return names[0] if len(names) == 1 else f"{start.rstrip('0123456789')}*.{ending}"


def _several(folder: str, splits: Sequence[str]) -> ConfigError:
    one = ", ".join(f"{folder}/{split}" for split in splits)
    return ConfigError(f"{folder} holds several splits of a data set: name one of {one}")


def _written_folders(names: Sequence[str]) -> tuple[str, ...]:
    """Return the folders, each with its final slash, that hold a data set or a run written by longnet."""
    inside: dict[str, set[str]] = {}
    for name in names:
        folder, slash, file = name.rpartition("/")
        inside.setdefault(folder + slash, set()).add(file)
    marks = *({name} for name in (UNFINISHED, *FINISHED)), {"recipe.json", "metrics.jsonl"}
    return tuple(folder for folder, files in inside.items() if folder and any(mark <= files for mark in marks))


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is skipped."""
    return name.startswith(".") or name == "__pycache__"


def _looks_like_text(name: str, head: bytes) -> bool:
    """Return whether a file found in a folder is worth opening: an image is not, and an empty file is an empty text.

    A compressed file is worth opening if its suffix names the compression, and it is not an archive of many files. A
    file whose suffix names a kind of text is opened, whatever it holds.
    """
    if compression(head):
        return name.lower().endswith(PACKED_SUFFIXES) and not bare_name(name).endswith(".tar")
    return is_named_text(name) or b"\0" not in head or sniff(head) not in ("text", "hdf5")


def natural_order(name: str) -> list[str | int]:
    """Return a sort key that puts part-2 before part-10."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"([0-9]+)", name))]
