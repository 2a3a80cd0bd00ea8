"""An estimate of what a job will take: the part that every `--dry-run` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from longnet_cli.runtime.chunks import SHORTEST_CHUNK


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Sizes in bytes, of one rank; `memory` by kind, `free` None where the system does not say.

    `free` is what is free besides the `program`, which is one of the kinds. `flops` are all that the whole job will
    execute, on all ranks; `seconds` is its time. `chunk_that_fits` is a shorter chunk, where `chunk` does not fit.
    """

    parameters: int
    memory: dict[str, int]
    free: int | None
    flops_per_token: float
    tokens: int
    flops: float
    seconds: float
    dtype: str
    chunk: int
    chunk_that_fits: int | None
    spilled: int  # bytes of the file of --spill

    HELD: ClassVar[tuple[str, ...]] = ("program",)  # kinds of memory that are held already when `free` is free

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def beyond(self) -> int:
        """Bytes that the job needs besides what is held."""
        return sum(size for kind, size in self.memory.items() if kind not in self.HELD)

    @property
    def largest(self) -> str:
        """The kind of the largest part of these."""
        return max((size, kind) for kind, size in self.memory.items() if kind not in self.HELD)[1]

    @property
    def fits(self) -> bool:
        return self.free is None or self.beyond <= self.free

    @property
    def advice(self) -> str:
        """Say what to change where it does not fit: the chunk, or what a shorter chunk does not make smaller."""
        return f"--chunk {self.chunk_that_fits} fits" if self.chunk_that_fits else self._other_advice()

    def _other_advice(self) -> str:
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """The keys of the machine format that all jobs have."""
        return {
            "parameters": self.parameters,
            "memory_bytes": self.memory,
            "peak_bytes": self.peak,
            "free_bytes": self.free,
            "fits": self.fits,
            "flops_per_token": self.flops_per_token,
            "tokens": self.tokens,
            "flops": self.flops,
            "seconds": self.seconds,
            "dtype": self.dtype,
            "chunk": self.chunk,
            "spill_bytes": self.spilled,
        }


def fitting_chunk(
    needed: Callable[[int], int], chunk: int, free: int | None, shortest: int = SHORTEST_CHUNK
) -> int | None:
    """Return a power of two below `chunk`, `shortest` at least, with which what is `needed` is free.

    None where there is none, and where `chunk` itself fits.
    """
    if free is None or needed(chunk) <= free:
        return None
    while chunk > shortest:
        chunk = 1 << (chunk - 1).bit_length() - 1  # the power of two below
        if chunk >= shortest and needed(chunk) <= free:
            return chunk
    return None
