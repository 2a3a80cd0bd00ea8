"""The objectives of training: the inputs and targets of a batch, and its loss on held-out documents.

The causal objective: predict the next token. The masked objective (BERT, arXiv 1810.04805, section 3.1): predict hidden
tokens from both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longnet_cli.basics.errors import DataError
from longnet_cli.data.documents import Document
from longnet_cli.jobs.row_jobs import ModelFacts
from longnet_cli.jobs.scoring.measures import Score
from longnet_cli.jobs.scoring.scoring import score
from longnet_cli.nets.net import IGNORED, Net
from longnet_cli.running.chunked_backward import Tokens
from longnet_cli.running.device import precision, to_device
from longnet_cli.running.ranks.ranks import Ranks
from longnet_cli.running.reader import Reader, Window

from .gradients import StoredTokens
from .recipe import Recipe
from .windows import Batch

# shares of the chosen tokens that become the mask, or a random token; the rest stay, and are predicted too
MASKED, RANDOM = 0.8, 0.1


def inputs_and_targets(
    batch: Batch, recipe: Recipe, device: torch.device, ranks: Ranks, *, eos_id: int, seed: int
) -> tuple[Tokens, Tokens, int]:
    """Return ids and targets (rows, seq_len) of windows of seq_len + 1 tokens, and how many targets all ranks have.

    With the masked objective, tokens are hidden on the host, and their targets stay there: finding these then waits
    for no device.
    """
    rows, length = batch.shape
    if recipe.train.objective == "causal":
        ids, nexts = (StoredTokens(batch, first, length - 1, device) for first in (0, 1))
        return ids, nexts, rows * (length - 1) * ranks.dp
    seen, targets = mask_tokens(
        StoredTokens(batch, 0, length - 1, torch.device("cpu"))[:, :],
        recipe.train.mask_rate,
        mask_id=recipe.model.vocab_size - 1,
        eos_id=eos_id,
        seeds=[(seed, number) for number in batch.numbers],
    )
    count = (targets >= 0).sum()
    ranks.sum(count)
    return to_device(seen, device), targets, max(1, int(count) // ranks.sp)  # a group's ranks have the same tokens


def mask_tokens(
    tokens: Tensor, rate: float, *, mask_id: int, eos_id: int | None, seeds: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Return the ids that the net sees of `tokens` (B, N) int64, and its targets; both (B, N).

    Targets are the chosen tokens, and -100 elsewhere. Each token is chosen with probability `rate`, except the ends of
    documents, `eos_id`. The draw of a row depends only on its seed, N and `mask_id`, so a resumed run hides the same
    tokens, on any rank. Ids below `mask_id` are tokens.
    """
    draws = [_draw(seed, tokens.shape[1], mask_id) for seed in seeds]
    chance, kind, others = (torch.stack(drawn).to(tokens.device) for drawn in zip(*draws, strict=True))
    chosen = chance < rate
    if eos_id is not None:
        chosen &= tokens != eos_id
        others = torch.where(others == eos_id, tokens, others)  # an `eos_id` inside a document would cut it
    seen = tokens.masked_fill(chosen & (kind < MASKED), mask_id)
    seen = torch.where(chosen & (kind >= MASKED) & (kind < MASKED + RANDOM), others, seen)
    return seen, tokens.masked_fill(~chosen, IGNORED)


def _draw(seed: Sequence[int], tokens: int, mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return two numbers in [0, 1) and an id below `mask_id` for each token of a row, (tokens,) each."""
    number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    draw = torch.Generator().manual_seed(number)
    return *torch.rand(2, tokens, generator=draw), torch.randint(mask_id, (tokens,), generator=draw)


@torch.no_grad()
def evaluate(
    model: Net,
    documents: Sequence[Document],
    recipe: Recipe,
    *,
    eos_id: int,
    seq_len: int,
    ranks: Ranks,
    on_part: Callable[[int], None],
) -> Score:
    """Return the score of held-out documents. A causal net scores each document whole, as `longnet score` does.

    With the masked objective, documents are cut into windows of `seq_len` tokens, and the same tokens are hidden every
    time. `on_part` gets the tokens of each forward pass, on all ranks. The net ends in training mode, and the random
    state stays as it was. Raises DataError where no token is hidden.
    """
    reading: dict[str, Any] = {
        "chunk": recipe.train.chunk,
        "dtype": recipe.train.dtype,
        "ranks": ranks.all_in_one(),
        "on_progress": on_part,
    }
    model.eval()
    try:
        if recipe.train.objective == "masked":
            return _score_masked(Reader(model, **reading), _masked_windows(documents, recipe, eos_id, seq_len))
        rows = score(model, documents, facts=ModelFacts(eos_id), **reading).read_all().to_pylist()
        return reduce(add, (Score(row["nll_sum"], row["n_tokens"], row["n_bytes"]) for row in rows))
    finally:
        model.train()


@dataclass(frozen=True)
class _MaskedWindow(Window):
    """A window in which some ids are hidden. `targets` has the hidden ids, and IGNORED everywhere else."""

    targets: Tensor


def _masked_windows(
    documents: Sequence[Document], recipe: Recipe, eos_id: int, seq_len: int
) -> Iterator[_MaskedWindow]:
    places = ((document, start) for document in documents for start in range(0, len(document), seq_len))
    for turn, (document, start) in enumerate(places):
        ids = torch.from_numpy(document.read(start, start + seq_len))[None]
        seen, targets = mask_tokens(
            ids, recipe.train.mask_rate, mask_id=recipe.model.vocab_size - 1, eos_id=eos_id, seeds=[(turn,)]
        )
        hidden = Document(document.doc_id, seen[0].numpy(), None, document.where)
        yield _MaskedWindow(hidden, 0, len(hidden), 0, targets[0])


def _score_masked(reader: Reader, windows: Iterator[_MaskedWindow]) -> Score:
    sums = torch.zeros(2, dtype=torch.float64, device=reader.device)  # nats, tokens
    for pieces in reader.read(windows):
        for piece in pieces:
            if piece.hidden is not None:
                targets = piece.window.targets[piece.start : piece.stop]  # on the host: no wait for a GPU
                chosen = (targets != IGNORED).nonzero().flatten()
                hidden = piece.hidden[to_device(chosen, reader.device)]
                with precision(reader.dtype, reader.device):
                    nll = reader.model.nll(hidden, to_device(targets[chosen], reader.device))
                sums[0] += nll.sum(dtype=torch.float64)
                sums[1] += len(chosen)
    reader.ranks.sum(sums)
    nats, tokens = sums.tolist()
    if not tokens:
        raise DataError("none of the held-out tokens was drawn to be hidden: data.held_out needs more of them")
    return Score(nats, int(tokens), None)
