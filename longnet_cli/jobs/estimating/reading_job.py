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
from longnet_cli.data.documents import SPOOL_BYTES, Document, Unread, checked
from longnet_cli.data.files import FileChangedError
from longnet_cli.data.tables import Text
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.jobs.encoding import EncodeOptions
from longnet_cli.jobs.estimating.estimate import Estimate, Extent, PlanSums, Shape
from longnet_cli.jobs.estimating.probe import FIRST_TOKENS, Probe, Sample
from longnet_cli.jobs.scoring.scoring import Cut
from longnet_cli.nets.net import InputSequence, Net, bos_ids
from longnet_cli.running.chunk_size import chunk_of, default_chunk, fitting_chunk
from longnet_cli.running.device import free_memory, peak_memory, resident_memory, resolve_dtype
from longnet_cli.running.ranks.portions import portions
from longnet_cli.running.ranks.ranks import Ranks
from longnet_cli.running.reader import PORTION_CHUNKS


class ScoreJob:
    """The job `score`: at several contexts, nats are kept for the gain; with `recalls`, bigrams are kept."""

    scores = True  # it computes logits
    skips_empty = False  # a resumed run counts empty documents as done
    alone = False  # windows share a forward pass

    def __init__(self, net: Net, cut: Cut, *, recalls: bool = False) -> None:
        self.net, self.cut, self.recalls = net, cut, recalls

    def sequence(self, document: Document) -> InputSequence[Document]:
        """Return a document as the net reads it. Raises ConfigError or DataError if the job refuses it."""
        return self.cut.sequence(self.net, document)

    def windows(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Yield (tokens, wanted tokens) for each window of a document of this many tokens."""
        if not (self.cut.last and tokens < self.cut.least):
            for context in self.cut.contexts:
                for start, stop, wanted in self.cut.inputs(tokens, context):
                    yield stop - start, stop - wanted

    def keeps(self, longest: int) -> dict[str, int]:
        """Return the bytes that the job keeps for a document of `longest` tokens, by kind."""
        nats = min(4 * longest, SPOOL_BYTES) if len(self.cut.contexts) > 1 else 0
        bigrams = 32 * min(longest, self.net.config.vocab_size**2) if self.recalls else 0
        return {kind: size for kind, size in (("nats", nats), ("bigrams", bigrams)) if size}


class EncodeJob:
    """The job `encode` with these options. Raises ConfigError for options that the net does not support."""

    scores, skips_empty = False, True

    def __init__(self, net: Net, options: EncodeOptions) -> None:
        options.check(net)
        self.net, self.options, self.alone = net, options, bool(options.all_layers)
        before = net.start_rows((*bos_ids(options.bos), *(options.prefix or ())))
        self.around = len(before) if options.closing is None else options.around

    def sequence(self, document: Document) -> InputSequence[Document]:
        return self.options.sequence(self.net, document)

    def windows(self, tokens: int) -> Iterator[tuple[int, int]]:
        for window in self.options.windows(tokens) if tokens else ():
            yield self.around + window.stop - window.start, window.last - window.first

    def keeps(self, longest: int) -> dict[str, int]:
        return {}


Job = ScoreJob | EncodeJob


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

    `seconds` is the time that reading and tokenizing all of them takes.
    """

    sums: PlanSums
    number: int
    tokens: int
    longest: int
    left_out: int
    drawn: Sample | None
    seconds: float


def count_documents(
    net: Net,
    job: Job,
    documents: Iterable[Document | Text],
    chunk: int,
    *,
    tokenizer: Tokenizer | None = None,
    sample: int | None = None,
    done: int = 0,
    skip_bad: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Counted:
    """Count what a `job` of `net` reads in chunks of `chunk` tokens; the other arguments are `estimate_documents`'s."""
    sums = PlanSums(net, chunk)
    drawn = Sample(sample, tokenizer) if sample and tokenizer else None
    left_out: list[Document] = []
    begin = time.perf_counter()
    items = islice(documents, 0 if job.skips_empty else done, None)
    found = _lengths(job, items, drawn, (lambda document, error: left_out.append(document)) if skip_bad else None)
    lengths = islice(filter(None, found), done, None) if job.skips_empty else found
    number = tokens = longest = 0

    def windows(lengths: Iterable[int]) -> Iterator[Extent]:
        nonlocal number, tokens, longest
        for length in lengths:
            number, tokens, longest = number + 1, tokens + length, max(longest, length)
            yield from (Extent(*window) for window in job.windows(length))
            if on_progress:
                on_progress(length)

    for part in portions(lengths, PORTION_CHUNKS * chunk, length_of=lambda length: length):
        for together in ([window] for window in windows(part)) if job.alone else [windows(part)]:
            sums.add(together)
    if not sums.read and not done:
        raise DataError("there is nothing to read: every document is empty, too short or left out")
    seconds = time.perf_counter() - begin + (drawn.seconds_of_all - drawn.seconds if drawn else 0)
    return Counted(sums, number, tokens, longest, len(left_out), drawn, seconds)


def estimate_documents(
    net: Net,
    job: Job,
    documents: Iterable[Document | Text],
    *,
    room: Room,
    tokenizer: Tokenizer | None = None,
    sample: int | None = None,
    done: int = 0,
    output: str = "",
    chunk: int | None = None,
    dtype: str = "auto",
    spill: str | None = None,
    ranks: Ranks | None = None,
    skip_bad: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> ReadingEstimate:
    """Estimate what a `job` of `net` takes for these documents, from their lengths and a short, measured read.

    Texts among the `documents` (`Inputs.untokenized`) need the `tokenizer`; a `sample` of this many is
    tokenized. A resumed run has already read the first `done` documents. `room` is the memory before the net was
    loaded. `chunk`, `dtype` and `ranks` are as in `running.reader.Reader`. `on_progress` gets the tokens of each
    document.

    Without `skip_bad`, raises what the job raises for documents that it cannot read. Raises DataError if there is
    nothing to read.
    """
    ranks, config, device = ranks or Ranks(), net.config, next(net.parameters()).device
    chunk = chunk_of(chunk, default_chunk(config, device), ranks=ranks)
    counted = count_documents(
        net, job, documents, chunk,
        tokenizer=tokenizer, sample=sample, done=done, skip_bad=skip_bad, on_progress=on_progress,
    )  # fmt: skip
    sums, drawn = counted.sums, counted.drawn

    held = peak_memory(device)
    probe = Probe(net, job.scores, dtype)
    weights = sum(x.numel() * x.element_size() for x in (*net.parameters(), *net.buffers()))
    program = max(0, probe.before - weights)
    free = None if room.free is None else max(0, room.free - max(0, program - room.held))
    usual = sums.usual if sums.read else Shape(1, FIRST_TOKENS)
    cut, left = sums.in_chunks(chunk), math.inf if free is None else free - weights
    rate, measured = probe.measure(usual, sums.longest if cut and usual == (1, chunk) else 0, left)
    if cut and usual != (1, chunk):
        probe.measure(Shape(1, chunk), sums.longest, left)

    def memory(chunk: int) -> dict[str, int]:
        kinds = {"weights": weights, **probe.bytes(sums.tokens_at_once(chunk), sums.logits_at_once(chunk))}
        kinds |= sums.kept_bytes(chunk, dtype, spill, ranks.of_group()) | job.keeps(counted.longest)
        return {kind: size for kind, size in kinds.items() if size}

    kinds = {"program": program, **memory(chunk)}
    if held > sum(kinds.values()):  # for files whose weights were converted to another type
        kinds["loading"] = held - sum(kinds.values())
    flops, on_disk = sums.flops(job.scores), sums.spilled_bytes(chunk, dtype, ranks.of_group())
    return ReadingEstimate(
        parameters=config.num_parameters(),
        memory=kinds,
        free=free,
        tokens=counted.tokens,
        flops=flops,
        flops_per_token=flops / (counted.tokens or 1),
        seconds=flops / (rate * ranks.world) + counted.seconds,
        dtype=resolve_dtype(dtype, device),
        chunk=chunk,
        chunk_that_fits=fitting_chunk(lambda n: sum(memory(n).values()), chunk, free) if config.streams else None,
        spilled=on_disk if spill else 0,
        spillable=0 if spill else on_disk,
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
