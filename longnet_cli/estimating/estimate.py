"""An estimate of the memory and the time of a job: the part that is common to every `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The memory, FLOPs and time of a job. Sizes are in bytes, of one rank; `memory` has them by kind.

    `free` is the memory that is free besides the `program`, which is one of the kinds; None where the system does not
    say. `flops` counts all FLOPs of the whole job, on all ranks; `seconds` is its time. `chunk_that_fits` is a shorter
    chunk that fits where `chunk` does not.
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

    HELD: ClassVar[tuple[str, ...]] = ("program",)  # kinds that are in use already when `free` is measured

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def beyond(self) -> int:
        """Bytes that the job needs besides the kinds in `HELD`."""
        return sum(size for kind, size in self.memory.items() if kind not in self.HELD)

    @property
    def largest(self) -> str:
        """The largest kind of memory in `beyond`."""
        return max((size, kind) for kind, size in self.memory.items() if kind not in self.HELD)[1]

    @property
    def fits(self) -> bool:
        return self.free is None or self.beyond <= self.free

    @property
    def advice(self) -> str:
        """The advice for a job that does not fit: a shorter chunk or, where none fits, another change."""
        return f"--chunk {self.chunk_that_fits} fits" if self.chunk_that_fits else self._other_advice()

    def _other_advice(self) -> str:
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """Return the part of the machine format that all jobs have."""
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
