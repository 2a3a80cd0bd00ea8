"""The Triton kernels in Triton's interpreter: one pass = operators of torch = dense reference, outputs and gradients.

Triton decides when it is imported whether it interprets: TRITON_INTERPRET=1 pytest tests/interpreted.py, which
test_one_pass.py does in a process of its own.
"""

from __future__ import annotations

import random
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
import triton.runtime.interpreter
from strategies import PackedMath, assert_close, pattern_with_options, run, turn
from torch import Tensor

from longnet_cli.attention import SINKS, FarSpan, Pattern, dilated_attention, far_keys, merging, one_pass
from longnet_cli.attention.branches import Branch
from longnet_cli.attention.kernels import KERNELS
from longnet_cli.attention.merging import strided_view
from longnet_cli.attention.packing import Pack, PackedRows, Sequences
from longnet_cli.attention.reference import dilated_attention_reference
from longnet_cli.attention.spans import Rows, far_spans

PAPER = Pattern((8, 16, 32, 64), (1, 2, 3, 6))  # r = 3 and 6 divide no w, as in the paper
WINDOW = Pattern.window(12, sinks=3)
NESTED = Pattern((8, 16, 32), (1, 2, 4), look_back=1, overlap="once", queries="all", sinks=2)
ALL = Pattern((8, 24), (1, 4), look_back=(1, 2), overlap="once", queries="all", sinks=3)
LOOK_BOTH = Pattern((4, 16), (1, 3), "grouped", look_back=(2, 1))
SPARSE = Pattern((16, 12), (3, 5))  # no query of most heads and tokens takes part

CASES = {
    "paper": (PAPER, {}),
    "paper, a start within segments": (PAPER, {"start": 21}),
    "paper, grouped heads": (Pattern(PAPER.segment_lengths, PAPER.dilation_rates, "grouped"), {"heads": 4}),
    "zero keys": (PAPER, {"causal": False, "padding": "zero_key"}),
    "ragged": (PAPER, {"batch": 3, "lengths": (45, 0, 33), "heads": 2}),
    "documents": (NESTED, {"documents": (5, 25, 1, 14), "heads": 2}),
    "nested, sinks, shared key heads": (NESTED, {"heads": 4, "kv_heads": 2, "turn": turn}),
    "all queries, biases": (ALL, {"kv_heads": 1}),
    "both ways": (LOOK_BOTH, {"causal": False, "heads": 4, "kv_heads": 2}),
    "uncovered queries": (SPARSE, {}),
    "window and sinks, head_dim that is no power of 2": (WINDOW, {"turn": turn, "head_dim": 20}),
}


SLOW = {"paper", "paper, a start within segments", "zero keys"}  # which others have in them
NOTHING, NO_EDGES = Sequences([], [], []), torch.empty(0)
IN_BF16 = {"paper", "all queries, biases"}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pass, "_TILE", 256)  # so that there are several: the interpreter is slow


@pytest.fixture(autouse=True, scope="session")
def _patched_once() -> None:
    """The interpreter puts itself into triton.language for every call of a function, for a third of a millisecond.

    It may stay there: whatever runs in this process is interpreted.
    """
    patch = getattr(triton.runtime.interpreter, "_patch_lang", None)
    if patch:
        once = lru_cache(lambda names: patch(SimpleNamespace(__globals__=dict(names))))

        def patched(fn):
            once(tuple((name, value) for name, value in fn.__globals__.items() if type(value) is type(triton)))
            return SimpleNamespace(restore=lambda: None)

        triton.runtime.interpreter._patch_lang = patched


def tensors(dtype: torch.dtype, batch=1, tokens=45, heads=3, kv_heads=0, head_dim=8) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    numbers = heads, kv_heads or heads, kv_heads or heads, heads
    return [torch.randn(batch, tokens, n, head_dim, generator=draw).to(dtype) for n in numbers]


def by_torch(monkeypatch: pytest.MonkeyPatch, *call, **options) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET")
        return run(dilated_attention, *call, **options)


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES])
def test_equals_torch_and_the_reference(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    pattern, options = CASES[case]
    shape = {name: options[name] for name in ("batch", "heads", "kv_heads", "head_dim") if name in options}
    options = {name: value for name, value in options.items() if name not in shape}
    documents = options.get("documents")
    inputs = tensors(torch.float32, **shape)
    assert merging._fused(inputs[0]) is one_pass
    with monkeypatch.context() as patch:
        patch.setattr(one_pass, "_PENDING", 0)  # several launches for a sum
        found = run(dilated_attention, inputs, pattern, **options)
    assert_close(found, by_torch(monkeypatch, inputs, pattern, **options), 1e-6)
    if not documents:
        assert_close(found, run(dilated_attention_reference, [x.double() for x in inputs], pattern, **options), 1e-6)
    if case not in IN_BF16:
        return
    narrow = tensors(torch.bfloat16, **shape)
    found = run(dilated_attention, narrow, pattern, **options)
    assert {x.dtype for x in found} == {torch.bfloat16}
    assert_close(found, by_torch(monkeypatch, [x.double() for x in narrow], pattern, **options), 1e-2)


@pytest.mark.parametrize(("dtype", "early"), [(torch.float32, True), (torch.bfloat16, False)])
def test_far_keys(dtype: torch.dtype, early: bool) -> None:
    """The second half of a sequence, given what it sees of the first; `early` tells of far gradients first."""
    pattern, half, tolerance = NESTED, 24, {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    told: list[Tensor] = []

    def in_halves(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        far = [far_keys(k[:, :half], v[:, :half], pattern, span) for span in far_spans(pattern, half, q.shape[1], True)]
        if early:
            far = [type(keys)(*keys.span, keys.k, keys.v, back=lambda *d: told.extend(d)) for keys in far]
        first = dilated_attention(*(x[:, :half] for x in (q, k, v)), pattern)
        return torch.cat([first, dilated_attention(*(x[:, half:] for x in (q, k, v)), pattern, start=half, far=far)], 1)

    inputs = tensors(dtype)
    found = run(in_halves, inputs, pattern)
    assert_close(found, run(dilated_attention_reference, [x.double() for x in inputs], pattern), tolerance)
    assert FarSpan(SINKS, 0, 2) in far_spans(pattern, half, 45, True)
    assert all(d.dtype == torch.float32 for d in told)
    assert bool(told) == early


def test_any_options(monkeypatch: pytest.MonkeyPatch) -> None:
    pick = random.Random(1)
    causal = pick.random() < 0.6
    pattern, kv_heads = pattern_with_options(pick, causal), pick.randint(1, 3)
    inputs = tensors(torch.float32, heads=kv_heads * pick.randint(1, 2), kv_heads=kv_heads)
    options = {"causal": causal, "kernel": pick.choice(["math", "cpu_flash"])}
    found = run(dilated_attention, inputs, pattern, **options)
    assert_close(found, by_torch(monkeypatch, inputs, pattern, **options), 1e-6)


def test_packed_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a few calls of gathered rows; key heads that are shared come more than once."""
    monkeypatch.setitem(KERNELS, "packed", PackedMath())
    for pattern, kv_heads in ((PAPER, 3), (NESTED, 1)):
        inputs, options = tensors(torch.float32, kv_heads=kv_heads), {"documents": (5, 17, 1, 22), "kernel": "packed"}
        found = run(dilated_attention, inputs, pattern, **options)
        assert_close(found, by_torch(monkeypatch, inputs, pattern, **options), 1e-6)


def test_gathered_rows() -> None:
    """Of many documents, beside the views of others; keys may come more than once."""
    draw = torch.Generator().manual_seed(0)
    q, part = torch.zeros(2, 30, 3, 8), torch.randn(70, 8, generator=draw)
    lse, view, view_lse = (torch.randn(n, generator=draw) for n in ((70,), (2, 3, 30, 8), (2, 3, 30)))
    places = torch.randperm(180, generator=draw)[:70]
    every = Rows(1, 30, 3, 0, 1, 30, 1, 0, 0)
    branch = Branch(every, every, False, first=True)
    for repeated in (False, True):
        if repeated:
            places = places % 50
        merge, total = one_pass.OnePassMerge(q, True), one_pass.OnePassGradientSum(q, 0, False)
        total.add(strided_view(total.place, every)[:, 0], view.clone(), every, True)
        total.add_rows(PackedRows(places, NO_EDGES, 0), part, repeated)
        expected = view.transpose(1, 2).reshape(-1, 8).index_add_(0, places, part)
        torch.testing.assert_close(total.result().view(-1, 8), expected)
        if not repeated:
            merge.add(branch, [strided_view(place, every)[:, 0] for place in merge.places], view, view_lse)
            merge.add_rows(Pack(NOTHING, NOTHING, False, 0), PackedRows(places, NO_EDGES, 0), part, lse)
            by_row = view_lse.transpose(1, 2).reshape(-1).clone()
            sums = by_row.index_copy(0, places, torch.logaddexp(by_row[places], lse))
            weight = torch.zeros(180).index_copy_(0, places, (lse - sums[places]).exp())
            parts = torch.zeros(180, 8).index_copy_(0, places, part)
            out, found = merge.result()
            torch.testing.assert_close(found.view(-1), sums)
            rows = view.transpose(1, 2).reshape(-1, 8)
            torch.testing.assert_close(out.view(-1, 8), torch.lerp(rows, parts, weight[:, None]))


def test_what_computes_wrongly_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pass, "inf", 0.0)  # every part has a zero key
    merging._select.cache_clear()
    with pytest.warns(
        UserWarning, match="merge by operators of torch, more slowly than in one pass: its out is off by"
    ):
        assert merging._fused(torch.zeros(1, 1, 1, 8)) is None
    merging._select.cache_clear()
