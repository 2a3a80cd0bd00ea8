"""Separate memory for tensors that outlive a chunk: host memory, or a disk (`--spill FOLDER`).

It is a map of a known size.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longnet_cli.attention.pattern import ceil_div
from longnet_cli.basics.errors import ConfigError, MemoryLimitError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)


def _allocate(file: int, size: int) -> None:
    """Give a file its room on the disk: a write to a map of a file would kill the process where the disk is full."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    zeros = bytes(min(size, 1 << 20))
    written = 0
    while written < size:  # a call may write a part
        written += os.pwrite(file, zeros[: size - written], written)


class MappedMemory:
    """One map of `size` bytes: of memory or, with a `folder`, of an unnamed file in it.

    The system removes the file when the process ends, however it ends. `empty` makes tensors as torch.empty does. When
    the last view of a tensor is gone, its room goes to the next tensor of the same size; when no tensor is left, all
    room is free for any size. So `size` must cover the `aligned` bytes of all tensors that are alive at one time.
    The system provides memory only when it is written to. In the process's heap, these long-lived tensors would leave
    gaps among the short-lived ones of a chunk: measured, half as much memory again.

    Raises ConfigError for a folder that cannot be written to, MemoryLimitError where memory or disk has no room.
    """

    def __init__(self, size: int, folder: str | Path | None = None) -> None:
        size = max(1, size)  # a map cannot be empty
        with _explained(folder, f"{size / 2**30:.2f} GiB are needed"):
            if folder is None:
                self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            else:
                with tempfile.TemporaryFile(dir=folder) as file:
                    _allocate(file.fileno(), size)
                    self._map = mmap.mmap(file.fileno(), size)
        self._used = self._alive = 0
        # size -> offsets of the rooms of that size
        self._free: defaultdict[int, list[int]] = defaultdict(list)

    def empty(
        self,
        shape: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return an uninitialized tensor, on the host whatever the `device`.

        Raises ValueError where there is no room left for it.
        """
        size = prod(shape) * dtype.itemsize
        # counted first: if garbage collection frees the only other tensor meanwhile, the map must not be reset
        self._alive += 1
        if free := self._free[aligned(size)]:
            offset = free.pop()
        elif self._used + size <= len(self._map):
            offset = self._used
            self._used += aligned(size)
        else:
            self._alive -= 1
            raise ValueError(f"of {len(self._map)} mapped bytes none are left for {size} more")
        # kept alive by the tensor's storage
        room = np.frombuffer(self._map, np.uint8, size, offset)
        weakref.finalize(room, self._give_back, offset, aligned(size))
        return torch.from_numpy(room).view(dtype).view(*shape)

    def _give_back(self, offset: int, size: int) -> None:
        self._free[size].append(offset)
        self._alive -= 1
        if not self._alive:  # the next sequence may need other sizes
            self._used = 0
            self._free.clear()


@contextmanager
def _explained(folder: str | Path | None, full: str) -> Iterator[None]:
    """Turn an OSError into one for the user; `full` is what to say of a full disk or memory."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in _FULL
        problem = f"{error.strerror}, {full}" if is_full else f"{error.strerror}"
        if folder is None:
            raise MemoryLimitError(
                f"{problem}: keep them on a disk, with --spill FOLDER"
            ) from error
        raise (MemoryLimitError if is_full else ConfigError)(
            f"--spill {folder}: {problem}"
        ) from error


def aligned(size: int) -> int:
    """Return the bytes that a tensor of `size` bytes takes of a map: tensors are aligned to 64, as by torch.empty."""
    return ceil_div(size, 64) * 64
