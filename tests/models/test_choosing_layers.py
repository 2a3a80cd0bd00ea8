"""The layers that choose blocks, where nobody has named them: those that look for what was read before."""

from __future__ import annotations

import math
import warnings
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import tiny_llama, tiny_model
from pattern_nets import foreign, native
from torch.nn.functional import cross_entropy

from longnet_cli.attention import Pattern
from longnet_cli.attention.notation import parse_pattern
from longnet_cli.basics.errors import InputWarning
from longnet_cli.models import choosing_layers
from longnet_cli.models.choosing_layers import layer_evidence, let_layers_choose, peaks
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.net import Net

PATTERN = Pattern((128,), (1,), look_back=1, chosen=8, chosen_block=8, chosen_every=4)
VOCABULARY = 256  # of the models that learn
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


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
    monkeypatch.setattr(
        choosing_layers, "layer_evidence", lambda net: asked.append(1) or [0.0, 0.4]
    )
    found = make(PATTERN)
    let_layers_choose(found)
    assert found.config.pattern == replace(PATTERN, chosen_layers=(1,))
    again = make(PATTERN)
    let_layers_choose(again)
    assert len(asked) == 1
    for width, chosen, times in (
        (1024, 8, 2),
        (2048, 4, 2),
        (64, 8, 3),
    ):  # patterns that show all of the text are one
        let_layers_choose(make(replace(PATTERN, segment_lengths=(width,), chosen=chosen)))
        assert len(asked) == times
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


def test_progress_is_said_while_it_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing_layers, "SECONDS", 0.0)
    with pytest.warns(InputWarning) as said:
        layer_evidence(native(PATTERN))
    steps = [str(line.message).partition("these weights: ")[2] for line in said]
    assert steps == [
        f"{what} in {layer} of 2 layers"
        for what in ("a text was read", "compared")
        for layer in (0, 1)
    ]


def test_without_evidence_the_layer_in_the_middle_chooses() -> None:
    net = native(PATTERN, ffn_dim=44)
    assert max(layer_evidence(net)) < choosing_layers.LEAST
    let_layers_choose(net)
    assert net.config.pattern.chosen_layers == (1,)


def test_a_narrow_window_is_asked_on_as_long_a_text() -> None:
    narrow, wide = (
        layer_evidence(native(replace(PATTERN, segment_lengths=(w,)), ffn_dim=44))
        for w in (16, 2048)
    )
    assert len(narrow) == len(wide) == 2


def test_a_net_without_chosen_blocks_stays_as_it_is() -> None:
    net = native(Pattern.window(128), ffn_dim=52)
    let_layers_choose(net)
    assert net.config.pattern == Pattern.window(128)


def learn_to_repeat(model: Any) -> None:
    """Train a model of transformers, with its own dense attention, on texts that say some tokens again and again.

    First the texts have 48 tokens, of which only what comes again counts: a model learns within 400 steps to look for
    what stood before. Then they are as long as the windows of PATTERN, and all tokens count: it learns when to be sure.
    """
    chance, short, long, rate = torch.Generator().manual_seed(0), 500, 400, 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(short + long):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (1 - step / (short + long))
        texts, tokens = (32, 48) if step < short else (16, 256)
        period = int(torch.randint(4, tokens // 2 + 1, (), generator=chance))
        own = torch.randint(VOCABULARY, (texts, period), generator=chance)
        ids = own.repeat(1, tokens // period + 1)[:, :tokens]
        first = period if step < short else 1
        cross_entropy(
            model(ids).logits[:, first - 1 : -1].flatten(0, 1), ids[:, first:].flatten()
        ).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
def test_a_model_that_learns_to_repeat_shows_the_layer_that_looks_back() -> None:
    """When this layer chooses, a model repeats what lies before its window. With another layer, or none, it does not.

    Three blocks are too few for one that the text names: votes alone choose. No token of the text comes twice before.
    """
    import transformers as hf

    from longnet_cli.integrations.transformers import use_dilated_attention
    from longnet_cli.models.hf.pretrained_net import TransformersNet

    def net(pattern: Pattern) -> Net:
        return TransformersNet(use_dilated_attention(deepcopy(model), pattern))

    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2)).train()
    learn_to_repeat(model)
    model.eval()
    pattern, chance = replace(PATTERN, chosen=3), torch.Generator().manual_seed(1)
    evidence = layer_evidence(net(pattern))
    own = torch.stack([torch.randperm(VOCABULARY, generator=chance) for _ in range(16)])
    again = torch.cat([own, own[:, 40:72]], 1)
    patterns = {None: Pattern.window(128)} | {
        layer: replace(pattern, chosen_layers=(layer,)) for layer in range(3)
    }
    with torch.no_grad():
        nats = {
            layer: float(
                cross_entropy(
                    read.logits(read(again)[:, 256:-1]).flatten(0, 1), again[:, 257:].flatten()
                )
            )
            for layer, read in ((layer, net(pattern)) for layer, pattern in patterns.items())
        }
    print(f"evidence {evidence}; nats of what comes again, by the layer that chooses: {nats}")
    (found,) = peaks(evidence)
    best = nats.pop(found)
    assert best < math.log(VOCABULARY)
    assert best < min(nats.values()) - 1
