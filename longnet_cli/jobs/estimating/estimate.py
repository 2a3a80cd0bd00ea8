"""The estimate of a job for `--dry-run`: its memory by kind, FLOPs and time. A long one is known before it starts.

    documents --count_documents--> ReadingPlan --reading_memory--> bytes by kind
    a short read of random tokens --reading_rate--> FLOP/s, and so the time of all

Of a reading job, only these tokens are read, and nothing is written. `jobs/training/costs.py` has that of a recipe.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from longnet_cli.jobs.estimating.memory import reading_memory, spilled_bytes
from longnet_cli.jobs.estimating.reading import ReadingPlan, Shape
from longnet_cli.nets.net import Net
from longnet_cli.running.causal_stream import open_stream
from longnet_cli.running.chunk_size import fitting_chunk
from longnet_cli.running.device import (
    bf16_instructions,
    free_memory,
    peak_memory,
    precision,
    resident_memory,
    wait_for,
)
from longnet_cli.running.reader import Reader, Window

SECONDS = 0.5  # that a forward pass takes, or repetitions of a read
FIRST_TOKENS = 256  # of the first forward pass; later ones grow until they take that long
STEPS = 3  # forward passes of a read
NEW_TOKENS = 4


class _Noise:
    """Random ids, or vectors of zeros, as `net` reads them."""

    def __init__(self, net: Net) -> None:
        self.net = net

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.net.inputs_like((1, stop - start))[0].cpu().numpy()


@torch.inference_mode()
def read_noise(net: Net, lengths: Sequence[int], chunk: int, dtype: str, *, scores: bool) -> None:
    """Read windows of these lengths as a job would, with their logits if it `scores`."""
    device = next(net.parameters()).device
    for pieces in Reader(net, chunk=chunk, dtype=dtype).read([Window(_Noise(net), 0, n, 0) for n in lengths]):
        if scores:
            hidden = torch.cat([piece.hidden for piece in pieces if piece.hidden is not None])
            with precision(dtype, device):
                net.nll(hidden, torch.zeros(len(hidden), dtype=torch.int64, device=device))
    wait_for(device)


def reading_rate(net: Net, plan: ReadingPlan, dtype: str, room: float, *, scores: bool) -> tuple[float, Shape]:
    """Return the FLOP/s of reading, and the shape of the forward passes that were timed.

    They are as most tokens' of the plan or, where these are slow or would need more than a quarter of the `room` in
    bytes, shorter. A read has `STEPS` of them: in a row if the plan's longest window is read in chunks.
    """
    usual = plan.usual if plan.read else Shape(1, FIRST_TOKENS)
    most, tokens = usual.rows * usual.tokens, FIRST_TOKENS

    def seconds(lengths: Sequence[int], least: float, scores: bool) -> float:
        begin, times = time.perf_counter(), 0
        while not times or time.perf_counter() < begin + least:
            read_noise(net, lengths, tokens, dtype, scores=scores)
            times += 1
        return (time.perf_counter() - begin) / times

    while True:
        tokens = min(tokens, most)
        shape = Shape(max(1, tokens // usual.tokens), min(tokens, usual.tokens))
        one = seconds([shape.tokens] * shape.rows, 0.0, False)
        if tokens == most or one >= SECONDS or 4 * net.config.forward_bytes(tokens) > room:
            break
        tokens *= 2 if one > SECONDS / 8 else 4
    steps = STEPS if one < 4 * SECONDS else 1
    in_chunks = plan.in_chunks(plan.chunk) and usual == Shape(1, plan.chunk)
    lengths = [min(plan.longest, steps * tokens)] if in_chunks else [shape.tokens] * steps * shape.rows
    timed = ReadingPlan(net, tokens)
    timed.add((length, length) for length in lengths)
    return timed.flops(scores) / seconds(lengths, SECONDS, scores), shape


@torch.inference_mode()
def seconds_of_new_token(net: Net, dtype: str) -> float:
    """Return the seconds that a new token takes, at best of NEW_TOKENS, after a prompt of as many random tokens."""
    device, stream = next(net.parameters()).device, open_stream(net)
    seconds = []
    with precision(dtype, device):
        stream(torch.randint(net.config.vocab_size, (1, NEW_TOKENS), device=device))
        for _ in range(NEW_TOKENS):
            began = time.perf_counter()
            hidden = stream(torch.randint(net.config.vocab_size, (1, 1), device=device))
            int(net.logits(hidden[0, -1]).argmax(-1))
            seconds.append(time.perf_counter() - began)
    return min(seconds)


WARM_UP = 64  # tokens of a read after which torch and its libraries are loaded


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The memory of a job, in bytes of one rank by kind, and other facts about it, named as in the machine format.

    `free` is the memory that is free besides the `program`, which is one of the kinds; None where the system does not
    say. `counts` are the parameters and what is read; `costs` are FLOPs and seconds, of the whole job on all ranks, and
    how they were found. `chunk_that_fits` is a shorter chunk that fits where the job's own does not, and `otherwise`
    the advice where none fits. Of a reading job, `measured` is the shape of the forward passes whose rate was timed,
    `too_long` the most tokens that the model reads, if a window has more, and `hint` what may make it faster.
    """

    memory: dict[str, int]
    free: int | None
    counts: dict[str, Any]
    costs: dict[str, Any]
    chunk_that_fits: int | None
    otherwise: str
    measured: Shape | None = None
    too_long: int | None = None
    hint: str = ""

    HELD: ClassVar[tuple[str, ...]] = ("program", "loading")  # in use when `free` is measured, or free again later

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def beyond(self) -> int:
        """Bytes that the job needs besides the kinds in `HELD`."""
        return sum(size for kind, size in self.memory.items() if kind not in self.HELD)

    @property
    def fits(self) -> bool:
        return self.free is None or self.beyond <= self.free

    @property
    def advice(self) -> str:
        """The advice for a job that does not fit: a shorter chunk or, where none fits, another change."""
        return f"--chunk {self.chunk_that_fits} fits" if self.chunk_that_fits else self.otherwise

    @property
    def facts(self) -> dict[str, Any]:
        """The keys and values of the machine format."""
        sizes = {"memory_bytes": self.memory, "peak_bytes": self.peak, "free_bytes": self.free, "fits": self.fits}
        return self.counts | sizes | self.costs


def largest(memory: dict[str, int]) -> str:
    """Return the largest kind of memory that is not held already."""
    return max((size, kind) for kind, size in memory.items() if kind not in Estimate.HELD)[1]


class Room(NamedTuple):
    """The bytes that a process holds, and the bytes that are free; None if the system does not say."""

    held: int
    free: int | None

    @classmethod
    def now(cls, device: torch.device) -> Room:
        return cls(resident_memory(device), free_memory(device))


def estimate_reading(
    reader: Reader,
    plan: ReadingPlan,
    *,
    room: Room,
    scores: bool,
    kept: dict[str, int] | None = None,
    output: str = "",
) -> Estimate:
    """Estimate what reading as planned takes, from arithmetic and a short, measured read.

    `room` is the memory before the net was loaded, `kept` what the job itself keeps of the longest document, in bytes
    by kind. `output` says what would happen to the output.
    """
    net, config, dtype, spill = reader.model, reader.model.config, reader.dtype, bool(reader.spill)
    most_while_loading = peak_memory(reader.device)
    warm_up = min(WARM_UP, config.max_tokens or WARM_UP)
    read_noise(net, [warm_up], warm_up, dtype, scores=scores)
    weights = sum(x.numel() * x.element_size() for x in (*net.parameters(), *net.buffers()))
    program = max(0, resident_memory(reader.device) - weights)
    free = None if room.free is None else max(0, room.free - max(0, program - room.held))
    rate, measured = reading_rate(net, plan, dtype, math.inf if free is None else free - weights, scores=scores)
    rate = reader.all_ranks.own(rate, reader.device)

    def needed(chunk: int) -> dict[str, int]:
        kinds = reading_memory(net, plan, chunk, dtype, reader.ranks, scores=scores, spill=spill) | (kept or {})
        return {kind: size for kind, size in kinds.items() if size}

    memory = {"program": program, **needed(reader.chunk)}
    if most_while_loading > sum(memory.values()):  # for files whose weights were converted to another type
        memory["loading"] = most_while_loading - sum(memory.values())
    fitting = fitting_chunk(lambda n: sum(needed(n).values()), reader.chunk, free) if config.streams else None
    flops, on_disk = plan.flops(scores), spilled_bytes(net, plan, reader.chunk, dtype, reader.ranks)
    instructions = bf16_instructions() if reader.device.type == "cpu" and dtype == "fp32" else None
    return Estimate(
        memory=memory,
        free=free,
        hint=f"this CPU has {instructions}: try --dtype bf16, which is often faster" if instructions else "",
        counts={
            "documents": plan.documents,
            "left_out": plan.left_out,
            "longest": plan.longest_document,
            "sampled": plan.sample.sampled if plan.sample and plan.sample.bytes else None,
            "tokens_read": plan.read,
            "parameters": config.num_parameters(),
        },
        costs={
            "flops_per_token": flops / (plan.tokens or 1),
            "tokens": plan.tokens,
            "flops": flops,
            "seconds": flops / (rate * reader.all_ranks.world) + plan.seconds,
            "dtype": dtype,
            "chunk": reader.chunk,
            "spill_bytes": on_disk if spill else 0,
            "flops_per_second": rate,
            "reading_seconds": plan.seconds,
            "output": output,
        },
        chunk_that_fits=fitting,
        otherwise=_advice(largest(memory), config.streams, on_disk > 0 and not spill),
        measured=measured,
        too_long=config.max_tokens if plan.longest > (config.max_tokens or math.inf) else None,
    )


def _advice(largest: str, streams: bool, spillable: bool) -> str:
    if largest == "hidden":
        return "keep the hidden states on a disk (--spill DIR)"
    if largest == "cache" and spillable:
        return "keep the keys and values on a disk (--spill DIR)"
    if largest == "cache":
        return "a pattern with shorter segments (--pattern) remembers less"
    if not streams:
        return "this model reads a document in one forward: leave out the longest, or cut them"
    return "no chunk fits: choose a smaller model or a larger device"
