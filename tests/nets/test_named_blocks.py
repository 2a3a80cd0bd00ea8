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
from strategies import cuts, split

from longnet_cli.attention import Pattern
from longnet_cli.attention.chosen import ChosenCall
from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets import named_blocks
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.named_blocks import ReadText, named_calls
from longnet_cli.running.causal_stream import CausalStream
from longnet_cli.running.ranks.exchange import Exchange

PATTERN = Pattern((16,), (1,), look_back=1, chosen=4, chosen_block=8, chosen_every=4)


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


def read(ids: torch.Tensor) -> ReadText:
    text = ReadText()
    text.put(0, ids)
    return text


def blocks_by_query(calls: list[ChosenCall], start: int) -> dict[tuple[int, int], list[int]]:
    return {
        (call.row, start + query): blocks
        for call in calls
        for queries, blocks in zip(call.queries.tolist(), call.blocks.tolist(), strict=True)
        for query in queries
    }


@given(
    seed=st.integers(0, 999), tokens=st.integers(1, 300), words=st.sampled_from([2, 9, 40]), sizes=cuts(),
    every=st.sampled_from([1, 4, 8]),
)  # fmt: skip
def test_names_are_those_of_a_plain_count(
    seed: int, tokens: int, words: int, sizes: list[int], every: int
) -> None:
    """In any chunks, single tokens included, and in any of two rows."""
    chance, pattern = random.Random(seed), replace(PATTERN, chosen_every=every)
    ids = torch.tensor([[chance.randrange(words) for _ in range(tokens)] for _ in range(2)])
    texts, start, found = [ReadText(), ReadText()], 0, {}
    for chunk in ids.split(split(tokens, sizes), 1):
        found |= blocks_by_query(named_calls(pattern, chunk, texts, start), start)
        start += chunk.shape[1]
    expected = {}
    for row in range(2):
        for query in range(32, tokens):
            first, near = query // every * every, (query // 16 - 1) * 16
            expected[row, query] = plainly(ids[row].tolist(), first, near, pattern)
    assert found == expected


def test_what_stands_often_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_blocks, "MOST_PLACES", 2)
    monkeypatch.setattr(named_blocks, "SPAN", 2)
    ids = torch.arange(1000, 1165)
    ids[41:43] = ids[105:107] = ids[163:165] = torch.tensor([1, 2])
    assert read(ids).named(PATTERN, 164, 144) == [0, 5, 13]
    ids[81:83] = ids[163:165]
    assert read(ids).named(PATTERN, 164, 144) == [0]


def test_a_match_in_the_second_half_of_a_block_names_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(named_blocks, "SPAN", 2)
    for end, blocks in ((43, [0, 5]), (44, [0, 5, 6]), (47, [0, 5, 6])):
        ids = torch.arange(1000, 1165)
        ids[end - 1 : end + 1] = ids[163:165] = torch.tensor([1, 2])
        assert read(ids).named(PATTERN, 164, 144) == blocks


def test_a_fork_reads_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_blocks, "SPAN", 12)
    text = read(torch.arange(100))
    text.named(PATTERN, 96, 80)
    fork = text.fork()
    text.put(100, torch.arange(100, 170))
    fork.put(100, torch.arange(70))
    assert text.named(PATTERN, 160, 144) == [0]
    assert fork.named(PATTERN, 160, 144) == [0, 6, 7, 8]


def net(pattern: Pattern = PATTERN) -> LongNet:
    sizes = {"vocab_size": 50, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 16}
    return LongNet(LongNetConfig(**sizes, pattern=pattern, position="rope")).double().eval()


@given(sizes=cuts(), seed=st.integers(0, 9))
def test_a_net_sees_the_same_in_any_chunks_and_in_a_fork(sizes: list[int], seed: int) -> None:
    model = net()
    ids = torch.randint(50, (2, 200), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        hidden, stream = model(ids), CausalStream(model)
        early = [stream(some) for some in ids[:, :120].split(split(120, sizes), 1)]
        fork = stream.fork()
        late = [fork(some) for some in ids[:, 120:].split(split(80, sizes), 1)]
        torch.testing.assert_close(torch.cat([*early, *late], 1), hidden)
        torch.testing.assert_close(stream(ids[:, 120:]), hidden[:, 120:])


def test_chunks_of_whole_segments_equal_one_pass_to_the_bit() -> None:
    model, ids = net().float(), torch.randint(50, (1, 200))
    with torch.no_grad():
        hidden, stream = model(ids), CausalStream(model)
        chunks = [stream(some) for some in ids.split(40, 1)]
        named = blocks_by_query(named_calls(PATTERN, ids, [ReadText()]), 0)
        assert torch.allclose(torch.cat(chunks, 1), hidden, atol=1e-5)
    assert len({*map(tuple, named.values())}) > 5  # the text names this and that


def test_several_ranks_are_refused() -> None:
    model, ids = net(), torch.randint(50, (1, 100))
    exchange = Exchange(model.config, [0, 50, 100], rank=0, cached=True)
    with pytest.raises(ConfigError, match="a pattern with chosen blocks is read by one process"):
        CausalStream(model)(ids[:, :50], exchange=exchange)


def test_a_net_sees_what_its_text_names() -> None:
    """With the same queries and keys, another text gives other hidden states; vectors have no text."""
    model, ids = net(), torch.randint(50, (2, 200))
    with torch.no_grad():
        hidden = model(ids)
        model.embedding.weight[:] = model.embedding.weight[torch.arange(50) // 2 * 2].clone()
        assert not torch.allclose(model(ids), model(ids // 2 * 2))
    with pytest.raises(ConfigError, match="chosen blocks are named by token ids"):
        model(embeddings=hidden)
    with pytest.raises(ConfigError, match="chosen blocks are named by token ids"):
        CausalStream(model)(embeddings=hidden)
