"""Blocks of keys that the content chooses: the operator = the reference that is written to be read."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import chosen_blocks, dilated_attention_reference
from strategies import Choice, assert_close, chosen_choices, cuts, run, split, turn, turning
from torch import Tensor

from longnet_cli.attention import (
    KVCache,
    LayerChoices,
    Past,
    Pattern,
    choosing,
    chosen,
    dilated_attention,
    groups,
    past,
)
from longnet_cli.attention import pattern as pattern_module
from longnet_cli.attention.branches import BACKWARD_FLOPS, attention_flops, backward_flops
from longnet_cli.attention.chosen import Chosen
from longnet_cli.attention.groups import GroupedPart, chosen_flops, groups_of
from longnet_cli.running.memory_maps import BlockFile, SpillFile

WINDOW = Pattern((16,), (1,), look_back=1, chosen=4, chosen_block=8, chosen_every=4)


def choice_of(
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    scale: float,
    turn: chosen.Turn | None,
    choices: LayerChoices | None = None,
) -> list:
    """What the operator chooses, in the form of `chosen_blocks`."""
    every, (batch, tokens) = pattern.chosen_every, q.shape[:2]
    parts = [
        GroupedPart(slice(0, batch), slice(0, tokens), 0, each)
        for each in groups_of(pattern, 0, tokens)
    ]
    call = Chosen(pattern, parts, turn, choices=choices)
    call.choose(q, k, scale)
    found = []
    for part, of_rows in zip(parts, call.blocks, strict=True):
        for row, blocks in enumerate(of_rows):
            for index, group in enumerate(blocks.tolist()):
                first = part.groups.start + index * every
                stop = first + part.groups.queries
                found += [
                    (row, range(start, min(start + every, stop)), group)
                    for start in range(first, stop, every)
                ]  # a group that sees all blocks has more queries
    return sorted(found, key=lambda each: (each[0], each[1].start))


def funnel(*stages: tuple[int, int]) -> AbstractContextManager[object]:
    return patch.object(groups, "FUNNEL", stages)


@given(choice=chosen_choices())
def test_equals_the_reference(choice: Choice) -> None:
    options = {"lengths": choice.lengths} | turning(choice)
    found = run(dilated_attention, choice.qkv(), choice.pattern, **options)
    expected = run(dilated_attention_reference, choice.qkv(), choice.pattern, **options)
    assert_close(found, expected, 1e-12)


@given(choice=chosen_choices(), scale=st.sampled_from([0.1, 3.0]))
def test_chooses_what_the_reference_chooses(choice: Choice, scale: float) -> None:
    q, k, *_ = choice.qkv()
    asked = (q, k, choice.pattern, scale, turn if choice.rotary else None)
    assert choice_of(*asked) == chosen_blocks(*asked)


@pytest.mark.parametrize(
    ("sizes", "tokens", "fewer", "stages"),
    [
        *(
            ((24, 24, every), 500, groups.FUNNEL, ((1, 9), (2, 6)))
            for every in (1, 2, 3, 4, 6, 12, 24)
        )
    ],
)
def test_chooses_in_stages_what_the_reference_chooses(
    sizes: tuple[int, int, int],
    tokens: int,
    fewer: tuple,
    stages: tuple,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pattern_module, "SCAN", 12)
    width, block, every = sizes
    pattern = Pattern((width,), (1,), look_back=1, chosen=3, chosen_block=block, chosen_every=every)
    q, k, *_ = Choice(pattern, 2, tokens, 4, 8, 0, True, None, 1, kv_heads=2).qkv()
    asked = q, k, pattern, 1.0, turn
    with funnel(*stages):
        in_stages = choice_of(*asked)
        assert in_stages == chosen_blocks(*asked)
    with funnel(*fewer):
        assert in_stages != choice_of(*asked)


@given(choice=chosen_choices(), seed=st.integers(0, 99))
def test_named_blocks_are_seen_before_others(choice: Choice, seed: int) -> None:
    """Whether they are candidates or not."""
    pattern, (q, k, *_) = replace(choice.pattern, chosen_layers=()), choice.qkv()
    chance = random.Random(seed)
    most, every = pattern.chosen // 4, pattern.chosen_every
    names: dict[tuple[int, int], list[int]] = {}

    def named(row: int, part: GroupedPart) -> Tensor:
        rows = []
        for first in range(
            part.groups.start, part.groups.start + part.groups.number * every, every
        ):
            blocks = [*range(1, part.groups.near // pattern.chosen_block)]
            own = names.setdefault((row, first), chance.sample(blocks, chance.randint(0, most)))
            rows.append([*own, *[-1] * (most - len(own))])
        return torch.tensor(rows, dtype=torch.int64).view(part.groups.number, most)

    with funnel((1, 2 * pattern.chosen)):
        asked = (q, k, pattern, 1.0, turn if choice.rotary else None)
        seen = choice_of(*asked, LayerChoices(choosing.Choices(named), pattern, 0))
        assert seen == chosen_blocks(*asked, lambda row, first: names[row, first])


@given(choice=chosen_choices(), layers=st.sampled_from([(1, 2, 4), (2,), ()]))
def test_layers_equal_the_reference(choice: Choice, layers: tuple[int, ...]) -> None:
    """Some choose, also among what the one before has chosen. Others see the same blocks, or block 0."""
    pattern, choices, made = replace(choice.pattern, chosen_layers=layers), choosing.Choices(), None
    with funnel((1, 2 * pattern.chosen)):
        for layer in range(6):
            inputs = replace(choice, seed=choice.seed + layer, lengths=None).qkv()
            options, place = turning(choice), LayerChoices(choices, pattern, layer)
            asked = *inputs[:2], pattern, choice.head_dim**-0.5, options.get("turn")
            if pattern.source(layer) == layer:
                made = expected = chosen_blocks(*asked, earlier=made)
            elif made is None:
                (w,), (b,) = pattern.segment_lengths, pattern.look_backs
                expected = [
                    (
                        row,
                        queries,
                        [0] if (queries.start // w - b) * w > pattern.chosen_keys else blocks,
                    )
                    for row, queries, blocks in chosen_blocks(*asked)
                ]
            else:
                expected = made
            seen = run(dilated_attention, inputs, pattern, **options, choices=place)
            assert_close(
                seen,
                run(dilated_attention_reference, inputs, pattern, **options, choice=expected),
                1e-12,
            )


def test_what_the_layer_before_has_chosen_is_compared_too() -> None:
    choices, pattern = choosing.Choices(), replace(WINDOW, chosen_layers=(0, 1))
    q, k, *_ = Choice(pattern, 1, 400, 4, 8, 0, True, None, 1, kv_heads=2).qkv()
    with funnel((1, 8)):
        choice_of(q.flip(1), k, pattern, 1.0, None, LayerChoices(choices, pattern, 0))
        second = choice_of(q, k, pattern, 1.0, None, LayerChoices(choices, pattern, 1))
        assert second != choice_of(q, k, pattern, 1.0, None)


def test_a_layer_that_follows_needs_the_one_before() -> None:
    pattern = replace(WINDOW, chosen_layers=(2,))
    x = torch.zeros(1, 100, 2, 4)
    with pytest.raises(
        ValueError, match="layer 3 sees the blocks that layer 2 chooses, which has not run"
    ):
        dilated_attention(x, x, x, pattern, choices=LayerChoices(choosing.Choices(), pattern, 3))


@given(choice=chosen_choices())
def test_fp32_equals_the_reference_for_the_same_choice(choice: Choice) -> None:
    """In fp32, another block may win where scores are nearly equal."""
    inputs, options = choice.qkv(torch.float32), turning(choice)
    found = run(dilated_attention, inputs, choice.pattern, **options)
    made = choice_of(*inputs[:2], choice.pattern, choice.head_dim**-0.5, options.get("turn"))
    exact = [x.double() for x in inputs]
    expected = run(dilated_attention_reference, exact, choice.pattern, **options, choice=made)
    assert_close(found, expected, 1e-5)


@given(choice=chosen_choices(), sizes=cuts())
def test_documents_in_a_row_equal_each_alone(choice: Choice, sizes: list[int]) -> None:
    documents = split(choice.tokens, [max(size, choice.tokens // 4) for size in sizes])

    def each_alone(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        parts = zip(*(x.split(documents, 1) for x in (q, k, v)), strict=True)
        return torch.cat([dilated_attention(*part, pattern, turn=turn) for part in parts], 1)

    found = run(dilated_attention, choice.qkv(), choice.pattern, documents=documents, turn=turn)
    assert_close(found, run(each_alone, choice.qkv(), choice.pattern), 1e-12)


@given(choice=chosen_choices())
def test_short_documents_are_dense(choice: Choice) -> None:
    """As long as all blocks are seen, every key is seen at its true distance."""
    pattern = choice.pattern
    (w,), (back,) = pattern.segment_lengths, pattern.look_back
    longest = (1 + back + pattern.chosen_keys // w) * w
    choice = replace(choice, tokens=min(choice.tokens, longest), lengths=None)
    found = run(dilated_attention, choice.qkv(), pattern, turn=turn)
    assert_close(found, run(dilated_attention, choice.qkv(), Pattern.dense()), 1e-12)


def alike(tokens: int, kinds: list[int]) -> tuple[Tensor, Tensor]:
    """q (1, tokens, 2, 4) of ones, and k (1, tokens, 1, 4) whose blocks of 8 have scores of these kinds."""
    k = torch.zeros(1, tokens, 1, 4, dtype=torch.float64)
    for block, kind in enumerate(kinds):
        k[:, 8 * block : 8 * block + 8] = kind
    return torch.ones(1, tokens, 2, 4, dtype=torch.float64), k


@pytest.mark.parametrize("number", [512, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_equal_blocks_the_earlier_is_seen(number: int, dtype: torch.dtype) -> None:
    """Block 8 and its neighbour are first, then blocks 2 and 5 are equal, and one place is left."""
    q, k = (x.to(dtype) for x in alike(112, [0, 0, 2, 0, 0, 2, 0, 0, 4, 0]))
    with funnel((1, number)):
        last = choice_of(q, k, WINDOW, 0.5, None)[-1]
        assert last == (0, range(108, 112), [0, 2, 8, 9])
        assert chosen_blocks(q, k, WINDOW, 0.5, None)[-1] == last


def test_without_votes_the_first_blocks_are_seen() -> None:
    """Also where nothing is finite."""
    q, k = alike(112, [])
    assert choice_of(q, k, WINDOW, 0.5, None)[-1][2] == [0, 1, 2, 3]
    q[:, 100] = torch.nan
    assert choice_of(q, k, WINDOW, 0.5, None)[-1][2] == [0, 1, 2, 3]


def test_groups_in_many_calls_equal_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = Choice(WINDOW, 2, 120, 6, 8, 0, True, None, 1, kv_heads=2, rotary=True)
    whole = run(dilated_attention, choice.qkv(), WINDOW, turn=turn)
    monkeypatch.setattr(
        groups, "CPU", groups.Limits(gathered=8, scores=1, unrotated=8, whole=False)
    )
    assert_close(run(dilated_attention, choice.qkv(), WINDOW, turn=turn), whole, 1e-12)


@pytest.mark.parametrize("kernel", ["math", "cpu_flash"])
def test_bf16(kernel: str) -> None:
    choice = Choice(WINDOW, 1, 200, 6, 16, 0, True, None, 4, kv_heads=2)
    inputs = choice.qkv(torch.bfloat16)
    found = run(dilated_attention, inputs, WINDOW, kernel=kernel)
    made = choice_of(*inputs[:2], WINDOW, 0.25, None)
    expected = run(dilated_attention_reference, [x.double() for x in inputs], WINDOW, choice=made)
    assert_close(found, expected, 1e-2)


@given(choice=chosen_choices(), sizes=cuts(), first=st.sampled_from([1, 64]))
def test_any_shards_with_their_cache_equal_the_whole(
    choice: Choice, sizes: list[int], first: int
) -> None:
    """In fp64, every shard chooses what the whole chooses. The past lies in one piece of memory, or in several."""
    (q, k, v, _), pattern = choice.qkv(), choice.pattern
    with patch.object(past, "FIRST_BLOCKS", first):
        whole = dilated_attention(q, k, v, pattern, **turning(choice))
        cache = KVCache(
            pattern,
            choice.batch,
            choice.heads,
            choice.head_dim,
            kv_heads=choice.kv_heads,
            dtype=q.dtype,
        )
        parts = []
        for part in zip(*(x.split(split(choice.tokens, sizes), 1) for x in (q, k, v)), strict=True):
            far = cache.far(*part[1:])
            parts.append(
                dilated_attention(*part, pattern, start=cache.position, far=far, **turning(choice))
            )
            cache.append(*part[1:], q=part[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("every", "size"), [(1, 1), (16, 1), (4, 16), (1, 100), (16, 100), (4, 1000)]
)
def test_chunks_and_single_tokens_equal_the_whole(
    every: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "FUNNEL", ((1, 30), (2, 10)))
    monkeypatch.setattr(groups, "CPU", groups.CPU._replace(unrotated=32))  # keys at a time
    pattern = Pattern((32,), (1,), look_back=1, chosen=4, chosen_block=16, chosen_every=every)
    q, k, v, _ = Choice(
        pattern, 1, 1100 if size > 1 else 300, 4, 8, 0, True, None, 1, kv_heads=2, rotary=True
    ).qkv()
    whole, parts = dilated_attention(q, k, v, pattern, turn=turn), []
    cache = KVCache(pattern, 1, 4, 8, kv_heads=2, dtype=q.dtype)
    for part in zip(*(x.split(size, 1) for x in (q, k, v)), strict=True):
        parts.append(
            dilated_attention(*part, pattern, start=cache.position, far=cache.far(), turn=turn)
        )
        cache.append(*part[1:], q=part[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("before", [64, 83, 149])
@pytest.mark.parametrize("lengths", [None, [60, 11]])
def test_gradients_of_a_shard_that_starts_anywhere(before: int, lengths: list[int] | None) -> None:
    """Those of the whole, of a loss that is the shard's alone, without what flows into the past."""
    choice = Choice(WINDOW, 2, before + 60, 6, 8, 0, True, None, 1, kv_heads=2, rotary=True)
    inputs = choice.qkv()
    cache = KVCache(WINDOW, 2, 6, 8, kv_heads=2, dtype=torch.float64)
    shard = [x[:, before:] for x in inputs]
    cache.append(*(x[:, :before] for x in inputs[1:3]), q=inputs[0][:, :before])
    inputs[3][:, :before] = 0
    options = {"start": before, "far": cache.far(), "turn": turn, "lengths": lengths}
    found = run(dilated_attention, shard, WINDOW, **options)
    whole = {"turn": turn, "lengths": lengths and [before + n for n in lengths]}
    expected = [x[:, before:] for x in run(dilated_attention, inputs, WINDOW, **whole)]
    assert_close(found, expected, 1e-12)
    assert not cache.far().past.waiting.requires_grad


def test_an_open_group_chooses_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder's tokens see what the first of their group has chosen, and a scan serves all groups of its slot."""
    chosen_by, scanned = [], []
    own, narrowed = choosing._picked, choosing._scanned
    monkeypatch.setattr(choosing, "_picked", lambda *args: chosen_by.append(1) or own(*args))
    monkeypatch.setattr(
        choosing, "_scanned", lambda *args: scanned.append(narrowed(*args)) or scanned[-1]
    )
    monkeypatch.setattr(pattern_module, "SCAN", 8)
    q, k, v, _ = Choice(WINDOW, 1, 200, 4, 8, 0, True, None, 1, kv_heads=2).qkv()
    cache = KVCache(WINDOW, 1, 4, 8, kv_heads=2, dtype=q.dtype)
    with funnel((1, 8)):
        for part in zip(*(x.split(1, 1) for x in (q, k, v)), strict=True):
            dilated_attention(*part, WINDOW, start=cache.position, far=cache.far())
            cache.append(*part[1:], q=part[0])
    assert len(chosen_by) == len(range(64, 200, 4))
    scans = [found for found in scanned if found[0] is not None]
    assert len(scans) == len(range(96, 200, 8))  # from nine candidates on


@given(sizes=cuts(), tokens=st.integers(1, 90), spilled=st.booleans(), data=st.data())
def test_an_earlier_past_has_the_first_rows(
    sizes: list[int], tokens: int, spilled: bool, data: st.DataObject
) -> None:
    """All blocks that were whole by then, and the rows after them, also where the cut is inside a block."""
    _, k, v, _ = Choice(WINDOW, 2, tokens, 4, 8, 0, True, None, 1, kv_heads=2).qkv()
    with TemporaryDirectory() as folder:
        found = Past(WINDOW, BlockFile(SpillFile(folder)) if spilled else None, keep=tokens)
        found.settle(None)
        for some in zip(
            k.split(split(tokens, sizes), 1), v.split(split(tokens, sizes), 1), strict=True
        ):
            found.append(some[0], *some)
        earlier = found.before(position := data.draw(st.integers(0, tokens)))
        blocks = [x.flatten(2, 3) for x in earlier.blocks.pieces()]
        assert torch.equal(
            torch.cat([*blocks, earlier.waiting], 2), torch.stack([k, v])[:, :, :position]
        )
        assert earlier.waiting.shape[2] < WINDOW.chosen_block


@pytest.mark.parametrize("spilled", [False, True])
def test_rows_of_a_cache_are_reordered(spilled: bool, tmp_path: Path) -> None:
    choice = Choice(WINDOW, 3, 150, 4, 8, 0, True, None, 1, kv_heads=2, rotary=True)
    q, k, v, _ = choice.qkv()
    blocks = BlockFile(SpillFile(tmp_path)) if spilled else None
    rows, cache = [2, 0, 0], KVCache(WINDOW, 3, 4, 8, kv_heads=2, dtype=q.dtype, blocks=blocks)
    for first, last in ((0, 90), (90, 99)):
        some = [x[:, first:last] for x in (q, k, v)]
        dilated_attention(*some, WINDOW, start=first, far=cache.far(), turn=turn)
        cache.append(*some[1:], q=some[0])
    cache.select(rows)
    some = [x[rows, 99:] for x in (q, k, v)]
    found = dilated_attention(*some, WINDOW, start=99, far=cache.far(), turn=turn)
    whole = dilated_attention(*(x[rows] for x in (q, k, v)), WINDOW, turn=turn)
    torch.testing.assert_close(found, whole[:, 99:], rtol=1e-12, atol=1e-12)


def test_a_cache_holds_all_keys_once_more() -> None:
    cache = KVCache(WINDOW, 1, 4, 8, kv_heads=2)
    empty = cache.nbytes
    x = torch.zeros(1, 8 * 64, 4, 8)
    cache.append(x[:, :, :2], x[:, :, :2], q=x)
    kept = cache.far().past
    kept.settle(None)
    keys, queries = 2 * 2 * 8 * 4 * 8 * 64, 4 * 8 * 4 * (128 + 6)
    assert cache.nbytes - empty == kept.nbytes == keys + keys // 8 + keys // 16 + queries


def test_a_cache_needs_queries() -> None:
    k = torch.zeros(1, 3, 2, 4)
    with pytest.raises(
        ValueError, match="chosen blocks need the queries of earlier tokens: give q"
    ):
        KVCache(WINDOW, 1, 2, 4).append(k, k)


def test_a_backward_pass_does_not_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    own, calls = chosen.choose, []
    monkeypatch.setattr(chosen, "choose", lambda *args: calls.append(1) or own(*args))
    pattern = Pattern((8,), (1,), look_back=1, chosen=3, chosen_block=4, chosen_every=4)
    q, k, v = (torch.randn(1, 200, 2, 8, requires_grad=True) for _ in range(3))
    out = dilated_attention(q, k, v, pattern)
    after = len(calls)
    out.sum().backward()
    assert len(calls) == after > 0


@pytest.mark.parametrize("tokens", [5, 16, 17, 60, 200, 1001])
def test_flops_of_chosen_blocks(tokens: int) -> None:
    """Each query sees min(near, chosen keys) of them, and the votes come once."""
    pattern = Pattern((8,), (1,), look_back=1, chosen=3, chosen_block=4, chosen_every=4)
    seen = sum(min(max(0, query // 8 - 1) * 8, 3 * 4) for query in range(tokens))
    found = chosen_flops(pattern, 2, 16, tokens)
    assert found.attention == 4 * 2 * 16 * seen
    assert (found.votes > 0) == (tokens > 24)
    both = attention_flops(pattern, 2, 16, tokens, True)
    assert both - attention_flops(Pattern((8,), (1,), look_back=1), 2, 16, tokens, True) == sum(
        found
    )
    assert backward_flops(pattern, 2, 16, tokens, True) == BACKWARD_FLOPS * (both - found.votes)
