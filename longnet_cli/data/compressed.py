"""Compressed inputs, by their first bytes: gzip, zstd, xz and bzip2, as a stream of what they unpack to.

They are unpacked as they are read, so memory does not grow with what is in them.
"""

import bz2
import gzip
import io
import lzma
import zlib
from typing import Any

import pyarrow as pa

from longnet_cli.data.tables import one_line
from longnet_cli.errors import DataError

SUFFIXES = (".gz", ".zst", ".xz", ".bz2")
UNPACKED_BUFFER = 1 << 20

_MAGIC = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2"}


def compression(head: bytes) -> str | None:
    """Return how an input is compressed, by at least its first 8 bytes; None where it is not."""
    if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:  # a frame to be skipped, as pzstd's begin
        return "zstd"
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def bare_name(name: str) -> str:
    """The name of a file without the suffix of its compression: `a.jsonl` of `a.jsonl.gz`."""
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def unpack(kind: str, packed: Any, where: str) -> io.BufferedReader:
    """Return what a binary file unpacks to. Reading raises DataError, with `where`, for damaged or cut data."""
    return io.BufferedReader(_Unpacked(kind, packed, where), UNPACKED_BUFFER)


class _Unpacked(io.RawIOBase):
    """A raw file of what is unpacked, with one kind of error."""

    def __init__(self, kind: str, packed: Any, where: str) -> None:
        self._kind, self._where = kind, where
        self._file: Any
        if kind == "gzip":
            self._file = gzip.GzipFile(fileobj=packed, mode="rb")
        elif kind == "xz":
            self._file = lzma.LZMAFile(packed)  # noqa: SIM115 (closed with what it reads)
        elif kind == "bzip2":
            self._file = bz2.BZ2File(packed)
        else:
            self._file = pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        out = memoryview(buffer).cast("B")
        try:
            data = self._file.read(len(out))
        except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None and error.strerror:
                raise  # of the disk
            raise DataError(
                f"{self._where}: the {self._kind} data is damaged or truncated ({one_line(error)})"
            ) from error
        out[: len(data)] = data
        return len(data)
