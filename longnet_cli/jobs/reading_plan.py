"""A plan of what a reader reads: counted from the lengths of documents, or estimated from a sample of texts."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, cast

import numpy as np

from longnet_cli.attention.spans import far_spans
from longnet_cli.basics.errors import DataError
from longnet_cli.basics.events import OnSkip
from longnet_cli.data.opened_inputs import Text
from longnet_cli.data.token_documents import Document, Unread
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.nets.config import NetConfig
from longnet_cli.running.ranks.dealing import portions
from longnet_cli.running.reader import (
    PORTION_CHUNKS,
    forward_passes,
    reading_steps,
)

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
        self.config = config
        self.chunk = chunk
        # of the rows of all forward passes; a long window is one row
        self._lengths = Counter[int]()

    def add_document(self, tokens: int) -> None:
        """Count a document; `add` counts its windows."""
        self.documents += 1
        self.tokens += tokens
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
        squares = sum(rows * length**2 for length, rows in self._lengths.items())
        return round(squares / (self.read or 1))

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
        return sum(
            rows * self.config.attention_flops(tokens) for tokens, rows in self._lengths.items()
        )

    def flops(self, scores: bool) -> float:
        """Return the FLOPs of all forward passes, with the logits of the wanted tokens if `scores`."""
        return self.product_flops(scores) + self.attention_flops()

    def in_chunks(self, chunk: int) -> bool:
        """Return whether a window is read in chunks of this many tokens."""
        return self.config.streams and self.longest > chunk

    def _sees_outside(self, tokens: int) -> bool:
        """Return whether the chunks of a window in a bidirectional net see keys of each other."""
        places = ((start, min(start + self.chunk, tokens)) for start in (0, self.chunk))
        return any(
            far_spans(self.config.pattern, start, stop, False, tokens) for start, stop in places
        )


def count_documents(
    job: RowJob,
    documents: Iterable[Document | Text],
    *,
    tokenizer: Tokenizer | None = None,
    sample: int | None = None,
    done: int = 0,
    skip_bad: bool = False,
) -> ReadingPlan:
    """Count what a `job` reads, from the lengths of documents.

    Texts among the `documents` (`Inputs.untokenized`) need the `tokenizer`; a `sample` of this many is tokenized. A
    resumed run has already read the first `done` documents. The reader's `events.progress` gets the tokens of each
    document.

    Without `skip_bad`, raises what the job raises for documents that it cannot read. Raises DataError if there is
    nothing to read.
    """
    plan = ReadingPlan(job.reader.model.config, job.reader.chunk)
    began = time.perf_counter()
    drawn = Sample(sample, tokenizer) if sample and tokenizer else None

    def leave_out(document: Document, error: Exception) -> None:
        plan.left_out += 1

    lengths = _lengths(job, documents, drawn, leave_out if skip_bad else None)
    with_rows = (n for n in lengths if not job.is_empty(n) and not job.is_short(n))

    def windows(lengths: Iterable[int]) -> Iterator[tuple[int, int]]:
        for length in lengths:
            plan.add_document(length)
            yield from job.window_sizes(length)
            job.reader.events.progress(length)

    to_come = islice(with_rows, done, None)
    for portion in portions(to_come, PORTION_CHUNKS * plan.chunk, length_of=lambda length: length):
        plan.add(windows(portion))
    if not plan.read and not done:
        raise DataError("there is nothing to read: every document is empty, too short or left out")
    plan.seconds = time.perf_counter() - began
    if drawn and drawn.bytes:
        plan.sampled = min(drawn.size, len(drawn.bytes))
        plan.seconds += drawn.seconds_of_others
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
        place = len(self.bytes)
        if place >= self.size:
            place = int(self._random.integers(place + 1))
        tokens = size = 0
        began = time.perf_counter()
        try:
            if place < self.size:
                for part in self.tokenizer.encode_long(text.parts):
                    tokens += len(part.ids)
                    size += part.n_bytes
                self._drawn[place : place + 1] = [(tokens, size)]
                self._seconds += time.perf_counter() - began
                self._tokenized += size
            else:
                size = sum(len(part.encode()) for part in text.parts)
        except DataError as error:
            return Unread(error)
        self.bytes.append(size)
        return None

    def lengths(self) -> Iterator[int]:
        """Yield the tokens of each text so far, by its bytes."""
        tokens = sum(tokens for tokens, _ in self._drawn)
        size = sum(size for _, size in self._drawn)
        for length in self.bytes:
            yield round(length * tokens / (size or 1))

    @property
    def seconds_of_others(self) -> float:
        """The time that tokenizing the other texts would take, in seconds."""
        return self._seconds * (sum(self.bytes) / (self._tokenized or 1) - 1)
