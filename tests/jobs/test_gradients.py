"""The gradient of packed windows = that of every document alone, whatever the chunk; which tokens are hidden."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_nets import EOS, draw, error, gradients, net
from strategies import PAPER_64TH, document_starts, patterns_with_options
from torch import Tensor

from longnet_cli.jobs.training.objective import backward, mask_tokens
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import IGNORED


def alone(model: LongNet, tokens: Tensor, targets: Tensor) -> Tensor:
    """The loss of every document by itself; a document begins at an EOS, or where its window does."""
    total = torch.zeros((), dtype=torch.float64)
    for ids, wanted in zip(tokens, targets, strict=True):
        starts = [i for i in range(len(ids)) if i == 0 or ids[i] == EOS]
        for start, stop in pairwise([*starts, len(ids)]):
            total = total + model.nll(model(ids[None, start:stop]), wanted[None, start:stop]).sum()
    return total


@settings(max_examples=settings.default.max_examples // 2)
@given(
    pattern=st.just(PAPER_64TH) | patterns_with_options(causal=True),
    batch=st.integers(1, 4),
    tokens=st.integers(1, 150),
    ends=st.sets(st.integers(0, 149), max_size=8),
    chunk=st.integers(1, 200),
    every=st.integers(1, 5),
)
def test_documents_of_a_window_do_not_see_each_other(pattern, batch, tokens, ends, chunk, every):
    model = net(pattern).double()
    ids, targets = draw(batch, tokens).clamp_(max=EOS - 1), draw(batch, tokens, seed=1)
    targets[:, torch.arange(tokens) % every > 0] = IGNORED
    for i in ends:  # another cut in every row, none in some
        if i < tokens:
            ids[i % batch, i] = EOS
    loss = alone(model, ids, targets)
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    found = backward(
        model, ids, targets, chunk=max(chunk, tokens // 10), starts=document_starts(ids, EOS)
    )
    assert error(found, loss.detach()) <= 1e-12
    floor = max(x.norm().item() for x in expected)
    for a, b in zip(gradients(model), expected, strict=True):
        assert (a - b).norm().item() <= 1e-12 * max(b.norm().item(), floor)


@pytest.mark.parametrize("chunk", [50, 100, 128, 1000])
def test_without_an_eos_id_a_window_is_one_sequence(chunk):
    model = net(PAPER_64TH).double()
    ids, targets = draw(3, 128), draw(3, 128, seed=1)
    loss = model.nll(model(ids), targets).sum()
    (loss * 0.25).backward()
    expected = gradients(model)
    model.zero_grad()
    found = backward(model, ids, targets, chunk=chunk, scale=0.25)
    assert error(found, loss.detach()) <= 1e-12
    assert all(
        error(a, b) <= 1e-9
        for a, b in zip(gradients(model), expected, strict=True)
        if b.norm() > 1e-9
    )


def test_tokens_without_a_target_have_no_logits(monkeypatch):
    model, rows = net(PAPER_64TH, causal=False), []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: rows.append(len(hidden)) or logits(hidden))
    ids, targets = draw(3, 128), draw(3, 128, seed=1)
    targets[:, 2:] = IGNORED
    backward(model, ids, targets, chunk=1000)
    assert rows == [3 * 2]


MASK, END = 4, 0


def test_of_ten_chosen_eight_become_the_mask_one_another_token_and_one_stays():
    tokens = torch.randint(1000, (8, 4096), generator=torch.Generator().manual_seed(0))
    seen, targets = mask_tokens(
        tokens, 0.15, mask_id=1000, eos_id=-1, seeds=[(1, row) for row in range(8)]
    )
    chosen = targets != IGNORED
    assert targets[chosen].equal(tokens[chosen])
    assert seen[~chosen].equal(tokens[~chosen])
    masked, same = seen[chosen] == 1000, seen[chosen] == tokens[chosen]
    shares = [chosen.double().mean(), masked.double().mean(), same.double().mean()]
    assert torch.stack(shares).sub(torch.tensor([0.15, 0.8, 0.1])).abs().max() < 0.015
    again, _ = mask_tokens(
        tokens, 0.15, mask_id=1000, eos_id=-1, seeds=[(1, row) for row in range(8)]
    )
    assert again.equal(seen)
    alone, _ = mask_tokens(tokens[5:6], 0.15, mask_id=1000, eos_id=-1, seeds=[(1, 5)])
    assert alone.equal(seen[5:6])  # whichever rank it is on
    assert not mask_tokens(tokens[:1], 0.15, mask_id=1000, eos_id=-1, seeds=[(1, 3)])[0].equal(
        seen[:1]
    )


def test_documents_keep_their_ends_and_get_no_other():
    tokens = torch.randint(MASK, (8, 512), generator=torch.Generator().manual_seed(0))
    seen, targets = mask_tokens(
        tokens, 0.9, mask_id=MASK, eos_id=END, seeds=[(1, row) for row in range(8)]
    )
    assert (seen == END).equal(tokens == END)
    assert (targets[tokens == END] == IGNORED).all()
