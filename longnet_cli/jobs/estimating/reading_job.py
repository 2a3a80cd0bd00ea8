"""The estimate of `score --dry-run` and `encode --dry-run`, before a long job: documents, tokens, FLOPs, memory, time.

    documents --lengths--> windows --the Reader's plan--> PlanSums --> FLOPs, and the sizes that make up memory
    a short read of random tokens --Probe--> FLOP/s, and the bytes of a forward pass

Only these tokens are read, and nothing is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import torch

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.data.documents import Document, Unread, checked
from longnet_cli.data.files import FileChangedError
from longnet_cli.data.tables import Text
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.jobs.estimating.estimate import Estimate, Extent, PlanSums, Shape
from longnet_cli.jobs.estimating.probe import FIRST_TOKENS, Probe, Sample
from longnet_cli.jobs.row_jobs import DocumentJob
from longnet_cli.running.chunk_size import fitting_chunk
from longnet_cli.running.device import free_memory, peak_memory, resident_memory, resolve_dtype
from longnet_cli.running.ranks.portions import portions
from longnet_cli.running.ranks.ranks import Ranks
from longnet_cli.running.reader import PORTION_CHUNKS

Job = DocumentJob[Any]


class Room(NamedTuple):
    """The bytes that a process holds, and the bytes that are free; None if the system does not say."""

    held: int
    free: int | None

    @classmethod
    def now(cls, device: torch.device) -> Room:
        return cls(resident_memory(device), free_memory(device))


@dataclass(frozen=True, kw_only=True)
class ReadingEstimate(Estimate):
    """The estimate of a job that reads documents.

    `tokens` is the number of tokens in all `documents`, `longest` the number in the longest one. If only `sampled`
    texts were tokenized, `tokens` is estimated from the bytes of all texts, and `tokens_error` is half of its 95 %
    interval. `tokens_read` counts the tokens of all forward passes, with every context and padding. `left_out` counts
    the documents that --skip-bad leaves out. `rate` is the FLOP/s of a forward pass of the `measured` shape. `seconds`
    is the time of all forward passes at that rate, plus the time for `reading` and tokenizing. `output` says what would
    happen to the output.
    """

    documents: int
    left_out: int
    longest: int
    sampled: int | None
    tokens_error: float
    tokens_read: int
    rate: float
    measured: Shape
    reading: float
    output: str
    too_long: int | None  # the most tokens that the model reads, if a window has more
    streams: bool
    spillable: int  # bytes that --spill would keep on a disk

    HELD: ClassVar[tuple[str, ...]] = ("program", "loading")  # loading is over, its memory free again

    def _other_advice(self) -> str:
        if self.largest == "hidden":
            return "keep the hidden states on a disk (--spill DIR)"
        if self.largest == "cache" and self.spillable:
            return "keep the keys and values on a disk (--spill DIR)"
        if self.largest == "cache":
            return "a pattern with shorter segments (--pattern) remembers less"
        if not self.streams:
            return "this model reads a document in one forward: leave out the longest, or cut them"
        return "no chunk fits: choose a smaller model or a larger device"

    def as_dict(self) -> dict[str, Any]:
        """Return a dict with the keys of the machine format."""
        interval = [max(0.0, self.tokens - self.tokens_error), self.tokens + self.tokens_error]
        return {
            "documents": self.documents,
            "left_out": self.left_out,
            "longest": self.longest,
            "sampled": self.sampled,
            "tokens_interval": None if self.sampled is None or math.isinf(self.tokens_error) else interval,
            "tokens_read": self.tokens_read,
            **super().as_dict(),
            "flops_per_second": self.rate,
            "reading_seconds": self.reading,
            "output": self.output,
        }


class Counted(NamedTuple):
    """The documents of a job, counted: their number, tokens, and the longest; those left out; texts that were sampled.

    `sums` are over their windows. `seconds` is the time that reading and tokenizing all of them takes.
    """

    sums: PlanSums
    number: int
    tokens: int
    longest: int
    left_out: int
    sample: Sample | None
    seconds: float


def count_documents(
    job: Job,
    documents: Iterable[Document | Text],
    *,
    tokenizer: Tokenizer | None = None,
    sample: int | None = None,
    done: int = 0,
    skip_bad: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Counted:
    """Count what a `job` reads, in its reader's chunks; the arguments are `estimate_documents`'s."""
    chunk = job.reader.chunk
    sums = PlanSums(job.reader.model, chunk)
    drawn = Sample(sample, tokenizer) if sample and tokenizer else None
    left_out: list[Document] = []
    begin = time.perf_counter()
    items = islice(documents, 0 if job.skips_empty else done, None)
    skip = (lambda document, error: left_out.append(document)) if skip_bad else None
    lengths = _lengths(job, items, drawn, skip)
    if job.skips_empty:  # an earlier run has counted only the others
        lengths = islice(filter(None, lengths), done, None)
    number = tokens = longest = 0

    def windows(lengths: Iterable[int]) -> Iterator[Extent]:
        nonlocal number, tokens, longest
        for length in lengths:
            number, tokens, longest = number + 1, tokens + length, max(longest, length)
            yield from (Extent(*window) for window in job.window_sizes(length))
            if on_progress:
                on_progress(length)

    for portion in portions(lengths, PORTION_CHUNKS * chunk, length_of=lambda length: length):
        for together in ([window] for window in windows(portion)) if job.alone else [windows(portion)]:
            sums.add(together)
    if not sums.read and not done:
        raise DataError("there is nothing to read: every document is empty, too short or left out")
    seconds = time.perf_counter() - begin + (drawn.seconds_of_all - drawn.seconds if drawn else 0)
    return Counted(sums, number, tokens, longest, len(left_out), drawn, seconds)


def _lengths(
    job: Job, items: Iterable[Document | Text], drawn: Sample | None, skip: Callable[..., None] | None
) -> Iterator[int]:
    """Yield the number of tokens of each document. Texts come last, with tokens estimated from their bytes."""

    def documents() -> Iterator[Document]:
        for item in items:
            if not isinstance(item, Text):
                yield item
                continue
            if drawn is None:
                raise ConfigError(f"{item.where}: this is text: give a tokenizer (bytes, or a tokenizer.json)")
            try:
                drawn.add(item)
            except DataError as error:
                if skip is None or isinstance(error, FileChangedError):
                    raise
                yield Unread(error)

    for sequence in checked(documents(), job.sequence, skip, reads=False):
        yield len(sequence.document)
    for size in drawn.bytes if drawn else ():
        yield round(size * drawn.tokens_per_byte) if drawn else 0


def estimate_documents(
    job: Job,
    documents: Iterable[Document | Text],
    *,
    room: Room,
    tokenizer: Tokenizer | None = None,
    sample: int | None = None,
    done: int = 0,
    output: str = "",
    ranks: Ranks | None = None,
    skip_bad: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> ReadingEstimate:
    """Estimate what a `job` takes for these documents, from their lengths and a short, measured read.

    Texts among the `documents` (`Inputs.untokenized`) need the `tokenizer`; a `sample` of this many is
    tokenized. A resumed run has already read the first `done` documents. `room` is the memory before the net was
    loaded. The job's reader is of one group of all `ranks`. `on_progress` gets the tokens of each document.

    Without `skip_bad`, raises what the job raises for documents that it cannot read. Raises DataError if there is
    nothing to read.
    """
    counted = count_documents(
        job, documents,
        tokenizer=tokenizer, sample=sample, done=done, skip_bad=skip_bad, on_progress=on_progress,
    )  # fmt: skip
    reader, config, sums, drawn = job.reader, job.reader.model.config, counted.sums, counted.sample
    most_while_loading = peak_memory(reader.device)
    probe = Probe(reader.model, job.scores, reader.dtype)
    program = max(0, probe.before - probe.weights)
    free = None if room.free is None else max(0, room.free - max(0, program - room.held))
    rate, measured = _measure(probe, sums, math.inf if free is None else free - probe.weights)

    def needed(chunk: int) -> dict[str, int]:
        return {kind: size for kind, size in _memory_by_kind(job, counted, probe, chunk).items() if size}

    memory = {"program": program, **needed(reader.chunk)}
    if most_while_loading > sum(memory.values()):  # for files whose weights were converted to another type
        memory["loading"] = most_while_loading - sum(memory.values())
    fitting = fitting_chunk(lambda n: sum(needed(n).values()), reader.chunk, free) if config.streams else None
    flops, on_disk = sums.flops(job.scores), sums.spilled_bytes(reader.chunk, reader.dtype, reader.ranks)
    return ReadingEstimate(
        parameters=config.num_parameters(),
        memory=memory,
        free=free,
        tokens=counted.tokens,
        flops=flops,
        flops_per_token=flops / (counted.tokens or 1),
        seconds=flops / (rate * (ranks or Ranks()).world) + counted.seconds,
        dtype=resolve_dtype(reader.dtype, reader.device),
        chunk=reader.chunk,
        chunk_that_fits=fitting,
        spilled=on_disk if reader.spill else 0,
        spillable=0 if reader.spill else on_disk,
        documents=counted.number,
        left_out=counted.left_out,
        longest=counted.longest,
        sampled=drawn.sampled if drawn and drawn.bytes else None,
        tokens_error=drawn.error if drawn else 0.0,
        tokens_read=sums.read,
        rate=rate,
        measured=measured,
        reading=counted.seconds,
        output=output,
        too_long=config.max_tokens if sums.longest > (config.max_tokens or math.inf) else None,
        streams=config.streams,
    )


def _measure(probe: Probe, sums: PlanSums, room: float) -> tuple[float, Shape]:
    """Return the FLOP/s of most tokens' forward passes, and the shape that was measured.

    The last measurement is of what takes the most memory: where a window is read in chunks, of several chunks of it.
    """
    usual = sums.usual if sums.read else Shape(1, FIRST_TOKENS)
    in_chunks, of_chunk = sums.in_chunks(sums.chunk), Shape(1, sums.chunk)
    rate, measured = probe.measure(usual, sums.longest if in_chunks and usual == of_chunk else 0, room)
    if in_chunks and usual != of_chunk:
        probe.measure(of_chunk, sums.longest, room)
    return rate, measured


def _memory_by_kind(job: Job, counted: Counted, probe: Probe, chunk: int) -> dict[str, int]:
    """Return the bytes of one rank at its peak beside the program, in chunks of so many tokens.

    They are the weights, the activations and logits of the largest forward pass in proportion to those of the probe's,
    what is kept between forward passes, and what the job keeps of the longest document.
    """
    reader, sums = job.reader, counted.sums
    return {
        "weights": probe.weights,
        **probe.bytes(sums.tokens_at_once(chunk), sums.logits_at_once(chunk)),
        **sums.kept_bytes(chunk, reader.dtype, bool(reader.spill), reader.ranks),
        **job.kept_bytes(counted.longest),
    }
