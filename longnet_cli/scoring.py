"""The `score` job: how well a causal model predicts each token of each document, as perplexity and bits per byte.

    document --_windows--> windows --batches_by_length--> forwards --> nll sums, float64, a document each

A window is a slice of the document: its inputs are all but its last token, its targets all but its first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from longnet_cli.data.sources import Document
from longnet_cli.errors import ConfigError, DataError
from longnet_cli.model.longnet import IGNORED, LongNet
from longnet_cli.runtime.device import precision

BATCH_TOKENS = 1 << 14  # in a forward, padding included; one longer sequence goes alone


@dataclass(frozen=True)
class Score:
    """What some tokens cost: `nll_sum` in nats, over `n_tokens` scored tokens, which stand for `n_bytes` of UTF-8.

    `n_bytes` is None where it is unknown. Scores add up.
    """

    nll_sum: float
    n_tokens: int
    n_bytes: int | None

    @property
    def ppl(self) -> float | None:
        """Perplexity, exp(nats a token); None without tokens, or past what a float holds."""
        try:
            return math.exp(self.nll_sum / self.n_tokens)
        except (ZeroDivisionError, OverflowError):
            return None

    @property
    def bpb(self) -> float | None:
        """Bits per byte of text: unlike perplexity, it compares models with different tokenizers."""
        return self.nll_sum / math.log(2) / self.n_bytes if self.n_bytes else None

    def __add__(self, other: Score) -> Score:
        known = self.n_bytes is not None and other.n_bytes is not None
        n_bytes = self.n_bytes + other.n_bytes if known else None  # type: ignore[operator]
        return Score(self.nll_sum + other.nll_sum, self.n_tokens + other.n_tokens, n_bytes)

    def as_dict(self) -> dict[str, float | int | None]:
        """The keys of the machine formats."""
        return {
            "nll_sum": self.nll_sum,
            "n_tokens": self.n_tokens,
            "n_bytes": self.n_bytes,
            "ppl": self.ppl,
            "bpb": self.bpb,
        }


@dataclass(frozen=True)
class DocumentScore:
    """The score of one document; `where` is its file and row."""

    doc_id: str
    where: str
    score: Score


def score(
    model: LongNet,
    documents: Iterable[Document],
    *,
    bos: int | None,
    context: int | None = None,
    dtype: str = "auto",
    device: torch.device | str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[DocumentScore]:
    """Yield the score of each document, in order; every token is scored exactly once.

    `bos` (the tokenizer's end-of-text id) is put before each document, so that its first token is scored too; with
    None it is not, and the bytes of what was scored are unknown. Without `context` a document is one causal pass. With
    it, a token sees at most `context` tokens before it: the document is cut into disjoint windows of that many
    targets, and each window starts anew at position 0, with the token before its first target as its first input.

    An empty document scores 0 tokens. `device` moves the model there; None leaves it where it is. `on_progress` gets
    the number of tokens that each forward has scored. Raises ConfigError for a model that cannot score, and DataError
    at the end when no document had a token to score.
    """
    if not model.config.causal:
        raise ConfigError("a bidirectional model sees the tokens it would have to predict: it cannot score")
    if not model.config.vocab_size:
        raise ConfigError("this model has no vocabulary (vocab_size 0): it cannot score tokens")
    if context is not None and context < 1:
        raise ConfigError(f"context must be 1 or more, not {context}")
    if device is not None:
        model.to(device)
    return _score(model, documents, bos, context, dtype, on_progress)


def batches_by_length(lengths: Sequence[int], limit: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Group sequences for padded forwards of at most `limit` tokens, as indices into `lengths`; the longest first.

    A sequence longer than `limit` is a group of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        rows = max(1, limit // lengths[order[0]])
        yield order[:rows]
        order = order[rows:]


@dataclass
class _Tally:
    """A document on its way: what its windows have cost so far."""

    document: Document
    nll_sum: float = 0.0
    n_tokens: int = 0

    def result(self, has_bos: bool) -> DocumentScore:
        n_bytes = self.document.n_bytes if has_bos else None  # else its first token's bytes were not scored
        scored = Score(self.nll_sum, self.n_tokens, n_bytes if self.n_tokens else 0)
        return DocumentScore(self.document.doc_id, self.document.where, scored)


def _score(
    model: LongNet,
    documents: Iterable[Document],
    bos: int | None,
    context: int | None,
    dtype: str,
    on_progress: Callable[[int], None] | None,
) -> Iterator[DocumentScore]:
    finished: list[_Tally] = []  # documents all of whose windows are scored or in `waiting`
    waiting: list[tuple[_Tally, np.ndarray]] = []
    size = scored = 0
    for document in documents:
        tally = _Tally(document)
        for window in _windows(document.tokens, bos, context):
            waiting.append((tally, window))
            size += len(window) - 1
            if size >= BATCH_TOKENS:
                _run(model, waiting, dtype, on_progress)
                scored += size
                waiting, size = [], 0
                yield from (done.result(bos is not None) for done in finished)
                finished = []
        finished.append(tally)
        if not waiting:
            yield from (done.result(bos is not None) for done in finished)
            finished = []
    _run(model, waiting, dtype, on_progress)
    yield from (done.result(bos is not None) for done in finished)
    if scored + size == 0:
        raise DataError(
            "no token could be scored: every document is empty"
            if bos is not None
            else "no token could be scored: no document has two tokens, and no end-of-text id can precede the first"
        )


def _windows(tokens: np.ndarray, bos: int | None, context: int | None) -> Iterator[np.ndarray]:
    """Cut (tokens,) ids, with bos before them, into windows of `context` targets: (targets + 1,) int64 copies."""
    before = 0 if bos is None else 1
    targets = len(tokens) + before - 1
    for start in range(0, targets, context or max(1, targets)):
        stop = min(start + context, targets) if context else targets
        cut = tokens[max(0, start - before) : stop + 1 - before].astype(np.int64)
        yield np.concatenate(([bos], cut)) if bos is not None and start == 0 else cut


def _run(
    model: LongNet,
    waiting: Sequence[tuple[_Tally, np.ndarray]],
    dtype: str,
    on_progress: Callable[[int], None] | None,
) -> None:
    """Score all windows, in batches of similar length, and add each to its document's tally."""
    for batch in batches_by_length([len(window) - 1 for _, window in waiting]):
        sums = _nll_sums(model, [waiting[index][1] for index in batch], dtype)
        tokens = 0
        for index, nll_sum in zip(batch, sums, strict=True):
            tally, window = waiting[index]
            tally.nll_sum += nll_sum
            tally.n_tokens += len(window) - 1
            tokens += len(window) - 1
        if on_progress:
            on_progress(tokens)


@torch.inference_mode()
def _nll_sums(model: LongNet, windows: Sequence[np.ndarray], dtype: str) -> list[float]:
    """The nats of each window's targets. Right padding needs no mask: a causal net does not see it."""
    device = next(model.parameters()).device
    padded = torch.full((len(windows), max(map(len, windows))), IGNORED)
    for row, window in zip(padded, windows, strict=True):
        row[: len(window)] = torch.from_numpy(window)
    padded = padded.to(device)
    with precision(dtype, device):
        hidden = model(padded[:, :-1].clamp(min=0))
        return model.nll(hidden, padded[:, 1:]).double().sum(-1).tolist()
