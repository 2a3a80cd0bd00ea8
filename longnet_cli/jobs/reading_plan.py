"""A plan of what a reader reads, counted from the lengths of documents."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple, cast

from longnet_cli.attention.cache import cached_rows
from longnet_cli.attention.spans import Lanes
from longnet_cli.basics.errors import DataError
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.nets.config import NetConfig, TransformersConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import Net
from longnet_cli.running.device import DTYPES
from longnet_cli.running.layerwise import fits_beside, kept_bytes
from longnet_cli.running.ranks.dealing import portions
from longnet_cli.running.ranks.ranks import Ranks
from longnet_cli.running.reader import PORTION_CHUNKS, Reader, forward_passes, reading_steps

from .row_jobs import RowJob


class Task(NamedTuple):
    """The reading that a job does: `read` reads documents, and `windows` says in which windows, by the tokens of one.

    The windows are (tokens, tokens that have logits).
    """

    read: Callable[[Reader, Sequence[Document]], None]
    windows: Callable[[int], Iterable[tuple[int, int]]]


class ReadingPlan:
    """Sums over the windows that a `Reader` of a net with this `config` reads in chunks. No window is kept.

    `documents` counts documents of `tokens` in all and `longest_document` at most; `left_out` those that --skip-bad
    leaves out. `read` are the tokens of all forward passes, padding included, and `scored` those that have logits.
    `longest` is the longest window, and `largest` the most tokens of a step. `seconds` is the
    time of reading and tokenizing.
    `new` are those of `read` whose time is in `seconds`, too: tokens that were generated.
    `examples` are documents to try the job with: the longest one, and the first ones that fill a chunk.
    With `streamed`, short windows go through a stream, too.
    """

    documents = tokens = longest_document = left_out = 0
    read = scored = new = longest = largest = 0
    seconds = 0.0

    def __init__(self, config: NetConfig, chunk: int, *, streamed: bool = False) -> None:
        self.config = config
        self.chunk = chunk
        self.streamed = streamed
        # of the rows of all forward passes; a long window is one row
        self._lengths = Counter[int]()
        self.examples: list[Document] = []
        self._room = chunk  # for other examples than the longest

    def add_document(self, tokens: int) -> None:
        """Count a document; `add` counts its windows."""
        self.documents += 1
        self.tokens += tokens
        self.longest_document = max(self.longest_document, tokens)

    def add_example(self, document: Document) -> None:
        """Keep a document if it is the longest so far, and while the others fill no chunk."""
        if not self.examples:
            self.examples.append(document)
            return
        if len(document) > len(self.examples[0]):
            self.examples[0], document = document, self.examples[0]
        if self._room > 0:
            self.examples.append(document)
            self._room -= len(document)

    def add(self, windows: Iterable[tuple[int, int]]) -> None:
        """Count windows, each as (tokens, tokens that have logits), as one `Reader.read` reads them."""

        def of_lengths() -> Iterator[range]:  # a range has a length, and no memory
            for tokens, scored in windows:
                self.scored += scored
                yield range(tokens)

        for step in reading_steps(of_lengths(), self.chunk, self.config.streams):
            self.largest = max(self.largest, sum(map(len, step)))
            passes = forward_passes(step, self.chunk, self.config.streams)
            if passes is None:
                passes = [[0]]  # a window that goes chunk by chunk is alone in its step
            for batch in passes:
                padded = len(step[batch[0]])
                self.longest = max(self.longest, padded)
                self.read += len(batch) * padded
                self._lengths[padded] += len(batch)

    def attention_flops(self) -> int:
        """Return the FLOPs of attention in all forward passes."""
        return sum(
            rows * self.config.attention_flops(tokens) for tokens, rows in self._lengths.items()
        )

    def flops(self) -> float:
        """Return the FLOPs of all forward passes and logits."""
        logits = self.config.vocabulary_flops() * self.scored
        return self.config.layer_flops() * self.read + logits + self.attention_flops()

    def at_once(self, chunk: int) -> int:
        """Return the most tokens that are read at a time, in chunks of this many."""
        return min(self.largest, chunk) if self.config.streams else self.largest

    def in_chunks(self, chunk: int) -> bool:
        """Return whether a window is read in chunks of this many tokens."""
        return self.config.streams and (self.streamed or self.longest > chunk)


def count_documents(
    job: RowJob,
    documents: Iterable[Document],
    *,
    done: int = 0,
) -> ReadingPlan:
    """Count what a `job` reads, from the lengths of documents.

    A resumed run has already read the first `done` documents. The reader's `events.progress` gets the tokens of each
    document, and its `events.left_out` says whether documents that cannot be read are left out.

    Raises what the job raises for documents that it cannot read, and DataError if there is nothing to read.
    """
    events = job.reader.events
    plan = ReadingPlan(job.reader.model.config, job.reader.chunk)
    began = time.perf_counter()

    def lengths() -> Iterator[int]:
        """Yield the tokens of each document that has rows."""
        for sequence in job.sequences(documents):
            if sequence is not None:
                plan.add_example(sequence.document)
                yield len(sequence.document)
        if job.failure:
            raise job.failure

    to_come = islice(lengths(), done, None)
    for portion in portions(to_come, PORTION_CHUNKS * plan.chunk, length_of=lambda length: length):
        in_portion = [*portion]
        for length in in_portion:
            plan.add_document(length)
            events.progress(length)
        plan.add(chain.from_iterable(map(job.window_sizes, in_portion)))
    if not plan.read and not done:
        raise DataError("there is nothing to read: every document is empty, too short or left out")
    plan.left_out = events.left_out.skipped
    plan.seconds = time.perf_counter() - began
    return plan


def cache_bytes(config: NetConfig, tokens: int, itemsize: int, *, written: bool = False) -> int:
    """Return what a stream has allocated after `tokens`, or has `written`. Training keeps more (`far_bytes`)."""
    number = 2 * config.head_dim * itemsize
    if isinstance(config, TransformersConfig) and config.memory != "segments":
        # one layer is being copied
        return (config.num_layers + 1) * config.kv_heads * tokens * number
    lanes = Lanes(config.pattern, config.num_heads, config.kv_heads)
    return config.num_layers * number * cached_rows(lanes, tokens, written=written)


def kept_by_chunks(reader: Reader, plan: ReadingPlan, chunk: int) -> dict[str, int]:
    """Return the bytes that chunks of the longest window keep for each other in memory, by kind.

    cache: keys and values, in a causal net. hidden: hidden states, in a bidirectional net, and the keys of a layer,
    unless they are on a disk or, because a GPU has no room, in the host's memory.
    """
    net = reader.model
    config = reader.model.config
    device = reader.device
    if config.causal and plan.in_chunks(chunk):
        itemsize = DTYPES[reader.dtype].itemsize
        written = device.type == "cpu"
        return {"cache": cache_bytes(config, plan.longest, itemsize, written=written)}
    size = spilled_bytes(net, plan, chunk, reader.ranks)
    fits = device.type == "cpu" or fits_beside(config.forward_bytes(chunk), size, device)
    return {"hidden": size} if fits and not reader.spill else {}


def spilled_bytes(net: Net, plan: ReadingPlan, chunk: int, ranks: Ranks) -> int:
    """Return the bytes of hidden states that one rank keeps between layers; 0 if no window is read so."""
    if net.config.causal or not net.layer_by_layer or not plan.in_chunks(chunk):
        return 0
    return kept_bytes(cast(LongNet, net), plan.longest, chunk, ranks)
