"""Separate memory for tensors that outlive a chunk: host memory, or a disk (`--spill FOLDER`).

Of a known size, it is a map. Blocks of a document of any length go to a file that grows and is not mapped: the pages of
a map that were read count as memory of the process.
"""

from __future__ import annotations

import copy
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

from longnet_cli.attention.past import Blocks
from longnet_cli.basics.errors import ConfigError, MemoryLimitError
from longnet_cli.basics.sizes import format_bytes
from longnet_cli.basics.system_calls import allocate, read_into

PIECE_BYTES = 1 << 26  # of blocks that are read from a file at a time
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)


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
                    allocate(file.fileno(), size)
                    self._map = mmap.mmap(file.fileno(), size)
        self._used = self._alive = 0
        self._free: defaultdict[int, list[int]] = defaultdict(
            list
        )  # size -> offsets of the rooms of that size

    def empty(
        self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str = "cpu"
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
            offset, self._used = self._used, self._used + aligned(size)
        else:
            self._alive -= 1
            raise ValueError(f"of {len(self._map)} mapped bytes none are left for {size} more")
        room = np.frombuffer(
            self._map, np.uint8, size, offset
        )  # kept alive by the tensor's storage
        weakref.finalize(room, self._give_back, offset, aligned(size))
        return torch.from_numpy(room).view(dtype).view(*shape)

    def _give_back(self, offset: int, size: int) -> None:
        self._free[size].append(offset)
        self._alive -= 1
        if not self._alive:  # the next sequence may need other sizes
            self._used = 0
            self._free.clear()


def mapped_empty(
    shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """Return an uninitialized tensor with a map of its own, which goes back to the system with it.

    On a GPU, it is that of torch.empty. Raises MemoryLimitError where memory has no room.
    """
    if torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return MappedMemory(prod(shape) * dtype.itemsize).empty(shape, dtype=dtype)


class SpillFile:
    """An unnamed file in a folder, which grows with what is written. The system removes it when the process ends.

    Raises ConfigError for a folder that cannot be written to, MemoryLimitError where the disk has no room.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.size = folder, 0
        with _explained(folder, "there is no room for a file"):
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    def append(self, rest: memoryview) -> int:
        """Write bytes at the end, and return the place of the first one."""
        start = self.size
        while rest:
            with _explained(
                self.folder, f"{format_bytes(self.size)} of keys and values are written"
            ):
                done = os.pwrite(self._file.fileno(), rest, self.size)
            self.size, rest = self.size + done, rest[done:]
        return start

    def read(self, start: int, into: Sequence[memoryview]) -> None:
        """Fill rooms for bytes, one after the other, with the bytes from `start` on."""
        done = read_into(self._file.fileno(), into, start)
        if done != sum(map(len, into)):
            raise OSError(errno.EIO, os.strerror(errno.EIO), f"--spill {self.folder}")


class BlockFile(Blocks):
    """The blocks of a layer in a file, which several layers share: keys and values of a block are one piece of it."""

    def __init__(self, file: SpillFile) -> None:
        super().__init__()
        self._file = file
        self._places: list[list[int]] = []  # of each block, in each row of the batch

    def append(self, blocks: Tensor) -> None:
        self._like = blocks[:, :, :0]
        data = (
            blocks.permute(2, 1, 0, 3, 4, 5).cpu().contiguous()
        )  # (n, B, k and v, tokens of a block, K, D)
        start, size = (
            self._file.append(data.view(torch.uint8).flatten().numpy().data),
            data[0, 0].nbytes,
        )
        rows = range(0, size * data.shape[1], size)
        self._places += [
            [block + row for row in rows] for block in range(start, self._file.size, data[0].nbytes)
        ]
        self.number = len(self._places)

    def take(self, row: int, blocks: Tensor, into: Tensor) -> None:
        host = into if into.device.type == "cpu" else torch.empty_like(into, device="cpu")
        keys, values = (x.view(torch.uint8).flatten(1).numpy() for x in host)
        for place, block in enumerate(blocks.tolist()):
            self._file.read(self._places[block][row], [keys[place].data, values[place].data])
        if host is not into:
            into.copy_(host)

    def select(self, rows: Tensor) -> None:
        self._places = [[block[row] for row in rows.tolist()] for block in self._places]

    def pieces(self) -> Iterator[Tensor]:
        if not self.number:
            return
        _, batch, _, *shape = self._like.shape
        step = max(1, PIECE_BYTES // (2 * batch * prod(shape) * self._like.itemsize))
        for start in range(0, self.number, step):
            blocks = torch.arange(start, min(start + step, self.number))
            piece = self._like.new_empty(2, batch, len(blocks), *shape, device="cpu")
            for row in range(batch):
                self.take(row, blocks, piece[:, row])
            yield piece

    def adopt(self, blocks: Tensor) -> None:
        self.append(blocks)

    def fork(self) -> BlockFile:
        new = copy.copy(self)
        new._places = [*self._places]
        return new


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
    return -(-size // 64) * 64
