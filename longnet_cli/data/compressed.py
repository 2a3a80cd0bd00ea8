"""Compressed inputs (gzip, zstd, xz and bzip2), known by their first bytes and read as a stream of unpacked data.

They are unpacked while they are read, so memory does not grow with their size.
"""

import bz2
import gzip
import io
import lzma
import zlib
from typing import Any

import pyarrow as pa

from longnet_cli.basics.errors import DataError
from longnet_cli.data.tables import Pipe, one_line

SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
UNPACKED_BUFFER = 1 << 20
STEP = 1 << 12  # bytes unpacked at a time: so many or fewer are lost before damage

_MAGIC = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2"}


def compression(head: bytes) -> str | None:
    """Return the compression of an input, by at least its first 8 bytes; None if it is not compressed."""
    if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:  # a skippable frame, with which pzstd's files start
        return "zstd"
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def bare_name(name: str) -> str:
    """Return the name of a file in lower case, without the suffix of its compression: `a.jsonl` for `A.jsonl.GZ`."""
    name = name.lower()
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


# Not pyarrow.CompressedInputStream, which reads no xz.
def unpack(kind: str, packed: Any, where: str) -> io.BufferedReader:
    """Return a file that unpacks a binary file. Reading raises DataError, with `where`, for damaged or cut data."""
    return io.BufferedReader(_Unpacked(kind, packed, where), UNPACKED_BUFFER)


class _Steps(Pipe):
    """A packed file that is read in steps: pyarrow unpacks all that one read has returned before it hands on any."""

    def read(self, size: int = STEP) -> bytes:
        return bytes(self._raw.read(min(size, STEP)))


class _Unpacked(io.RawIOBase):
    """A raw file of unpacked data, with one kind of error for all compressions."""

    def __init__(self, kind: str, packed: Any, where: str) -> None:
        self._kind, self._where = kind, where
        self._damage: DataError | None = None
        self._file: Any
        if kind == "gzip":
            self._file = gzip.GzipFile(fileobj=packed, mode="rb")
        elif kind == "xz":
            self._file = lzma.LZMAFile(packed)  # noqa: SIM115 (closed with what it reads)
        elif kind == "bzip2":
            self._file = bz2.BZ2File(packed)
        else:
            self._file = pa.CompressedInputStream(pa.PythonFile(_Steps(packed), mode="r"), "zstd")
        self._read = getattr(self._file, "read1", self._file.read)  # `read` joins steps, and would lose all of them

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        out = memoryview(buffer).cast("B")
        if self._damage:
            raise self._damage
        try:
            data = self._read(min(len(out), STEP))
        except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None and error.strerror:
                raise  # an error of the disk
            said = f"{self._where}: the {self._kind} data is damaged or truncated ({one_line(error)})"
            self._damage = DataError(said)
            raise self._damage from error
        out[: len(data)] = data
        return len(data)
