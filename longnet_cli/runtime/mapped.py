"""Room for tensors that outlive a chunk, apart from what is computed with: memory, or a disk (`--spill FOLDER`)."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longnet_cli.errors import ConfigError, MemoryLimitError


class MappedMemory:
    """One map of `size` bytes: of memory or, with a `folder`, of one file in it that has no name.

    The system removes the file with the process, however that ends. `empty` makes tensors as torch.empty does. When the
    last view of one is gone, its room goes to the next of the same size; when none is left, all of it to any. So what
    is mapped is `aligned` bytes for each that is alive at one time. Memory is taken when it is written. Among the many
    short-lived tensors of a chunk, long-lived ones would leave gaps that nothing fits: half as much again, measured.

    Raises ConfigError for a folder that cannot be written to, MemoryLimitError where memory or disk has not the room.
    """

    def __init__(self, size: int, folder: str | Path | None = None) -> None:
        size = max(1, size)  # there is no map of nothing
        try:
            if folder is None:
                self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            else:
                with tempfile.TemporaryFile(dir=folder) as file:
                    os.posix_fallocate(file.fileno(), 0, size)  # a write to a map of a full disk would kill the process
                    self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)
            problem = f"{error.strerror}, {size / 2**30:.2f} GiB are needed" if full else f"{error.strerror}"
            if folder is None:
                raise MemoryLimitError(f"{problem}: keep them on a disk, with --spill FOLDER") from error
            raise (MemoryLimitError if full else ConfigError)(f"--spill {folder}: {problem}") from error
        self._used = self._alive = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # size -> where such rooms begin

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Return a tensor of any content, on the host whatever the `device` that is computed on.

        Raises ValueError where there is no room left for it.
        """
        size = prod(shape) * dtype.itemsize
        self._alive += 1  # first: garbage that is collected meanwhile gives its room back, and is not the last now
        if free := self._free[aligned(size)]:
            offset = free.pop()
        elif self._used + size <= len(self._map):
            offset, self._used = self._used, self._used + aligned(size)
        else:
            self._alive -= 1
            raise ValueError(f"of {len(self._map)} mapped bytes none are left for {size} more")
        room = np.frombuffer(self._map, np.uint8, size, offset)  # which the tensor's storage holds
        weakref.finalize(room, self._give_back, offset, aligned(size))
        return torch.from_numpy(room).view(dtype).view(*shape)

    def _give_back(self, offset: int, size: int) -> None:
        self._free[size].append(offset)
        self._alive -= 1
        if not self._alive:  # the next sequence may be of another length
            self._used = 0
            self._free.clear()


def aligned(size: int) -> int:
    """Bytes that a tensor of `size` bytes takes of a map: it begins where one of torch.empty could."""
    return -(-size // 64) * 64
