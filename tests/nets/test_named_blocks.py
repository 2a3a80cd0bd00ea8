"""The blocks that a text names are those of a plain count of its pairs and triples."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pattern_nets import draw, net
from strategies import CHOSEN, cuts, split

from longnet_cli.attention import Pattern
from longnet_cli.attention.chosen import ChosenCall
from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets import named_blocks
from longnet_cli.nets.named_blocks import ReadText, named_calls
from longnet_cli.running.causal_stream import CausalStream
from longnet_cli.running.ranks.exchange import Exchange


def plainly(ids: list[int], first: int, near: int, pattern: Pattern) -> list[int]:
    """The blocks that the group from position `first` on sees."""
    size, scores = pattern.chosen_block, defaultdict[int, float](float)
    last = ids[max(0, first - named_blocks.SPAN + 1) : first + 1]
    grams = {tuple(last[at : at + n]) for n in (2, 3) for at in range(len(last) - n + 1)}
    for gram in grams:
        n = len(gram)
        places = [end for end in range(n - 1, near) if tuple(ids[end - n + 1 : end + 1]) == gram]
        if not 0 < len(places) <= named_blocks.MOST_PLACES:
            continue
        worth = log(1 + near // size / len(places))
        for place in places:
            scores[place // size] += worth
            if place % size >= size // 2:
                scores[place // size + 1] += named_blocks.NEXT * worth
    inside = [block for block in scores if 0 < block < near // size]
    best = sorted(inside, key=lambda block: (-round(scores[block], 6), block))
    return [0, *sorted(best[: pattern.chosen - 1])]


def blocks_by_query(calls: list[ChosenCall], start: int) -> dict[tuple[int, int], list[int]]:
    return {
        (call.row, start + query): blocks
        for call in calls
        for queries, blocks in zip(call.queries.tolist(), call.blocks.tolist(), strict=True)
        for query in queries
    }


@given(
    seed=st.integers(0, 999), tokens=st.integers(1, 300), words=st.sampled_from([2, 9, 40]), sizes=cuts(),
    every=st.sampled_from([1, 4, 8]), most=st.sampled_from([2, named_blocks.MOST_PLACES]),
)  # fmt: skip
def test_names_are_those_of_a_plain_count(seed, tokens, words, sizes, every, most):
    """In any chunks, single tokens included, and in any of two rows; what stands often names nothing."""
    chance, pattern = random.Random(seed), replace(CHOSEN, chosen_every=every)
    ids = torch.tensor([[chance.randrange(words) for _ in range(tokens)] for _ in range(2)])
    texts, start, found, expected = [ReadText(), ReadText()], 0, {}, {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(named_blocks, "MOST_PLACES", most)
        for chunk in ids.split(split(tokens, sizes), 1):
            found |= blocks_by_query(named_calls(pattern, chunk, texts, start), start)
            start += chunk.shape[1]
        for row in range(2):
            for query in range(32, tokens):
                first, near = query // every * every, (query // 16 - 1) * 16
                expected[row, query] = plainly(ids[row].tolist(), first, near, pattern)
    assert found == expected


def test_a_fork_reads_on_alone():
    model = net(CHOSEN).double()
    with torch.no_grad():
        stream, ids = CausalStream(model), draw(2, 200)
        stream(ids[:, :120])
        stream.fork()(ids[:, :80])
        torch.testing.assert_close(stream(ids[:, 120:]), model(ids)[:, 120:])


def test_several_ranks_are_refused():
    model, ids = net(CHOSEN), draw(1, 100)
    exchange = Exchange(model.config, [0, 50, 100], rank=0, cached=True)
    with pytest.raises(ConfigError, match="a pattern with chosen blocks is read by one process"):
        CausalStream(model)(ids[:, :50], exchange=exchange)


def test_a_net_sees_what_its_text_names():
    """With the same queries and keys, another text gives other hidden states; vectors have no text."""
    model, ids = net(CHOSEN), draw(2, 200)
    with torch.no_grad():
        hidden = model(ids)
        model.embedding.weight[:] = model.embedding.weight[torch.arange(50) // 2 * 2].clone()
        assert not torch.allclose(model(ids), model(ids // 2 * 2))
    with pytest.raises(ConfigError, match="chosen blocks are named by token ids"):
        model(embeddings=hidden)
    with pytest.raises(ConfigError, match="chosen blocks are named by token ids"):
        CausalStream(model)(embeddings=hidden)
