"""Many documents take few kernel calls, and each gets what it gets alone: as a union of levels, and packed."""

from __future__ import annotations

import random
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    PAPER_64TH,
    Choice,
    PackedMath,
    Problem,
    assert_close,
    choices,
    cuts,
    problems,
    run,
    split,
    turning,
)  # fmt: skip
from torch import Tensor

from longnet_cli.attention import FarKeys, FarSpan, Pattern, dilated_attention, far_keys, planning
from longnet_cli.attention.kernels import KERNELS, _select
from longnet_cli.attention.planning import Shard, plan_calls
from longnet_cli.attention.reference import dilated_attention_reference


class Unpacked(PackedMath):
    """A kernel whose packed calls fail, as those of a build without them."""

    name, wrong = "unpacked", "forward_packed"

    def forward_packed(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.wrong == "forward_packed":
            raise RuntimeError("no kernel image\nfor this device")
        return super().forward_packed(*args, **kwargs)

    def backward_packed(self, tensors, *args) -> tuple[Tensor, Tensor, Tensor]:
        if self.wrong == "own lse":  # rather than the merged one
            tensors = (*tensors[:4], *self.forward_packed(*tensors[1:4], *args))
        dq, dk, dv = super().backward_packed(tensors, *args)
        return dq, 1.1 * dk if self.wrong == "backward_packed" else dk, dv


@pytest.fixture(scope="module", autouse=True)
def packed_math():
    KERNELS["packed"] = PackedMath()
    yield
    del KERNELS["packed"]


def each_alone(documents: list[int]):
    def function(*qkv, **options) -> Tensor:
        *qkv, pattern = qkv
        parts = zip(*(x.split(documents, 1) for x in qkv), strict=True)
        return torch.cat([dilated_attention_reference(*part, pattern, **options) for part in parts], dim=1)

    return function


@given(problem=problems(lengths=False) | choices(), sizes=cuts())
def test_documents_equal_the_reference(problem: Problem, sizes: list[int]) -> None:
    """With every option of a pattern: look-back, sinks, shared key heads."""
    inputs = problem.qkv() if isinstance(problem, Choice) else problem.tensors(4)
    documents, options = split(problem.tokens, sizes), {"causal": problem.causal}
    if isinstance(problem, Choice):
        options |= turning(problem)
    expected = run(each_alone(documents), inputs, problem.pattern, **options)
    for kernel in ("packed", "cpu_flash"):
        found = run(dilated_attention, inputs, problem.pattern, documents=documents, kernel=kernel, **options)
        assert_close(found, expected, 1e-12)


@given(problem=problems(), zero_keys=st.booleans())
def test_padded_rows_equal_the_reference(problem: Problem, zero_keys: bool) -> None:
    options = {"causal": problem.causal, "lengths": problem.lengths, "padding": "zero_key" if zero_keys else "exact"}
    inputs = problem.tensors(4)
    expected = run(dilated_attention_reference, inputs, problem.pattern, **options)
    for kernel in ("packed", "cpu_flash"):
        assert_close(run(dilated_attention, inputs, problem.pattern, kernel=kernel, **options), expected, 1e-12)


def test_the_first_document_may_have_begun_before_the_shard() -> None:
    pattern, documents, before = PAPER_64TH, [150, 40, 90, 20], 100
    q, k, v, dout = Problem(pattern, 2, before + 300, 12, 4, 0, True, None, seed=5).tensors(4)
    spans = [FarSpan(level, before // w * w, before) for level, (w, _) in enumerate(pattern.levels) if before % w]

    def shard(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, kernel: str | None) -> Tensor:
        first, *rest = (x.split([before, 300], 1) for x in (q, k, v))
        far: list[FarKeys] = [far_keys(rest[0][0], rest[1][0], pattern, span) for span in spans]
        own = first[1], rest[0][1], rest[1][1]
        return dilated_attention(*own, pattern, start=before, far=far, documents=documents, kernel=kernel)

    inputs = [q, k, v, dout[:, before:]]
    found, alone = (run(shard, inputs, pattern, kernel=kernel) for kernel in ("packed", None))
    assert_close(found, alone, 1e-12)


@pytest.mark.parametrize("kernel", ["cuda_flash", "cuda_efficient"])
def test_calls_on_a_gpu_hardly_grow_with_the_number_of_documents(kernel: str) -> None:
    """The paper's pattern, a chunk of 16Ki tokens: 12 calls for one document, which copies nothing."""
    x = torch.empty(1, 16384, 12, 64, device="meta")
    draw = random.Random(0)
    for number, most in ((1, 12), (8, 24), (32, 24), (128, 24)):
        cut = [0, *sorted(draw.sample(range(1, 16384), number - 1)), 16384]
        assert calls(kernel, x, documents=[b - a for a, b in pairwise(cut)]) <= most
    rows = torch.empty(262, 700, 12, 64, device="meta")
    assert calls(kernel, rows, causal=False, lengths=[draw.randint(300, 700) for _ in range(262)]) <= 24


def calls(kernel: str, x: Tensor, causal: bool = True, lengths=None, documents=None) -> int:
    plan = plan_calls(KERNELS[kernel], x, x, x, Pattern.paper(), Shard(0, lengths, documents, causal=causal))
    return sum(len(found) for *_, found in plan.placed) + len(plan.packs)


def test_what_is_kept_for_packed_rows_goes_with_their_plan() -> None:
    """Calls share it, and it must not outlive them."""
    x = torch.empty(1, 90, 3, 8)
    plan = plan_calls(KERNELS["packed"], x, x, x, PAPER_64TH, Shard(documents=[30, 41, 19]))
    kept = weakref.ref(plan.packs[0].rows(x.device)[0].places)
    assert plan.packs[0].rows(x.device)[0].places is kept()
    del plan
    planning._plan.cache_clear()
    assert kept() is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("forward_packed", "RuntimeError: no kernel image"),
        ("backward_packed", "its dk is off by 1.0e-01 on cpu"),
        ("own lse", "its dq is off by"),
    ],
)
def test_a_kernel_whose_packed_calls_fail_does_not_pack(monkeypatch: pytest.MonkeyPatch, wrong: str, said: str) -> None:
    kernel = Unpacked()
    kernel.wrong = wrong
    monkeypatch.setitem(KERNELS, "unpacked", kernel)
    inputs, documents = Problem(PAPER_64TH, 1, 90, 6, 8, 0, True, None, seed=1).tensors(4), [30, 41, 19]
    _select.cache_clear()
    with pytest.warns(UserWarning, match=f"'unpacked' takes documents one by one: packed, {said}") as warned:
        found = run(dilated_attention, inputs, PAPER_64TH, documents=documents, kernel="unpacked")
    _select.cache_clear()
    assert len(warned) == 1
    assert kernel.packs  # elsewhere, or in another type, it may
    assert_close(found, run(each_alone(documents), inputs, PAPER_64TH), 1e-12)


def test_a_document_that_fits_the_first_segment_is_one_call_on_a_cpu() -> None:
    x = torch.empty(1, 2000, 6, 32)
    shard = Shard(documents=[300, 1024, 676])
    plan = plan_calls(KERNELS["cpu_flash"], x, x, x, Pattern((1024, 4096), (1, 4)), shard)
    assert [len(found) for *_, found in plan.placed] == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [100, 129, 512, 700, 1030])
def test_causal_squares_of_all_sizes(tokens: int, dtype: torch.dtype) -> None:
    """They go in steps of rows, or as one call; with several levels and without."""
    for pattern in (Pattern((2048,), (1,)), Pattern((1024, 2048), (1, 2))):
        inputs = Problem(pattern, 1, tokens, 2, 8, 0, True, None, seed=tokens).tensors(4, dtype)
        found = run(dilated_attention, inputs, pattern, kernel="cpu_flash")
        expected = run(dilated_attention_reference, [x.double() for x in inputs], pattern)
        assert_close(found, expected, {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype])
