"""The `score` job: how well a causal model predicts each token of each document, as perplexity and bits per byte.

    document --Cut.windows--> windows --Reader--> hidden states --nll--> sums of nats, one float64 per document

A window is a range of the document's tokens to predict; its inputs are the tokens one before them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from longnet_cli.data.documents import Document, checked
from longnet_cli.data.kept import Sent
from longnet_cli.data.portions import Portion, portions
from longnet_cli.data.sinks import ShardWriter
from longnet_cli.errors import ConfigError, DataError, LongNetError, NotFiniteError
from longnet_cli.finite_json import to_json
from longnet_cli.measures import ByPosition, ByRecall, DocumentScore, Score
from longnet_cli.model.net import Net
from longnet_cli.recall import Bigrams
from longnet_cli.runtime.dealing import Parcel, deal
from longnet_cli.runtime.device import precision, to_device, to_host
from longnet_cli.runtime.ranks import Ranks
from longnet_cli.runtime.reading import AfterBos, Bos, Piece, Reader, Window, bos_ids, check_length, share_reader
from longnet_cli.sizes import format_size

# Called with (document, start, ids, log-probabilities): those of its tokens [start, start + n), (n,) int64 and float32
OnTokens = Callable[[Document, int, np.ndarray, np.ndarray], None]
# Called with (document, context, nats): those of its next tokens at that context, (n,) float32; of no token, n is 0
OnNats = Callable[[Document, int | None, np.ndarray], None]
OnSkip = Callable[[Document, LongNetError], None]  # with a document that is left out, and why

ADVICE = "the model's weights are too large for its numbers, or damaged"
LOGPROB_BATCH = 1 << 18  # tokens of a record batch of log-probabilities


class NothingToScoreError(DataError):
    """Among the documents there is no token to score."""


def score(
    model: Net,
    documents: Iterable[Document],
    *,
    bos: Bos,
    known: Iterable[Document] = (),
    context: int | Sequence[int] | None = None,
    stride: int | None = None,
    last: int | None = None,
    by_position: bool = False,
    by_recall: bool = False,
    count_bytes: Callable[[np.ndarray], int | None] | None = None,
    chunk: int | None = None,
    dtype: str = "auto",
    device: torch.device | str | None = None,
    ranks: Ranks | None = None,
    on_skip: OnSkip | None = None,
    on_tokens: OnTokens | None = None,
    on_nats: OnNats | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[DocumentScore]:
    """Yield the score of each document, in order; every token is scored exactly once.

    `bos` (the id of the tokenizer's end of text, or several) is put before each document, so that its first token is
    scored too; with None it is not, and the bytes of what was scored are unknown. Without `context` a document is one
    causal pass. With it, a token sees at most `context` tokens before it: the document is cut into disjoint windows of
    that many targets, and each window starts anew at position 0, with the token before its first target as its first
    input. Several contexts give a document as many scores, in turn, of the same tokens.

    With a `stride` windows overlap: each is of `context` targets, of which only the last `stride` count, so that a
    token has seen more than `context - stride` before it, where its document has them. With `last` only so many tokens
    at the end of each document are scored, likewise from windows as long as the context; documents too short for that
    are left out, and bytes are what `count_bytes` says of the scored ids (None: unknown).

    `by_position` also sums by position in the window, `by_recall` by how many tokens ago the document had the same
    token after the same one, before the window too: `recall.Bigrams` has what memory that takes.

    `chunk`, `dtype` and `ranks` as in `runtime.reading.Reader`: memory does not depend on the document's length, and
    none of them changes a number beyond rounding. Several ranks need the same documents. Those that share each document
    get all results; of several groups with documents of their own, rank 0 does and the others get none.

    A document that the model does not read for its length, or with ids that are none, ends the run, or with `on_skip`
    is handed to it and left out. Lengths of the `known` documents, those among all that cost nothing to look at, are
    checked before anything else.

    An empty document scores 0 tokens. `device` moves the model there; None leaves it where it is. `on_tokens` gets the
    log-probabilities of all tokens in order, `on_nats` their negatives at each context, those of a document before its
    score. `on_progress` gets the number of tokens that each forward has scored.
    Raises ConfigError for a model that cannot score, options that contradict each other and a document with more tokens
    than the model reads, NothingToScoreError at the end when no document had a token to score, NotFiniteError for a
    log-probability that is NaN or infinite.
    """
    cut = Cut.of(model, bos, context, stride, last)
    ranks = ranks or Ranks()
    if on_tokens and len(cut.contexts) > 1:
        raise ConfigError("log-probabilities of tokens need one context: give only one")
    if on_tokens and ranks.dp > 1:
        raise ConfigError("log-probabilities of tokens are written by one group of ranks: leave out --dp")
    if device is not None:
        model.to(device)
    reader = share_reader(model, chunk=chunk, dtype=dtype, ranks=ranks, on_progress=on_progress)
    scorer = Scorer(
        reader,
        bos,
        cut,
        by_position=by_position,
        by_recall=by_recall,
        count_bytes=count_bytes,
        on_tokens=on_tokens,
        on_nats=on_nats,
    )
    taken = scorer.checked(documents, known, on_skip)

    def run() -> Iterator[DocumentScore]:
        scored = 0
        parts = portions(taken, reader.portion)
        for _, found in deal(parts, scorer.run, ranks, Parcel(_pack, _unpack), scorer.tell_progress):
            for each in found:
                scored += each.score.n_tokens
                yield each
        if not scored and (ranks.first or ranks.dp == 1):
            raise scorer.nothing()

    return run()


def logprob_schema(metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """A row is a stretch of a document: its tokens from `start` on, and the log-probability of each, in nats.

    A long document takes several rows, `part` 0, 1, 2 ... of one doc_id. `metadata` is `weights.model_origin`.
    """
    fields = [
        pa.field("doc_id", pa.string()),
        pa.field("part", pa.int32()),
        pa.field("start", pa.int64()),
        pa.field("input_ids", pa.large_list(pa.int32()), nullable=False),
        pa.field("logprobs", pa.large_list(pa.float32()), nullable=False),
    ]
    return pa.schema(fields, metadata=dict(metadata or {}))


@contextmanager
def write_token_logprobs(path: str | Path, metadata: Mapping[str, str] | None = None) -> Iterator[OnTokens]:
    """Open a file for the log-probabilities of tokens (see `logprob_schema`), as the `on_tokens` of `score`."""
    rows: list[tuple[str, int, int, np.ndarray, np.ndarray]] = []
    size = part = 0
    last: Document | None = None

    with ShardWriter(path, logprob_schema(metadata)) as writer:

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


@dataclass(frozen=True)
class Cut:
    """The cut of documents into windows; `before` is how many ids (of `Bos`) come before each document."""

    before: int
    contexts: Sequence[int | None]
    stride: int | None
    last: int | None

    @classmethod
    def of(cls, model: Net, bos: Bos, context: int | Sequence[int] | None, stride: int | None, last: int | None) -> Cut:
        """Return the cut that `score` makes. Raises ConfigError as `score` does for the model and these options."""
        if not model.config.causal:
            raise ConfigError("a bidirectional model sees the tokens it would have to predict: it cannot score")
        if not model.config.vocab_size:
            raise ConfigError("this model has no vocabulary (vocab_size 0): it cannot score tokens")
        contexts: Sequence[int | None] = [context] if context is None or isinstance(context, int) else list(context)
        given = [*(("context", each) for each in contexts), ("stride", stride), ("last", last)]
        for name, value in given:
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, not {value}")
        if not contexts or len(set(contexts)) < len(contexts):
            raise ConfigError(f"each context may be given once: {', '.join(map(str, contexts))}")
        if stride and (small := [each for each in contexts if each is None or each < stride]):
            raise ConfigError(
                f"a stride of {stride} tokens needs a context"
                + (f" of {stride} or more, not {small[0]}" if small[0] else "")
            )
        return cls(len(bos_ids(bos)), contexts, stride, last)

    @property
    def first(self) -> int:
        """The first target of a document, 1 where nothing precedes it."""
        return 0 if self.before else 1

    def check(self, model: Net, document: Document) -> None:
        """Raise TooLongError for a document with a window that the model does not read."""
        more = max(0, self.before - 1)  # ids before the last one from which a target is predicted
        fits = max(1, (model.config.max_tokens or 0) - more)
        instead = f"score it in windows (--context {format_size(fits)} --stride {format_size(-(-fits // 2))})"
        check_length(model, self.longest(len(document)) + more, document.where, instead)

    def inputs(self, tokens: int, context: int | None) -> Iterator[tuple[int, int, int]]:
        """(start, stop, wanted): the ids that each window reads, and from which of them on a target counts."""
        before = self.before - 1  # from a target to its input
        for start, stop, counted in self.windows(tokens, context):
            yield start + before if start > self.first else 0, stop + before, counted + before

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

    def longest(self, tokens: int) -> int:
        """Targets of the longest window of a document of so many tokens; 0 where it is left out."""
        if self.last and tokens < self.least:
            return 0
        return max(0, min(tokens - self.first, max(each or tokens for each in self.contexts)))

    @property
    def least(self) -> int:
        """Tokens of a document whose `last` ones all get windows as long as every context."""
        last = self.last or 0
        return self.first + max(
            last if size is None else size + last - min(self.stride or size, last) for size in self.contexts
        )


@dataclass
class _Tally:
    """A document on its way: what its windows have cost so far, until `expected` tokens are counted."""

    document: Document
    context: int | None
    expected: int
    n_bytes: int | None  # of what is scored
    by_position: ByPosition | None
    by_recall: ByRecall | None
    bigrams: Bigrams  # read for by_recall only
    nll_sum: float = 0.0
    n_tokens: int = 0

    def result(self) -> DocumentScore:
        score = Score(self.nll_sum, self.n_tokens, self.n_bytes if self.n_tokens else 0)
        tables = self.by_position, self.by_recall
        return DocumentScore(
            self.document.doc_id, self.document.where, score, self.context, *tables, self.document.kept
        )


@dataclass(frozen=True)
class _Window(Window):
    """The inputs of a document's targets: the hidden state of each predicts the id after it."""

    tally: _Tally


class Scorer:
    """Documents in, scores out in the same order, on the ranks of one group. The arguments are those of `score`."""

    def __init__(
        self,
        reader: Reader,
        bos: Bos,
        cut: Cut,
        *,
        by_position: bool = False,
        by_recall: bool = False,
        count_bytes: Callable[[np.ndarray], int | None] | None = None,
        on_tokens: OnTokens | None = None,
        on_nats: OnNats | None = None,
    ) -> None:
        self.reader, self.model, self.bos, self.cut = reader, reader.model, bos, cut
        self.by_position, self.by_recall = by_position, by_recall
        self.count_bytes, self.on_tokens, self.on_nats = count_bytes, on_tokens, on_nats
        self.open: deque[_Tally] = deque()  # documents whose windows are being read

    def checked(
        self, documents: Iterable[Document], known: Iterable[Document] = (), on_skip: OnSkip | None = None
    ) -> Iterator[Document]:
        """The `documents`, each checked before it is yielded, and without `on_skip` all the `known` ones now."""
        check = partial(self.cut.check, self.model)
        for document in known if on_skip is None else ():
            check(document)
        return checked(documents, check, on_skip)

    def run(self, documents: Iterable[Document]) -> Iterator[DocumentScore]:
        """Yield the score of each checked document at each context, in order."""
        measured: deque[tuple[Sequence[Piece[_Window]], Callable[[], Tensor]]] = deque()
        for pieces in self.reader.read(self._windows(documents)):
            measured.append((pieces, self._measure(pieces)))
            # within a window a device computes the next chunk while the host adds up the one before
            ends = bool(pieces) and pieces[-1].stop == pieces[-1].window.stop
            while len(measured) > (0 if ends else 1):
                self._add_up(*measured.popleft())
            while self.open and self.open[0].n_tokens == self.open[0].expected:
                yield self.open.popleft().result()

    def tell_progress(self, portion: Portion[Document]) -> None:
        """Tell of tokens that another group of ranks has scored."""
        scored = portion.items * self.cut.last if self.cut.last else portion.length
        self.reader.on_progress(scored * len(self.cut.contexts))

    def nothing(self) -> NothingToScoreError:
        """Return the error for documents without a token to score."""
        if self.cut.last:
            return NothingToScoreError(f"no token could be scored: no document has {self.cut.least} tokens or more")
        return NothingToScoreError(
            "no token could be scored: every document is empty or left out"
            if bos_ids(self.bos)
            else "no token could be scored: no document has two tokens, and no end-of-text id can precede the first"
        )

    def _windows(self, documents: Iterable[Document]) -> Iterator[_Window]:
        for document in documents:
            if self.cut.last and len(document) < self.cut.least:
                continue
            ids = AfterBos(document, self.bos)
            for context in self.cut.contexts:
                tally = self._tally(document, context, Bigrams(ids))
                self.open.append(tally)
                if not tally.expected:
                    yield _Window(ids, 0, 0, 0, tally)
                for start, stop, wanted in self.cut.inputs(len(document), context):
                    yield _Window(ids, start, stop, wanted, tally)

    def _tally(self, document: Document, context: int | None, bigrams: Bigrams) -> _Tally:
        expected = max(0, len(document) - self.cut.first)
        n_bytes = document.n_bytes if bos_ids(self.bos) else None  # those of the first token were not scored
        if self.cut.last:
            expected = self.cut.last
            ids = document.read(len(document) - expected, len(document))
            n_bytes = self.count_bytes(ids) if self.count_bytes else None
        positions = ByPosition(min(self.model.config.pattern.segment_lengths)) if self.by_position else None
        recall = ByRecall() if self.by_recall else None
        return _Tally(document, context, expected, n_bytes, positions, recall, bigrams)

    @torch.inference_mode()
    def _measure(self, pieces: Sequence[Piece[_Window]]) -> Callable[[], Tensor]:
        """Return what waits for the nats of the pieces' targets, (tokens,), and gives them on the host."""
        device, ranks = self.reader.device, self.reader.ranks
        nll = torch.zeros(sum(map(len, pieces)), device=device)
        places = nll.split([len(piece) for piece in pieces])
        mine = [(piece, place) for piece, place in zip(pieces, places, strict=True) if piece.hidden is not None]
        if mine:
            hidden = torch.cat([piece.hidden for piece, _ in mine if piece.hidden is not None])
            ids = np.concatenate([self._targets(piece) for piece, _ in mine])
            targets = to_device(torch.from_numpy(ids), device)
            with precision(self.reader.dtype, device):
                found = self.model.nll(hidden, targets)
            for (_, place), part in zip(mine, found.split([len(piece) for piece, _ in mine]), strict=True):
                place.copy_(part)
        ranks.sum(nll)
        return to_host(nll)

    def _add_up(self, pieces: Sequence[Piece[_Window]], nll: Callable[[], Tensor]) -> None:
        """Add the nats of the pieces' targets to their documents."""
        for piece, part in zip(pieces, nll().split([len(piece) for piece in pieces]), strict=True):
            self._add(piece, part.numpy())

    def _add(self, piece: Piece[_Window], nll: np.ndarray) -> None:
        tally = piece.window.tally
        first = piece.start + 1 - AfterBos(tally.document, self.bos).first
        if not np.isfinite(nll).all():
            token = first + int(np.argmin(np.isfinite(nll)))
            advice = "--dtype fp16 overflows, take bf16 or fp32" if self.reader.dtype == "fp16" else ADVICE
            raise NotFiniteError(
                f"{tally.document.where}: document {tally.document.doc_id!r}: the log-probability of token {token} is "
                f"not finite: {advice}"
            )
        tally.nll_sum += float(nll.sum(dtype=np.float64))
        tally.n_tokens += len(nll)
        if tally.by_position:
            tally.by_position.add(piece.start - piece.window.start, nll)
        if tally.by_recall:
            tally.by_recall.add(tally.bigrams.distances(piece.start + 1, piece.stop + 1), nll)
        if self.on_nats:
            self.on_nats(tally.document, tally.context, nll)
        if self.on_tokens and len(nll):
            self.on_tokens(tally.document, first, self._targets(piece), -nll)

    @staticmethod
    def _targets(piece: Piece[_Window]) -> np.ndarray:
        return piece.window.ids.read(piece.start + 1, piece.stop + 1)


def _pack(found: Iterable[DocumentScore]) -> bytes:
    """Scores as JSON, in which floats stay what they are; values that are carried along become what is printed."""
    rows = []
    for each in found:
        positions = each.by_position and [each.by_position.segment, each.by_position.seen, each.by_position.inside]
        recall = each.by_recall and [each.by_recall.table]
        tables = [
            [item.tolist() if isinstance(item, np.ndarray) else item for item in kept or ()]
            for kept in (positions, recall)
        ]
        rows.append(
            [
                each.doc_id,
                each.where,
                *astuple(each.score),
                each.context,
                *tables,
                {name: value.as_py() for name, value in each.kept.items()},
            ]
        )
    return to_json(rows).encode()


def _unpack(data: bytes) -> Iterator[DocumentScore]:
    for doc_id, where, nll_sum, n_tokens, n_bytes, context, positions, recall, kept in json.loads(data):
        yield DocumentScore(
            doc_id,
            where,
            Score(nll_sum, n_tokens, n_bytes),
            context,
            ByPosition(positions[0], *map(np.array, positions[1:])) if positions else None,
            ByRecall(np.array(recall[0])) if recall else None,
            {name: cast(pa.Scalar, Sent(value)) for name, value in kept.items()},
        )
