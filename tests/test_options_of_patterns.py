"""The options of a pattern: look-back, each key once, all queries, sinks, biases, shared key heads.

Fast = dense reference, outputs and gradients; shards with their far keys, and chunks with their cache, = the whole.

pytest tests/test_options_of_patterns.py
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Choice, choices, cuts, split, turn
from torch import Tensor

from longnet_cli.attention import SINKS, FarKeys, KVCache, Pattern, Span, dilated_attention, far_keys
from longnet_cli.attention.pattern import attention_flops, cached_rows, far_spans, lanes
from longnet_cli.attention.reference import _key_counts, dilated_attention_reference


def run(function, inputs: list[Tensor], pattern: Pattern, **options) -> list[Tensor]:
    """out, dq, dk, dv of sum(out * dout); inputs are q, k, v, dout."""
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs[:3])
    out = function(q, k, v, pattern, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3], materialize_grads=True)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Relative in the norm of each tensor, with a floor of a tenth of the largest, for gradients that cancel."""
    floor = max(x.double().norm().item() for x in expected) * 0.1
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        error = (a.double() - b.double()).norm().item() / max(b.double().norm().item(), floor, 1e-30)
        assert error <= tolerance, f"{name} is off by {error:.2e}"


def turning(choice: Choice) -> dict:
    return {"turn": turn} if choice.rotary else {}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@given(choice=choices())
def test_every_choice_equals_the_reference(choice: Choice, dtype: torch.dtype, tolerance: float) -> None:
    inputs, options = choice.qkv(dtype), choice.options | turning(choice)
    found = run(dilated_attention, inputs, choice.pattern, **options)
    expected = run(dilated_attention_reference, [x.double() for x in inputs], choice.pattern, **options)
    assert_close(found, expected, tolerance)


@given(choice=choices(), sizes=cuts(), called=st.booleans())
def test_shards_with_their_far_keys_equal_the_whole(choice: Choice, sizes: list[int], called: bool) -> None:
    """Each shard gets what `far_spans` says, in parts, one per shard that made them; gradients flow back into those.

    `called`: far keys that tell of their gradients early, as those of other ranks do.
    """
    pattern, start, stop = choice.pattern, choice.start, choice.start + choice.tokens
    edges = [start]
    for size in split(choice.tokens, [max(size, choice.tokens // 6) for size in sizes]):
        edges.append(edges[-1] + size)
    told: list[dict[str, Tensor]] = []

    def in_shards(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **options) -> Tensor:
        outs = []
        for a, b in pairwise(edges):
            far: list[FarKeys] = []
            for span in far_spans(pattern, a, b, choice.causal, stop):
                for c, d in pairwise(edges):
                    part = Span(span.level, max(span.start, c), min(span.stop, d))
                    if part.start < part.stop and span.stop > start:
                        rows = slice(c - start, d - start)
                        keys = far_keys(k[:, rows], v[:, rows], pattern, part, start=c, num_heads=choice.heads)
                        far.append(watched(keys, told) if called else keys)
            q_, k_, v_ = (x[:, a - start : b - start] for x in (q, k, v))
            outs.append(dilated_attention(q_, k_, v_, pattern, causal=choice.causal, start=a, far=far, **options))
        return torch.cat(outs, 1)

    inputs = choice.qkv()
    found = run(in_shards, inputs, pattern, **turning(choice))
    whole = run(dilated_attention, inputs, pattern, causal=choice.causal, start=start, **turning(choice))
    assert_close(found, whole, 1e-12)
    for found in told:
        assert torch.equal(found["back k"], found["k"])
        assert torch.equal(found["back v"], found["v"])


def watched(keys: FarKeys, told: list[dict[str, Tensor]]) -> FarKeys:
    """Notes that what `back` is told is what flows into k and v."""
    notes: dict[str, Tensor] = {}
    told.append(notes)
    for name, x in (("k", keys.k), ("v", keys.v)):
        x.register_hook(lambda d, name=name: notes.__setitem__(name, d.clone()))

    def back(dk: Tensor, dv: Tensor) -> None:
        assert not notes
        notes.update({"back k": dk.clone(), "back v": dv.clone()})

    return replace(keys, back=back)


@given(choice=choices(causal=True), sizes=cuts(), keep=st.booleans())
def test_any_shards_with_their_cache_equal_the_whole(choice: Choice, sizes: list[int], keep: bool) -> None:
    pattern, (q, k, v, _) = choice.pattern, choice.qkv()
    whole = dilated_attention(q, k, v, pattern, **turning(choice))
    cache = KVCache(
        pattern, choice.batch, choice.heads, choice.head_dim, kv_heads=choice.kv_heads, dtype=q.dtype, keep=keep
    )
    size = cache.nbytes
    parts, seen = [], []
    for part in zip(*(x.split(split(choice.tokens, sizes), 1) for x in (q, k, v)), strict=True):
        seen.append((part, cache.position, cache.far()))
        parts.append(dilated_attention(*part, pattern, start=cache.position, far=cache.far(), **turning(choice)))
        cache.append(*part[1:])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    rows = cached_rows(pattern, choice.heads, choice.kv_heads)
    assert cache.nbytes == size == 2 * choice.batch * choice.head_dim * q.itemsize * rows
    if keep:  # the far keys given out on the way are still what they were
        again = [dilated_attention(*p, pattern, start=at, far=far, **turning(choice)) for p, at, far in seen]
        assert all(map(torch.equal, again, parts))


@given(choice=choices(), sizes=cuts())
def test_documents_in_a_row_equal_each_alone(choice: Choice, sizes: list[int]) -> None:
    """Each has its own sinks."""
    documents = split(choice.tokens, sizes)
    options = {"causal": choice.causal} | turning(choice)
    choice = replace(choice, start=0, rotary=False)

    def each_alone(*qkv: Tensor, **options) -> Tensor:
        *qkv, pattern = qkv
        parts = zip(*(x.split(documents, 1) for x in qkv), strict=True)
        return torch.cat([dilated_attention(*part, pattern, **options) for part in parts], dim=1)

    found = run(dilated_attention, choice.qkv(), choice.pattern, documents=documents, **options)
    assert_close(found, run(each_alone, choice.qkv(), choice.pattern, **options), 1e-12)


@given(choice=choices())
def test_flops_are_those_of_the_pairs_that_meet(choice: Choice) -> None:
    """Those of a causal square count half: the pairs that meet, less half of those of a row and itself."""
    pattern = replace(choice.pattern, level_bias=None)
    counts = _key_counts(pattern, choice.heads, choice.tokens, choice.causal, 0, "exact")[0]
    pairs = counts.sum() - (counts.diagonal(0, 1, 2).sum() / 2 if choice.causal else 0)
    found = attention_flops(pattern, choice.heads, 8, choice.tokens, choice.causal, 2, choice.kv_heads)
    assert found == 2 * 4 * 8 * pairs
