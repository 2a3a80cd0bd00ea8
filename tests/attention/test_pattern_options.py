"""The options of a pattern: look-back, each key once, all queries, sinks, shared key heads.

Fast = dense reference, outputs and gradients; shards with their far keys, and chunks with their cache, = the whole.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from reference import key_counts
from strategies import (
    CHOSEN,
    TOLERANCE,
    Choice,
    assert_close,
    cache_of,
    choices,
    compare_with_reference,
    cuts,
    run,
    split,
    turn,
    turning,
)
from torch import Tensor

from longnet_cli.attention import (
    SINKS,
    FarKeys,
    FarSpan,
    KVCache,
    Pattern,
    dilated_attention,
    far_keys,
)
from longnet_cli.attention.branches import attention_flops, branches
from longnet_cli.attention.cache import cached_rows
from longnet_cli.attention.merging import apart
from longnet_cli.attention.notation import parse_pattern
from longnet_cli.attention.spans import Lanes, far_spans
from longnet_cli.attention.views import strided_view


@pytest.mark.parametrize("kernel", ["cpu_flash", "math"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@given(choice=choices())
def test_every_choice_equals_the_reference(choice, dtype, kernel):
    compare_with_reference(choice, dtype, kernel)


@given(choice=choices(causal=False))
def test_zero_keys_equal_the_reference(choice):
    plain = Pattern(choice.pattern.segment_lengths, choice.pattern.dilation_rates)
    choice = replace(choice, pattern=plain, start=0, by_level=False)
    compare_with_reference(choice, padding="zero_key")


@given(choice=choices())
def test_gradients_are_added_to_views_without_overlap(choice):
    """Where two numbers of a view are one place, a sum of several threads is wrong, now and then."""
    places = torch.arange(choice.tokens * choice.kv_heads).view(
        1, choice.tokens, choice.kv_heads, 1
    )
    start, lanes = choice.start, Lanes(choice.pattern, choice.heads, choice.kv_heads)
    spans = (FarSpan(SINKS, 0, min(start, choice.pattern.sinks)),)
    for branch in branches(lanes, start, choice.tokens, choice.causal, "exact", spans):
        view = strided_view(places, branch.keys)[0]
        for into, part in apart(view, torch.zeros(view.shape), branch.keys):
            assert into.shape == part.shape
            assert into.unique().numel() == into.numel()


@given(choice=choices(), sizes=cuts(), called=st.booleans(), zero_keys=st.booleans())
def test_shards_with_their_far_keys_equal_the_whole(choice, sizes, called, zero_keys):
    """Each shard gets what `far_spans` says, in parts, one per shard that made them; gradients flow back into those.

    `called`: far keys that tell of their gradients early, as those of other ranks do.
    """
    zero_keys = zero_keys and not choice.pattern.refusal(False, "zero_key")
    choice = replace(choice, start=0, causal=False) if zero_keys else choice
    pattern, start, stop = choice.pattern, choice.start, choice.start + choice.tokens
    padding, total = ("zero_key", stop) if zero_keys else ("exact", None)
    options = {"causal": choice.causal, "padding": padding, **turning(choice)}
    edges = [start]
    for size in split(choice.tokens, [max(size, choice.tokens // 6) for size in sizes]):
        edges.append(edges[-1] + size)
    told: list[Watcher] = []

    def in_shards(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **options) -> Tensor:
        outs = []
        for a, b in pairwise(edges):
            far: list[FarKeys] = []
            for span in far_spans(pattern, a, b, choice.causal, stop):
                for c, d in pairwise(edges):
                    part = FarSpan(span.level, max(span.start, c), min(span.stop, d))
                    if part.start < part.stop and span.stop > start:
                        rows = slice(c - start, d - start)
                        keys = far_keys(
                            k[:, rows], v[:, rows], pattern, part, start=c, num_heads=choice.heads
                        )
                        if called:
                            keys = replace(keys, k=keys.k.clone(), v=keys.v.clone())
                            told.append(Watcher(keys))
                            keys = replace(keys, source=told[-1])
                        far.append(keys)
            q_, k_, v_ = (x[:, a - start : b - start] for x in (q, k, v))
            outs.append(
                dilated_attention(q_, k_, v_, pattern, start=a, far=far, total=total, **options)
            )
        return torch.cat(outs, 1)

    inputs = choice.qkv()
    found = run(in_shards, inputs, pattern, **options)
    whole = run(dilated_attention, inputs, pattern, start=start, **options)
    assert_close(found, whole, 1e-12)
    for source in told:
        assert source.taken.keys() == source.flowed.keys() == {"k", "v"}
        assert all(torch.equal(source.taken[name], source.flowed[name]) for name in "kv")


class Watcher:
    """A source of far keys that keeps to its contract, and notes the gradients that it is told and that flow.

    The numbers come when they are waited for: before, they are NaN.
    """

    def __init__(self, keys: FarKeys) -> None:
        self.span = keys.span
        self.rows = keys.k.data, keys.v.data
        self.late = [rows.clone() for rows in self.rows]
        self.taken: dict[str, Tensor] = {}
        self.flowed: dict[str, Tensor] = {}
        for name, x in (("k", keys.k), ("v", keys.v)):
            x.data.fill_(torch.nan)
            x.register_hook(lambda d, name=name: self.flowed.__setitem__(name, d.clone()))

    def arrive(self) -> None:
        for rows, late in zip(self.rows, self.late, strict=True):
            rows.copy_(late)

    def take_gradients(self, span: FarSpan, dk: Tensor, dv: Tensor) -> None:
        assert span == self.span
        assert not self.taken
        assert not self.flowed
        self.taken = {"k": dk.clone(), "v": dv.clone()}


LONG = Choice(Pattern.dense(), 1, 300, 4, 8, 0, True, None, seed=0)


@given(choice=choices(causal=True), sizes=cuts(), keep=st.booleans())
@example(choice=LONG, sizes=[1, 20, 3, 100], keep=False)
@example(choice=replace(LONG, pattern=Pattern((8, 96), (1, 2), look_back=1)), sizes=[7], keep=False)
def test_any_shards_with_their_cache_equal_the_whole(choice, sizes, keep):
    """Rows of long segments come when they are needed."""
    pattern, options, (q, k, v, _) = choice.pattern, turning(choice), choice.qkv()
    lanes, parts, seen = Lanes(pattern, choice.heads, choice.kv_heads), [], []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("longnet_cli.attention.cache.FIRST_ROWS", 16)
        cache = cache_of(choice, keep=choice.tokens if keep else 0)
        for part in zip(*(x.split(split(choice.tokens, sizes), 1) for x in (q, k, v)), strict=True):
            start = cache.position
            seen.append((part, start, cache.far()))
            far = cache.append(*part[1:])  # of a single token, with its own row
            parts.append(dilated_attention(*part, pattern, start=start, far=far, **options))
        rows = cached_rows(lanes, 2 * choice.tokens)
    assert_close([torch.cat(parts, 1)], [dilated_attention(q, k, v, pattern, **options)], 1e-12)
    assert cache.nbytes <= 2 * choice.batch * choice.head_dim * q.itemsize * rows
    # the far keys given out on the way are still what they were
    again = [dilated_attention(*p, pattern, start=at, far=far, **options) for p, at, far in seen]
    assert_close([torch.cat(again, 1)], [torch.cat(parts, 1)], 1e-12)


@given(choice=choices())
def test_flops_are_those_of_the_pairs_that_meet(choice):
    """Those of a causal square count half: the pairs that meet, less half of those of a row and itself."""
    pattern = choice.pattern
    counts = key_counts(pattern, choice.heads, choice.tokens, choice.causal, 0, "exact")[0]
    pairs = counts.sum() - (counts.diagonal(0, 1, 2).sum() / 2 if choice.causal else 0)
    found = attention_flops(pattern, choice.heads, 8, choice.tokens, choice.causal)
    assert found == 4 * 8 * pairs


@pytest.mark.parametrize("head_offsets", ["modulo", "grouped"])
def test_a_cache_holds_what_the_heads_of_a_grouped_model_share_once(head_offsets):
    """12 query heads on 3 key heads: a quarter of the finest level and of the sinks."""
    pattern = Pattern((64, 256), (1, 4), head_offsets, look_back=1, overlap="once", sinks=4)
    # key head 1 has query heads 4 to 7, of offsets 0 to 3, or 1 and 2
    shared = {"modulo": 12, "grouped": 6}[head_offsets]
    for kv_heads, lanes in ((12, 12), (3, shared)):
        cache = KVCache(pattern, 1, 12, 8, kv_heads=kv_heads)
        cache.append(*torch.zeros(2, 1, 600, kv_heads, 8))
        assert cache.nbytes == 2 * 8 * 4 * (128 * kv_heads + 128 * lanes + 4 * kv_heads)


def test_a_query_sees_what_the_table_says():
    """The far row of the evidence: a window of 1,024 and 4,096 further tokens at rate 4, scaled to a 64th."""
    pattern = Pattern((16, 16), (1, 4), look_back=(1, 5), overlap="once", queries="all", sinks=2)
    counts = key_counts(pattern, 4, 256, True, 0, "exact")[0]
    for head in range(4):
        near, far, sinks = range(112, 135), range(48 + head, 112, 4), range(2)
        assert counts[head, 134].nonzero().flatten().tolist() == sorted([*sinks, *far, *near])
    assert pattern.keys_per_query == 16 * 3 + 16 * 8 / 4 + 2
    assert pattern.cache_rows == 32 + 6 * 4 + 2


@pytest.mark.parametrize(
    ("pattern", "causal"),
    [
        (Pattern.window(16, look_back=2, sinks=3), True),
        (
            parse_pattern(
                "geometric:64,base=4,ratio=4,look_back=1,overlap=once,queries=all,sinks=3"
            ),
            True,
        ),
        (parse_pattern("geometric:64,base=4,ratio=4,look_back=1,overlap=once,queries=all"), False),
        (Pattern((8, 32), (1, 4), look_back=(1, 2), overlap="once", queries="all", sinks=3), True),
        (Pattern((8, 32), (1, 4), look_back=(1, 2), queries="all", sinks=3), False),
        (Pattern((8, 32), (1, 2), look_back=(2, 1)), True),
    ],
)
def test_keys_per_query_are_those_in_the_middle(pattern, causal):
    """Counted over a segment of the widest level, far from both ends; causal, half of them and all sinks."""
    w = max(pattern.segment_lengths)
    middle = slice(3 * w, 4 * w)
    counts = key_counts(pattern, max(pattern.dilation_rates), 6 * w, causal, 0, "exact")[0].double()
    mean = counts[:, middle].sum(-1).mean().item()
    # half a row: itself
    own = counts.diagonal(0, 1, 2)[:, middle].mean().item() / 2 if causal else 0
    expected = (pattern.keys_per_query - pattern.sinks) / (2 if causal else 1) + pattern.sinks
    assert mean - own == pytest.approx(expected)


# what no text of a pattern can say; the others are in test_notation.py
WRONG: dict[Pattern, list[tuple[dict, str]]] = {
    Pattern((8, 16), (1, 2)): [
        ({"dilation_rates": (1,)}, "one entry per level"),
        ({"segment_lengths": (), "dilation_rates": ()}, "one entry per level"),
        ({"segment_lengths": (0, 16)}, "at least 1"),
        ({"dilation_rates": (0, 1)}, "at least 1"),
        ({"segment_lengths": (2.5, 16)}, r"segment_lengths needs whole numbers, got \(2.5, 16\)"),
        ({"dilation_rates": "12"}, "dilation_rates needs whole numbers, got '12'"),
        ({"segment_lengths": 8}, "segment_lengths needs whole numbers, got 8"),
        ({"look_back": -1}, "look_back needs one number from 0, or 2, one per level"),
        ({"look_back": 0.5}, "look_back needs whole numbers, got 0.5"),
        ({"sinks": "4"}, "sinks needs whole numbers"),
    ],
    CHOSEN: [
        ({"chosen": -1}, "chosen must be 0 or more blocks, got -1"),
        ({"chosen": 1.5}, "chosen needs whole numbers, got"),
        ({"chosen_block": 0}, "chosen_block must divide the segment length 16, got 0"),
        ({"chosen_every": 0}, "chosen_every must divide chosen_block, 8, got 0"),
    ],
}


@pytest.mark.parametrize(
    ("pattern", "options", "message"), [(x, *row) for x, rows in WRONG.items() for row in rows]
)
def test_wrong_options_say_what_is_wrong(pattern, options, message):
    with pytest.raises(ValueError, match=message) as error:
        replace(pattern, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "call", "message"),
    [
        (
            Pattern((8, 16), (1, 2), queries="all"),
            {},
            'queries="all" needs overlap="once" in causal attention',
        ),
        *(
            (
                Pattern((8,), (1,), **{name: value}),
                {"causal": False, "padding": "zero_key"},
                'padding="zero_key" goes',
            )
            for name, value in {
                "look_back": 1,
                "overlap": "once",
                "queries": "all",
                "sinks": 1,
            }.items()
        ),
        (
            Pattern.window(4, sinks=2),
            {"start": 9},
            r"the sinks \[0, 2\) lie before the shard that starts at 9",
        ),
        (
            Pattern.window(4, sinks=2),
            {"start": 9, "turn": turn},
            r"the sinks \[0, 2\) lie before the shard",
        ),
        (
            Pattern.window(4, sinks=2),
            {"start": 9, "far": [(SINKS, 0, 3)]},
            "are not among the 2 sinks before 9",
        ),
        (Pattern.window(4), {"start": 9, "far": [(SINKS, 0, 1)]}, "are not among the 0 sinks"),
        (CHOSEN, {"causal": False}, "chosen=4 is for causal attention"),
        (Pattern.window(4), {"heads": 3}, "the heads of k and v may be a divisor"),
        (Pattern.window(4), {"start": 4, "far": [(0, 0, 4)], "rows": 3}, r"need \(1, 4, 2, 4\)"),
    ],
)
def test_wrong_calls_say_what_is_wrong(pattern, call, message):
    options = dict(call)
    rows, heads = options.pop("rows", 9), options.pop("heads", 2)
    far = [FarKeys(*span, *torch.zeros(2, 1, rows, heads, 4)) for span in options.pop("far", [])]
    q, k = torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, heads, 4)
    with pytest.raises(ValueError, match=message):
        dilated_attention(q, k, k, pattern, far=far, **options)
