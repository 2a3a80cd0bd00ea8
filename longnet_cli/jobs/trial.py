"""A trial of a reading job: it reads the first chunks of its longest document, and memory and speed are measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch

from longnet_cli.data.token_documents import Document
from longnet_cli.jobs.reading_plan import ReadingPlan, kept_by_chunks
from longnet_cli.running.device import (
    peak_from_now,
    peak_memory,
    precision,
    trim_memory,
    wait_for,
)
from longnet_cli.running.reader import SHORTEST_CHUNK, Reader, fitting_chunk

CHUNKS = 3  # of the longest document
WARM_UP = 64  # tokens of a read after which torch and its libraries are loaded
# of a CPU's memory in one run and in another: whether a large tensor fits a gap is chance
HEAP_GAPS = 1.2
SECONDS = 0.5  # a shorter trial is run again, without its first uses of memory


class Task(NamedTuple):
    """The reading that a job does: `read` reads documents, and `windows` says in which windows, by the tokens of one.

    The windows are (tokens, wanted tokens). A job that `scores` computes logits of the wanted ones.
    """

    read: Callable[[Reader, Sequence[Document]], None]
    windows: Callable[[int], Iterable[tuple[int, int]]]
    scores: bool


class Trial(NamedTuple):
    """The result: the bytes of the weights, of the program beside them, and of a token that is read; and FLOP/s."""

    weights: int
    program: int
    of_token: float
    rate: float


def try_reading(reader: Reader, plan: ReadingPlan, task: Task, free: float | None) -> Trial:
    """Read the examples of a plan, in one process, up to `CHUNKS` chunks of the longest.

    The chunks are shorter where a forward pass might need more than a quarter of the `free` bytes.
    """
    net = reader.model
    device = reader.device
    config = reader.model.config
    at_once = fitting_chunk(lambda n: 4 * config.forward_bytes(n), plan.largest, free)
    chunk = min(reader.chunk, at_once or SHORTEST_CHUNK)
    trial_reader = Reader(
        net, chunk=chunk, dtype=reader.dtype, spill=reader.spill, events=reader.events
    )

    def cut(document: Document, tokens: int) -> Document:
        head = document.head(tokens)
        return head if any(task.windows(len(head))) else document  # it may be too short for the job

    longest = plan.examples[:1]
    documents = [cut(document, CHUNKS * chunk) for document in longest]
    documents += [cut(document, chunk) for document in plan.examples[1:]]
    counted = ReadingPlan(config, chunk, streamed=plan.streamed)
    counted.add(chain.from_iterable(task.windows(len(document)) for document in documents))

    trim_memory(device)
    idle_peak = peak_from_now(device)
    with torch.inference_mode(), precision(reader.dtype, device):
        net(net.inputs_like((1, min(WARM_UP, config.max_tokens or WARM_UP))))
    idle = idle_peak() or peak_memory(device)

    def seconds() -> float:
        began = time.perf_counter()
        task.read(trial_reader, documents)
        wait_for(device)
        return time.perf_counter() - began

    reading_peak = peak_from_now(device)
    least = seconds()
    if least < SECONDS:
        least = min(least, seconds())
    most = reading_peak() or peak_memory(device)
    weights = sum(x.numel() * x.element_size() for x in (*net.parameters(), *net.buffers()))
    kept = sum(kept_by_chunks(trial_reader, counted, chunk).values())
    gaps = HEAP_GAPS if device.type == "cpu" else 1.0
    return Trial(
        weights,
        program=max(0, idle - weights),
        of_token=gaps * max(0, most - idle - kept) / (counted.largest or 1),
        rate=max(1.0, counted.flops(task.scores) / least),
    )
