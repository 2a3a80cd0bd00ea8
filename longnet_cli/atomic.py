"""Atomic writes of files, and folders with a single writer: temporary names, locks, fsync, rename."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from longnet_cli.errors import ConfigError, LongNetError

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")  # a file that is being written; the group is its final name


@contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Turn a failed write (a full disk, a file too large) into a LongNetError that names what was being written.

    A BrokenPipeError passes through unchanged: the reader has read enough.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise LongNetError(f"{what}: cannot write: {error.strerror or error}") from error


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing under a temporary name in its folder; rename it when the block ends without an error.

    Missing folders are created. At any time, even after a crash, the path holds the old file or the whole new one.
    Temporary files that killed writers of the same file left behind are removed. A device or a named pipe is written
    to directly. Raises ConfigError when the path cannot be opened, LongNetError when the end of the file cannot be
    written.
    """
    target = Path(path)
    with _opening(path):
        direct = target.exists() and not stat.S_ISREG(target.stat().st_mode)
        if not direct:
            target = Path(os.path.realpath(path))  # not for >(command), whose real path does not exist
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target.parent, target.name)
        temporary, file = (target, open(target, "wb")) if direct else _new_temporary(target)  # noqa: SIM115
    try:
        yield file
        with writing(path):
            file.flush()
            if not direct:
                os.fsync(file.fileno())
            file.close()
            if not direct:
                os.replace(temporary, target)
                sync_folder(target.parent)
    except BaseException:
        with suppress(OSError):  # on a full disk, close fails again, but the file is then closed
            file.close()
        if not direct:
            temporary.unlink(missing_ok=True)
        raise


def is_temporary(name: str) -> bool:
    """Return whether a file name is a temporary name of `atomic_write`."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_leftovers(folder: Path, target: str | None = None) -> None:
    """Delete the temporary files that killed writers left in a folder: all of them, or only those for `target`.

    A running writer holds a lock on its temporary file, which is then kept.
    """
    for name in os.listdir(folder):
        match = _TEMPORARY.fullmatch(name)
        if match and target in (None, match[1]):
            with suppress(OSError), open(folder / name, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (folder / name).unlink()


def _new_temporary(target: Path) -> tuple[Path, BinaryIO]:
    """Create and lock a temporary file beside `target`. The lock shows `remove_leftovers` that it is in use."""
    while True:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            file = open(temporary, "xb")  # noqa: SIM115 (its user closes it)
            with suppress(OSError):  # a network file system without locks, where leftovers are never removed
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:  # otherwise another writer removed it before it was locked
                return temporary, file
            file.close()
        except FileExistsError:
            continue
        except BaseException:  # Ctrl-C and SIGTERM may come between any two lines
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_file(path: str | Path, data: bytes) -> None:
    """Write `data` to a file atomically. Raises the errors of `atomic_write`."""
    with atomic_write(path) as file, writing(path):
        file.write(data)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Create a temporary folder to fill; rename it to `path` when the block ends without an error.

    Raises ConfigError if `path` exists and is not an empty folder, or if the folder cannot be created; LongNetError
    for a full disk or a failed write.
    """
    target = Path(os.path.abspath(path))
    with _opening(path):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"{path} exists and is not an empty folder: name a new one, or remove it first")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        temporary.mkdir()
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, target)
            sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create a folder and lock it against a second writer. The lock ends with the block, or when the process ends.

    Raises ConfigError if the folder cannot be created or another process has locked it, LongNetError for a full disk.
    """
    with _opening(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another process is writing into this folder") from None
        except OSError:
            pass  # a network file system without locks
        yield
    finally:
        os.close(handle)


@contextmanager
def _opening(path: str | Path) -> Iterator[None]:
    """Turn an OSError into a ConfigError, because the path is an option; into a LongNetError if the disk is full."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (LongNetError if full else ConfigError)(f"{path}: cannot write: {error.strerror}") from error
