"""The masked objective (BERT, arXiv 1810.04805, section 3.1): predict hidden tokens from both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from longnet_cli.model.net import IGNORED

# shares of the chosen tokens that become the mask, or a random token; the rest stay, and are predicted too
MASKED, RANDOM = 0.8, 0.1


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
