"""Learned biases of levels: gradients = dense attention's; chunks, documents, caches, files; their learning rate.

Ranks are in test_exchange.py, compiled graphs in test_compiled.py, the kernels of one pass in interpreted.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import recipe, tiny_llama
from conftest import RunLongnet
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pattern_nets import draw, error, gradients, net
from strategies import Choice, PackedMath, assert_close, choices, cuts, split, turning
from torch import Tensor

from longnet_cli.attention import Pattern, dilated_attention
from longnet_cli.attention.kernels import KERNELS
from longnet_cli.attention.notation import format_pattern, parse_pattern
from longnet_cli.attention.reference import dilated_attention_reference
from longnet_cli.basics.errors import ConfigError
from longnet_cli.hub.model_names import preset_dir
from longnet_cli.jobs.training.gradients import backward
from longnet_cli.jobs.training.loop import train
from longnet_cli.models.official import to_torchscale
from longnet_cli.nets.longnet import LongNet
from longnet_cli.running.causal_stream import CausalStream

LEARNED = Pattern((8, 32, 64), (1, 4, 4), look_back=1, overlap="once", queries="all", level_bias="learned:-4")


def run(function, inputs: list[Tensor], bias: Tensor, pattern: Pattern, **options) -> list[Tensor]:
    """out, dq, dk, dv and the gradient of the biases, of sum(out * dout); inputs are q, k, v, dout."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs[:3], bias)]
    out = function(*leaves[:3], pattern, level_bias=leaves[3], **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3], materialize_grads=True)]


def with_biases(choice: Choice) -> tuple[Pattern, Tensor]:
    assume(len(choice.pattern.levels) > 1 and choice.pattern.dilation_rates[0] == 1)
    shape = len(choice.pattern.levels) - 1, choice.heads
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(choice.seed), dtype=torch.float64)
    return replace(choice.pattern, level_bias="learned"), bias


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@given(choice=choices())
def test_gradients_equal_the_reference(choice: Choice, dtype: torch.dtype, tolerance: float) -> None:
    pattern, bias = with_biases(choice)
    inputs, options = choice.qkv(dtype), choice.options | turning(choice)
    found = run(dilated_attention, inputs, bias.to(dtype), pattern, **options)
    exact = [x.double() for x in inputs]
    assert_close(found, run(dilated_attention_reference, exact, bias.to(dtype).double(), pattern, **options), tolerance)


@settings(max_examples=10)
@example(choice=Choice(LEARNED, 2, 400, 4, 4, 0, True, None, 0, kv_heads=2), sizes=[150, 90, 7])
@given(choice=choices(), sizes=cuts())
def test_documents_get_what_they_get_alone(choice: Choice, sizes: list[int]) -> None:
    pattern, bias = with_biases(choice)
    inputs, documents = choice.qkv(), split(choice.tokens, sizes)
    options = {"causal": choice.causal} | turning(choice)
    KERNELS["packed"] = PackedMath()
    try:
        found = [
            run(dilated_attention, inputs, bias, pattern, documents=documents, kernel=kernel, **options)
            for kernel in ("packed", "cpu_flash")
        ]
    finally:
        del KERNELS["packed"]
    alone = [
        run(dilated_attention_reference, list(part), bias, pattern, **options)
        for part in zip(*(x.split(documents, 1) for x in inputs), strict=True)
    ]
    expected = [torch.cat([part[i] for part in alone], 1) for i in range(4)] + [sum(part[4] for part in alone)]
    for each in found:
        assert_close(each, expected, 1e-10)


@pytest.fixture
def model() -> LongNet:
    """Biases of several sizes, which no two heads share."""
    found = net(LEARNED).double()
    for index, layer in enumerate(found.layers):
        layer.attention.level_bias.data = torch.linspace(-2, 2, 8, dtype=torch.float64).view(2, 4) * (-1) ** index
    return found


@settings(max_examples=10)
@given(chunk=st.integers(5, 200))
def test_training_in_chunks_is_training_at_once(chunk: int) -> None:
    model, ids, targets = net(LEARNED).double(), draw(2, 190), draw(2, 190, seed=1)
    results = []
    for size in (1000, chunk):
        model.zero_grad()
        loss = backward(model, ids, targets, chunk=size, starts=[[0, 30, 41], [0]])
        results.append([loss, *gradients(model)])
    assert len(results[0]) == 1 + len([*model.parameters()])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-10 * max(b.norm(), results[0][0].sqrt())


def test_token_by_token_is_the_whole(model: LongNet) -> None:
    ids = draw(2, 150)
    with torch.no_grad():
        stream = CausalStream(model)
        parts = [stream(part) for part in ids.split(1, 1)]
        assert error(torch.cat(parts, 1), model(ids)) <= 1e-12


def test_bf16_on_a_trained_layer() -> None:
    """Of longnet-tiny, with far keys that weigh as much as near ones: the gradient in bf16 is that in fp32 to 5 %."""
    pattern = replace(parse_pattern("64/1,1Ki/4,look_back=1,overlap=once,queries=all"), level_bias="learned:0")
    net = LongNet.from_pretrained(preset_dir() / "longnet-tiny", pattern=pattern)
    for layer in (net.layers[1].attention, net.layers[-1].attention):
        seen: list[Tensor] = []
        hook = layer.register_forward_hook(lambda _, inputs, out, seen=seen: seen.extend((inputs[0].detach(), out)))
        loss = net.nll(net(ids := draw(1, 1000)), ids.roll(-1, 1)).sum()
        hook.remove()
        (dout,) = torch.autograd.grad(loss, seen[1])
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (x.to(dtype) for x in layer.project(seen[0], net.positions(seen[0], 0)))
            mixed = dilated_attention(q, k, v, pattern, level_bias=layer.level_bias)
            out = layer.out(layer.inner_norm(mixed.float().flatten(-2)))
            found.append(torch.autograd.grad(out, layer.level_bias, dout)[0])
        assert error(found[1], found[0]) <= 0.05


def test_a_saved_model(model: LongNet, tmp_path: Path) -> None:
    """A folder keeps the biases; another pattern leaves them out, or starts with its own."""
    model.float().save_pretrained(tmp_path / "learned")
    ids = draw(1, 100)
    with torch.no_grad():
        again = LongNet.from_pretrained(tmp_path / "learned")
        assert torch.equal(again(ids), model(ids))
        assert again.config.pattern == LEARNED == parse_pattern(format_pattern(LEARNED))
        assert again.config.num_parameters() == sum(p.numel() for p in again.parameters())
        fixed = LongNet.from_pretrained(tmp_path / "learned", pattern=replace(LEARNED, level_bias=(0, -4, -4)))
        fixed.save_pretrained(tmp_path / "fixed")
        started = LongNet.from_pretrained(tmp_path / "fixed", pattern=LEARNED)
        torch.testing.assert_close(started(ids), fixed(ids))
        assert not torch.allclose(fixed(ids), model(ids), atol=1e-3)
    with pytest.raises(ConfigError, match="torchscale has no learned biases"):
        to_torchscale(model)
    transformers = pytest.importorskip("transformers")
    import longnet_cli.integrations.transformers  # noqa: F401 (it registers our classes)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "learned")
    assert torch.equal(theirs(ids).logits, model.logits(model(ids)))


def test_they_learn_at_a_rate_of_their_own(tmp_path: Path) -> None:
    """AdamW's first step is the learning rate, whatever the gradient; without a decay."""
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    settings = {"model.pattern": "8/1,32/2,look_back=1,overlap=once,queries=all,level_bias=learned:-3"}
    settings |= {"model.position": "rope", "train.stages": [{"seq_len": 64, "steps": 1}], "schedule.warmup_steps": 0}
    for name, optimizer, rate in (("adamw", {}, 0.1), ("muon", {"optimizer.level_bias_lr": 0.03}, 0.03)):
        found = recipe(tmp_path / "corpus.txt", **settings, **optimizer, **{"optimizer.name": name})
        train(found, tmp_path / name)
        bias = LongNet.from_pretrained(tmp_path / name).layers[0].attention.level_bias
        assert ((bias.detach() + 3).abs() - rate).abs().max() <= 1e-4


def test_who_has_none(run_longnet: RunLongnet, tmp_path: Path) -> None:
    """A Hugging Face model has no such weights; nor does a level alone, or a first level at another rate."""
    (tmp_path / "a.txt").write_text("a text")
    tiny_llama(tmp_path / "llama", max_position_embeddings=2048)
    for command in (["score", "a.txt", "--model", "./llama"], ["train", "--init", "./llama", "--data", "a.txt"]):
        result = run_longnet(
            *command, "--pattern", "8/1,32/4,level_bias=learned", *["-o", "out"] * (command[0] == "train")
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert 'level_bias = "learned" is for a LongNet' in result.stderr
        assert result.stderr.count("\n") == 1
    for text in ("window:8,level_bias=learned", "8/2,16/4,level_bias=learned:-4"):
        with pytest.raises(ValueError, match='level_bias="learned" needs two levels or more, the first at rate 1'):
            parse_pattern(text)
    with pytest.raises(ValueError, match="level_bias needs a number, as \"learned:-4\", got 'learned:low'"):
        parse_pattern("8/1,16/4,level_bias=learned:low")
    x = torch.zeros(1, 8, 4, 4)
    with pytest.raises(ValueError, match=r"level_bias needs \(2, 4\), \(levels - 1, heads\), got \(2, 3\)"):
        dilated_attention(x, x, x, LEARNED, level_bias=torch.zeros(2, 3))
    with pytest.raises(ValueError, match='biases are for a pattern with level_bias="learned"'):
        dilated_attention(x, x, x, Pattern.window(8), level_bias=torch.zeros(0, 4))
