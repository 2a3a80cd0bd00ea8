"""The layers that choose blocks, where nobody has named them: those that look for what was read before."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import tiny_llama, tiny_model
from pattern_nets import foreign, native
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.attention.notation import parse_pattern
from longnet_cli.basics.errors import InputWarning
from longnet_cli.models import choosing_layers
from longnet_cli.models.choosing_layers import layer_evidence, let_layers_choose, peaks
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.net import Net

PATTERN = Pattern((128,), (1,), look_back=1, chosen=8, chosen_block=8, chosen_every=4)


@pytest.mark.parametrize(
    ("evidence", "layers"),
    [
        ([0.0, 0.3, 0.1, 0.5, 0.6, 0.2, 0.14], (1, 4)),
        ([0.3, 0.2, 0.1, 0.4], (0, 3)),
        ([0.1, 0.14, 0.1], ()),
        ([0.3, 0.3], ()),
    ],
)
def test_peaks_choose(evidence: list[float], layers: tuple[int, ...]) -> None:
    assert peaks(evidence) == layers


@pytest.mark.parametrize("make", [native, foreign])
def test_the_layers_that_were_found_choose(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found once, and what the net then computes is what it computes with the layers named."""
    asked = []
    monkeypatch.setattr(choosing_layers, "layer_evidence", lambda net: asked.append(1) or [0.0, 0.4])
    found = make(PATTERN)
    let_layers_choose(found)
    assert found.config.pattern == replace(PATTERN, chosen_layers=(1,))
    again = make(PATTERN)
    let_layers_choose(again)
    assert len(asked) == 1
    ids = torch.randint(90, (1, 500), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        named, every = make(replace(PATTERN, chosen_layers=(1,))), make(PATTERN)
        assert torch.equal(found(ids), named(ids))
        assert torch.equal(again(ids), named(ids))
        assert not torch.equal(every(ids), named(ids))


@pytest.mark.parametrize("build", [tiny_model, tiny_llama])
def test_a_pattern_that_is_given_without_layers_gets_them(
    build: Any, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"position": "rope"} if build is tiny_model else {}
    folder = ModelFolder.find(str(build(tmp_path / "model", **options)))
    monkeypatch.setattr(choosing_layers, "layer_evidence", lambda net: [0.4, 0.1])
    pattern = parse_pattern("window:128,chosen=8x8,chosen_every=4")
    assert folder.net(pattern=pattern).config.pattern.chosen_layers == (0,)
    named = replace(pattern, chosen_layers=(1,))
    assert folder.net(pattern=named).config.pattern == named


def test_what_took_long_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 7.2, 7.2, 7.3])
    monkeypatch.setattr(choosing_layers.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(choosing_layers, "layer_evidence", lambda net: [0.5, 0.0])
    said = "blocks are chosen by the layers 0: found in 7 s by a text of random tokens"
    with pytest.warns(InputWarning, match=said):
        let_layers_choose(native(PATTERN, ffn_dim=40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        let_layers_choose(native(PATTERN, ffn_dim=40))


def test_without_evidence_the_layer_in_the_middle_chooses() -> None:
    net = native(PATTERN, ffn_dim=44)
    assert max(layer_evidence(net)) < choosing_layers.LEAST
    let_layers_choose(net)
    assert net.config.pattern.chosen_layers == (1,)


@pytest.mark.parametrize("pattern", [Pattern.window(128), replace(PATTERN, segment_lengths=(16,))])
def test_other_nets_stay_as_they_are(pattern: Pattern) -> None:
    """Without chosen blocks, and where windows are too short to see a text twice."""
    net = native(pattern, ffn_dim=52)
    let_layers_choose(net)
    assert net.config.pattern == pattern


def of_llama() -> Net:
    import transformers as hf

    return learning(hf.LlamaForCausalLM, hf.LlamaConfig, num_key_value_heads=2)


def of_neox() -> Net:
    import transformers as hf

    return learning(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, rotary_pct=1.0)


def learning(net: Any, config: Any, **more: Any) -> Net:
    from longnet_cli.integrations.transformers import use_dilated_attention
    from longnet_cli.models.hf.pretrained_net import TransformersNet

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    pattern = Pattern((64,), (1,), look_back=1, chosen=4, chosen_block=8, chosen_every=4)
    built = net(config(**sizes, intermediate_size=128, **more)).eval()
    return TransformersNet(use_dilated_attention(built, pattern))


def nats(net: Net, ids: Tensor, first: int) -> Tensor:
    """Return the mean nats of tokens from `first` on."""
    return net.nll(net(ids)[:, first - 1 : -1], ids[:, first:]).mean()


@pytest.mark.slow
@pytest.mark.parametrize("make", [of_llama, of_neox])
def test_nets_that_learn_to_repeat_show_the_layers_that_look_back(make: Any) -> None:
    """With these layers, the net repeats what it has read long ago; with the layer of least evidence, it does not.

    It learns from texts that say 4 to 63 tokens again and again, first short ones.
    """
    net, chance, steps, rate = make().train(), torch.Generator().manual_seed(0), 800, 3e-3
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (1 - step / steps)
        grown = min(1, 2 * step / steps)
        period = int(torch.randint(4, 8 + int(56 * grown), (), generator=chance))
        own = torch.randint(97, (32, period), generator=chance)
        nats(net, own.repeat(1, 40)[:, : max(2 * period, 64 + int(96 * grown))], period).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()
    evidence = layer_evidence(net.eval())
    own = torch.randint(97, (8, 532), generator=chance)
    again, found = torch.cat([own, own[:, :32]], 1), {}
    with torch.no_grad():
        for layers in (peaks(evidence), (min(range(4), key=lambda layer: evidence[layer]),)):
            net.choose_in(layers)
            found[layers] = float(nats(net, again, 533))
    print(f"evidence {evidence}; nats of what comes again, by the layers that choose: {found}")
    best, other = found.values()
    assert best < other - 1
