"""Inside torch.compile, checkpointing and autocast: equal to eager."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from pattern_nets import draw, error, gradients, net
from strategies import PAPER_64TH, turn
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from longnet_cli.attention import DilatedAttention, KVCache, Pattern, dilated_attention
from longnet_cli.jobs.training.objective import backward

pytestmark = pytest.mark.ci

COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
HEADS, SIZE = 4, 8
PATTERN = Pattern((8, 32, 64), (1, 4, 6))


@pytest.fixture(scope="module")
def compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(autouse=True)
def _fresh_compiler(compiler_cache: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch keeps compiled graphs on disk, our operator's backward in them: an old one would hide a new mistake."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", compiler_cache)
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):  # g++ takes long over vectors
        yield
    torch._dynamo.reset()


def tensors(count: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(2, tokens, HEADS, SIZE, generator=draw).to(dtype).requires_grad_()
        for _ in range(count)
    ]


def compare(
    function: Callable[..., Tensor],
    compiled: Callable[..., Tensor],
    inputs: list[Tensor],
    **options,
) -> None:
    """Outputs and the gradients of all inputs to 1e-6 of the largest number."""
    results = []
    for f in (function, compiled):
        for x in inputs:
            x.grad = None
        out = f(*inputs, **options)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max())


def plain(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return dilated_attention(q.sin(), k, v * 2, PATTERN, **options).cos()


@pytest.mark.parametrize(
    "options", [{}, {"documents": [20, 60]}, {"lengths": torch.tensor([17, 80])}, {"start": 40}]
)
@pytest.mark.parametrize(
    "pattern",
    [
        Pattern((8, 32), (1, 4), look_back=1, overlap="once", queries="all", sinks=3),
    ],
)
def test_compiled_equals_eager(pattern, options):
    """Every option of a pattern, shared key heads, rows from outside and sinks that are turned."""

    far = None
    if start := options.get("start"):
        cache = KVCache(pattern, 2, HEADS, SIZE, kv_heads=2)
        _, k, v = (x.detach() for x in tensors(3, start))
        cache.append(k[:, :, :2], v[:, :, :2])
        far = cache.far()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        of_two = k[:, :, :2], v[:, :, :2] * 2
        return dilated_attention(q.sin(), *of_two, pattern, far=far, turn=turn, **options).cos()

    compare(attend, torch.compile(attend, backend="aot_eager"), tensors(3, 80))


def test_no_graph_holds_what_comes_from_outside():
    """In chunks, far keys differ at each call, and their provider keeps a cache: neither compiles anything again."""
    ids, targets = draw(2, 400), draw(2, 400, seed=1)
    model = net(PAPER_64TH, layers=1)
    expected = [backward(model, ids, targets, chunk=100, starts=None), *gradients(model)]
    counter = CompileCounterWithBackend("eager")
    model.layers[0].forward = torch.compile(model.layers[0].forward, backend=counter)
    found = [backward(model, ids, targets, chunk=100, starts=None), *gradients(model)]
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) <= 1e-6
    # without and with gradients: the layer and its attention, before and after
    assert counter.frame_count == 2 * 4


@pytest.mark.parametrize(
    ("padded", "backend"), [(False, "aot_eager"), pytest.param(True, "inductor", marks=COMPILER)]
)
def test_a_compiled_layer_of_torch(padded, backend):
    layer = nn.TransformerEncoderLayer(32, HEADS, 48, dropout=0.0, batch_first=True)
    layer.self_attn = DilatedAttention(32, HEADS, PATTERN)
    x = torch.randn(2, 100, 32, requires_grad=True)
    padding = torch.arange(100) >= torch.tensor([[100], [41]]) if padded else None
    compare(layer, torch.compile(layer, backend=backend), [x], src_key_padding_mask=padding)


@pytest.mark.parametrize("compiled", [True, False])
def test_autocast(compiled):
    """Projections in bf16, the operator as exact as bf16 inputs allow, and the same compiled."""
    module = DilatedAttention(32, HEADS, PAPER_64TH)
    f = torch.compile(module, backend="aot_eager") if compiled else module
    x = torch.randn(2, 100, 32, requires_grad=True)
    exact = module(x, x, x, is_causal=True)[0]
    (exact_grad,) = torch.autograd.grad(exact.square().sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = f(x, x, x, is_causal=True)[0]
    assert out.dtype is torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().square().sum(), x)
    assert (out - exact).norm() / exact.norm() <= 2e-2
    assert (grad - exact_grad).norm() / exact_grad.norm() <= 2e-2


@pytest.mark.parametrize(("reentrant", "compiled"), [(True, False), (False, False), (False, True)])
def test_checkpoint(reentrant, compiled):
    def again(*qkv: Tensor) -> Tensor:
        return checkpoint(plain, *qkv, use_reentrant=reentrant)

    f = torch.compile(again, backend="aot_eager") if compiled else again
    compare(plain, f, tensors(3, 50))
