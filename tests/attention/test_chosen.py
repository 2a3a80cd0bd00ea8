"""Chosen blocks: the operator = the reference that is written to be read, in any shards, with its cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from reference import dilated_attention_reference
from strategies import (
    Choice,
    SeenBlocks,
    assert_close,
    blocks_of_shard,
    chosen_choices,
    cuts,
    some_blocks,
    split,
    turn,
    turning,
)
from torch import Tensor

from longnet_cli.attention import KVCache, Outside, Pattern, chosen, dilated_attention
from longnet_cli.attention.branches import attention_flops
from longnet_cli.attention.cache import cached_rows
from longnet_cli.attention.chosen import Chosen
from longnet_cli.attention.kernels import select_kernel
from longnet_cli.attention.spans import Layout

WINDOW = Pattern((16,), (1,), look_back=1, chosen=4, chosen_block=8, chosen_every=4)


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


@example(choice=Choice(WINDOW, 2, 150, 4, 8, 0, True, (150, 90), 1, kv_heads=2, rotary=True))
@given(choice=chosen_choices())
def test_equals_the_reference(choice: Choice) -> None:
    qkv, seen = choice.qkv()[:3], seen_in(choice)
    assert_close([attend(choice, qkv, seen)], [expected_of(choice, qkv, seen)], 1e-12)


@pytest.mark.parametrize("kernel", ["math", "cpu_flash"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@given(choice=chosen_choices())
def test_other_types(kernel: str, dtype: torch.dtype, tolerance: float, choice: Choice) -> None:
    qkv, seen = choice.qkv(dtype)[:3], seen_in(choice)
    expected = expected_of(choice, [x.double() for x in qkv], seen)
    assert_close([attend(choice, qkv, seen, kernel=kernel)], [expected], tolerance)


@given(choice=chosen_choices())
def test_groups_in_many_calls_equal_one_call(choice: Choice) -> None:
    qkv, seen = choice.qkv()[:3], seen_in(choice)
    together = attend(choice, qkv, seen)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chosen, "GATHERED", {"cpu": 1})
        assert_close([attend(choice, qkv, seen)], [together], 1e-14)


def read(
    choice: Choice, qkv: list[Tensor], seen: list[SeenBlocks], sizes: list[int], cache: KVCache
) -> list[Tensor]:
    outs = []
    for part in zip(*(x.split(sizes, 1) for x in qkv), strict=True):
        start, stop = cache.position, cache.position + part[0].shape[1]
        named = blocks_of_shard(choice.pattern, seen, start, stop)
        far = cache.far(*part[1:], named=named)
        outs.append(
            dilated_attention(*part, choice.pattern, start=start, far=far, **turning(choice))
        )
        cache.append(*part[1:])
    return outs


def cache_of(choice: Choice, dtype: torch.dtype = torch.float64) -> KVCache:
    sizes = choice.batch, choice.heads, choice.head_dim
    return KVCache(choice.pattern, *sizes, kv_heads=choice.kv_heads, dtype=dtype)


@given(choice=chosen_choices(), sizes=cuts())
def test_any_shards_with_their_cache_equal_the_whole(choice: Choice, sizes: list[int]) -> None:
    choice = replace(choice, lengths=None)
    qkv, seen, cache = choice.qkv()[:3], seen_in(choice), cache_of(choice)
    found = torch.cat(read(choice, qkv, seen, split(choice.tokens, sizes), cache), 1)
    assert_close([found], [attend(choice, qkv, seen)], 1e-12)
    kept = cached_rows(Layout(choice.pattern, choice.heads, choice.kv_heads), choice.tokens)
    of_rows = 2 * choice.batch * choice.head_dim * 8
    assert kept * of_rows <= cache.nbytes <= 2 * kept * of_rows


@given(choice=chosen_choices(), sizes=cuts(), saves=st.booleans())
def test_rows_of_a_cache_are_reordered_forked_and_saved(
    choice: Choice, sizes: list[int], saves: bool
) -> None:
    choice = replace(choice, lengths=None, batch=2)
    qkv, seen, cache = choice.qkv()[:3], seen_in(choice), cache_of(choice)
    whole, half = attend(choice, qkv, seen), choice.tokens // 2
    parts = [x.split([half, choice.tokens - half], 1) for x in qkv]
    early, late = (list(x) for x in zip(*parts, strict=True))
    if half:
        read(choice, early, seen, split(half, sizes), cache)
        fork = cache.fork()
        read(choice, [x * 2 for x in late], seen, split(choice.tokens - half, sizes), fork)
        if saves:
            state = {name: x.clone() for name, x in cache.state()}
            cache = cache_of(choice)
            cache.restore(half, state)
        cache.select([1, 0])
    swapped = [(group._replace(row=1 - group.row), blocks) for group, blocks in seen]
    turned = [x.flip(0) for x in late]
    found = torch.cat(read(choice, turned, swapped, split(choice.tokens - half, sizes), cache), 1)
    assert_close([found.flip(0)], [whole[:, half:]], 1e-12)


def test_a_fork_writes_into_no_rows_of_the_other() -> None:
    choice = Choice(WINDOW, 1, 160, 4, 8, 0, True, None, 1, kv_heads=2)
    qkv, seen, cache = choice.qkv()[:3], seen_in(choice), cache_of(choice)
    first, middle, last = (
        [x[:, part] for x in qkv] for part in (slice(60), slice(60, 90), slice(90, 160))
    )
    read(choice, first, seen, [60], cache)
    fork = cache.fork()
    read(choice, middle, seen, [30], cache)
    read(choice, [2 * x for x in middle], seen, [30], fork)
    found = torch.cat(read(choice, last, seen, [70], cache), 1)
    assert_close([found], [attend(choice, qkv, seen)[:, 90:]], 1e-12)


def test_whole_groups_in_shards_equal_the_whole_to_the_bit() -> None:
    """Shards of whole segments: the same calls, on the same rows."""
    choice = Choice(WINDOW, 2, 160, 4, 8, 0, True, None, 1, kv_heads=2, rotary=True)
    qkv, seen = choice.qkv(torch.float32)[:3], seen_in(choice)
    kernel = select_kernel(torch.device("cpu"), torch.float32, 8)
    out, lse = torch.zeros(2, 160, 4, 8), torch.zeros(2, 160, 4)
    shards = [x.clone() for x in (out, lse)]
    everything = Chosen(blocks_of_shard(WINDOW, seen))
    chosen.add_blocks(kernel, 0.5, everything, 8, turn, *qkv, out, lse)
    for start in range(0, 160, 16):
        stop = start + 16
        rows = torch.stack(qkv[1:])[:, :, :stop]
        part = Chosen(blocks_of_shard(WINDOW, seen, start, stop), rows)
        some = [x[:, start:stop] for x in (*qkv, *shards)]
        chosen.add_blocks(kernel, 0.5, part, 8, turn, *some)
    assert torch.equal(out, shards[0])
    assert torch.equal(lse, shards[1])


def test_a_gradient_is_refused() -> None:
    choice = Choice(WINDOW, 1, 160, 2, 8, 0, True, None, 1, kv_heads=2)
    q, k, v = choice.qkv()[:3]
    out = attend(choice, [q.requires_grad_(), k, v], seen_in(choice))
    with pytest.raises(ValueError, match="chosen blocks have no gradient"):
        out.sum().backward()


def test_what_does_not_say_which_blocks_are_seen_is_refused() -> None:
    q = torch.randn(1, 40, 2, 8)
    named = Outside(chosen=Chosen([]))
    for options in (
        {},
        {"far": Outside()},
        {"start": 40, "far": named},
        {"far": named, "documents": [20, 20]},
    ):
        with pytest.raises(ValueError, match="which blocks a document's queries see is not given"):
            dilated_attention(q, q, q, WINDOW, **options)
    cache = KVCache(WINDOW, 1, 2, 8)
    with pytest.raises(ValueError, match=r"give them to far\(\)"):
        cache.far()


@pytest.mark.parametrize("tokens", [5, 32, 33, 60, 1001])
def test_flops_are_those_of_as_many_blocks_as_may_be_named(tokens: int) -> None:
    window = replace(WINDOW, chosen=0, chosen_block=32, chosen_every=16)
    beside = attention_flops(WINDOW, 3, 8, tokens, True) - attention_flops(
        window, 3, 8, tokens, True
    )
    assert beside == 4 * 3 * 8 * max(0, tokens - 32) * 4 * 8
