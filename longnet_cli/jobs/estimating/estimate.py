"""The estimate of a job for `--dry-run`: its memory by kind, FLOPs and time. A long one is known before it starts.

    documents --lengths--> windows --the Reader's steps--> ReadingPlan --reading_memory--> bytes by kind
    texts --Sample.add--> bytes of each, and tokens of some --Sample.lengths--> tokens of each
    a short read of random tokens --reading_rate--> FLOP/s, and so the time of all

Of a reading job, only these tokens are read, and nothing is written. With a sample, every text is read, which is fast,
and its UTF-8 bytes are counted. Only a uniform sample of the texts is tokenized. The estimate is the bytes of all
texts, times the tokens per byte of the sample. This ratio estimate is close where documents differ in length but are
alike in tokens per byte. `jobs/training/costs.py` has the estimate of a recipe.
"""

from __future__ import annotations

import math
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import numpy as np
import torch

from longnet_cli.attention.spans import far_spans
from longnet_cli.basics.errors import DataError
from longnet_cli.data.documents import Document, Unread
from longnet_cli.data.manifest import OnSkip
from longnet_cli.data.tables import Text
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.jobs.estimating.memory import cache_bytes, forward_memory, itemsize_of, transient_memory
from longnet_cli.nets.config import NetConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import Net
from longnet_cli.running.causal_stream import open_stream
from longnet_cli.running.device import bf16_instructions, free_memory, peak_memory, precision, resident_memory, wait_for
from longnet_cli.running.layerwise import fits_beside, kept_bytes
from longnet_cli.running.ranks.dealing import portions
from longnet_cli.running.ranks.ranks import Ranks
from longnet_cli.running.reader import PORTION_CHUNKS, Reader, Window, fitting_chunk, forward_passes, reading_steps

if TYPE_CHECKING:
    from longnet_cli.jobs.row_jobs import RowJob

SEED = 0  # every run draws the same documents


class ReadingPlan:
    """Sums over what a `Reader` of a net with this `config` reads in chunks, which keep no window.

    `documents` counts documents of `tokens` in all and `longest_document` at most; `left_out` those that --skip-bad
    leaves out. `read` are the tokens of all forward passes, padding included, and `wanted` those whose hidden states
    are wanted. `longest` is the longest window, `largest` the most tokens of a forward pass, and `together` the most
    tokens of windows that wait for each other. `seconds` is the time of reading and tokenizing, `sampled` the number of
    texts that were tokenized, None if all were counted.
    """

    documents = tokens = longest_document = left_out = 0
    read = wanted = longest = largest = together = 0
    twice = 0  # tokens whose keys are computed twice: of long windows, layer by layer
    seconds = 0.0
    sampled: int | None = None

    def __init__(self, config: NetConfig, chunk: int) -> None:
        self.config, self.chunk = config, chunk
        self._lengths: Counter[int] = Counter()  # of the rows of all forward passes; a long window is one row

    def add_document(self, tokens: int) -> None:
        """Count a document; `add` counts its windows."""
        self.documents, self.tokens = self.documents + 1, self.tokens + tokens
        self.longest_document = max(self.longest_document, tokens)

    def add(self, windows: Iterable[tuple[int, int]]) -> None:
        """Count windows, each as (tokens, tokens whose hidden states are wanted), as one `Reader.read` reads them."""

        def of_lengths() -> Iterator[range]:  # a range has a length, and no memory
            for tokens, wanted in windows:
                self.wanted += wanted
                yield range(tokens)

        for step in reading_steps(of_lengths(), self.chunk, self.config.streams):
            tokens = sum(map(len, step))
            self.longest = max(self.longest, *map(len, step))
            batches = forward_passes(step, self.chunk, self.config.streams)
            if batches is None:
                shapes, self.largest = [(1, tokens)], max(self.largest, self.chunk)
                self.twice += 0 if self.config.causal or not self._sees_outside(tokens) else tokens
            else:
                shapes = [(len(batch), len(step[batch[0]])) for batch in batches]
                self.largest = max(self.largest, *(rows * length for rows, length in shapes), 0)
                self.together = max(self.together, tokens)
            for rows, length in shapes:
                self.read += rows * length
                self._lengths[length] += rows

    @property
    def usual(self) -> int:
        """The tokens of the row in which a token is read, on average over all tokens."""
        return round(sum(rows * length**2 for length, rows in self._lengths.items()) / (self.read or 1))

    def product_flops(self, scores: bool) -> float:
        """Return the FLOPs of the matrices in all forward passes, with the logits of wanted tokens if `scores`.

        A layer computes queries, keys and values, by three matrices (dim, dim), a second time for tokens `twice`.
        """
        config = self.config
        again = 3 * 2 * config.dim**2 * config.num_layers
        logits = config.vocabulary_flops() * self.wanted if scores else 0
        return config.layer_flops() * self.read + again * self.twice + logits

    def attention_flops(self) -> int:
        """Return the FLOPs of attention in all forward passes."""
        return sum(rows * self.config.attention_flops(tokens) for tokens, rows in self._lengths.items())

    def flops(self, scores: bool) -> float:
        """Return the FLOPs of all forward passes, with the logits of the wanted tokens if `scores`."""
        return self.product_flops(scores) + self.attention_flops()

    def in_chunks(self, chunk: int) -> bool:
        """Return whether a window is read in chunks of this many tokens."""
        return self.config.streams and self.longest > chunk

    def _sees_outside(self, tokens: int) -> bool:
        """Return whether the chunks of a window in a bidirectional net see keys of each other."""
        places = ((start, min(start + self.chunk, tokens)) for start in (0, self.chunk))
        return any(far_spans(self.config.pattern, start, stop, False, tokens) for start, stop in places)


def count_documents(
    job: RowJob,
    documents: Iterable[Document | Text],
    *,
    tokenizer: Tokenizer | None = None,
    sample: int | None = None,
    done: int = 0,
    skip_bad: bool = False,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> ReadingPlan:
    """Count what a `job` reads, from the lengths of documents.

    Texts among the `documents` (`Inputs.untokenized`) need the `tokenizer`; a `sample` of this many is tokenized. A
    resumed run has already read the first `done` documents. `on_progress` gets the tokens of each document.

    Without `skip_bad`, raises what the job raises for documents that it cannot read. Raises DataError if there is
    nothing to read.
    """
    plan, began = ReadingPlan(job.reader.model.config, job.reader.chunk), time.perf_counter()
    drawn = Sample(sample, tokenizer) if sample and tokenizer else None

    def leave_out(document: Document, error: Exception) -> None:
        plan.left_out += 1

    lengths = _lengths(job, documents, drawn, leave_out if skip_bad else None)
    lengths = islice(filter(None, lengths) if job.skips_empty else lengths, done, None)

    def windows(lengths: Iterable[int]) -> Iterator[tuple[int, int]]:
        for length in lengths:
            plan.add_document(length)
            yield from job.window_sizes(length)
            on_progress(length)

    for portion in portions(lengths, PORTION_CHUNKS * plan.chunk, length_of=lambda length: length):
        plan.add(windows(portion))
    if not plan.read and not done:
        raise DataError("there is nothing to read: every document is empty, too short or left out")
    plan.seconds = time.perf_counter() - began
    if drawn and drawn.bytes:
        plan.sampled, plan.seconds = min(drawn.size, len(drawn.bytes)), plan.seconds + drawn.seconds_of_others
    return plan


def _lengths(
    job: RowJob, items: Iterable[Document | Text], drawn: Sample | None, on_skip: OnSkip | None
) -> Iterator[int]:
    """Yield the number of tokens of each document. Those of texts come last, estimated from their bytes."""
    for item in items:
        document = drawn.add(item) if drawn and isinstance(item, Text) else cast(Document, item)
        if document is not None and job.take(document, on_skip, reads=False) is not None:
            yield len(document)
    yield from drawn.lengths() if drawn else ()


class Sample:
    """A uniform sample of `size` texts, drawn while they go by (Vitter's algorithm R, in size * ln(texts) steps).

    `bytes` has the size of each text so far, in 8 bytes of memory per text.
    """

    def __init__(self, size: int, tokenizer: Tokenizer) -> None:
        self.size, self.tokenizer = size, tokenizer
        self.bytes = array("q")
        self._drawn: list[tuple[int, int]] = []  # tokens and bytes of each text in the sample
        self._seconds, self._tokenized = 0.0, 0  # the time for so many bytes
        self._random = np.random.default_rng(SEED)

    def add(self, text: Text) -> Unread | None:
        """Count the next text, and tokenize it if it is drawn. Return one that cannot be read."""
        place = len(self.bytes) if len(self.bytes) < self.size else int(self._random.integers(len(self.bytes) + 1))
        tokens, size, began = 0, 0, time.perf_counter()
        try:
            if place < self.size:
                for part in self.tokenizer.encode_long(text.parts):
                    tokens, size = tokens + len(part.ids), size + part.n_bytes
                self._drawn[place : place + 1] = [(tokens, size)]
                self._seconds, self._tokenized = self._seconds + time.perf_counter() - began, self._tokenized + size
            else:
                size = sum(len(part.encode()) for part in text.parts)
        except DataError as error:
            return Unread(error)
        self.bytes.append(size)
        return None

    def lengths(self) -> Iterator[int]:
        """Yield the tokens of each text so far, by its bytes."""
        tokens, size = (sum(each) for each in zip(*self._drawn, strict=True)) if self._drawn else (0, 0)
        for length in self.bytes:
            yield round(length * tokens / (size or 1))

    @property
    def seconds_of_others(self) -> float:
        """The time that tokenizing the other texts would take, in seconds."""
        return self._seconds * (sum(self.bytes) / (self._tokenized or 1) - 1)


def reading_memory(
    net: Net, plan: ReadingPlan, chunk: int, dtype: str, ranks: Ranks, *, scores: bool, spill: bool
) -> dict[str, int]:
    """Return the bytes of one rank that reads windows as planned, in chunks of so many tokens.

    hidden: float32 hidden states that wait, in pieces and joined: of windows that are read together, or of two chunks
    of a longer one. In a bidirectional net also all that `spilled_bytes` counts, unless they are on a disk or, because
    a GPU has no room, in the host's memory. cache: of the longest window in a causal net, without what is on a disk.
    """
    config, device = net.config, next(net.parameters()).device
    in_chunks, spillable = plan.in_chunks(chunk), spilled_bytes(net, plan, chunk, dtype, ranks)
    tokens = min(plan.largest, chunk) if config.streams else plan.largest
    together = min(plan.together, 2 * chunk)
    itemsize = itemsize_of(dtype, device)
    sizes = config.num_heads, config.head_dim, plan.longest, itemsize
    transient = transient_memory(config.pattern, *sizes, device.type)
    kinds = forward_memory(net, tokens, dtype, max(tokens, together) * scores, transient, once=plan.read <= tokens)
    kinds["hidden"] = 2 * 4 * config.dim * (2 * chunk if in_chunks else together)
    if in_chunks and config.causal:
        cache = cache_bytes(config, plan.longest, itemsize)
        kinds["cache"] = sum(cache) - (spillable if spill else 0)
    elif not spill and (device.type == "cpu" or fits_beside(config.forward_bytes(chunk), spillable, device)):
        kinds["hidden"] += spillable
    return kinds


def spilled_bytes(net: Net, plan: ReadingPlan, chunk: int, dtype: str, ranks: Ranks) -> int:
    """Return the bytes of one rank's file of `--spill`; 0 if no window is read in chunks.

    A bidirectional net keeps hidden states there between its layers, a causal one the blocks that are chosen from.
    """
    if not plan.in_chunks(chunk):
        return 0
    if net.config.causal:
        itemsize = itemsize_of(dtype, next(net.parameters()).device)
        return cache_bytes(net.config, plan.longest, itemsize).blocks
    return kept_bytes(cast(LongNet, net), plan.longest, chunk, ranks) if net.layer_by_layer else 0


SECONDS = 0.25  # that the read takes whose rate counts
FIRST_TOKENS = 256  # of the first read; later ones grow until they take that long
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


def reading_rate(net: Net, plan: ReadingPlan, dtype: str, room: float, *, scores: bool) -> float:
    """Return the FLOP/s of reading windows of the plan's usual length, the best of two reads.

    They are as many as take `SECONDS`, or one that is shorter, or all there are. Fewer are read if a forward pass would
    need more than a quarter of the `room` in bytes.
    """
    tokens, config = FIRST_TOKENS, net.config

    def seconds_of(lengths: Sequence[int]) -> float:
        began = time.perf_counter()
        read_noise(net, lengths, plan.chunk, dtype, scores=scores)
        return time.perf_counter() - began

    while True:
        length = min(plan.usual or tokens, tokens)
        lengths = [length] * (tokens // length)
        seconds = min(seconds_of(lengths) for _ in range(2))
        together = min(tokens, plan.chunk) if config.streams else length
        if seconds >= SECONDS or tokens >= plan.read or 4 * config.forward_bytes(together) > room:
            break
        tokens *= 2 if seconds > SECONDS / 8 else 4
    timed = ReadingPlan(config, plan.chunk)
    timed.add((length, length) for length in lengths)
    return timed.flops(scores) / seconds


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
    say. `others` are counts of what is read, and FLOPs and seconds of the whole job on all ranks. `chunk_that_fits` is
    a shorter chunk that fits where the job's own does not, `spillable` the kinds that --spill would keep on a disk, and
    `hint` says what may make the job faster.
    """

    memory: dict[str, int]
    free: int | None
    others: dict[str, Any]
    chunk_that_fits: int | None
    spillable: Sequence[str] = ()
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
    def largest(self) -> str:
        """The largest kind of memory that is not held already."""
        return max((size, kind) for kind, size in self.memory.items() if kind not in self.HELD)[1]

    @property
    def advice(self) -> str:
        """What makes a job fit that does not."""
        if self.chunk_that_fits:
            return f"--chunk {self.chunk_that_fits} fits"
        if self.largest in self.spillable:
            return "--spill DIR keeps the largest part on a disk"
        return "no chunk fits: choose shorter windows, a smaller model or a larger device"

    @property
    def facts(self) -> dict[str, Any]:
        """The keys and values of the machine format."""
        sizes = {"memory_bytes": self.memory, "peak_bytes": self.peak, "free_bytes": self.free, "fits": self.fits}
        return self.others | sizes


class Room(NamedTuple):
    """The bytes that a process holds, and the bytes that are free; None if the system does not say."""

    held: int
    free: int | None

    @classmethod
    def now(cls, device: torch.device) -> Room:
        return cls(resident_memory(device), free_memory(device))


def estimate_reading(
    reader: Reader, plan: ReadingPlan, *, room: Room, scores: bool, kept: dict[str, int] | None = None
) -> Estimate:
    """Estimate what reading as planned takes, from arithmetic and a short, measured read.

    `room` is the memory before the net was loaded, `kept` what the job itself keeps of the longest document, in bytes
    by kind.
    """
    net, config, dtype, spill = reader.model, reader.model.config, reader.dtype, bool(reader.spill)
    most_while_loading = peak_memory(reader.device)
    warm_up = min(WARM_UP, config.max_tokens or WARM_UP)
    read_noise(net, [warm_up], warm_up, dtype, scores=scores)
    weights = sum(x.numel() * x.element_size() for x in (*net.parameters(), *net.buffers()))
    program = max(0, resident_memory(reader.device) - weights)
    free = None if room.free is None else max(0, room.free - max(0, program - room.held))
    rate = reading_rate(net, plan, dtype, math.inf if free is None else free - weights, scores=scores)
    rate = reader.all_ranks.own(rate, reader.device)

    def needed(chunk: int) -> dict[str, int]:
        kinds = reading_memory(net, plan, chunk, dtype, reader.ranks, scores=scores, spill=spill) | (kept or {})
        return {kind: size for kind, size in kinds.items() if size}

    memory = {"program": program, **needed(reader.chunk)}
    if most_while_loading > sum(memory.values()):  # for files whose weights were converted to another type
        memory["loading"] = most_while_loading - sum(memory.values())
    flops, on_disk = plan.flops(scores), spilled_bytes(net, plan, reader.chunk, dtype, reader.ranks)
    instructions = bf16_instructions() if reader.device.type == "cpu" and dtype == "fp32" else None
    return Estimate(
        memory=memory,
        free=free,
        others={
            "documents": plan.documents,
            "left_out": plan.left_out,
            "longest": plan.longest_document,
            "sampled": plan.sampled,
            "tokens_read": plan.read,
            "parameters": config.num_parameters(),
            "flops_per_token": flops / (plan.tokens or 1),
            "tokens": plan.tokens,
            "flops": flops,
            "seconds": flops / (rate * reader.all_ranks.world) + plan.seconds,
            "dtype": dtype,
            "chunk": reader.chunk,
            "spill_bytes": on_disk if spill else 0,
            "flops_per_second": rate,
            "reading_seconds": plan.seconds,
        },
        chunk_that_fits=fitting_chunk(lambda n: sum(needed(n).values()), reader.chunk, free)
        if config.streams
        else None,
        spillable=("cache", "hidden") if on_disk and not spill else (),
        hint=f"this CPU has {instructions}: try --dtype bf16, which is often faster" if instructions else "",
    )
