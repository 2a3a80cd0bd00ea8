"""The `score` job: how well a causal model predicts each token of each document, as perplexity and bits per byte.

    document --Cut.windows--> windows --Reader--> hidden states --nll--> sums of nats, one float64 per document

A window is a range of the document's tokens to predict, for one of several contexts. Its inputs are the same range,
shifted back by one token.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longnet_cli.basics.errors import ConfigError, NotFiniteError
from longnet_cli.basics.finite_json import to_json
from longnet_cli.basics.sizes import format_size
from longnet_cli.data.documents import SPOOL_BYTES, Document
from longnet_cli.data.kept import Sent
from longnet_cli.data.left_out import OnSkip
from longnet_cli.jobs.row_jobs import DocumentJob
from longnet_cli.jobs.scoring.measures import ByPosition, DocumentScore, Gain, GainTally, Score
from longnet_cli.nets.net import LOGITS_LIMIT, Bos, InputSequence, Net, bos_ids
from longnet_cli.running.device import precision, to_device, to_host
from longnet_cli.running.ranks.dealing import Codec
from longnet_cli.running.ranks.portions import Portion
from longnet_cli.running.ranks.ranks import Ranks
from longnet_cli.running.reader import OnWindows, Piece, Reader, Window, share_reader


@dataclass(frozen=True)
class Cut:
    """The cut of documents into windows. The ids of `bos` come before each document."""

    bos: tuple[int, ...]
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
        return cls(bos_ids(bos), contexts, stride, last)

    @property
    def first(self) -> int:
        """The first target of a document: token 0, or token 1 if nothing precedes the document."""
        return 0 if self.bos else 1

    def sequence(self, model: Net, document: Document) -> InputSequence[Document]:
        """Return a document as the model reads it. Raises TooLongError for a window that is too long for the model."""
        sequence = model.sequence(document, self.bos)
        more = max(0, sequence.first - 1)  # ids before the one that predicts the first target
        fits = max(1, (sequence.limit or 0) - more)
        instead = f"score it in windows (--context {format_size(fits)} --stride {format_size(-(-fits // 2))})"
        return sequence.check(instead, self.longest(len(document)) + more)

    @property
    def nothing(self) -> str:
        """The error text for documents without a token to score."""
        if self.last:
            return f"no token could be scored: no document has {self.least} tokens or more"
        if self.bos:
            return "no token could be scored: every document is empty or left out"
        return "no token could be scored: no document has two tokens, and no end-of-text id can precede the first"

    def inputs(self, tokens: int, context: int | None) -> Iterator[tuple[int, int, int]]:
        """Yield (start, stop, wanted) for each window: it reads [start, stop), and targets count from `wanted` on."""
        before = len(self.bos) - 1  # from a target to its input
        for start, stop, counted in self.windows(tokens, context):
            yield start + before if start > self.first else 0, stop + before, counted + before

    def windows(self, tokens: int, context: int | None) -> Iterator[tuple[int, int, int]]:
        """Yield (start, stop, counted) for each window: at most `context` targets, which count from `counted` on.

        The counted targets of all windows make up the document, or its `last` tokens.
        """
        size = context or max(1, tokens - self.first)
        step = self.stride or size
        look_back = self.stride is not None or self.last is not None
        for counted in range(tokens - self.last if self.last else self.first, tokens, step):
            stop = min(counted + step, tokens)
            yield max(self.first, stop - size) if look_back else counted, stop, counted

    def longest(self, tokens: int) -> int:
        """Return the number of targets in the longest window of a document of `tokens` tokens, 0 if it is left out."""
        if self.last and tokens < self.least:
            return 0
        return max(0, min(tokens - self.first, max(each or tokens for each in self.contexts)))

    @property
    def least(self) -> int:
        """The fewest tokens of a document whose `last` tokens all get windows as long as every context."""
        last = self.last or 0
        return self.first + max(
            last if size is None else size + last - min(self.stride or size, last) for size in self.contexts
        )


# Called with (document, start, ids, log-probabilities) of the tokens [start, start + n): (n,) int64 and (n,) float32.
# With `top`, two more are the most likely ids in their places, and their log-probabilities.
OnTokens = Callable[..., None]

ADVICE = "the model's weights are too large for its numbers, or damaged"


def score(
    model: Net,
    documents: Iterable[Document],
    *,
    bos: Bos,
    stored: Iterable[Document] = (),
    context: int | Sequence[int] | None = None,
    stride: int | None = None,
    last: int | None = None,
    by_position: bool = False,
    count_bytes: Callable[[np.ndarray], int | None] | None = None,
    chunk: int | None = None,
    dtype: str = "auto",
    spill: str | Path | None = None,
    device: torch.device | str | None = None,
    ranks: Ranks | None = None,
    on_skip: OnSkip | None = None,
    on_tokens: OnTokens | None = None,
    top: bool = False,
    on_progress: Callable[[int], None] | None = None,
    on_choice: OnWindows | None = None,
) -> Iterator[DocumentScore]:
    """Yield the score of each document, in order. Every token is scored exactly once.

    `bos` (the id of the tokenizer's end of text, or several ids) is put before each document, so that its first token
    is scored too. With None, the first token is not scored, and the number of scored bytes is unknown. Without
    `context`, a document is one causal pass. With it, a token sees at most `context` tokens before it: the document is
    cut into disjoint windows of that many targets. Each window starts again at position 0, and its first input is the
    token before its first target. With several contexts, a document has a score for each, in turn, of the same tokens,
    and the score at the longest has the gain over the shortest. For the gain, 4 bytes per token of a document are kept,
    in a file in $TMPDIR if they are many.

    With a `stride`, windows overlap. Each has `context` targets, of which only the last `stride` count, so a counted
    token has seen more than `context - stride` tokens before it, if its document has them. With `last`, only this many
    tokens at the end of each document are scored, also from windows as long as the context. Documents too short for
    that are left out, and `count_bytes` gives the bytes of the scored ids (None: unknown).

    `by_position` also sums the nats by position in the window.

    `chunk`, `dtype`, `spill` and `ranks` are as in `running.reader.Reader`: memory does not depend on the document's
    length, without chosen blocks, and none of them changes a number beyond rounding. All ranks need the same documents.
    In one group of ranks, which share each document, all get all results. Several groups divide the documents between
    them; then rank 0 gets all results and the others none.

    A document that is too long for the model, or has invalid ids, ends the run. With `on_skip`, it is passed to
    `on_skip` and left out instead. The `stored` documents are the part of `documents` whose lengths are cheap to read;
    without `on_skip`, these lengths are checked before anything else.

    An empty document scores 0 tokens. The model is moved to `device`; None leaves it where it is. `on_tokens` gets the
    log-probabilities of all tokens in order, and with `top` the most likely tokens in their places. `on_progress` gets
    the number of tokens that each forward pass has scored. `on_choice` is as in `Reader`.
    Raises ConfigError for a model that cannot score, options that contradict each other and a document with more tokens
    than the model reads, NoTokensError at the end if no document had a token to score, NotFiniteError for a
    log-probability that is NaN or infinite.
    """
    cut = Cut.of(model, bos, context, stride, last)
    ranks = ranks or Ranks()
    if on_tokens and ranks.dp > 1:
        raise ConfigError("log-probabilities of tokens are written by one group of ranks: leave out --dp")
    if device is not None:
        model.to(device)
    reader = share_reader(
        model, chunk=chunk, dtype=dtype, spill=spill, ranks=ranks, on_progress=on_progress, on_choice=on_choice
    )
    scorer = Scorer(reader, cut, by_position, count_bytes, on_tokens, top)
    return scorer.all_results(scorer.checked(documents, stored, on_skip), ranks)


def most_likely(model: Net, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most likely next id (N,) int64 of each hidden state (N, dim), and its log-probability (N,)."""
    ids, logprobs = [], []
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
    by_position: ByPosition | None
    gain: GainTally | None  # shared by the tallies of the document at all contexts
    nll_sum: float = 0.0
    n_tokens: int = 0

    @property
    def ends(self) -> bool:
        """Return whether all tokens have been counted, and also compared if the result has a gain."""
        compared = self.gain.tokens if self.gain and self.context == self.gain.longest else self.expected
        return self.n_tokens == compared == self.expected

    def result(self) -> DocumentScore:
        score = Score(self.nll_sum, self.n_tokens, self.n_bytes if self.n_tokens else 0)
        gain = self.gain.result() if self.gain and self.context == self.gain.longest else None
        document = self.document
        return DocumentScore(
            document.doc_id, document.where, score, self.context, self.by_position, gain, document.kept
        )


@dataclass(frozen=True)
class _ScoredWindow(Window):
    """The inputs of a document's targets: the hidden state of each input predicts the next id."""

    tally: _Tally


def _pack(scores: Iterable[DocumentScore]) -> bytes:
    """Return scores as JSON, which keeps floats exact. Values of kept columns become the values that are printed."""

    def as_lists(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields}

    printed = (replace(score, kept={name: value.as_py() for name, value in score.kept.items()}) for score in scores)
    return to_json([asdict(score, dict_factory=as_lists) for score in printed]).encode()


def _unpack(data: bytes) -> Iterator[DocumentScore]:
    for row in json.loads(data):
        positions, gain = row["by_position"], row["gain"]
        row["score"] = Score(**row["score"])
        row["by_position"] = positions and ByPosition(
            positions["segment"], np.array(positions["seen"]), np.array(positions["inside"])
        )
        row["gain"] = gain and Gain(*gain)
        row["kept"] = {name: Sent(value) for name, value in row["kept"].items()}
        yield DocumentScore(**row)


@dataclass
class Scorer(DocumentJob[DocumentScore]):
    """The job of `score`: a score of each document at each context. The fields are as the arguments of `score`."""

    codec, scores = Codec(_pack, _unpack), True

    reader: Reader
    cut: Cut
    by_position: bool = False
    count_bytes: Callable[[np.ndarray], int | None] | None = None
    on_tokens: OnTokens | None = None
    top: bool = False  # whether `on_tokens` also gets the most likely tokens
    open: deque[_Tally] = field(default_factory=deque, init=False)  # documents whose windows are being read

    def __post_init__(self) -> None:
        if self.on_tokens and len(self.cut.contexts) > 1:
            raise ConfigError("log-probabilities of tokens need one context: give only one")
        self.nothing = self.cut.nothing

    def sequence(self, document: Document) -> InputSequence[Document]:
        return self.cut.sequence(self.reader.model, document)

    def window_sizes(self, tokens: int) -> Iterator[tuple[int, int]]:
        if not (self.cut.last and tokens < self.cut.least):
            for context in self.cut.contexts:
                for start, stop, wanted in self.cut.inputs(tokens, context):
                    yield stop - start, stop - wanted

    def kept_bytes(self, tokens: int) -> dict[str, int]:
        """Return the bytes of the nats that are kept for the gain."""
        return {"nats": min(4 * tokens, SPOOL_BYTES) if len(self.cut.contexts) > 1 else 0}

    def tokens(self, result: DocumentScore) -> int:
        return result.score.n_tokens

    def results(self, sequences: Iterable[InputSequence[Document]]) -> Iterator[DocumentScore]:
        """Yield the score of each checked document at each context, in order."""
        measured: deque[tuple[Sequence[Piece[_ScoredWindow]], Sequence[Callable[[], Tensor]]]] = deque()
        for pieces in self.reader.read(self._windows(sequences)):
            measured.append((pieces, self._measure(pieces)))
            # within a window, the device computes the next chunk while the host sums the previous one
            ends = bool(pieces) and pieces[-1].stop == pieces[-1].window.stop
            while len(measured) > (0 if ends else 1):
                self._add_up(*measured.popleft())
            while self.open and self.open[0].ends:
                yield self.open.popleft().result()

    def tell_progress(self, portion: Portion[InputSequence[Document]]) -> None:
        """Report the tokens that another group of ranks has scored."""
        scored = portion.items * self.cut.last if self.cut.last else portion.length
        self.reader.on_progress(scored * len(self.cut.contexts))

    def _windows(self, sequences: Iterable[InputSequence[Document]]) -> Iterator[_ScoredWindow]:
        contexts = [context for context in self.cut.contexts if context is not None]
        for sequence in sequences:
            document = sequence.document
            if self.cut.last and len(document) < self.cut.least:
                continue
            gain = GainTally(contexts) if len(contexts) > 1 else None
            for context in self.cut.contexts:
                tally = self._tally(document, context, gain)
                self.open.append(tally)
                if not tally.expected:
                    yield _ScoredWindow(sequence, 0, 0, 0, tally)
                for start, stop, wanted in self.cut.inputs(len(document), context):
                    yield _ScoredWindow(sequence, start, stop, wanted, tally)

    def _tally(self, document: Document, context: int | None, gain: GainTally | None) -> _Tally:
        expected = max(0, len(document) - self.cut.first)
        n_bytes = document.n_bytes if self.cut.bos else None  # without bos, the first token is not scored
        if self.cut.last:
            expected = self.cut.last
            ids = document.read(len(document) - expected, len(document))
            n_bytes = self.count_bytes(ids) if self.count_bytes else None
        positions = ByPosition(min(self.reader.model.config.pattern.segment_lengths)) if self.by_position else None
        return _Tally(document, context, expected, n_bytes, positions, gain)

    @torch.inference_mode()
    def _measure(self, pieces: Sequence[Piece[_ScoredWindow]]) -> Sequence[Callable[[], Tensor]]:
        """Return a function for the nats (tokens,) of the pieces' targets, which it waits for and returns on the host.

        With `top`, two more are for the most likely ids and their log-probabilities.
        """
        device, ranks = self.reader.device, self.reader.ranks
        tokens = sum(map(len, pieces))
        columns = [torch.zeros(tokens, device=device)]
        if self.top:
            columns += [torch.zeros(tokens, dtype=torch.int64, device=device), torch.zeros(tokens, device=device)]
        mine = [piece for piece in pieces if piece.hidden is not None]
        if mine:
            hidden = torch.cat([piece.hidden for piece in mine if piece.hidden is not None])
            ids = np.concatenate([self._targets(piece) for piece in mine])
            targets = to_device(torch.from_numpy(ids), device)
            with precision(self.reader.dtype, device):
                of_mine = [self.reader.model.nll(hidden, targets)]
                of_mine += most_likely(self.reader.model, hidden) if self.top else ()
            for column, values in zip(columns, of_mine, strict=True):
                parts = iter(values.split([len(piece) for piece in mine]))
                for piece, place in zip(pieces, column.split([len(piece) for piece in pieces]), strict=True):
                    if piece.hidden is not None:
                        place.copy_(next(parts))
        ranks.sum(*columns)
        return [to_host(column) for column in columns]

    def _add_up(self, pieces: Sequence[Piece[_ScoredWindow]], columns: Sequence[Callable[[], Tensor]]) -> None:
        """Add the nats of the pieces' targets to their documents."""
        parts = [column().split([len(piece) for piece in pieces]) for column in columns]
        for piece, nll, *top in zip(pieces, *parts, strict=True):
            self._add(piece, nll.numpy(), [column.numpy() for column in top])

    def _add(self, piece: Piece[_ScoredWindow], nll: np.ndarray, top: Sequence[np.ndarray]) -> None:
        tally = piece.window.tally
        first = piece.start + 1 - len(self.cut.bos)
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
        if tally.gain and tally.context is not None:
            tally.gain.add(tally.context, nll)
        if self.on_tokens and len(nll):
            self.on_tokens(tally.document, first, self._targets(piece), -nll, *top)

    @staticmethod
    def _targets(piece: Piece[_ScoredWindow]) -> np.ndarray:
        return piece.window.sequence.read(piece.start + 1, piece.stop + 1)
