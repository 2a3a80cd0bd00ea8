"""The `score` job: how well a causal model predicts each token of each document, as perplexity and bits per byte.

    document --Cut.windows--> windows --Reader--> hidden states --nll--> sums of nats, one float64 per document --> row

A window is a range of the document's tokens to predict, for one of several contexts. Its inputs are the same range,
shifted back by one token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from longnet_cli.attention.pattern import ceil_div
from longnet_cli.basics.errors import ConfigError, NotFiniteError
from longnet_cli.basics.sizes import format_size
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.data.outputs.row_writer import kept_columns, row_schema
from longnet_cli.jobs.job_options import ScoreOptions
from longnet_cli.jobs.row_jobs import ModelFacts, RowJob
from longnet_cli.models.folder import Loaded
from longnet_cli.nets.net import LOGITS_LIMIT, InputSequence, Net, bos_ids
from longnet_cli.running.device import precision, to_device, to_host
from longnet_cli.running.reader import Piece, Reader, Window

from .measures import Gain, GainTally, Score, column


@dataclass(frozen=True)
class Cut:
    """The cut of documents into windows."""

    facts: ModelFacts
    options: ScoreOptions

    @property
    def bos(self) -> tuple[int, ...]:
        """The ids before each document."""
        return bos_ids(self.facts.bos)

    @property
    def no_tokens_error(self) -> str:
        """The error text for documents without a token to score."""
        if self.options.last:
            return f"no token could be scored: no document has {self.fewest_tokens} tokens or more"
        if self.bos:
            return "no token could be scored: every document is empty or left out"
        return "no token could be scored: no document has two tokens, and no end-of-text id can precede the first"

    def windows(self, tokens: int, context: int | None) -> Iterator[tuple[int, int, int]]:
        """Yield (start, stop, wanted) of each window, which reads the ids [start, stop).

        What the ids from `wanted` on predict is scored. A window has at most `context` targets. The scored tokens of
        all windows make up the document, or its `last` tokens. Ids are counted with the `bos` before the document.
        """
        options = self.options
        first = self.facts.first_target
        to_input = len(self.bos) - 1  # added to a target: the id before it, which predicts it
        size = context or max(1, tokens - first)
        step = options.stride or size
        look_back = options.stride is not None or options.last is not None
        for counted in range(tokens - options.last if options.last else first, tokens, step):
            end = min(counted + step, tokens)
            target = max(first, end - size) if look_back else counted
            start = target + to_input if target > first else 0
            yield start, end + to_input, counted + to_input

    def longest(self, tokens: int) -> int:
        """Return the targets in the longest window of a document of `tokens` tokens, 0 for one without a row."""
        if tokens < self.fewest_tokens:
            return 0
        longest = max(self.options.context or (tokens,))
        return max(0, min(tokens - self.facts.first_target, longest))

    @property
    def fewest_tokens(self) -> int:
        """The fewest tokens of a document that has a row."""
        return self.options.fewest_tokens(self.facts.first_target)


ADVICE = "the model's weights are too large for its numbers, or damaged"


def score(
    model: Net,
    documents: Iterable[Document],
    options: ScoreOptions = ScoreOptions(),  # noqa: B008
    facts: ModelFacts = ModelFacts(),  # noqa: B008
    *,
    count_bytes: Callable[[np.ndarray], int | None] = lambda ids: None,
    top: bool = False,
    **reading: Any,
) -> pa.RecordBatchReader:
    """Score `documents` lazily, in order; return a reader of record batches of their rows (`Scorer.schema`).

    At each context, every token, or each of the `last`, is scored exactly once. The first token of a document is scored
    if the model has a `bos` (`facts`); otherwise the number of scored bytes is unknown. `count_bytes` gives the bytes
    of scored ids, for `last` (None: unknown).

    `reading` are arguments of `running.reader.Reader`: `ranks`, `chunk`, `dtype`, `spill` and `events`. Memory does not
    depend on the document's length, without chosen blocks, and none of them changes a number beyond rounding. All ranks
    need the same documents. In one group of ranks, which share each document, all get all rows. Several groups divide
    the documents between them; then rank 0 gets all rows and the others none.

    A document that is too long for the model, or has invalid ids, ends the run, unless
    `events.left_out` counts it.

    An empty document has a row of 0 tokens or, with `last`, none. `events.logprobs` gets the log-probabilities of all
    tokens in order, int64 ids and float32 numbers, and with `top` the most likely tokens in their places.
    `events.progress` gets the number of tokens that each forward pass has scored.
    Raises ConfigError for a model that cannot score and options that contradict each other. The reader raises
    ConfigError for a document with more tokens than the model reads, NoTokensError at the end if no document had a
    token to score, NotFiniteError for a log-probability that is NaN or infinite.
    """
    return Scorer(Reader(model, **reading), options, facts, count_bytes, top).rows(documents)


def most_likely(model: Net, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most likely next id (N,) int64 of each hidden state (N, dim), and its log-probability (N,)."""
    ids = []
    logprobs = []
    for rows in hidden.split(max(1, LOGITS_LIMIT // model.config.vocab_size)):
        logits = model.logits(rows).float()
        best = logits.max(-1)
        ids.append(best.indices)
        logprobs.append(best.values - logits.logsumexp(-1))
    return torch.cat(ids), torch.cat(logprobs)


@dataclass
class _Tally:
    """The running sums of a document over the windows read so far, until `expected` tokens are counted."""

    document: Document
    context: int | None
    expected: int
    n_bytes: int | None  # of the scored tokens
    gain: GainTally | None  # shared by the tallies of the document at all contexts
    nll_sum: float = 0.0
    n_tokens: int = 0


def _row(tallies: Sequence[_Tally], contexts: Sequence[int | None]) -> dict[str, object]:
    """Return the row of a document, from its tallies at all contexts. Columns that it lacks are null."""
    first = tallies[0]
    row: dict[str, Any] = {"doc_id": first.document.doc_id}
    for tally in tallies:
        score = Score(tally.nll_sum, tally.n_tokens, tally.n_bytes if tally.n_tokens else 0)
        row |= {"n_tokens": score.n_tokens, "n_bytes": score.n_bytes}
        of_context: dict[str, Any] = {"nll_sum": score.nll_sum, "ppl": score.ppl, "bpb": score.bpb}
        for name, value in of_context.items():
            row[column(name, tally.context, contexts)] = value
    if first.gain:
        row |= first.gain.result()._asdict()
    return row


@dataclass(frozen=True)
class _ScoredWindow(Window):
    """The inputs of a document's targets: the hidden state of each input predicts the next id."""

    tally: _Tally


# Pieces of windows, and a function for each thing that is measured of their targets: it waits for the device
_Measured = tuple[Sequence[Piece[_ScoredWindow]], Sequence[Callable[[], Tensor]]]


class Scorer(RowJob):
    """The job of `score`: a row for each document. The arguments are as those of `score`."""

    options: ScoreOptions
    doing = "scoring"
    row_name = "row"
    shard_name = "gains"
    shard_unit = "tokens"
    shard_size = 1 << 22
    batch_rows = 1 << 12

    def __init__(
        self,
        reader: Reader,
        options: ScoreOptions = ScoreOptions(),  # noqa: B008
        facts: ModelFacts = ModelFacts(),  # noqa: B008
        count_bytes: Callable[[np.ndarray], int | None] = lambda ids: None,
        top: bool = False,
    ) -> None:
        super().__init__(reader, options, facts)
        if not reader.model.config.causal:
            raise ConfigError(
                "a bidirectional model sees the tokens it would have to predict: it cannot score"
            )
        if not reader.model.config.vocab_size:
            raise ConfigError("this model has no vocabulary (vocab_size 0): it cannot score tokens")
        if reader.events.logprobs:
            if len(options.contexts) > 1:
                raise ConfigError("log-probabilities of tokens need one context: give only one")
            if reader.all_ranks.dp > 1:
                raise ConfigError(
                    "log-probabilities of tokens are written by one group of ranks: leave out --dp"
                )
        self.cut = Cut(facts, options)
        self.no_tokens_error = self.cut.no_tokens_error
        self.count_bytes = count_bytes
        self.top = top
        # of documents whose windows are being read, at each context
        self.open: deque[list[_Tally]] = deque()

    @classmethod
    def of_model(
        cls,
        reader: Reader,
        options: ScoreOptions,
        loaded: Loaded,
        top: bool = False,
    ) -> Scorer:
        """Return the job for a model, which counts bytes by the model's tokenizer."""
        job = cls(reader, options, ModelFacts.of(loaded), top=top)
        if loaded.tokenizer:
            job.count_bytes = loaded.tokenizer.n_bytes
        return job

    @cached_property
    def schema(self) -> pa.Schema:
        """The schema of the rows, with the columns `kept_fields`.

        `n_tokens` is the number of scored tokens, the same at each context. The columns of the gain are those of
        `measures.Gain`. Columns that are there once for each of several contexts end with the context. The metadata
        keys are `longnet.*`; unknown values are left out.
        """
        options = self.options
        of_contexts = dict.fromkeys(("nll_sum", "ppl", "bpb"), pa.float64())
        kinds = {"doc_id": pa.string(), "n_tokens": pa.int64(), "n_bytes": pa.int64()}
        for (name, kind), context in product(of_contexts.items(), options.contexts):
            kinds[column(name, context, options.contexts)] = kind
        if len(options.contexts) > 1:
            kinds |= dict.fromkeys(Gain._fields, pa.float64())
        columns = pa.schema(kinds)
        return row_schema(columns, self.kept_fields, self.facts.metadata)

    def sequence(self, document: Document) -> InputSequence[Document]:
        """Return a document as the model reads it. Raises TooLongError for a window that is too long for the model."""
        sequence = self.reader.model.sequence(document, self.cut.bos)
        if sequence.limit is None:
            return sequence
        more = max(0, sequence.own_start - 1)  # ids before the one that predicts the first target
        fits = max(1, sequence.limit - more)
        instead = f"score it in windows (--context {format_size(fits)} --stride {format_size(ceil_div(fits, 2))})"
        return sequence.check(instead, self.cut.longest(len(document)) + more)

    def window_sizes(self, tokens: int) -> Iterator[tuple[int, int]]:
        if tokens < self.fewest_tokens:  # such a head
            return
        for context in self.options.contexts:
            for start, stop, wanted in self.cut.windows(tokens, context):
                yield stop - start, stop - wanted

    def counted(self, tokens: int, documents: int = 1) -> int:
        scored = min(tokens, documents * self.options.last) if self.options.last else tokens
        return scored * len(self.options.contexts)

    def size(self, document: Document) -> int:
        return len(document) + 1

    def results(self, sequences: Iterable[InputSequence[Document]]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of the documents in order, each as soon as its document is scored at all contexts."""
        measured = deque[_Measured]()
        for pieces in self.reader.read(self._windows(sequences)):
            measured.append((pieces, self._measure(pieces)))
            # within a window, the device computes the next chunk while the host sums the previous one
            ends = bool(pieces) and pieces[-1].stop == pieces[-1].window.stop
            while len(measured) > (0 if ends else 1):
                self._add_up(*measured.popleft())
            if ended := [*self._ended()]:
                yield self._record_batch(ended)

    def _ended(self) -> Iterator[list[_Tally]]:
        """Take out the documents, in order, that are scored at all contexts."""
        while self.open and all(tally.n_tokens == tally.expected for tally in self.open[0]):
            yield self.open.popleft()

    def _record_batch(self, documents: Sequence[Sequence[_Tally]]) -> pa.RecordBatch:
        rows = [_row(tallies, self.options.contexts) for tallies in documents]
        scored = pa.schema(list(self.schema)[: len(self.schema) - len(self.kept_fields)])
        columns = pa.RecordBatch.from_pylist(rows, scored).columns
        kept = kept_columns([tallies[0].document for tallies in documents], self.kept_fields)
        return pa.record_batch([*columns, *kept], schema=self.schema)

    def _windows(self, sequences: Iterable[InputSequence[Document]]) -> Iterator[_ScoredWindow]:
        contexts: Any = self.options.contexts  # of several, none is None
        for sequence in sequences:
            document = sequence.document
            gain = GainTally(contexts) if len(contexts) > 1 else None
            tallies = [self._tally(document, context, gain) for context in contexts]
            self.open.append(tallies)
            for tally in tallies:
                if not tally.expected:
                    yield _ScoredWindow(sequence, 0, 0, 0, 0, tally)
                for start, stop, wanted in self.cut.windows(len(document), tally.context):
                    yield _ScoredWindow(sequence, start, stop, wanted, stop, tally)

    def _tally(self, document: Document, context: int | None, gain: GainTally | None) -> _Tally:
        expected = max(0, len(document) - self.facts.first_target)
        # without bos, the first token is not scored
        n_bytes = document.n_bytes if self.cut.bos else None
        if self.options.last:
            expected = self.options.last
            ids = document.read(len(document) - expected, len(document))
            n_bytes = self.count_bytes(ids)
        return _Tally(document, context, expected, n_bytes, gain)

    @torch.inference_mode()
    def _measure(self, pieces: Sequence[Piece[_ScoredWindow]]) -> Sequence[Callable[[], Tensor]]:
        """Start to compute the nats (tokens,) of the pieces' targets; return a function that waits for them.

        With `top`, two more are for the most likely ids and their log-probabilities.
        """
        device = self.reader.device
        sizes = [*map(len, pieces)]
        tokens = sum(sizes)
        columns = [torch.zeros(tokens, device=device)]
        if self.top:
            columns += [
                torch.zeros(tokens, dtype=torch.int64, device=device),
                torch.zeros(tokens, device=device),
            ]
        mine = [
            (piece.hidden, self._targets(piece)) for piece in pieces if piece.hidden is not None
        ]
        if mine:
            hidden_of_pieces, ids_of_pieces = zip(*mine, strict=True)
            hidden = torch.cat(hidden_of_pieces)
            targets = to_device(torch.from_numpy(np.concatenate(ids_of_pieces)), device)
            with precision(self.reader.dtype, device):
                of_mine = [self.reader.model.nll(hidden, targets)]
                of_mine += most_likely(self.reader.model, hidden) if self.top else ()
            are_mine = torch.tensor([piece.hidden is not None for piece in pieces])
            places = to_device(are_mine.repeat_interleave(torch.tensor(sizes)), device)
            for column, values in zip(columns, of_mine, strict=True):
                column.masked_scatter_(places, values.to(column.dtype))
        self.reader.ranks.sum(*columns)
        return [*map(to_host, columns)]

    def _add_up(
        self,
        pieces: Sequence[Piece[_ScoredWindow]],
        columns: Sequence[Callable[[], Tensor]],
    ) -> None:
        """Add the nats of the pieces' targets to their documents."""
        measured = [column().numpy() for column in columns]
        finite = bool(np.isfinite(measured[0]).all())
        edges = [0, *accumulate(map(len, pieces))]
        for piece, begin, end in zip(pieces, edges, edges[1:], strict=False):
            nll, *top = (column[begin:end] for column in measured)
            tally = piece.window.tally
            start = piece.start + 1 - len(self.cut.bos)
            if not finite and not np.isfinite(nll).all():
                token = start + int(np.argmin(np.isfinite(nll)))
                advice = ADVICE
                if self.reader.dtype == "fp16":
                    advice = "--dtype fp16 overflows, take bf16 or fp32"
                raise NotFiniteError(
                    f"{tally.document.where}: document {tally.document.doc_id!r}: the log-probability of token {token} "
                    f"is not finite: {advice}"
                )
            tally.nll_sum += float(np.add.reduce(nll, dtype=np.float64))
            tally.n_tokens += len(nll)
            if tally.gain:
                tally.gain.add(tally.context, nll)
            if (take := self.reader.events.logprobs) and len(nll):
                take(tally.document, start, self._targets(piece), -nll, *top)

    @staticmethod
    def _targets(piece: Piece[_ScoredWindow]) -> np.ndarray:
        return piece.window.sequence.read(piece.start + 1, piece.stop + 1)
