"""System calls that not every system has, each with a way that works without it. macOS lacks some that Linux has."""

import os
from collections.abc import Sequence
from typing import Any


def read_into(file: int, rooms: Sequence[Any], offset: int) -> int:
    """Fill rooms for bytes, one after the other, from `offset` of a file on. Return the bytes, fewer at its end."""
    if hasattr(os, "preadv"):
        return os.preadv(file, rooms, offset)
    read = 0
    for room in rooms:
        into = memoryview(room).cast("B")
        data = os.pread(file, len(into), offset + read)
        into[: len(data)] = data
        read += len(data)
        if len(data) < len(into):
            break
    return read


def allocate(file: int, size: int) -> None:
    """Give a file its room on the disk: a write to a map of a file would kill the process where the disk is full."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    zeros = bytes(min(size, 1 << 20))
    written = 0
    while written < size:  # a call may write a part
        written += os.pwrite(file, zeros[: size - written], written)
