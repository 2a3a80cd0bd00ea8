"""Kernels: each one that runs here equals plain math; selection, forcing and probing. On a GPU: tests/test_gpu.py.

What attention takes on a GPU, tried on a CPU: operators and memory of chosen blocks with a GPU's limits, which give
the same bits as a CPU's; and the memory of a backward pass.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from builders import tiny_net
from strategies import PAPER_64TH
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longnet_cli.attention import (
    Pattern,
    chosen,
    cuda_kernels,
    dilated_attention,
    kernels,
)
from longnet_cli.attention.chosen import Chosen, add_blocks, chosen_calls, groups_of
from longnet_cli.attention.cuda_kernels import CudaFlashKernel
from longnet_cli.attention.kernels import KERNELS
from longnet_cli.attention.planning import Shard, merged_backward, plan_calls
from longnet_cli.nets.positions import sink_turn

CPU, MATH = torch.device("cpu"), kernels.KERNELS["math"]


@pytest.fixture(autouse=True)
def _fresh_selection():
    """Selections are remembered for the life of a process; not from one test to the next."""
    kernels._select.cache_clear()
    yield
    kernels._select.cache_clear()


def strided(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(batch, heads, rows, head_dim) with rows three tokens apart in a (batch, tokens, heads, head_dim) tensor."""
    batch, heads, rows, head_dim = shape
    x = torch.randn(batch, rows * 3, heads, head_dim, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)[:, ::3].transpose(1, 2)


def test_cpu_flash_copies_many_rows_that_lie_far_apart():
    """More than a page apart, and as many queries as are worth it: the result is the same."""
    flash = kernels.KERNELS["cpu_flash"]
    q, k, v, dout = (strided(1, 8, 520, 64, dtype=torch.float32, seed=s) for s in range(4))
    near = k[:, :2].transpose(1, 2).contiguous().transpose(1, 2)
    assert flash._side_by_side(k).is_contiguous()
    assert flash._side_by_side(near) is near
    out, lse = flash.forward(q, k, v, True, 0.1)
    expected = MATH.forward(*(x.double() for x in (q, k, v)), True, 0.1)
    grads = flash.backward((dout, q, k, v, out, lse), True, 0.1)
    of_expected = MATH.backward((*(x.double() for x in (dout, q, k, v)), *expected), True, 0.1)
    for a, b in zip((out, lse, *grads), (*expected, *of_expected), strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_the_cpu_gets_flash_and_the_environment_decides(monkeypatch):
    monkeypatch.delenv("LONGNET_KERNEL", raising=False)
    assert kernels.select_kernel(CPU, torch.float32, 64).name == "cpu_flash"
    monkeypatch.setenv("LONGNET_KERNEL", "math")
    assert kernels.select_kernel(CPU, torch.float32, 64).name == "math"
    assert kernels.select_kernel(CPU, torch.float32, 64, "cpu_flash").name == "cpu_flash"
    monkeypatch.setenv("LONGNET_KERNEL", "quick")
    with pytest.raises(
        ValueError, match="choose from flash_attn, cuda_flash, cuda_efficient, cpu_flash, math"
    ):
        kernels.select_kernel(CPU, torch.float32, 64)


def off_by_a_tenth(kernel, *arguments):
    return tuple(1.1 * x for x in type(kernel).backward(kernel, *arguments))


def own_lse(kernel, tensors, *options):
    """The gradients of a call whose out and lse are its own, not those that are merged with others'."""
    own = type(kernel).forward(kernel, *tensors[1:4], *options)
    return type(kernel).backward(kernel, (*tensors[:4], *own), *options)


def whole_tiles(kernel, tensors, *options):
    dq, dk, dv = type(kernel).backward(kernel, tensors, *options)
    dq[:, :, dq.shape[2] // 64 * 64 :] = 0
    return dq, dk, dv


def head_by_head(kernel, tensors, *options):
    dq, dk, dv = type(kernel).backward(kernel, tensors, *options)
    return dq, dk if tensors[2].stride(1) else dk / 2, dv


def fails(kernel, *_):
    """As those whose first line is an assertion about the device, and gives no reason."""
    raise AssertionError


@pytest.mark.parametrize(
    ("call", "wrong", "said"),
    [
        ("backward", off_by_a_tenth, "its dq is off"),
        ("backward", own_lse, "its dq is off"),
        ("backward", whole_tiles, "its dq is off"),
        ("backward", head_by_head, "its dk is off"),
        ("forward", fails, "AssertionError: no reason given"),
    ],
)
def test_a_kernel_that_is_wrong_or_fails_is_passed_over(monkeypatch, call, wrong, said):
    """What only real calls have is tried: a merged lse, rows that fill no tile, heads that share a key head."""
    monkeypatch.delenv("LONGNET_KERNEL", raising=False)
    flash = kernels.KERNELS["cpu_flash"]
    monkeypatch.setattr(flash, call, partial(wrong, flash))
    with pytest.warns(UserWarning, match=f"'cpu_flash' is not used: {said}"):
        assert kernels.select_kernel(CPU, torch.float32, 16).name == "math"
    with pytest.raises(ValueError, match=f"cannot run here: {said}"):
        kernels.select_kernel(CPU, torch.float32, 16, "cpu_flash")


def test_a_kernel_is_probed_again_for_algorithms_that_are_always_equal(
    monkeypatch,
):
    monkeypatch.delenv("LONGNET_KERNEL", raising=False)
    flash = kernels.KERNELS["cpu_flash"]
    backward = flash.backward

    def refusing(*arguments):
        assert not torch.are_deterministic_algorithms_enabled(), "no such algorithm"
        return backward(*arguments)

    monkeypatch.setattr(flash, "backward", refusing)
    assert kernels.select_kernel(CPU, torch.float32, 16).name == "cpu_flash"
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.warns(
            UserWarning, match="'cpu_flash' is not used: AssertionError: no such algorithm"
        ):
            assert kernels.select_kernel(CPU, torch.float32, 16).name == "math"
    finally:
        torch.use_deterministic_algorithms(False)


def test_probing_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    kernels.select_kernel(CPU, torch.float32, 24)
    assert torch.equal(state, torch.get_rng_state())


class Largest(TorchDispatchMode):
    """The most numbers that an operator returns in a tensor."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numbers = max(
            self.numbers, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)), 0
        )
        return result


@pytest.mark.parametrize("causal", [True, False])
def test_plain_math_takes_long_rows_in_blocks_of_keys(causal, monkeypatch):
    q, k, v, dout = (strided(1, 2, 300, 8, dtype=torch.float64, seed=s) for s in range(4))
    results, largest = [], []
    for most in (1 << 26, 1 << 14):  # scores; with the second, blocks of 27 keys
        monkeypatch.setattr(type(MATH), "_MAX_SCORES", most)
        with Largest() as seen:
            out, lse = MATH.forward(q, k, v, causal, 0.3)
            results.append(
                (out, lse, *MATH.backward((dout, q, k, v, 0.5 * out, lse + 0.7), causal, 0.3))
            )
        largest.append(seen.numbers)
    for whole, in_blocks in zip(*results, strict=True):
        assert (whole - in_blocks).norm() <= 1e-13 * whole.norm()
    assert largest == [2 * 300 * 300, 2 * 300 * 27]


def test_cuda_limits():
    cuda = kernels.KERNELS["cuda_flash"]
    assert cuda.max_batch(12, 1, 64) <= 65_535
    assert cuda.max_batch(12, 2048, 64) * 12 * 2048 * 64 < 2**31
    assert cuda.max_batch(1, 1 << 30, 64) == 1


def test_efficient_attention_serves_what_flash_does_not(card):
    cuda, efficient, flash = (
        card(8),
        kernels.KERNELS["cuda_efficient"],
        kernels.KERNELS["cuda_flash"],
    )
    for dtype, head_dim in ((torch.float32, 64), (torch.float32, 5)):
        assert flash.refusal(cuda, dtype, head_dim)
        assert efficient.refusal(cuda, dtype, head_dim) is None
    assert efficient.refusal(cuda, torch.bfloat16, 20) is None
    assert "no torch.float64" in efficient.refusal(cuda, torch.float64, 64)
    assert "compute capability 8.0 for bf16" in efficient.refusal(card(7), torch.bfloat16, 64)


def test_plain_math_on_a_gpu_is_said(monkeypatch):
    monkeypatch.delenv("LONGNET_KERNEL", raising=False)
    with pytest.warns(
        UserWarning, match="attention in torch.float64 on cuda falls back to plain math"
    ) as said:
        assert kernels.select_kernel(torch.device("cuda"), torch.float64, 64).name == "math"
    assert [str(warning.message).count("\n") for warning in said] == [0]
    # as was asked for: nothing to say
    kernels.select_kernel(torch.device("cuda"), torch.float64, 64, "math")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], torch.device]:
    """Make this machine say that it has a card, of a compute capability."""

    def of(major: int) -> torch.device:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, 0))
        return torch.device("cuda")

    return of


def test_a_broken_package_stops_no_other_kernel(monkeypatch, card):
    """As flash-attn's with another nvidia-cutlass-dsl, or of another torch: on a CPU nobody imports it."""
    imported = []

    def broken(name: str) -> None:
        imported.append(name)
        raise AttributeError("module 'cutlass' has no attribute 'Int32'\nin line 3")

    monkeypatch.setattr(cuda_kernels.importlib, "import_module", broken)
    monkeypatch.delenv("LONGNET_KERNEL", raising=False)
    assert kernels.select_kernel(CPU, torch.float32, 64).name == "cpu_flash"
    assert not imported
    why = kernels.KERNELS["flash_attn"].refusal(card(9), torch.bfloat16, 64)
    assert (
        why
        == "flash_attn cannot be imported: AttributeError: module 'cutlass' has no attribute 'Int32'"
    )
    assert imported == ["flash_attn.flash_attn_interface"]


def test_a_card_gets_flash_attn_if_it_is_there(monkeypatch, card):
    monkeypatch.delenv("LONGNET_KERNEL", raising=False)
    monkeypatch.setattr(kernels, "_failure", lambda *_: None)
    monkeypatch.setattr(cuda_kernels.FlashAttnKernel, "functions", lambda _: (print, print))
    assert kernels.select_kernel(card(8), torch.bfloat16, 64).name == "flash_attn"


# what starts nothing on a GPU
VIEWS = {
    *("view", "_unsafe_view", "slice", "select", "unsqueeze", "squeeze", "expand", "as_strided"),
    *("transpose", "t", "permute", "unbind", "split", "split_with_sizes", "alias", "detach"),
    *("unfold", "view_as_complex", "view_as_real", "empty", "empty_like", "new_empty"),
    *("scalar_tensor", "lift_fresh"),
}
WAITS = {  # for a GPU
    *("tolist", "item", "nonzero", "unique", "masked_select", "__bool__", "__int__", "__index__"),
}


class Launches(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


class Waits(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in WAITS:
            self.by_name[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class FlashOfAGpu(CudaFlashKernel):
    """As many groups at a time as a GPU's kernel takes, and no result."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), q.new_empty(q.shape[:3])


def rope_of(heads: int, head_dim: int) -> Any:
    return sink_turn(tiny_net(position="rope", num_heads=heads, dim=heads * head_dim).config)


def blocks_of(pattern: Pattern, tokens: int) -> Chosen:
    """All groups see the first blocks, as many as they may."""
    groups = groups_of(pattern, 0, 0, tokens)
    seen = [(x, range(min(pattern.chosen, x.near // pattern.chosen_block))) for x in groups]
    return Chosen(chosen_calls(pattern, 0, seen, torch.device("cpu")))


def test_a_layer_starts_few_operators(monkeypatch):
    """For 65,536 tokens of 12 heads x 64 in bf16, tried with a quarter of them, of one head x 8 in fp32.

    The limit is so much less, too.
    """
    limit = chosen.GATHERED["cuda"] * 2 // (4 * 96)
    monkeypatch.setattr(chosen, "GATHERED", {"cpu": limit})
    pattern, tokens = Pattern.finding(), 16_384
    q, k = torch.randn(2, 1, tokens, 1, 8).unbind()
    blocks, rope = blocks_of(pattern, tokens), rope_of(1, 8)
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:3])
    with torch.no_grad(), Waits() as waits, Launches() as launches:
        add_blocks(FlashOfAGpu(), 0.5, blocks, 32, rope, q, k, k, out, lse)
    assert 0 < launches.number <= 1700
    assert not waits.by_name.total()


class Live(TorchDispatchMode):
    """The most bytes at a time of tensors that did not exist before."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, Tensor) and not x.is_meta else None
            if storage is not None and storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def test_what_chosen_blocks_take_for_a_time(monkeypatch):
    """Keys and values of a call, the keys turned in fp32, and their product."""
    limit = 4 << 20
    monkeypatch.setattr(chosen, "GATHERED", {"cpu": limit})
    pattern, tokens, heads = Pattern.finding(), 4096, (2, 64)
    q, k = torch.randn(2, 1, tokens, *heads).bfloat16().unbind()
    blocks, rope = blocks_of(pattern, tokens), rope_of(*heads)
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:3])
    known = [out, lse, *(x for call in blocks.calls for x in call[1:])]
    with torch.no_grad(), Live(q, k, *known) as live:
        add_blocks(FlashOfAGpu(), 0.125, blocks, 32, rope, q, k, k, out, lse)
    assert limit < live.peak <= 6 * limit


def test_memory_of_a_forward_and_a_backward():
    """In times the bytes of q, beside inputs and dout: the 4 of the result and of gradients cannot be less."""
    q, k, v, dout = torch.randn(4, 1, 4096, 4, 64).unbind()
    tensors = [x.requires_grad_() for x in (q, k, v)]
    with Live(q, dout) as live:
        dilated_attention(*tensors, PAPER_64TH).backward(dout)
    assert live.peak <= 7.5 * q.nbytes


@pytest.mark.full
@pytest.mark.parametrize("tokens", [1 << 15, 1 << 17])
def test_memory_of_a_backward(tokens):
    """In times the bytes of q, beside the five of saved tensors and dout: the 3 of gradients cannot be less.

    On fake tensors: torch knows what its CUDA operators return. They allocate more inside.
    """
    with FakeTensorMode():
        q, k, v, out, dout = (
            torch.empty(1, tokens, 12, 64, dtype=torch.bfloat16) for _ in range(5)
        )
        lse = torch.empty(1, tokens, 12)
        plan = plan_calls(KERNELS["cuda_flash"], q, k, v, Pattern.paper(), Shard())
        with Live(q, k, v, out, dout, lse) as live:
            grads = merged_backward(plan, 0.125, (dout, q, k, v, out, lse), [])
            grads = [d.to(q.dtype) for d in grads]
    assert live.peak <= 12 * q.nbytes
