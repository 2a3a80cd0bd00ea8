"""The files that an input names (a file, a folder, a glob, an @list or stdin), in a stable, natural order."""

import glob
import os
import re
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, filterfalse
from pathlib import Path
from typing import TYPE_CHECKING, TextIO
from urllib.parse import unquote

from longnet_cli.basics.errors import (
    ConfigError,
    DataError,
    InputWarning,
    is_utf8,
    refuse_web_address,
)

from .folder_files import choose_files, is_hidden, natural_order
from .local_files import read_error
from .opened_inputs import reading

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

STDIN = Path("/dev/stdin")  # where stdin can seek


@dataclass(frozen=True)
class InputFile:
    """One file to read, or stdin where `path` is None. `name` becomes the doc_id, `where` goes into messages.

    Both are the path's UTF-8 text, in any locale. `filesystem` holds the path, None on this machine; the listing of a
    store gives the `stored_size`.
    """

    path: Path | None
    name: str
    where: str
    filesystem: "FileSystem | None" = None
    stored_size: int | None = None

    @property
    def size(self) -> int | None:
        """The bytes of a file, None for a pipe and where a store does not say."""
        status = self.status
        return status.st_size if status else self.stored_size

    @property
    def status(self) -> os.stat_result | None:
        """The status of a file on this machine, None for a pipe and for a file in a store."""
        with suppress(OSError):
            if self.path is not None and self.filesystem is None and self.path.is_file():
                return self.path.stat()
        return None

    @property
    def local_path(self) -> Path | None:
        """The path of a file on this machine that can be read more than once, None for what has no `status`."""
        return self.path if self.status else None


class InputFiles:
    """The files that `names` stand for, in order. Names are expanded when the files are first needed, and only once.

    A name that occurs twice becomes the whole path. A file that is reached more than once, by another name or through a
    link, is read once, in its first place, and a warning names it. Expanding raises ConfigError for no input and for
    stdin given twice. Iterating raises the DataError of the first missing input, unless `skip_bad`.
    """

    def __init__(self, names: Sequence[str | Path], *, skip_bad: bool = False) -> None:
        self.names = names
        self.skip_bad = skip_bad

    def __iter__(self) -> Iterator[InputFile]:
        if self.missing and not self.skip_bad:
            raise self.missing[0]
        return iter(self.found)

    @cached_property
    def _expanded(self) -> tuple[list[InputFile], list[DataError]]:
        """The files that folders, globs, lists and URIs name, and the errors of inputs that cannot be found."""
        names = [_as_text(str(name)) for name in self.names]
        if not names:
            raise ConfigError("no input: name a file, a folder, a glob, @list.txt, or - for stdin")
        if names.count("-") + names.count("@-") > 1:
            raise ConfigError("stdin (-) can be read only once")
        missing = list[DataError]()
        return [*_expand_all(names, missing, in_list=False)], missing

    @cached_property
    def found(self) -> list[InputFile]:
        """The files that are there."""
        expanded, _ = self._expanded
        files = once(expanded)
        times = Counter(file.name for file in files)
        return [replace(file, name=file.where) if times[file.name] > 1 else file for file in files]

    @property
    def missing(self) -> list[DataError]:
        """The errors of the inputs that are missing."""
        return self._expanded[1]


def once(files: Iterable[InputFile]) -> list[InputFile]:
    """Return the files, but leave out files that repeat an earlier one (same device and inode), with a warning."""
    first: dict[object, InputFile] = {}
    again: list[str] = []
    for input_file in files:
        status = input_file.status
        key = (status.st_dev, status.st_ino) if status else input_file.where
        earlier = first.setdefault(key, input_file)
        if earlier.where != input_file.where:
            again.append(f"{input_file.where}, which is {earlier.where},")
        elif earlier is not input_file:
            again.append(input_file.where)
    if again:
        more = f" (and {len(again) - 1} more)" if again[1:] else ""
        warnings.warn(
            f"{again[0]} is read once, though it is named more than once{more}",
            InputWarning,
            stacklevel=2,
        )
    return list(first.values())


def _expand_all(
    items: Iterable[str],
    missing: list[DataError],
    *,
    in_list: bool,
) -> Iterator[InputFile]:
    """Yield the files that inputs name. `missing` gets an error for each input that cannot be found."""
    for item in items:
        try:
            for input_file in _expand(item, missing, in_list=in_list):
                if is_utf8(input_file.where):
                    yield input_file
                else:
                    problem = f"{input_file.where!a}: the name is not UTF-8: rename it"
                    missing.append(DataError(problem))
        except DataError as error:
            missing.append(error)


def _as_text(path: str) -> str:
    """Return a path as UTF-8 text, in any locale. A byte that is not UTF-8 becomes a surrogate."""
    try:
        return os.fsencode(path).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # text with characters that the locale's encoding lacks
        return path


def _as_path(text: str) -> str:
    """Return the path for the system: the inverse of `_as_text`."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def _expand(item: str, missing: list[DataError], *, in_list: bool) -> Iterable[InputFile]:
    if not item:  # such as an unset variable in a script
        raise ConfigError(
            "an input is empty: name a file, a folder, a glob, @list.txt, or - for stdin"
        )
    refuse_web_address(item)
    if item.startswith("file://"):
        item = unquote(item.removeprefix("file://"))
        in_list = True  # in a URI, @ starts a name, not a list
    elif re.match(r"[a-z][a-z0-9+.-]*://", item):
        from .remote import find_remote  # imported late: 20 ms for stores alone

        filesystem, files = find_remote(item)
        return [
            InputFile(Path(path), name, where, filesystem, size)
            for path, name, where, size in files
        ]
    path = Path(_as_path(item))
    if item == "-":
        return [_stdin_file()]
    if path.is_dir():
        return [
            InputFile(file := path / _as_path(name), name, _as_text(str(file)))
            for name in _folder_files(path)
        ]
    if path.exists():
        return [_local_file(item)]
    if item.startswith("@") and not in_list:
        return _expand_all(_listed(item[1:]), missing, in_list=True)
    if glob.has_magic(item):
        matches = filter(os.path.isfile, glob.glob(_as_path(item), recursive=True))
        names = sorted(map(_as_text, matches), key=natural_order)
        if not names:
            raise DataError(f"{item}: no file matches")
        return map(_local_file, names)
    raise DataError(f"{item}: no such file or folder")


def _local_file(where: str) -> InputFile:
    path = Path(_as_path(where))
    return InputFile(path, _as_text(path.name), where)


def _stdin_file() -> InputFile:
    """Return the input_file for stdin. `< file` can seek, like any other file; anything else is read once, forwards."""
    stdin = _open_stdin()
    path = None
    with suppress(OSError, ValueError):
        handle = stdin.fileno()
        if stat.S_ISREG(os.fstat(handle).st_mode) and os.lseek(handle, 0, os.SEEK_CUR) == 0:
            path = STDIN
    return InputFile(path, "stdin", "stdin")


def _open_stdin() -> TextIO:
    if sys.stdin is None:
        raise DataError("stdin is closed")
    return sys.stdin


def _listed(name: str) -> list[str]:
    """Return the inputs in a list, or in stdin for `-`, written as on the command line, one per line that is not blank.

    In a list with NULs, as `find -print0` writes it, all up to a NUL is a name.
    """
    where = f"@{name}"
    try:
        data = _open_stdin().buffer.read() if name == "-" else Path(_as_path(name)).read_bytes()
        if b"\0" in data:
            names = data.decode("utf-8", "surrogateescape").split("\0")
        else:
            names = [*map(str.strip, data.decode("utf-8-sig").splitlines())]
        items = [*filter(None, names)]
    except OSError as error:
        raise read_error(where, error, "cannot read the list") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: cannot read the list: {error}") from error
    if not items:
        raise DataError(f"{where}: the list names no input")
    return items


def _folder_files(folder: Path) -> list[str]:
    """Return what `choose_files` does. Folders that are links are followed, after all others, and each folder once."""
    paths: list[Path] = []
    tops = [str(folder)]
    walked: set[tuple[int, int]] = set()  # folders, by device and inode
    for root, folders, names in chain.from_iterable(map(os.walk, tops)):  # tops grows
        status = os.stat(root)
        identity = status.st_dev, status.st_ino
        if identity in walked:
            folders.clear()
            continue
        walked.add(identity)
        folders[:] = filterfalse(is_hidden, folders)
        tops += sorted(filter(os.path.islink, map(partial(os.path.join, root), folders)))
        paths += filter(Path.is_file, map(Path(root).joinpath, names))

    def read(name: str, size: int | None) -> bytes:
        path = folder / _as_path(name)
        with reading(_as_text(str(path))), path.open("rb") as file:
            return file.read(size)

    names = [_as_text(file.relative_to(folder).as_posix()) for file in paths]
    return choose_files(_as_text(str(folder)), names, read)
