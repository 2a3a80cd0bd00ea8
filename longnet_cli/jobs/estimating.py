"""The needs of a job: its memory by kind, FLOPs and time. `--dry-run` says it before a long job starts.

    documents --lengths--> windows --the Reader's steps--> ReadingPlan: tokens, FLOPs, the longest window
    the first chunks of the longest document --try_reading--> Trial: bytes of the program and of a token, FLOP/s

A reading job is tried: its first chunks say what all of them take, except for what chunks of a longer document keep for
each other, which is counted. Nothing is written. A training is estimated in `jobs/training/costs.py`. A job's peak is
the sum of its kinds, as if everything were held at one time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch

from longnet_cli.data.documents.token_documents import Document
from longnet_cli.jobs.reading_plan import ReadingPlan, Task, kept_by_chunks, spilled_bytes
from longnet_cli.running import device as machines
from longnet_cli.running.reader import SHORTEST_CHUNK, Reader, fitting_chunk

CHUNKS = 2  # of the longest document: the second sees keys of the first
WARM_UP = 64  # tokens of a read after which torch and its libraries are loaded
# of a CPU's memory in one run and in another: whether a large tensor fits a gap is chance
HEAP_GAPS = 1.2
FASTER = 1.2  # times: below it, bf16 is not worth its rounding
SECONDS = 0.5  # a shorter trial is run again, without its first uses of memory


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The memory of a job, in bytes of one rank by kind, and other facts about it, named as in the machine format.

    What is `held` is in use when the `free` memory is measured, or free again later; all else is `needed`. `free` is
    infinite where the system does not say. `others` are counts of what is read, and FLOPs and seconds of the whole
    job on all ranks. `chunk_that_fits` is a shorter chunk that fits where the job's own does not, `spillable` the
    kind that --spill would keep on a disk, and `hint` says what may make the job faster.
    """

    held: dict[str, int]
    needed: dict[str, int]
    free: float
    chunk_that_fits: int | None
    spillable: str
    others: dict[str, Any] = field(default_factory=dict)
    hint: str = ""

    @property
    def memory(self) -> dict[str, int]:
        return self.held | self.needed

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def beyond(self) -> int:
        """Bytes that the job needs besides what is held."""
        return sum(self.needed.values())

    @property
    def fits(self) -> bool:
        return self.beyond <= self.free

    @property
    def largest(self) -> str:
        """The largest kind of memory that is needed."""
        return max(self.needed, key=lambda kind: self.needed[kind])

    @property
    def advice(self) -> str:
        """The changes that make a job fit that does not."""
        if self.chunk_that_fits:
            return f"--chunk {self.chunk_that_fits} fits"
        if self.largest == self.spillable:
            return "--spill DIR keeps the largest part on a disk"
        return "no chunk fits: choose shorter windows, a smaller model or a larger device"

    @property
    def facts(self) -> dict[str, Any]:
        """The keys and values of the machine format, in which an infinite number becomes null."""
        sizes = {
            "memory_bytes": self.memory,
            "peak_bytes": self.peak,
            "free_bytes": self.free,
            "fits": self.fits,
        }
        return self.others | sizes


class Room(NamedTuple):
    """The bytes that a process holds, and the bytes that are free; infinitely many if the system does not say."""

    held: int
    free: float

    @classmethod
    def now(cls, device: torch.device) -> Room:
        return cls(machines.resident_memory(device), machines.free_memory(device))


class Trial(NamedTuple):
    """The result: the bytes of the weights, of the program beside them, and of a token that is read; and FLOP/s."""

    weights: int
    program: int
    of_token: float
    rate: float


def try_reading(reader: Reader, plan: ReadingPlan, task: Task, free: float) -> Trial:
    """Read the examples of a plan, in one process, up to `CHUNKS` chunks of the longest.

    The chunks are shorter where a forward pass might need more than a quarter of the `free` bytes.
    """
    net = reader.model
    device = reader.device
    config = reader.model.config
    chunk = fitting_chunk(lambda tokens: 4 * config.forward_bytes(tokens), reader.chunk, free)
    chunk = chunk or min(SHORTEST_CHUNK, reader.chunk)
    trial_reader = Reader(
        net,
        chunk=chunk,
        dtype=reader.dtype,
        spill=reader.spill,
        events=reader.events,
    )

    documents = list[Document]()
    for document in plan.examples:  # the longest one is the first
        head = document.head(chunk if documents else CHUNKS * chunk)
        is_long_enough = any(task.windows(len(head)))
        documents.append(head if is_long_enough else document)
    counted = ReadingPlan(config, chunk, streamed=plan.streamed)
    counted.add(chain.from_iterable(task.windows(len(document)) for document in documents))

    machines.trim_memory(device)
    idle_peak = machines.peak_from_now(device)
    with torch.inference_mode(), machines.precision(reader.dtype, device):
        net(net.inputs_like((1, min(WARM_UP, config.max_tokens or WARM_UP))))
    idle = idle_peak() or machines.peak_memory(device)

    def seconds() -> float:
        began = time.perf_counter()
        task.read(trial_reader, documents)
        machines.wait_for(device)
        return time.perf_counter() - began

    reading_peak = machines.peak_from_now(device)
    least = seconds()
    if least < SECONDS:
        least = min(least, seconds())
    most = reading_peak() or machines.peak_memory(device)
    weights = sum(x.numel() * x.element_size() for x in (*net.parameters(), *net.buffers()))
    kept = sum(kept_by_chunks(trial_reader, counted, chunk).values())
    gaps = HEAP_GAPS if device.type == "cpu" else 1.0
    return Trial(
        weights,
        program=max(0, idle - weights),
        of_token=gaps * max(0, most - idle - kept) / max(1, counted.at_once(chunk)),
        rate=max(1.0, counted.flops() / least),
    )


def estimate_reading(reader: Reader, plan: ReadingPlan, task: Task, *, room: Room) -> Estimate:
    """Estimate what reading as planned takes, from a trial. `room` is the memory before the net was loaded."""
    most_while_loading = machines.peak_memory(reader.device)
    trial = try_reading(reader, plan, task, room.free)
    free = max(0, room.free - max(0, trial.program - room.held))

    def needed(chunk: int) -> dict[str, int]:
        reading = round(trial.of_token * plan.at_once(chunk))
        kept = kept_by_chunks(reader, plan, chunk)
        kinds = {"weights": trial.weights, "reading": reading, **kept}
        return {kind: size for kind, size in kinds.items() if size}

    held = {"program": trial.program}
    kinds = needed(reader.chunk)
    loading = most_while_loading - trial.program - sum(kinds.values())
    if loading > 0:  # for files whose weights were converted to another type
        held["loading"] = loading
    return Estimate(
        held=held,
        needed=kinds,
        free=free,
        others=_others(reader, plan, trial),
        chunk_that_fits=fitting_chunk(
            lambda chunk: sum(needed(chunk).values()),
            reader.chunk,
            free,
        ),
        spillable="hidden",
        hint=_faster(reader),
    )


def _others(reader: Reader, plan: ReadingPlan, trial: Trial) -> dict[str, Any]:
    """Return what is read, and how long that takes."""
    ranks = reader.all_ranks
    spilled = 0
    if reader.spill:
        spilled = spilled_bytes(reader.model, plan, reader.chunk, reader.ranks)
    rate = ranks.own(trial.rate, reader.device)
    flops = plan.flops()
    flops_per_token = flops / max(1, plan.read)
    timed_flops = flops_per_token * (plan.read - plan.new)
    return {
        "documents": plan.documents,
        "left_out": plan.left_out,
        "longest": plan.longest_document,
        "tokens_read": plan.read,
        "parameters": reader.model.config.num_parameters(),
        "flops_per_token": flops_per_token,
        "tokens": plan.tokens,
        "flops": flops,
        "seconds": timed_flops / (rate * ranks.world) + plan.seconds,
        "dtype": reader.dtype,
        "chunk": reader.chunk,
        "spill_bytes": spilled,
        "flops_per_second": rate,
        "tokens_per_second": plan.read * rate / max(1, flops),
        "reading_seconds": plan.seconds,
    }


def _faster(reader: Reader) -> str:
    """Return a hint for a CPU that multiplies matrices faster in bf16."""
    device = reader.device
    if device.type != "cpu" or reader.dtype != "fp32" or not machines.has_bf16_instructions():
        return ""
    # these instructions make some CPUs faster, and others slower
    times = machines.matmul_peak(device, "bf16") / machines.matmul_peak(device, "fp32")
    if times < FASTER:
        return ""
    return f"this CPU multiplies matrices {times:.1f} times as fast with --dtype bf16"
