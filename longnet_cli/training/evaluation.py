"""How well a net in training predicts held-out documents, by the objective it is trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add

import torch

from longnet_cli.data.sources import Document
from longnet_cli.errors import DataError
from longnet_cli.model import LongNet
from longnet_cli.model.net import IGNORED
from longnet_cli.runtime.device import precision
from longnet_cli.runtime.ranks import Ranks
from longnet_cli.scoring import Score, score

from .masking import mask_tokens
from .recipe import Recipe


@torch.no_grad()
def evaluate(
    model: LongNet,
    documents: Sequence[Document],
    recipe: Recipe,
    *,
    eos_id: int,
    seq_len: int,
    ranks: Ranks,
    on_part: Callable[[], None],
) -> Score:
    """The score of held-out documents: each whole, as `longnet score` does it, for a causal net.

    For the masked objective, windows of `seq_len` tokens of each document, of which the same ones are hidden every
    time. `on_part` is called on all ranks after each forward. The net's mode and random numbers are left as they were.
    """
    model.eval()
    try:
        if recipe.train.objective == "masked":
            return _score_masked(model, documents, recipe, eos_id, seq_len, ranks, on_part)
        found = score(
            model,
            documents,
            bos=eos_id,
            chunk=recipe.train.chunk,
            dtype=recipe.train.dtype,
            ranks=ranks.all_in_one(),
            on_progress=lambda tokens: on_part(),
        )
        return reduce(add, (each.score for each in found))
    finally:
        model.train()


def _score_masked(
    model: LongNet,
    documents: Sequence[Document],
    recipe: Recipe,
    eos_id: int,
    seq_len: int,
    ranks: Ranks,
    on_part: Callable[[], None],
) -> Score:
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
    windows = ((document, start) for document in documents for start in range(0, len(document), seq_len))
    for turn, (document, start) in enumerate(windows):
        if turn % ranks.world == ranks.rank:
            ids = torch.from_numpy(document.read(start, min(start + seq_len, len(document))))[None]
            seen, targets = mask_tokens(
                ids, recipe.train.mask_rate, mask_id=recipe.model.vocab_size - 1, eos_id=eos_id, seeds=[(turn,)]
            )
            hidden_ones = (targets != IGNORED).to(device)
            with precision(recipe.train.dtype, device):
                nll = model.nll(model(seen.to(device))[hidden_ones], targets.to(device)[hidden_ones])
            sums[0] += nll.sum(dtype=torch.float64)
            sums[1] += hidden_ones.sum()
        on_part()
    ranks.sum(sums)
    if not sums[1]:
        raise DataError("none of the held-out tokens was drawn to be hidden: data.held_out needs more of them")
    return Score(sums[0].item(), int(sums[1].item()), None)
