"""The `score` job: how well a causal model predicts each token of each document, as perplexity and bits per byte.

    document --_windows--> windows --+-- short --batches_by_length--> padded forwards --+--> sums of nats, float64,
                                     +-- longer than a chunk --CausalStream-------------+    a document each

A window is a range of the document's tokens to predict; its inputs are the tokens one before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from longnet_cli.data.sinks import ShardWriter
from longnet_cli.data.sources import Document
from longnet_cli.errors import ConfigError, DataError, LongNetError
from longnet_cli.measures import ByPosition, DocumentScore, Score
from longnet_cli.model.net import IGNORED, Net
from longnet_cli.runtime.chunks import default_chunk, open_stream
from longnet_cli.runtime.device import precision
from longnet_cli.runtime.launch import Ranks
from longnet_cli.runtime.ranks import even_edges

# Called with (document, start, ids, log-probabilities): those of its tokens [start, start + n), (n,) int64 and float32
OnTokens = Callable[[Document, int, np.ndarray, np.ndarray], None]

ADVICE = "the model's weights are too large for its numbers, or damaged"
LOGPROB_BATCH = 1 << 18  # tokens of a record batch of log-probabilities


class NotFiniteError(LongNetError):
    """The net computed NaN or an infinity; the message names the document and the token. Exit code 1."""


def score(
    model: Net,
    documents: Iterable[Document],
    *,
    bos: int | None,
    context: int | Sequence[int] | None = None,
    stride: int | None = None,
    last: int | None = None,
    by_position: bool = False,
    count_bytes: Callable[[np.ndarray], int | None] | None = None,
    chunk: int | None = None,
    dtype: str = "auto",
    device: torch.device | str | None = None,
    ranks: Ranks | None = None,
    on_tokens: OnTokens | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[DocumentScore]:
    """Yield the score of each document, in order; every token is scored exactly once.

    `bos` (the tokenizer's end-of-text id) is put before each document, so that its first token is scored too; with
    None it is not, and the bytes of what was scored are unknown. Without `context` a document is one causal pass. With
    it, a token sees at most `context` tokens before it: the document is cut into disjoint windows of that many
    targets, and each window starts anew at position 0, with the token before its first target as its first input.
    Several contexts give a document as many scores, in turn, of the same tokens.

    With a `stride` windows overlap: each is of `context` targets, of which only the last `stride` count, so that a
    token has seen more than `context - stride` before it, where its document has them. With `last` only so many tokens
    at the end of each document are scored, likewise from windows as long as the context; documents too short for that
    are left out, and bytes are what `count_bytes` says of the scored ids (None: unknown). `by_position` also sums by
    position in the window.

    `chunk` is the most tokens of one forward, by default what `default_chunk` gives. Short windows share a forward; a
    longer one is streamed, so memory does not depend on the document's length and the chunk changes no number. A net
    that does not stream reads it in one forward.

    Several `ranks`, all given the same documents, share every long window, `chunk` tokens each, and deal out the
    forwards of short ones; every rank gets all results.

    An empty document scores 0 tokens. `device` moves the model there; None leaves it where it is. `on_tokens` gets the
    log-probabilities of all tokens in order. `on_progress` gets the number of tokens that each forward has scored.
    Raises ConfigError for a model that cannot score, options that contradict each other and a document with more tokens
    than the model has positions, DataError at the end when no document had a token to score, NotFiniteError for a
    log-probability that is NaN or infinite.
    """
    if not model.config.causal:
        raise ConfigError("a bidirectional model sees the tokens it would have to predict: it cannot score")
    if not model.config.vocab_size:
        raise ConfigError("this model has no vocabulary (vocab_size 0): it cannot score tokens")
    contexts: Sequence[int | None] = [context] if context is None or isinstance(context, int) else list(context)
    given = [*(("context", each) for each in contexts), ("chunk", chunk), ("stride", stride), ("last", last)]
    for name, value in given:
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be 1 or more, not {value}")
    if not contexts or len(set(contexts)) < len(contexts):
        raise ConfigError(f"contexts must differ from each other, not be {', '.join(map(str, contexts))}")
    if stride and (small := [each for each in contexts if each is None or each < stride]):
        raise ConfigError(
            f"a stride of {stride} tokens needs a context" + (f" of as many, not {small[0]}" if small[0] else "")
        )
    if on_tokens and len(contexts) > 1:
        raise ConfigError("log-probabilities of tokens are those of one context: give one")
    if device is not None:
        model.to(device)
    ranks = ranks or Ranks()
    # ranks may have other amounts of free memory
    chunk = chunk or int(ranks.smallest(default_chunk(model.config, next(model.parameters()).device)))
    cut = _Cut(0 if bos is not None else 1, contexts, stride, last)
    scorer = _Scorer(model, bos, cut, by_position, count_bytes, chunk, dtype, ranks, on_tokens, on_progress)
    return scorer.run(documents)


def batches_by_length(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Group sequences for padded forwards of at most `limit` tokens, as indices into `lengths`; the longest first.

    A sequence longer than `limit` is a group of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        rows = max(1, limit // lengths[order[0]])
        yield order[:rows]
        order = order[rows:]


def logprob_schema() -> pa.Schema:
    """A row is a stretch of a document: its tokens from `start` on, and the log-probability of each, in nats.

    A long document takes several rows, `part` 0, 1, 2 ... of one doc_id.
    """
    fields = [
        pa.field("doc_id", pa.string()),
        pa.field("part", pa.int32()),
        pa.field("start", pa.int64()),
        pa.field("input_ids", pa.large_list(pa.int32()), nullable=False),
        pa.field("logprobs", pa.large_list(pa.float32()), nullable=False),
    ]
    return pa.schema(fields)


@contextmanager
def write_token_logprobs(path: str | Path) -> Iterator[OnTokens]:
    """Open a file for the log-probabilities of tokens (see `logprob_schema`), as the `on_tokens` of `score`."""
    rows: list[tuple[str, int, int, np.ndarray, np.ndarray]] = []
    size = part = 0
    last: Document | None = None

    with ShardWriter(path, logprob_schema()) as writer:

        def flush() -> None:
            nonlocal rows, size
            if rows:
                columns = [pa.array(c, f.type) for c, f in zip(zip(*rows, strict=True), writer.schema, strict=True)]
                writer.write(pa.record_batch(columns, schema=writer.schema))
            rows, size = [], 0

        def on_tokens(document: Document, start: int, ids: np.ndarray, logprobs: np.ndarray) -> None:
            nonlocal size, part, last
            part = part + 1 if document is last else 0
            last = document
            rows.append((document.doc_id, part, start, ids, logprobs))
            size += len(ids)
            if size >= LOGPROB_BATCH:
                flush()

        yield on_tokens
        flush()


def check_length(document: Document, tokens: int, model: Net, instead: str) -> None:
    """Raise ConfigError where `model` has no positions for `tokens` of the document, saying what to do `instead`."""
    limit = model.config.max_tokens
    if limit is not None and tokens > limit:
        raise ConfigError(f"{document.where}: {tokens} tokens, and the model has {limit} positions: {instead}")


def read_sequence(document: Document, bos: int | None, start: int, stop: int) -> np.ndarray:
    """The ids [start, stop) of what a model reads, (stop - start,) int64: bos, unless it is None, and the document."""
    if bos is None:
        return document.read(start, stop)
    ids = document.read(max(0, start - 1), stop - 1)
    return ids if start else np.concatenate((np.array([bos]), ids))


@dataclass(frozen=True)
class _Cut:
    """How documents are cut into windows; `first` is their first target, 1 where nothing precedes a document."""

    first: int
    contexts: Sequence[int | None]
    stride: int | None
    last: int | None

    def windows(self, tokens: int, context: int | None) -> Iterator[tuple[int, int, int]]:
        """(start, stop, counted): targets [start, stop), at most `context` of them, count from `counted` on.

        Those that count make up the document, or its `last` tokens.
        """
        size = context or max(1, tokens - self.first)
        step = self.stride or size
        look_back = self.stride is not None or self.last is not None
        for counted in range(tokens - self.last if self.last else self.first, tokens, step):
            stop = min(counted + step, tokens)
            yield max(self.first, stop - size) if look_back else counted, stop, counted

    @property
    def least(self) -> int:
        """Tokens of a document whose `last` ones all get windows as long as every context."""
        last = self.last or 0
        return self.first + max(
            last if size is None else size + last - min(self.stride or size, last) for size in self.contexts
        )


@dataclass
class _Tally:
    """A document on its way: what its windows have cost so far."""

    document: Document
    context: int | None
    n_bytes: int | None  # of what is scored
    by_position: ByPosition | None
    nll_sum: float = 0.0
    n_tokens: int = 0

    def result(self) -> DocumentScore:
        score = Score(self.nll_sum, self.n_tokens, self.n_bytes if self.n_tokens else 0)
        return DocumentScore(self.document.doc_id, self.document.where, score, self.context, self.by_position)


@dataclass(frozen=True)
class _Window:
    """The targets [start, stop) of a document, and (1 + stop - start,) int64 `ids`: the token before them first.

    Those before `counted` are predicted on the way, and not counted. The first input is the `offset`-th of those that
    the model sees together.
    """

    tally: _Tally
    start: int
    ids: np.ndarray
    counted: int = 0
    offset: int = 0

    @property
    def targets(self) -> int:
        return len(self.ids) - 1


class _Scorer:
    """Documents in, scores out in the same order; short windows wait until a forward is full."""

    def __init__(
        self,
        model: Net,
        bos: int | None,
        cut: _Cut,
        by_position: bool,
        count_bytes: Callable[[np.ndarray], int | None] | None,
        chunk: int,
        dtype: str,
        ranks: Ranks,
        on_tokens: OnTokens | None,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self.model, self.bos, self.chunk, self.dtype = model, bos, chunk, dtype
        self.cut, self.by_position, self.count_bytes = cut, by_position, count_bytes
        self.ranks = ranks
        self.on_tokens, self.on_progress = on_tokens, on_progress
        self.device = next(model.parameters()).device
        self.waiting: list[_Window] = []
        self.targets = 0  # of the windows that wait
        self.finished: list[_Tally] = []  # documents all of whose windows are scored or waiting

    def run(self, documents: Iterable[Document]) -> Iterator[DocumentScore]:
        scored = 0
        for document in documents:
            if self.cut.last and len(document) < self.cut.least:
                continue
            for context in self.cut.contexts:
                tally = self._tally(document, context)
                for start, stop, counted in self.cut.windows(len(document), context):
                    check_length(document, stop - start, self.model, f"--context {self.model.config.max_tokens}")
                    if stop - start > self.chunk and self.model.config.streams:
                        yield from self._flush()
                        self._stream(tally, start, stop, counted)
                    else:
                        self.waiting.append(replace(self._window(tally, start, stop), counted=counted))
                        self.targets += stop - start
                        if self.targets >= self.chunk:
                            yield from self._flush()
                    scored += stop - counted
                self.finished.append(tally)
                if not self.waiting:
                    yield from self._flush()
        yield from self._flush()
        if scored == 0:
            if self.cut.last:
                raise DataError(f"no token could be scored: no document has {self.cut.least} tokens")
            raise DataError(
                "no token could be scored: every document is empty"
                if self.bos is not None
                else "no token could be scored: no document has two tokens, and no end-of-text id can precede the first"
            )

    def _tally(self, document: Document, context: int | None) -> _Tally:
        n_bytes = document.n_bytes if self.bos is not None else None  # those of the first token were not scored
        if self.cut.last:
            ids = document.read(len(document) - self.cut.last, len(document))
            n_bytes = self.count_bytes(ids) if self.count_bytes else None
        positions = ByPosition(min(self.model.config.pattern.segment_lengths)) if self.by_position else None
        return _Tally(document, context, n_bytes, positions)

    def _window(self, tally: _Tally, start: int, stop: int) -> _Window:
        first = 0 if self.bos is None else 1  # where a document begins in its sequence
        return _Window(tally, start, read_sequence(tally.document, self.bos, start - 1 + first, stop + first))

    def _flush(self) -> Iterator[DocumentScore]:
        """Score what waits, in padded forwards of similar lengths, and hand out what is finished."""
        sizes = [window.targets for window in self.waiting]
        nll = torch.zeros(sum(sizes), device=self.device)
        places = nll.split(sizes)
        for turn, batch in enumerate(batches_by_length(sizes, self.chunk)):
            if turn % self.ranks.world == self.ranks.rank:
                for index, row in zip(batch, self._forward([self.waiting[i] for i in batch]), strict=True):
                    places[index].copy_(row[: sizes[index]])
            if self.on_progress:
                self.on_progress(sum(sizes[index] for index in batch))
        if sizes:
            self.ranks.sum(nll)
        for window, row in zip(self.waiting, nll.cpu().split(sizes), strict=True):
            self._count(window, row.numpy())
        self.waiting, self.targets = [], 0
        yield from (tally.result() for tally in self.finished)
        self.finished = []

    @torch.inference_mode()
    def _forward(self, windows: Sequence[_Window]) -> torch.Tensor:
        """(windows, targets of the longest) float32 nats. Right padding needs no mask: a causal net does not see it."""
        padded = torch.full((len(windows), max(len(window.ids) for window in windows)), IGNORED)
        for row, window in zip(padded, windows, strict=True):
            row[: len(window.ids)] = torch.from_numpy(window.ids)
        padded = padded.to(self.device)
        with precision(self.dtype, self.device):
            return self.model.nll(self.model(padded[:, :-1].clamp(min=0)), padded[:, 1:])

    @torch.inference_mode()
    def _stream(self, tally: _Tally, start: int, stop: int, counted: int) -> None:
        """Score a window that is longer than a chunk."""
        stream, ranks = open_stream(self.model, self.ranks.group), self.ranks
        for first in range(start, stop, self.chunk * ranks.world):
            last = min(first + self.chunk * ranks.world, stop)
            edges = even_edges(first, last - first, ranks.world)
            mine = self._window(tally, edges[ranks.rank], edges[ranks.rank + 1])
            ids = torch.from_numpy(mine.ids)[None].to(self.device)
            nll = torch.zeros(last - first, device=self.device)
            with precision(self.dtype, self.device):
                hidden = stream(ids[:, :-1], edges=[edge - start for edge in edges] if ranks.group else None)
                if counted < last:
                    nll[edges[ranks.rank] - first :][: mine.targets] = self.model.nll(hidden, ids[:, 1:])[0]
            ranks.sum(nll)
            # what is reported needs the ids of all, where somebody asks for them
            whole = self._window(tally, first, last) if self.on_tokens and ranks.group else mine
            self._count(replace(whole, start=first, counted=counted, offset=first - start), nll.cpu().numpy())
            if self.on_progress:
                self.on_progress(last - first)

    def _count(self, window: _Window, nll: np.ndarray) -> None:
        """Add the (targets,) nats of a window to its document."""
        skipped, tally = max(0, window.counted - window.start), window.tally
        nll = nll[skipped:]
        if not np.isfinite(nll).all():
            token = window.start + skipped + int(np.argmin(np.isfinite(nll)))
            raise NotFiniteError(
                f"{tally.document.where}: document {tally.document.doc_id!r}: the log-probability of token {token} is "
                f"not finite: {'--dtype fp16 overflows, take bf16 or fp32' if self.dtype == 'fp16' else ADVICE}"
            )
        tally.nll_sum += float(nll.sum(dtype=np.float64))
        tally.n_tokens += len(nll)
        if tally.by_position:
            tally.by_position.add(window.offset + skipped, nll)
        if self.on_tokens and len(nll):
            self.on_tokens(tally.document, window.start + skipped, window.ids[1 + skipped :], -nll)
