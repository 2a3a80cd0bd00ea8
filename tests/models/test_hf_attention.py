"""Models of transformers with dilated attention = their own with one full segment, = the dense reference otherwise.

All from their config classes with random weights; nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from strategies import PAPER_64TH, Choice, choices, cuts, split, turn
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")

import transformers as hf
from hf_models import (
    CHOSEN,
    FAR,
    GROUPED,
    LEVELS,
    MODELS,
    ROPES,
    SIZES,
    TILED,
    WIDE,
    WINDOW,
    bert,
    built,
    gpt2,
    ids,
    llama,
    mixed,
    modernbert,
    qwen2,
    qwen3,
    rotary,
    sharing,
)
from reference import dilated_attention_reference

from longnet_cli.attention import Pattern
from longnet_cli.attention.cache import cached_rows
from longnet_cli.attention.spans import Lanes
from longnet_cli.basics.errors import ConfigError
from longnet_cli.models.hf.attention import (
    dilated_attention_forward,
    pattern_of,
    use_dilated_attention,
)
from longnet_cli.models.hf.longnet_cache import LongNetCache
from longnet_cli.nets.named_blocks import ReadText


def right_padded(tokens: int) -> Tensor:
    return (torch.arange(tokens) < torch.tensor([[tokens], [tokens // 3]])).long()


def outputs_and_gradients(
    model: hf.PreTrainedModel, implementation: str, **inputs: Any
) -> dict[str, Tensor]:
    """Logits at true tokens, and the gradients of a sum of their log-probabilities."""
    model.set_attn_implementation(implementation)
    logits = model(**inputs).logits
    true = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    logits = logits[true]
    picked = logits.log_softmax(-1)[torch.arange(len(logits)), inputs["input_ids"][true]]
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(picked.sum(), list(named.values()), allow_unused=True)
    return {
        "logits": logits.detach(),
        **{n: g for n, g in zip(named, grads, strict=True) if g is not None},
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = ((found[name] - value).abs().max() / max(1.0, value.abs().max())).item()
        assert error <= 1e-5, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize(
    ("model", "pattern", "how"),
    [
        *((x, PAPER_64TH, {}) for x in MODELS),
        *((llama, x, {}) for x in (WINDOW, FAR, TILED, GROUPED)),
        *((x, FAR, {}) for x in (qwen2, gpt2, bert, modernbert)),
        (llama, FAR, {"is_causal": False}),  # a decoder made bidirectional
    ],
)
def test_a_pattern_is_the_dense_reference(model, pattern, how):
    """The paper's at 1/64 scale, over more than one of its widest segments; it is not what dense attention gives."""
    net, tokens = (
        use_dilated_attention(built(model), pattern),
        600 if pattern is PAPER_64TH else 150,
    )
    inputs = {"input_ids": ids(tokens), "attention_mask": right_padded(tokens), **how}
    expected = outputs_and_gradients(net, "dilated_reference", **inputs)
    assert_equal(outputs_and_gradients(net, "dilated", **inputs), expected)
    dense = outputs_and_gradients(net, "sdpa", **inputs)
    assert (dense["logits"] - expected["logits"]).abs().max() > 1e-2


def attention_module(choice: Choice) -> nn.Module:
    """What a layer is to its attention function."""
    module = nn.Module()
    module.config = SimpleNamespace(dilated_attention=asdict(choice.pattern))
    module.is_causal, module._dilated_turn = choice.causal, turn if choice.rotary else None
    return module


@given(choice=choices(causal=True), sizes=cuts())
def test_any_pattern_with_cached_keys_is_the_dense_reference(choice, sizes):
    """The attention function, given all keys so far: outputs and gradients, with fewer key heads than query heads."""
    # transformers rotates queries and keys itself
    choice = replace(choice, start=0, by_level=False)
    module, results = attention_module(choice), []
    for whole in (True, False):
        *inputs, dout = (x.requires_grad_() for x in choice.qkv())
        q, k, v = inputs
        if whole:
            moved = {"turn": turn} if choice.rotary else {}
            out = dilated_attention_reference(
                q, k, v, choice.pattern, lengths=choice.lengths, **moved
            )
        else:
            outs, stop = [], 0
            for size in split(choice.tokens, [max(size, choice.tokens // 20) for size in sizes]):
                start, stop = stop, stop + size
                heads_first = (
                    x.transpose(1, 2) for x in (q[:, start:stop], k[:, :stop], v[:, :stop])
                )
                columns = (
                    torch.tensor([[0, min(n, stop)] for n in choice.lengths])
                    if choice.lengths
                    else None
                )
                outs.append(dilated_attention_forward(module, *heads_first, columns)[0])
            out = torch.cat(outs, 1)
        results.append(
            [out.detach(), *torch.autograd.grad(out, inputs, dout.detach(), materialize_grads=True)]
        )
    for found, expected in zip(results[1], results[0], strict=True):
        assert (found - expected).norm() <= 1e-12 * max(1.0, expected.norm().item())


@pytest.mark.parametrize("kind", ["default", *ROPES, "partial", "neighbours", "none"])
def test_sinks_are_seen_as_if_right_before_the_window(kind):
    """So a token's only layer gives what dense attention gives where nothing but sinks and window is there."""
    net = built(rotary, kind=kind)
    tokens, last = ids(150), 140
    window = (last // 16 - 1) * 16
    expected = net(torch.cat([tokens[:, :3], tokens[:, window : last + 1]], 1)).logits[:, -1]
    use_dilated_attention(net, WINDOW)
    found = net(tokens[:, : last + 1]).logits[:, -1]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    unmoved = next(module for module in net.modules() if hasattr(module, "_dilated_turn"))
    unmoved._dilated_turn = None
    near = (
        net(tokens[:, : last + 1]).logits[:, -1] - expected
    ).abs().max() <= 1e-4 * expected.abs().max()
    assert near == (kind == "none")


def test_sinks_that_cannot_be_moved_are_refused():
    """By name, and the model goes on with what it had."""
    ropes = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    gptj = hf.GPTJForCausalLM(
        hf.GPTJConfig(vocab_size=97, n_embd=48, n_layer=1, n_head=6, rotary_dim=4)
    )
    for net, message in (
        (
            built(llama, rope_parameters=ropes),
            "LlamaForCausalLM has positions that depend on .*rope_type dynamic",
        ),
        (
            built(
                llama,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [1, 1, 2],
                },
            ),
            "in several dimensions",
        ),
        # Older transformers say that it does not pick its attention by name
        (gptj, "of its own|does not pick its attention by name"),
    ):
        expected = net(ids(20)).logits
        with pytest.raises(ConfigError, match=message):
            use_dilated_attention(net, WINDOW)
        assert torch.equal(net(ids(20)).logits, expected)


def left_padded(tokens: int) -> Tensor:
    return right_padded(tokens).flip(1)


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "pattern"),
    [
        *((llama, WINDOW), (mixed, FAR), (gpt2, CHOSEN), (sharing, WINDOW), (sharing, CHOSEN)),
        *(
            pytest.param(*case, marks=pytest.mark.ci)
            for case in ((qwen3, TILED), (gpt2, LEVELS), (llama, CHOSEN))
        ),
    ],
)
def test_generate_is_exact_with_any_cache(model, pattern):
    """Token for token what one pass over all before it has as its best, for rows of different lengths too."""
    net = use_dilated_attention(built(model), pattern)
    net.generation_config.eos_token_id = None
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    for mask in (None, left_padded(30)):
        padded = {} if mask is None else {"attention_mask": mask}
        bounded = LongNetCache(net.config)
        found = net.generate(ids(30), past_key_values=bounded, **padded, **options)
        if pattern.chosen:
            with pytest.raises(
                ConfigError,
                match=r"this cache has no token ids, which name blocks: pass past_key_values=LongNetCache",
            ):
                net.generate(ids(30), **padded, **options)
        else:
            assert torch.equal(net.generate(ids(30), **padded, **options), found)
        assert bounded.get_seq_length() == 69
    in_chunks = {"past_key_values": LongNetCache(net.config), "prefill_chunk_size": 7}
    assert torch.equal(
        net.generate(ids(30), attention_mask=left_padded(30), **in_chunks, **options), found
    )
    alone = net.generate(ids(30)[1:, 20:], past_key_values=LongNetCache(net.config), **options)
    assert torch.equal(found[1:, 20:], alone)
    for sequence, prompt in ((found[:1], 30), (alone, 10)):
        logits = net(sequence, use_cache=False).logits[:, prompt - 1 : -1]
        assert torch.equal(logits.argmax(-1), sequence[:, prompt:])


@pytest.mark.parametrize("pattern", [WINDOW, CHOSEN])
def test_forks_of_a_cache_read_on_alone(pattern):
    net = use_dilated_attention(built(llama), pattern)
    cache = LongNetCache(net.config)
    net(ids(60)[:, :40], past_key_values=cache)
    fork = cache.fork()
    net(ids(9), past_key_values=cache.fork())
    found = [net(ids(60)[:, 40:], past_key_values=each).logits for each in (fork, cache)]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], net(ids(60), use_cache=False).logits[:, 40:])


@pytest.mark.parametrize("model", [llama, qwen3, gpt2])
def test_where_a_text_names_all_blocks_attention_is_dense(model, monkeypatch):
    monkeypatch.setattr(ReadText, "named", lambda self, pattern, first, near: range(near // 8))
    net, tokens = built(model), ids(100)
    with torch.no_grad():
        expected = net(tokens, use_cache=False).logits
        use_dilated_attention(net, CHOSEN)
        torch.testing.assert_close(net(tokens, use_cache=False).logits, expected)
        cache = LongNetCache(net.config)
        read = [net(some, past_key_values=cache).logits for some in tokens.split(30, 1)]
        torch.testing.assert_close(torch.cat(read, 1), expected)
        with pytest.raises(ConfigError, match="chosen blocks are named by token ids"):
            net(inputs_embeds=net.get_input_embeddings()(tokens), use_cache=False)


@pytest.mark.parametrize("pattern", [FAR, CHOSEN])
def test_a_cache_follows_beams(pattern):
    """Each beam has the score of its tokens, as one pass over them gives it."""
    net = use_dilated_attention(built(llama, eos_token_id=None), pattern)
    beams = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 20, "pad_token_id": 0}
    cache = LongNetCache(net.config)
    how = {"past_key_values": cache, "return_dict_in_generate": True, "output_scores": True}
    found = net.generate(ids(60), **beams, **how)
    nats = net(found.sequences, use_cache=False).logits.log_softmax(-1)[:, :-1]
    of_tokens = nats.gather(-1, found.sequences[:, 1:, None])[:, 59:, 0].sum(-1)
    torch.testing.assert_close(of_tokens / 20, found.sequences_scores, rtol=1e-4, atol=1e-4)


def test_a_bounded_cache_is_bounded_and_follows_beams():
    """Padded rows, too."""
    net = use_dilated_attention(built(llama, eos_token_id=None), FAR)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 40, "pad_token_id": 0}
    cache, padded = LongNetCache(net.config), {"attention_mask": left_padded(30)}
    found = net.generate(ids(30), past_key_values=cache, **beams, **padded)
    assert torch.equal(found, net.generate(ids(30), **beams, **padded))
    rows = net.config.num_hidden_layers * 4 * 2 * 8 * cached_rows(Lanes(FAR, 12, 4))
    assert cache.nbytes == 6 * rows
    cache.reorder_cache(torch.tensor([4, 0]))
    assert cache.nbytes == 2 * rows


def test_padding_on_both_sides_is_as_alone():
    """Without a cache, gradients too; a row without a token harms nobody."""
    net = use_dilated_attention(built(llama), FAR)
    mask = torch.zeros(3, 60, dtype=torch.int64)
    mask[0, 5:50] = mask[1, 5:60] = 1
    padded = net(ids(60, 3), attention_mask=mask, use_cache=False).logits
    results = []
    for row, (first, stop) in enumerate([(5, 50), (5, 60)]):
        alone = net(ids(60, 3)[row : row + 1, first:stop], use_cache=False).logits[0]
        results += [
            (x, *torch.autograd.grad(x.square().sum(), net.lm_head.weight, retain_graph=True))
            for x in (padded[row, first:stop], alone)
        ]
    for found, expected in zip(results[::2], results[1::2], strict=True):
        for x, y in zip(found, expected, strict=True):
            assert (x - y).abs().max() <= 1e-4 * y.abs().max()


@pytest.mark.ci
@pytest.mark.full
@pytest.mark.parametrize(("model", "pattern"), [(llama, FAR), (bert, PAPER_64TH)])
def test_a_compiled_model(model, pattern):
    """Padded batches too."""
    torch._dynamo.reset()
    net = use_dilated_attention(built(model), pattern)
    compiled = torch.compile(net, backend="aot_eager")
    options = {"use_cache": False} if model is llama else {}
    for mask in (torch.ones(2, 130, dtype=torch.int64), right_padded(130)):
        results = []
        for f in (net, compiled):
            logits = f(ids(130), attention_mask=mask, **options).logits[mask.bool()]
            results.append(
                [logits, *torch.autograd.grad(logits.square().mean(), list(net.parameters()))]
            )
        for expected, found in zip(*results, strict=True):
            assert (found - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max())
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "pattern", [Pattern((8, 32), (1, 4), "grouped"), TILED, GROUPED, FAR, CHOSEN]
)
def test_the_pattern_is_saved_and_loaded(tmp_path, pattern):
    net = use_dilated_attention(built(llama), pattern)
    net.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert pattern_of(again.config) == pattern
    assert torch.equal(again(ids(100)).logits, net(ids(100)).logits)
    # no Auto class, which would call use_dilated_attention
    own = type(built(llama)).from_pretrained(tmp_path)
    if pattern.moves_keys:
        with pytest.raises(ConfigError, match=r"call use_dilated_attention\(model\) after loading"):
            own(ids(100))
        use_dilated_attention(own)
    assert torch.equal(own(ids(100)).logits, net(ids(100)).logits)


@pytest.mark.parametrize("model", [llama, bert])
def test_autocast_and_checkpointing(model):
    """bf16 is near; activations computed again are the same."""
    net = use_dilated_attention(built(model), PAPER_64TH)
    exact = outputs_and_gradients(net, "dilated", input_ids=ids(150))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = outputs_and_gradients(net, "dilated", input_ids=ids(150))
    for name, value in exact.items():
        # BERT's key biases have none
        assert (rough[name] - value).norm() <= 5e-2 * max(0.1, value.norm()), name
    assert not torch.equal(rough["logits"].float(), exact["logits"])
    net.train()
    net.gradient_checkpointing_enable()
    options = {"use_cache": False} if model is llama else {}
    assert_equal(outputs_and_gradients(net, "dilated", input_ids=ids(150), **options), exact)


PACKED = torch.cat([torch.arange(20), torch.arange(20)])[None].expand(2, -1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"attention_mask": (torch.arange(40) % 20 > 5).long().expand(2, -1)},
            "row 0 has padding between its tokens",
        ),
        (
            {"attention_mask": torch.ones(2, 1, 40, 40, dtype=torch.bool)},
            r"not one of \(2, 1, 40, 40\)",
        ),
        ({"position_ids": PACKED}, r"a row each; torch\.export and"),
    ],
)
def test_calls_that_are_refused(call, message):
    net = use_dilated_attention(built(llama), PAPER_64TH)
    with pytest.raises(ValueError, match=message):
        net(ids(40), use_cache=False, **call)


def test_caches_that_are_refused():
    net = use_dilated_attention(built(llama, eos_token_id=None), PAPER_64TH)
    options = {"max_new_tokens": 3, "pad_token_id": 0}
    with pytest.raises(ValueError, match="generates with a LongNetCache, with a DynamicCache"):
        net.generate(ids(20), cache_implementation="static", **options)
    for cache in (None, LongNetCache(net.config)):
        with pytest.raises(
            ValueError, match=r"row 1 has padding between its tokens.*padding_side = .left"
        ):
            net.generate(ids(20), attention_mask=right_padded(20), past_key_values=cache, **options)
    cache = LongNetCache(net.config)
    net.generate(ids(20), past_key_values=cache, **options)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="the padding of a batch changed"):
        net(ids(1), attention_mask=left_padded(cache.get_seq_length() + 1), past_key_values=cache)
    with pytest.raises(ValueError, match="a LongNetCache is for dilated attention"):
        built(llama)(ids(9), past_key_values=LongNetCache(net.config))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: bert(is_decoder=True, add_cross_attention=True), "cross-attention"),
        (
            lambda: hf.T5ForConditionalGeneration(hf.T5Config(d_model=16, d_kv=4, num_layers=1)),
            "an encoder-decoder",
        ),
        (
            lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, **WIDE, num_key_value_heads=4)),
            "sliding window",
        ),
        (
            lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=16, n_layer=1, n_head=2)),
            "pick its attention by name",
        ),
    ],
)
def test_models_that_are_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        use_dilated_attention(model(), PAPER_64TH)


def test_configs_that_are_refused():
    net = built(llama)
    with pytest.raises(ConfigError, match=r"call use_dilated_attention\(model, pattern\)"):
        use_dilated_attention(net)
    with pytest.raises(ConfigError, match="no output_attentions"):
        use_dilated_attention(net, PAPER_64TH)(ids(20), output_attentions=True)
    trained = use_dilated_attention(built(gpt2, attn_pdrop=0.1), PAPER_64TH).train()
    with pytest.raises(
        ConfigError, match=r"no dropout of attention weights, and the model's config asks for 0\.1"
    ):
        trained(ids(20))
