"""Files and folders that are there whole or not at all, and folders with a single writer.

There are two protocols. A file is written under a temporary name, flushed and renamed: `atomic_write`. A folder's files
are written first and its manifest, itself such a file, last: `whole_folder` for models (config.json),
`sealed_manifests.py` for checkpoints and states, `data/outputs/shards.py` for shards. Without its manifest, a folder
does not count.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from .errors import ConfigError, LongNetError, first_line

# a file that is being written; the group is its final name
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")


@contextmanager
def writing(what: str | Path, failure: type[LongNetError] = LongNetError) -> Iterator[None]:
    """Turn a failed write (a full disk, a file too large) into a LongNetError that names what was being written.

    A full disk raises LongNetError (exit code 1), any other failure raises `failure`. Give ConfigError for `failure`
    where an option has named the path. A BrokenPipeError passes through unchanged: the reader has read enough.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:  # of safetensors for a full disk
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        reason = first_line(error)
        raise (LongNetError if full else failure)(f"{what}: cannot write: {reason}") from error


# Not atomicwrites (archived) or filelock (locks alone): no library flushes the folder too, removes what killed writers
# left, and writes to pipes.
@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing under a temporary name in its folder; rename it when the block ends without an error.

    The file's `name` is the temporary one. Missing folders are created. At any time, even after a crash, the path holds
    the old file or the whole new one. Temporary files that killed writers of the same file left behind are removed. A
    device or a named pipe is written to directly. Raises ConfigError when the path cannot be opened, LongNetError when
    the end of the file cannot be written.
    """
    with writing(path, ConfigError):
        # such as >(command), whose real path does not exist
        direct = os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode)
        target = Path(path if direct else os.path.realpath(path))
    if direct:
        with writing(path, ConfigError):
            file = target.open("wb")
        with _closing(file, path):
            yield file
        return
    temporary = _temporary_name(target)
    try:
        with writing(path, ConfigError):
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target.parent, target.name)
            handle = _make_locked(temporary, _new_file)
            file = open(temporary, "wb", opener=lambda *_: handle)  # noqa: SIM115
        with _closing(file, path):
            yield file
            with writing(path):
                file.flush()
                os.fsync(file.fileno())
        with writing(path):
            os.replace(temporary, target)
            flush(target.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def _closing(file: BinaryIO, path: str | Path) -> Iterator[None]:
    """Close a file at the end of the block. Raises LongNetError when the end of the file cannot be written."""
    try:
        yield
        with writing(path):
            file.close()
    except BaseException:
        with suppress(OSError):  # on a full disk, close fails again, but the file is then closed
            file.close()
        raise


def is_temporary(name: str) -> bool:
    """Return whether a file name is a temporary name of `atomic_write`."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_leftovers(folder: Path, target: str | None = None) -> None:
    """Delete the temporary files and folders that killed writers left: all of them, or only those for `target`.

    A running writer holds a lock on its own, which is then kept.
    """
    for name in os.listdir(folder):
        match = _TEMPORARY.fullmatch(name)
        if match and target in (None, match[1]):
            with suppress(OSError), _descriptor(folder / name) as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder / name)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _new_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY)


def _temporary_name(target: Path) -> Path:
    """Return a new temporary name beside `target`.

    Whoever makes a file of this name has to know the name before: a signal may come between any two lines, and then
    the file must go.
    """
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def _make_locked(temporary: Path, make: Callable[[Path], int]) -> int:
    """Make and lock a temporary file or folder. Return its descriptor.

    The lock shows `remove_leftovers` that it is in use. `make` makes it, and returns the descriptor.
    """
    while True:
        handle = make(temporary)
        # a network file system without locks, where leftovers are never removed
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        # Without a link, another writer has removed it before it was locked
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_file(path: str | Path, data: bytes) -> None:
    """Write `data` to a file atomically. Raises the errors of `atomic_write`."""
    with atomic_write(path) as file, writing(path):
        file.write(data)


def missing_folders(path: Path) -> list[Path]:
    """Return a folder and those around it that do not exist, the innermost first."""
    return [place for place in (path, *path.parents) if not place.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove these folders, up to the first that is missing or not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def whole_folder(path: str | Path, last: str, *, new: bool = False) -> Iterator[Path]:
    """Fill a folder whose file `last` is written last: a new folder that has this file is whole.

    Yields a temporary folder inside of `path`. When the block ends without an error, its files are flushed and moved to
    `path`, where they replace files of the same names: the largest first, and `last` at the end. A folder that must be
    `new` is missing before, or empty. All files get the mode of new ones: some libraries write files for their owner
    alone.

    Raises ConfigError if `path` is in use, or if the folder cannot be created; LongNetError for a full disk or a failed
    write.
    """
    target = Path(os.path.abspath(path))
    temporary = _temporary_name(target / last)
    with ExitStack() as stack:
        stack.callback(remove_empty, missing_folders(target))
        with writing(path, ConfigError):
            if new:
                check_unused(path)
            stack.callback(shutil.rmtree, temporary, ignore_errors=True)
            target.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target)
            stack.callback(os.close, _make_locked(temporary, _new_folder))
        with writing(path):
            yield temporary
            mode = temporary.stat().st_mode & 0o666
            files = list(temporary.iterdir())
            for file in files:
                if file.is_file():
                    file.chmod(mode)
                flush(file)
            files.sort(key=lambda file: (file.name == last, -file.stat().st_size))
            for file in files:
                os.replace(file, target / file.name)
            temporary.rmdir()
            flush(target)


def check_unused(path: str | Path) -> None:
    """Raise ConfigError for a path that exists, unless it is a folder without files but those of killed writers."""
    target = Path(path)
    if target.exists() and not (target.is_dir() and all(map(is_temporary, os.listdir(target)))):
        raise ConfigError(
            f"{path} exists and is not an empty folder: name a new one, or remove it first"
        )


def flush(path: Path) -> None:
    """Make what is written to a file, or the renames in a folder, survive a power cut."""
    with _descriptor(path) as handle:
        os.fsync(handle)


@contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create a folder and lock it against a second writer. The lock ends with the block, or when the process ends.

    Folders that were made, and that the block leaves empty, are removed.
    Raises ConfigError if the folder cannot be created or another process has locked it, LongNetError for a full disk.
    """
    with ExitStack() as stack:
        with writing(folder, ConfigError):
            stack.callback(remove_empty, missing_folders(folder))
            folder.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(_descriptor(folder))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another process is writing into this folder") from None
        except OSError:
            pass  # a network file system without locks
        yield
