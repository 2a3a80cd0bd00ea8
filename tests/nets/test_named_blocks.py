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
from longnet_cli.attention.groups import GroupedPart, groups_of
from longnet_cli.nets import named_blocks
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.named_blocks import NamedBlocks, ReadText
from longnet_cli.running.causal_stream import CausalStream

PATTERN = Pattern((16,), (1,), look_back=1, chosen=8, chosen_block=8, chosen_every=4)


def plainly(ids: list[int], first: int, near: int, number: int, size: int) -> list[int]:
    """The blocks that the group from position `first` on names."""
    scores: dict[int, float] = defaultdict(float)
    grams = {
        tuple(ids[end - n + 1 : end + 1])
        for end in range(max(0, first - named_blocks.SPAN + 1), first + 1)
        for n in (2, 3)
        if end - n + 1 >= 0
    }
    for gram in sorted(grams):
        n = len(gram)
        places = [end for end in range(n - 1, near) if tuple(ids[end - n + 1 : end + 1]) == gram]
        blocks: dict[int, float] = {}
        for place in places if len(places) <= named_blocks.MOST_PLACES else ():
            blocks[place // size] = 1.0
        for place in places if len(places) <= named_blocks.MOST_PLACES else ():
            if place % size >= size - size // 4 and place // size + 2 <= near // size:
                blocks.setdefault(place // size + 1, named_blocks.NEXT)
        for block, worth in blocks.items():
            scores[block] += worth * log(near // size / len(blocks))
    best = sorted(
        (block for block in scores if block), key=lambda block: (-round(scores[block], 9), block)
    )
    return [block for block in best if scores[block] > 1e-12][:number]


@given(
    seed=st.integers(0, 999), tokens=st.integers(1, 300), words=st.sampled_from([2, 9, 40]), sizes=cuts(),
    every=st.sampled_from([1, 4, 8]),
)  # fmt: skip
def test_names_are_those_of_a_plain_count(
    seed: int, tokens: int, words: int, sizes: list[int], every: int
) -> None:
    """In any chunks, and in any of two rows."""
    chance, pattern = random.Random(seed), replace(PATTERN, chosen_every=every)
    ids = torch.tensor([[chance.randrange(words) for _ in range(tokens)] for _ in range(2)])
    texts, start = [ReadText(), ReadText()], 0
    for chunk in ids.split(split(tokens, sizes), 1):
        for text, row in zip(texts, chunk, strict=True):
            text.append(row)
        named = NamedBlocks(pattern, chunk, texts)
        for groups in groups_of(pattern, start, start + chunk.shape[1]):
            if groups.near <= pattern.chosen_keys:
                continue
            part = GroupedPart(slice(0, 2), slice(0, chunk.shape[1]), start, groups)
            for row in range(2):
                begin = groups.start // every * every
                for group, blocks in enumerate(named(row, part).tolist()):
                    expected = plainly(ids[row].tolist(), begin + group * every, groups.near, 2, 8)
                    assert blocks == expected + [-1] * (2 - len(expected))
        start += chunk.shape[1]


def test_what_stands_often_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_blocks, "MOST_PLACES", 2)
    monkeypatch.setattr(named_blocks, "SPAN", 4)
    ids = torch.arange(1000, 1165)
    ids[41:43] = ids[105:107] = ids[163:165] = torch.tensor([1, 2])
    (groups,) = groups_of(PATTERN, 164, 165)
    assert ReadText([ids]).named(PATTERN, groups).tolist() == [[5, 13]]
    ids[81:83] = ids[163:165]
    assert ReadText([ids]).named(PATTERN, groups).tolist() == [[-1, -1]]


def test_a_fork_reads_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_blocks, "SPAN", 12)
    text = ReadText([torch.arange(100)])
    fork = text.fork()
    text.append(torch.arange(100, 170))
    fork.append(torch.arange(70))
    (groups,) = groups_of(PATTERN, 160, 164)
    assert text.named(PATTERN, groups).tolist() == [[-1, -1]]
    assert fork.named(PATTERN, groups).tolist() == [[6, 7]]


def test_a_net_sees_what_its_text_names() -> None:
    """With the same queries and keys, another text gives other hidden states; vectors have no text."""
    config = LongNetConfig(
        vocab_size=50,
        dim=16,
        num_layers=2,
        num_heads=2,
        ffn_dim=16,
        pattern=PATTERN,
        position="rope",
    )
    net = LongNet(config).double().eval()
    ids = torch.randint(50, (2, 200))
    with torch.no_grad():
        hidden = net(ids)
        unnamed = net(embeddings=net.embed(ids))
        assert not torch.allclose(hidden, unnamed)
        assert torch.equal(
            net(ids, named=lambda row, part: torch.full((part.groups.number, 2), -1)), unnamed
        )
        stream = CausalStream(net)
        read = [stream(embeddings=net.embed(some)) for some in ids.split(30, 1)]
        torch.testing.assert_close(torch.cat(read, 1), unnamed)
