"""Local files that another program may shrink or rewrite: a read returns the file as it was opened, or raises.

Token ids are not read through a map: touching a mapped page that the file no longer has kills the process with SIGBUS,
even after a check. A read past the end is short, which can be noticed.
"""

import errno
import io
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from longnet_cli.basics.errors import DataError, LongNetError, MemoryLimitError, first_line


class FileChangedError(DataError):
    """A file changed while it was read."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason


class reading_row:  # noqa: N801 (as a function that makes it; contextlib's takes as long as a read)
    """Name the row, the first that is lost, in the error of a file that changes while it is read."""

    __slots__ = ("row",)

    def __init__(self, row: int) -> None:
        self.row = row

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if isinstance(error, FileChangedError):
            raise FileChangedError(f"{error.where}, row {self.row}", error.reason) from None


AHEAD = 1 << 16  # bytes that are read at once for small reads that follow each other


class LocalFile(io.RawIOBase):
    """A file for reading, by position (`read_at`) or as a raw binary file.

    After each read, size and modification time must be the same as when the file was opened. Replacing the file by a
    rename is no error: the opened file can still be read.

    Reading raises FileChangedError, and DataError when the disk fails.
    """

    def __init__(self, handle: int, where: str) -> None:
        """Take a descriptor, which is closed with this object. `where` is the name of the file in messages."""
        super().__init__()
        self.where = where
        self._handle = handle
        self._position = 0
        self._ahead = (0, np.empty(0, np.uint8))  # bytes that were read ahead, and where they begin
        self.take_state()

    @classmethod
    def open(cls, path: str | Path, where: str) -> "LocalFile":
        """Open a file. Raises OSError when it cannot be opened."""
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC), where)

    def take_state(self) -> None:
        """Take the file as it is now: each read from now on must find it so."""
        status = os.fstat(self._handle)
        self.size = status.st_size
        self._written = status.st_mtime_ns

    def read_at(self, offset: int, out: Any) -> None:
        """Fill `out`, a contiguous array or memoryview, with the file's bytes from `offset` on."""
        missing = out.nbytes
        count = 1
        try:
            while missing and count:  # one call reads 2 GB at most
                place = offset + out.nbytes - missing
                count = os.preadv(self._handle, (memoryview(out).cast("B")[-missing:],), place)
                missing -= count
            status = os.fstat(self._handle)
        except OSError as error:
            raise read_error(self.where, error) from error
        if missing or status.st_mtime_ns != self._written or status.st_size != self.size:
            change = "it was written to"
            if status.st_size != self.size:
                change = f"it had {self.size} bytes and has {status.st_size}"
            reason = f"the file changed while it was read ({change}): let its writer end, and start again"
            raise FileChangedError(self.where, reason)

    def read_along(self, offset: int, size: int) -> np.ndarray:
        """Return `size` bytes from `offset` on, (size,) uint8: one read of the file serves many that follow each other.

        The bytes are not to be changed.
        """
        begin, ahead = self._ahead
        start = offset - begin
        if not 0 <= start <= len(ahead) - size:
            # what does not follow the last bytes, such as a window that is drawn at random, is read alone
            follows = 0 <= start <= len(ahead) + AHEAD
            more = min(AHEAD, self.size - offset) if follows else 0
            ahead = np.empty(max(size, more), np.uint8)
            self.read_at(offset, ahead)
            # a large read is not kept
            self._ahead = (
                (offset, ahead) if len(ahead) <= AHEAD else (offset + size, ahead[:0].copy())
            )
            start = 0
        return ahead[start : start + size]

    def map(self) -> mmap.mmap:
        """Return a map of the whole file. Touching it kills the process where the file has become shorter."""
        return mmap.mmap(self._handle, self.size, mmap.MAP_PRIVATE, mmap.PROT_READ)

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer` from the current position on, only in part at the end of the file. Return the bytes filled."""
        out = memoryview(buffer).cast("B")[: max(0, self.size - self._position)]
        self.read_at(self._position, out)
        self._position += len(out)
        return len(out)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """Close the file. This also happens when nothing refers to it any more."""
        if not self.closed:
            os.close(self._handle)
        super().close()


@dataclass(slots=True, eq=False)
class LocalIds:
    """A view of (tokens,) ids that lie in a file: a slice reads nothing, `np.asarray` reads all of it."""

    file: LocalFile
    offset: int
    dtype: np.dtype
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: slice) -> "LocalIds":
        start, stop, _ = index.indices(self.length)
        offset = self.offset + start * self.dtype.itemsize
        return LocalIds(self.file, offset, self.dtype, max(0, stop - start))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        data = self.file.read_along(self.offset, self.length * self.dtype.itemsize)
        return np.asarray(data.view(self.dtype), dtype)


def read_error(what: str, error: OSError, problem: str = "cannot read") -> LongNetError:
    """Return a one-line error for a failed system call on an input. Running out of memory or files is not bad data."""
    reason = first_line(error)
    if error.errno == errno.ENOMEM:
        return MemoryLimitError(f"{what}: there is no memory to read it ({reason})")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return LongNetError(
            f"{what}: {reason}: raise the limit (ulimit -n), or read fewer files at a time"
        )
    return DataError(f"{what}: {problem}: {reason}")


@contextmanager
def spooling() -> Iterator[None]:
    """Turn an OSError, of a temporary file that cannot be written, into a LongNetError of one line."""
    try:
        yield
    except OSError as error:
        raise LongNetError(
            f"{tempfile.gettempdir()}: no place for a temporary file: {first_line(error)}; set TMPDIR"
        ) from error


class Part(NamedTuple):
    """Consecutive ids: a row, or a stretch of a flat column or of a text.

    `ids` is (tokens,) of any integer type, a view of memory or of a file. `valid` (tokens,) is false at nulls, None
    when there are none. `row` is the row of the file that holds the ids, if one does. In a `flat` part every id is a
    row, and `row` is the first. Of a text, `n_bytes` are its UTF-8 bytes and `places`, if asked for, the characters
    [start, end) of each token in the whole text, (tokens, 2) int64. Of a chat, `is_answer`, if asked for, says which
    ids an assistant is to write, (tokens,) bool.
    """

    ids: np.ndarray | LocalIds
    valid: pa.BooleanArray | None = None
    row: int = 0
    flat: bool = False
    n_bytes: int = 0
    places: np.ndarray | None = None
    is_answer: np.ndarray | None = None

    def is_null(self, start: int, length: int) -> np.ndarray:
        """Return which of the ids [start, start + length) are null, (length,) bool."""
        if self.valid is None:
            return np.zeros(length, bool)
        return ~self.valid.slice(start, length).to_numpy(zero_copy_only=False)

    def row_of(self, index: int) -> int:
        """Return the row of the file that holds an id or, in a `flat` part of vectors, a vector."""
        return self.row + index if self.flat else self.row

    def cut(
        self,
        start: int,
        stop: int,
        row: int,
        *,
        flat: bool = False,
    ) -> "Part":
        """Return the ids [start, stop), which begin in this row of the file."""
        valid = self.valid
        if valid is not None:
            valid = valid.slice(start, stop - start)
        return Part(self.ids[start:stop], valid, row, flat)
