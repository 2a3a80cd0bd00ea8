"""Inside torch.compile, checkpointing, autocast and FSDP2: equal to eager, and no graph break around the operator."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from pattern_nets import draw, error, gradients, net
from strategies import PAPER_64TH, turn
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from longnet_cli.attention import DilatedAttention, FarSpan, Pattern, dilated_attention, far_keys
from longnet_cli.attention.shard import Shard
from longnet_cli.attention.spans import far_spans
from longnet_cli.jobs.training.objective import backward
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.positions import position_table

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
    return [torch.randn(2, tokens, HEADS, SIZE, generator=draw).to(dtype).requires_grad_() for _ in range(count)]


def compare(function: Callable[..., Tensor], compiled: Callable[..., Tensor], inputs: list[Tensor], **options) -> None:
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


def with_far(q: Tensor, k: Tensor, v: Tensor, other_k: Tensor, other_v: Tensor) -> Tensor:
    far = [far_keys(other_k, other_v, PATTERN, FarSpan(level, 0, 30)) for level in (1, 2)]
    return dilated_attention(q, k, v, PATTERN, start=30, far=far).cos()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"causal": False, "padding": "zero_key"},
        {"lengths": [17, 50]},
        {"lengths": torch.tensor([50, 3])},
        {"documents": [20, 30]},
        {"start": 77, "scale": 0.1, "kernel": "math"},
    ],
)
def test_compiled_equals_eager(options: dict) -> None:
    compare(plain, torch.compile(plain, backend="aot_eager", fullgraph=True), tensors(3, 50), **options)


def test_far_keys_compiled() -> None:
    compare(with_far, torch.compile(with_far, backend="aot_eager", fullgraph=True), tensors(5, 50))


@pytest.mark.parametrize(
    ("options", "rotary"),
    [
        ({}, True),
        ({}, False),
        ({"documents": [20, 60]}, True),
        ({"lengths": [17, 80]}, True),
        ({"causal": False}, True),
    ],
)
def test_other_patterns_compiled(options: dict, rotary: bool) -> None:
    """Every option of a pattern, shared key heads and, from outside too, sinks that are turned."""
    pattern = Pattern((8, 32), (1, 4), look_back=1, overlap="once", queries="all", sinks=3)
    turning = {"turn": turn} if rotary else {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dilated_attention(q.sin(), k[:, :, :2], v[:, :, :2] * 2, pattern, **options, **turning).cos()

    def in_shards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        far = [far_keys(k, v, pattern, span) for span in far_spans(pattern, 40, 80, True)]
        return dilated_attention(q[:, 40:], k[:, 40:], v[:, 40:], pattern, start=40, far=far, **turning).cos()

    for function in (attend,) if options else (attend, in_shards):
        compare(function, torch.compile(function, backend="aot_eager", fullgraph=True), tensors(3, 80))


@pytest.mark.parametrize("options", [{}, {"documents": [20, 60]}, {"lengths": [17, 80]}])
def test_chosen_blocks_compiled(options: dict) -> None:
    """Outside the graph, which breaks at them."""
    pattern = Pattern((8,), (1,), look_back=1, chosen=2, chosen_block=4, chosen_every=4)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dilated_attention(q.sin(), k[:, :, :2], v[:, :, :2] * 2, pattern, **options, turn=turn).cos()

    compare(attend, torch.compile(attend, backend="aot_eager"), tensors(3, 80))


def test_one_graph_for_all_lengths() -> None:
    """Lengths of a batch and numbers of tokens are data of the operator: a new one compiles nothing."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(plain, backend=counter, fullgraph=True, dynamic=True)
    for tokens, lengths in [(50, [3, 50]), (51, [51, 0]), (170, [9, 9])]:
        compare(plain, compiled, tensors(3, tokens), lengths=torch.tensor(lengths))
    assert counter.frame_count == 1


def test_wrong_lengths_are_refused_by_a_compiled_graph_too() -> None:
    x = torch.randn(2, 12, 24)
    module = torch.compile(DilatedAttention(24, 4, PATTERN), backend="aot_eager", fullgraph=True)
    padding = torch.arange(12).expand(2, -1) < 3
    with pytest.raises(ValueError, match=r"lengths needs 2 numbers from 0 to 12, got \[-1, -1\]"):
        module(x, x, x, key_padding_mask=padding)


def test_the_operator_keeps_torchs_contract() -> None:
    """Schema, fake kernel, autograd and the strides that a compiler may change, by torch's own checks."""
    q, k, v = tensors(3, 20)
    outside = [x[:, :4].detach().requires_grad_() for x in (k, v)]
    pattern = ([8, 32], [1, 4], "modulo", [0, 0], "repeat", "dilated", 0, 0, 32, 16, [], 0)
    options, shard = (0.3, None, *pattern), (None, None, "exact", True)
    samples = [
        (q, k, v, [], None, [], *options, 0, *shard),
        (q, k, v, [], torch.tensor([7, 20]), [], *options, 0, *shard),
        (q, k, v, outside, None, [1, 0, 16], *options, 16, *shard),
    ]
    for sample in samples:
        torch.library.opcheck(torch.ops.longnet.dilated_attention, sample)
        out, lse = torch.ops.longnet.dilated_attention(*sample)
        saved = [x.detach() for x in (torch.ones_like(out), *sample[:3], out, lse)]
        backward = (*saved, [x.detach() for x in sample[3]], *sample[4:])
        torch.library.opcheck(torch.ops.longnet.dilated_attention_backward, backward)


def test_no_cuda_graph_captures_the_operators() -> None:
    """As `mode="reduce-overhead"` would: the operators copy tables that a replay does not find."""
    unsafe = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Callable:
        operators = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        unsafe.extend(operator for operator in operators if torch.Tag.cudagraph_unsafe in operator.tags)
        return make_boxed_func(graph.forward)

    q, k, v = tensors(3, 50)
    torch.compile(plain, backend=aot_autograd(fw_compiler=look, bw_compiler=look))(q, k, v).sum().backward()
    ours = torch.ops.longnet
    assert unsafe == [ours.dilated_attention.default, ours.dilated_attention_backward.default]


TILED = {"segment_lengths": (8, 32), "dilation_rates": (1, 4), "overlap": "once", "look_back": 1}
WINDOW = {"segment_lengths": (16,), "dilation_rates": (1,), "look_back": 1}
CHOSEN = WINDOW | {"chosen": 1, "chosen_block": 8, "chosen_every": 8}
# of each field of `Pattern` or `Shard`, a value, and what else the call has with it and without it
FIELDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "segment_lengths": ((16, 64), {}),
    "dilation_rates": ((1, 2), {}),
    "head_offsets": ("grouped", {"dilation_rates": (1, 3)}),
    "look_back": (1, {}),
    "overlap": ("once", {"look_back": 1}),
    "queries": ("all", TILED),
    "sinks": (3, TILED),
    "chosen": (2, CHOSEN),
    "chosen_block": (16, CHOSEN),
    "chosen_every": (8, CHOSEN | {"chosen": 2, "chosen_every": 2}),
    "chosen_exact": (3, CHOSEN | {"chosen": 2, "chosen_every": 2}),
    "start": (19, {}),
    "lengths": ([33, 80], {}),
    "documents": ([30, 50], {}),
    "total": (90, {"padding": "zero_key", "causal": False}),
    "padding": ("zero_key", {"segment_lengths": (7, 30), "causal": False}),
    "causal": (False, {}),
}


OF_NETS = {"chosen_layers"}  # options that say nothing about one call
OPTIONS = [field.name for field in fields(Pattern) if field.name not in OF_NETS] + [*Shard._fields]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_graph_forgets_no_option(name: str) -> None:
    """Each option changes the result, and does so in a graph too. An option that is new needs a line in FIELDS."""
    value, others = FIELDS[name]
    q, k, v = tensors(3, 80)
    found = []
    for options in (others, others | {name: value}):
        given = {"segment_lengths": (8, 32), "dilation_rates": (1, 4)} | options
        pattern = Pattern(**{key: given.pop(key) for key in [*given] if key not in Shard._fields})

        def attend(q: Tensor, k: Tensor, v: Tensor, pattern=pattern, given=given) -> Tensor:
            return dilated_attention(q, k, v, pattern, **given)

        compare(attend, torch.compile(attend, backend="aot_eager", fullgraph=not pattern.chosen), [q, k, v])
        found.append(attend(q, k, v))
    assert not torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[COMPILER, pytest.mark.slow])])
@pytest.mark.parametrize("causal", [True, False])
def test_a_block_compiles_to_one_graph(causal: bool, backend: str) -> None:
    """A layer of LongNet, positions included: compiled = eager, parameters' gradients too."""
    config = LongNetConfig(
        vocab_size=0, dim=32, num_layers=1, num_heads=HEADS, ffn_dim=48, segment_lengths=PATTERN.segment_lengths,
        dilation_rates=PATTERN.dilation_rates, position="rope", causal=causal,
    )  # fmt: skip
    block = LongNet(config).layers[0]
    x = torch.randn(2, 100, 32, requires_grad=True)
    table = position_table(config, 0, 100, "cpu", torch.float32)
    assert torch._dynamo.explain(block)(x, table).graph_break_count == 0
    run_block(block, torch.compile(block, backend=backend, fullgraph=True), x, table)


def run_block(block: nn.Module, compiled: Callable[..., Tensor], *inputs: Tensor) -> None:
    leaves = [inputs[0], *block.parameters()]
    expected, found = (
        [out, *torch.autograd.grad(out.square().mean(), leaves)] for out in (f(*inputs) for f in (block, compiled))
    )
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() <= 1e-6 * max(1.0, a.abs().max())


def test_no_graph_holds_what_comes_from_outside() -> None:
    """In chunks, far keys differ at each call, and their provider keeps a cache: neither compiles anything again."""
    ids, targets = draw(2, 400), draw(2, 400, seed=1)
    model = net(PAPER_64TH, layers=1)
    expected = [backward(model, ids, targets, chunk=100, starts=None), *gradients(model)]
    counter = CompileCounterWithBackend("eager")
    model.layers[0].forward = torch.compile(model.layers[0].forward, backend=counter)
    found = [backward(model, ids, targets, chunk=100, starts=None), *gradients(model)]
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) <= 1e-6
    assert counter.frame_count == 2 * 4  # without and with gradients: the layer and its attention, before and after


@pytest.mark.parametrize(("padded", "backend"), [(False, "aot_eager"), pytest.param(True, "inductor", marks=COMPILER)])
def test_torchs_encoder_layer_compiles_to_one_graph(padded: bool, backend: str) -> None:
    layer = nn.TransformerEncoderLayer(32, HEADS, 48, dropout=0.0, batch_first=True)
    layer.self_attn = DilatedAttention(32, HEADS, PATTERN)
    x = torch.randn(2, 100, 32, requires_grad=True)
    padding = torch.arange(100) >= torch.tensor([[100], [41]]) if padded else None
    assert torch._dynamo.explain(layer)(x, None, padding).graph_break_count == 0
    run_block(layer, torch.compile(layer, backend=backend, fullgraph=True), x, None, padding)


@pytest.mark.parametrize("compiled", [True, False])
def test_autocast(compiled: bool) -> None:
    """Projections in bf16, the operator as exact as bf16 inputs allow, and the same compiled."""
    module = DilatedAttention(32, HEADS, PAPER_64TH)
    f = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
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
def test_checkpoint(reentrant: bool, compiled: bool) -> None:
    def again(*qkv: Tensor) -> Tensor:
        return checkpoint(plain, *qkv, use_reentrant=reentrant)

    f = torch.compile(again, backend="aot_eager", fullgraph=True) if compiled else again
    compare(plain, f, tensors(3, 50))


FSDP = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from longnet_cli.attention import DilatedAttention, Pattern
rank, world = int(sys.argv[1]), 2
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=world)
def build():
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True) for _ in range(2)]
    for layer in layers:
        layer.self_attn = DilatedAttention(16, 4, Pattern((8, 32), (1, 4)))
    return nn.Sequential(*layers)
whole, sharded = build(), build()
mesh = dist.init_device_mesh("cpu", (world,))
for layer in sharded:
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
batch = torch.randn(world * 2, 50, 16, generator=torch.Generator().manual_seed(1))
mine = batch[rank * 2 : rank * 2 + 2]
(whole(batch).square().sum() / len(batch)).backward()
(sharded(mine).square().sum() / len(mine)).backward()  # fully_shard averages over ranks
for (name, a), b in zip(whole.named_parameters(), sharded.parameters(), strict=True):
    error = (b.grad.full_tensor() - a.grad).abs().max() / a.grad.abs().max()
    assert error <= 1e-5, (name, error)
print("equal", flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # threads of gloo sometimes abort an interpreter that shuts down
"""


def test_fsdp2(command_env: Mapping[str, str], tmp_path: Path) -> None:
    """Two processes under `fully_shard`: the gradients of the whole batch in one."""
    commands = [[sys.executable, "-c", FSDP, str(rank), str(tmp_path / "store")] for rank in range(2)]
    running = [
        subprocess.Popen(c, env=command_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out.splitlines()[-1:]) == (0, ["equal"]), err  # gloo of older torch speaks before
