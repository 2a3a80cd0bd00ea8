"""Chosen blocks: the operator = the reference that is written to be read, in any shards, with its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import dilated_attention_reference
from strategies import (
    CHOSEN,
    TOLERANCE,
    Choice,
    SeenBlocks,
    assert_close,
    blocks_of_shard,
    cache_of,
    chosen_choices,
    cuts,
    some_blocks,
    split,
    turn,
    turning,
)
from torch import Tensor

from longnet_cli.attention import KVCache, Outside, chosen, dilated_attention
from longnet_cli.attention.branches import attention_flops
from longnet_cli.attention.cache import cached_rows
from longnet_cli.attention.chosen import Chosen
from longnet_cli.attention.kernels import select_kernel
from longnet_cli.attention.spans import Lanes


def attend(choice: Choice, qkv: list[Tensor], seen: list[SeenBlocks], **options) -> Tensor:
    far = Outside(chosen=Chosen(blocks_of_shard(choice.pattern, seen)))
    options |= {"lengths": choice.lengths} | turning(choice)
    return dilated_attention(*qkv, choice.pattern, far=far, **options)


def expected_of(choice: Choice, qkv: list[Tensor], seen: list[SeenBlocks]) -> Tensor:
    rows = [(group.row, range(group.start, group.stop), blocks) for group, blocks in seen]
    options = {"lengths": choice.lengths} | turning(choice)
    return dilated_attention_reference(*qkv, choice.pattern, choice=rows, **options)


def seen_in(choice: Choice) -> list[SeenBlocks]:
    """Blocks for the groups of real tokens."""
    seen = some_blocks(choice.pattern, choice.batch, choice.tokens, choice.seed)
    lengths = choice.lengths or [choice.tokens] * choice.batch
    cut = [
        (group._replace(stop=min(group.stop, lengths[group.row])), blocks) for group, blocks in seen
    ]
    return [(group, blocks) for group, blocks in cut if group.start < group.stop]


@pytest.mark.parametrize("kernel", ["math", "cpu_flash"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@given(choice=chosen_choices(), gathered=st.sampled_from([1, chosen.GATHERED["cpu"]]))
def test_equals_the_reference(kernel, dtype, choice, gathered):
    """In one call, and in many calls of few groups."""
    qkv, seen = choice.qkv(dtype)[:3], seen_in(choice)
    expected = expected_of(choice, [x.double() for x in qkv], seen)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chosen, "GATHERED", {"cpu": gathered})
        assert_close([attend(choice, qkv, seen, kernel=kernel)], [expected], TOLERANCE[dtype])


def read(
    choice: Choice, qkv: Sequence[Tensor], seen: list[SeenBlocks], sizes: list[int], cache: KVCache
) -> list[Tensor]:
    outs = []
    for part in zip(*(x.split(sizes, 1) for x in qkv), strict=True):
        start, stop = cache.position, cache.position + part[0].shape[1]
        named = blocks_of_shard(choice.pattern, seen, start, stop)
        far = cache.append(*part[1:], named=named)
        outs.append(
            dilated_attention(*part, choice.pattern, start=start, far=far, **turning(choice))
        )
    return outs


@given(choice=chosen_choices(), sizes=cuts(), saves=st.booleans())
def test_shards_with_a_cache_that_is_forked_reordered_and_saved_equal_the_whole(
    choice, sizes, saves
):
    choice = replace(choice, lengths=None, batch=2, tokens=choice.tokens + 2)
    qkv, seen, cache = choice.qkv()[:3], seen_in(choice), cache_of(choice)
    whole, tokens = attend(choice, qkv, seen), choice.tokens
    parts = [tokens // 3, tokens // 3, tokens - 2 * (tokens // 3)]
    early, middle, late = zip(*(x.split(parts, 1) for x in qkv), strict=True)
    found = read(choice, early, seen, split(parts[0], sizes), cache)
    fork = cache.fork()
    found += read(choice, middle, seen, split(parts[1], sizes), cache)
    read(choice, [2 * x for x in middle], seen, split(parts[1], sizes), fork)
    if saves:
        state = {name: x.clone() for name, x in cache.state()}
        cache = cache_of(choice)
        cache.restore(2 * parts[0], state)
    cache.select([1, 0])
    swapped = [(group._replace(row=1 - group.row), blocks) for group, blocks in seen]
    turned = read(choice, [x.flip(0) for x in late], swapped, split(parts[2], sizes), cache)
    assert_close([torch.cat([*found, *(x.flip(0) for x in turned)], 1)], [whole], 1e-12)
    kept = cached_rows(Lanes(choice.pattern, choice.heads, choice.kv_heads), tokens)
    of_rows = 2 * choice.batch * choice.head_dim * 8
    past = tokens * choice.kv_heads
    assert past * of_rows <= cache.nbytes <= 2 * kept * of_rows


def test_whole_groups_in_shards_equal_the_whole_to_the_bit():
    """Shards of whole segments: the same calls, on the same rows."""
    choice = Choice(CHOSEN, 2, 160, 4, 8, 0, True, None, 1, kv_heads=2, rotary=True)
    qkv, seen = choice.qkv(torch.float32)[:3], seen_in(choice)
    kernel = select_kernel(torch.device("cpu"), torch.float32, 8)
    out, lse = torch.zeros(2, 160, 4, 8), torch.zeros(2, 160, 4)
    shards = [x.clone() for x in (out, lse)]
    everything = Chosen(blocks_of_shard(CHOSEN, seen))
    chosen.add_blocks(kernel, 0.5, everything, 8, turn, *qkv, out, lse)
    for start in range(0, 160, 16):
        stop = start + 16
        rows = torch.stack(qkv[1:])[:, :, :stop]
        part = Chosen(blocks_of_shard(CHOSEN, seen, start, stop), rows)
        some = [x[:, start:stop] for x in (*qkv, *shards)]
        chosen.add_blocks(kernel, 0.5, part, 8, turn, *some)
    assert torch.equal(out, shards[0])
    assert torch.equal(lse, shards[1])


def test_a_gradient_is_refused():
    choice = Choice(CHOSEN, 1, 160, 2, 8, 0, True, None, 1, kv_heads=2)
    q, k, v = choice.qkv()[:3]
    out = attend(choice, [q.requires_grad_(), k, v], seen_in(choice))
    with pytest.raises(ValueError, match="chosen blocks have no gradient"):
        out.sum().backward()


def test_what_does_not_say_which_blocks_are_seen_is_refused():
    q = torch.randn(1, 40, 2, 8)
    named = Outside(chosen=Chosen([]))
    for options in (
        {},
        {"far": Outside()},
        {"start": 40, "far": named},
        {"far": named, "documents": [20, 20]},
    ):
        with pytest.raises(ValueError, match="which blocks a document's queries see is not given"):
            dilated_attention(q, q, q, CHOSEN, **options)


@pytest.mark.parametrize("tokens", [5, 32, 33, 60, 1001])
def test_flops_are_those_of_as_many_blocks_as_may_be_named(tokens):
    window = replace(CHOSEN, chosen=0, chosen_block=32, chosen_every=16)
    beside = attention_flops(CHOSEN, 3, 8, tokens, True) - attention_flops(
        window, 3, 8, tokens, True
    )
    assert beside == 4 * 3 * 8 * max(0, tokens - 32) * 4 * 8
