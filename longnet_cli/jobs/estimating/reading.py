"""The plan of a reading job, counted before anything is read: documents, tokens, forward passes and their FLOPs.

    documents --lengths--> windows --the Reader's steps--> ReadingPlan
    texts --Sample.add--> bytes of each, and tokens of some --tokens_per_byte--> tokens of all

With a sample, every text is read, which is fast, and its UTF-8 bytes are counted. Only a uniform sample of the texts is
tokenized. The estimate is the bytes of all texts, times the tokens per byte of the sample. This ratio estimate is close
where documents differ in length but are alike in tokens per byte.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from longnet_cli.attention.spans import far_spans
from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.data.documents import Document, Unread
from longnet_cli.data.files import FileChangedError
from longnet_cli.data.manifest import OnSkip
from longnet_cli.data.tables import Text
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.nets.net import Net
from longnet_cli.running.ranks.portions import portions
from longnet_cli.running.reader import PORTION_CHUNKS, forward_passes, reading_steps

if TYPE_CHECKING:
    from longnet_cli.jobs.row_jobs import RowJob

SEED = 0  # every run draws the same documents


class Shape(NamedTuple):
    """The shape of a forward pass: rows, and tokens per row, padding included."""

    rows: int
    tokens: int


class ReadingPlan:
    """Sums over what a `Reader` of `net` reads in chunks, which keep no window.

    `documents` counts documents of `tokens` in all and `longest_document` at most; `left_out` those that --skip-bad
    leaves out. `read` are the tokens of all forward passes, padding included, and `wanted` those whose hidden states
    are wanted. `longest` is the longest window, `largest` the most tokens of a forward pass, and `together` the most
    tokens of windows that wait for each other. `seconds` is the time of reading and tokenizing, `sample` what was.
    """

    documents = tokens = longest_document = left_out = 0
    read = wanted = longest = largest = together = 0
    twice = 0  # tokens whose keys are computed twice: of long windows, layer by layer
    shard_units = 0  # of the outputs of all documents, in the job's `shard_unit`
    seconds = 0.0
    sample: Sample | None = None

    def __init__(self, net: Net, chunk: int) -> None:
        self.config, self.chunk = net.config, chunk
        self._lengths: Counter[int] = Counter()  # of the rows of all forward passes; a long window is one row
        # by the bit length of a row's tokens: the tokens of such forward passes, and the shape of the last one
        self._shapes: dict[int, tuple[int, Shape]] = {}

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
            self.longest = max(self.longest, *map(len, step))
            batches = forward_passes(step, self.chunk, self.config.streams)
            if batches is None:
                tokens = len(*step)
                self._count(Shape(1, self.chunk), tokens)
                self._lengths[tokens] += 1
                self.twice += 0 if self.config.causal or not self._sees_outside(tokens) else tokens
                continue
            self.together = max(self.together, sum(map(len, step)))
            for batch in batches:
                shape = Shape(len(batch), len(step[batch[0]]))
                self._count(shape, shape.rows * shape.tokens)
                self._lengths[shape.tokens] += shape.rows

    @property
    def usual(self) -> Shape:
        """The shape of the forward passes that most tokens go through. Raises ValueError where there is none."""
        return max(self._shapes.values())[1]

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

    def _count(self, shape: Shape, tokens: int) -> None:
        self.read += tokens
        self.largest = max(self.largest, shape.rows * shape.tokens)
        before, _ = self._shapes.get(shape.tokens.bit_length(), (0, shape))
        self._shapes[shape.tokens.bit_length()] = before + tokens, shape


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
    plan = ReadingPlan(job.reader.model, job.reader.chunk)
    plan.sample = drawn = Sample(sample, tokenizer) if sample and tokenizer else None
    begin = time.perf_counter()

    def leave_out(document: Document, error: Exception) -> None:
        plan.left_out += 1

    lengths = _lengths(
        job, islice(documents, 0 if job.skips_empty else done, None), drawn, leave_out if skip_bad else None
    )
    if job.skips_empty:  # an earlier run has counted only the others
        lengths = islice(filter(None, lengths), done, None)

    def windows(lengths: Iterable[int]) -> Iterator[tuple[int, int]]:
        for length in lengths:
            plan.add_document(length)
            plan.shard_units += job.size(length)
            yield from job.window_sizes(length)
            on_progress(length)

    for portion in portions(lengths, PORTION_CHUNKS * plan.chunk, length_of=lambda length: length):
        plan.add(windows(portion))
    if not plan.read and not done:
        raise DataError("there is nothing to read: every document is empty, too short or left out")
    plan.seconds = time.perf_counter() - begin + (drawn.seconds_of_all - drawn.seconds if drawn else 0)
    return plan


def _lengths(
    job: RowJob, items: Iterable[Document | Text], drawn: Sample | None, on_skip: OnSkip | None
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
                if on_skip is None or isinstance(error, FileChangedError):
                    raise
                yield Unread(error)

    for document in documents():
        if job.take(document, on_skip, reads=False) is not None:
            yield len(document)
    for size in drawn.bytes if drawn else ():
        yield round(size * drawn.tokens_per_byte) if drawn else 0


class Sample:
    """A uniform sample of `size` texts, drawn while they go by (Vitter's algorithm R, in size * ln(texts) steps).

    `bytes` has the size of each text so far, in 8 bytes of memory per text. `seconds` is the time spent tokenizing.
    """

    def __init__(self, size: int, tokenizer: Tokenizer) -> None:
        self.size, self.tokenizer = size, tokenizer
        self.bytes = array("q")
        self._drawn: list[tuple[int, int]] = []  # tokens and bytes of each text in the sample
        self.seconds = 0.0
        self._tokenized = 0  # bytes
        self._random = np.random.default_rng(SEED)

    def add(self, text: Text) -> None:
        """Count the next text, and tokenize it if it is drawn."""
        place = len(self.bytes) if len(self.bytes) < self.size else int(self._random.integers(len(self.bytes) + 1))
        if place < self.size:
            tokens, size, begin = 0, 0, time.perf_counter()
            for part in self.tokenizer.encode_long(text.parts):
                tokens, size = tokens + len(part.ids), size + part.n_bytes
            self._drawn[place : place + 1] = [(tokens, size)]
            self._tokenized += size
            self.seconds += time.perf_counter() - begin
        else:
            size = sum(len(part.encode()) for part in text.parts)
        self.bytes.append(size)

    @property
    def sampled(self) -> int:
        return min(self.size, len(self.bytes))

    @property
    def tokens_per_byte(self) -> float:
        tokens, size = (sum(each) for each in zip(*self._drawn, strict=True)) if self._drawn else (0, 0)
        return float(tokens / size) if size else 0.0

    @property
    def seconds_of_all(self) -> float:
        """The time that tokenizing all texts would take, in seconds."""
        return self.seconds * sum(self.bytes) / (self._tokenized or 1)
