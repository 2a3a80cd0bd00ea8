"""Models of transformers: small, with random weights, made of their config classes; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")

import transformers as hf
from reference import dilated_attention_reference
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from longnet_cli.attention import SINKS, FarKeys, Outside, Pattern
from longnet_cli.models.hf.attention import dilated_mask, pattern_of
from longnet_cli.models.hf.pretrained_net import TransformersNet

SIZES = {"vocab_size": 97, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 12}
ROOM = {"max_position_embeddings": 1024}
WIDE = {"intermediate_size": 64}
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
ROPES = {
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
    "linear": {"factor": 4.0},
}

LEVELS = Pattern((8, 24, 60), (1, 3, 5))
WINDOW = Pattern.window(16, sinks=3)
# a window, and a far level before it
FAR = Pattern((16, 16), (1, 4), "modulo", (1, 3), "once", "all", 4)
TILED = Pattern((8, 32, 128), (1, 4, 16), look_back=1, overlap="once", queries="all")
CHOSEN = Pattern((16,), (1,), look_back=1, chosen=4, chosen_block=8, chosen_every=4)
GROUPED = Pattern((8, 20), (1, 3), "grouped", look_back=1, sinks=2)


def llama(key_heads: int = 4, **changes: Any) -> hf.PreTrainedModel:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**SIZES, **ROOM, **WIDE, num_key_value_heads=key_heads, **changes)
    )


def qwen2() -> hf.PreTrainedModel:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, **ROOM, **WIDE, num_key_value_heads=6))


def qwen3() -> hf.PreTrainedModel:
    return hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**SIZES, **ROOM, **WIDE, num_key_value_heads=2, head_dim=8)
    )


def gpt2(**changes: Any) -> hf.PreTrainedModel:
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} | changes
    scaled = {"scale_attn_by_inverse_layer_idx": True}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**SIZES, n_positions=1024, **dropout, **scaled))


def bert(**changes: Any) -> hf.PreTrainedModel:
    return hf.BertForMaskedLM(hf.BertConfig(**SIZES, **ROOM, **WIDE, **NO_DROPOUT, **changes))


def mixed() -> hf.PreTrainedModel:
    kinds = {
        "use_sliding_window": True,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    return hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**SIZES, **ROOM, **WIDE, **kinds, num_key_value_heads=6)
    )


def sharing() -> hf.PreTrainedModel:
    """Layers of two kinds, of which the last ones reuse the keys of earlier ones."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
    sizes = (
        SIZES
        | ROOM
        | WIDE
        | {"num_hidden_layers": 4, "vocab_size_per_layer_input": 97, "sliding_window": 16}
    )
    heads = {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
    }
    return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**sizes, **heads, **kinds))


def modernbert() -> hf.PreTrainedModel:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    sizes = SIZES | {"num_hidden_layers": 3, "pad_token_id": 0}
    return hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**sizes, **ROOM, **WIDE, layer_types=kinds, local_attention=32)
    )


def rotary(kind: str) -> hf.PreTrainedModel:
    """One layer with a kind of rotary positions."""
    sizes = SIZES | ROOM | WIDE | {"num_hidden_layers": 1, "pad_token_id": 0}
    if kind == "partial":
        return hf.PhiForCausalLM(hf.PhiConfig(**sizes))
    if kind == "neighbours":
        return hf.GlmForCausalLM(hf.GlmConfig(**sizes, num_key_value_heads=4, head_dim=8))
    if kind == "none":
        return hf.SmolLM3ForCausalLM(
            hf.SmolLM3Config(**sizes, num_key_value_heads=4, no_rope_layers=[0])
        )
    ropes = {"rope_parameters": {"rope_theta": 1e4, "rope_type": kind, **ROPES.get(kind, {})}}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **ropes, num_key_value_heads=4))


CAUSAL = [llama, qwen2, qwen3, gpt2]
MODELS = [*CAUSAL, bert, modernbert]


def built(model: Callable[..., hf.PreTrainedModel], **changes: Any) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    found = model(**changes).eval()
    # Initial weights are so small that attention would hardly show
    for parameter in found.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    return found


def ids(tokens: int, batch: int = 2) -> Tensor:
    return torch.randint(1, 97, (batch, tokens), generator=torch.Generator().manual_seed(1))


def nats_from(net: TransformersNet, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """Of tokens (B, N) that stand from `start` on, after their sinks at 0, 1, 2 ..., which stay there."""
    n, kept = net.config.pattern.sinks, {}
    with torch.no_grad():
        net(tokens[:, :n], far=lambda layer, q, k, v: Outside(kept.setdefault(layer, (k, v))[:0]))
        sinks = {layer: Outside([FarKeys(SINKS, 0, n, *rows)]) for layer, rows in kept.items()}
        hidden = net(tokens[:, n:-1], start=start + n, far=lambda layer, q, k, v: sinks[layer])
        return net.nll(hidden, tokens[:, n + 1 :])


def reference(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **options
):
    """The dense-mask reference as an attention function of transformers, "dilated_reference"."""
    if options.get("sliding_window") is not None:
        options = {"scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    lengths = None if attention_mask is None else attention_mask[:, 1]
    given = {"causal": module.is_causal if is_causal is None else is_causal, "lengths": lengths}
    given |= {"scale": scaling, "turn": getattr(module, "_dilated_turn", None)}
    return dilated_attention_reference(
        q, k, v, pattern_of(module.config), **given
    ).contiguous(), None


hf.AttentionInterface.register("dilated_reference", reference)
AttentionMaskInterface.register("dilated_reference", dilated_mask)
