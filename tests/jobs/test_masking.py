"""Which tokens are hidden, and as what."""

from __future__ import annotations

import torch

from longnet_cli.jobs.training.objective import mask_tokens
from longnet_cli.nets.net import IGNORED

MASK, EOS = 4, 0


def test_of_ten_chosen_eight_become_the_mask_one_another_token_and_one_stays() -> None:
    tokens = torch.randint(1000, (8, 4096), generator=torch.Generator().manual_seed(0))
    seen, targets = mask_tokens(tokens, 0.15, mask_id=1000, eos_id=None, seeds=[(1, row) for row in range(8)])
    chosen = targets != IGNORED
    assert targets[chosen].equal(tokens[chosen])
    assert seen[~chosen].equal(tokens[~chosen])
    masked, same = seen[chosen] == 1000, seen[chosen] == tokens[chosen]
    shares = [chosen.double().mean(), masked.double().mean(), same.double().mean()]
    assert torch.stack(shares).sub(torch.tensor([0.15, 0.8, 0.1])).abs().max() < 0.015
    again, _ = mask_tokens(tokens, 0.15, mask_id=1000, eos_id=None, seeds=[(1, row) for row in range(8)])
    assert again.equal(seen)
    alone, _ = mask_tokens(tokens[5:6], 0.15, mask_id=1000, eos_id=None, seeds=[(1, 5)])
    assert alone.equal(seen[5:6])  # whichever rank it is on
    assert not mask_tokens(tokens[:1], 0.15, mask_id=1000, eos_id=None, seeds=[(1, 3)])[0].equal(seen[:1])


def test_documents_keep_their_ends_and_get_no_other() -> None:
    tokens = torch.randint(MASK, (8, 512), generator=torch.Generator().manual_seed(0))
    seen, targets = mask_tokens(tokens, 0.9, mask_id=MASK, eos_id=EOS, seeds=[(1, row) for row in range(8)])
    assert (seen == EOS).equal(tokens == EOS)
    assert (targets[tokens == EOS] == IGNORED).all()
