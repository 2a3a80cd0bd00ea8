"""A tiny configuration of any causal model of transformers: `tiny_config("llama")`. Windows have 16 tokens."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import transformers as hf

# sizes, by the names that configurations have for them: the first that fits
SIZES = {
    r".*vocab_size.*": 97,
    r"hidden_size|d_model|n_embd|emb_dim|embedding_(size|dim)": 64,
    r"n_layers?|(num_)?(hidden_|decoder_|encoder_)?layers": 2,
    r".*(key_value|kv)_heads|index_n_heads|linear_num_\w+_heads": 2,
    r"mamba_n(um)?_heads": 8,
    r".*heads|n_head": 4,
    r"qk_(rope|nope)_head_dim|hidden_size_per_layer_input|rotary_dim": 8,
    r".*head_dim|dim_head|kv_channels|mamba_d_head|\w*d_state|\w*state_size|kv_lora_rank|index_topk|rel_extent": 16,
    r"(sliding|local)_window.*|sliding_window|.*chunk_size|window_size": 16,
    r"(dense_|prefix_dense_)?intermediate_size.*|.*ffn_(hidden_size|dim)|dff|dim_ff|n_inner": 48,
    r".*(intermediate|ffn_hidden)_size": 32,
    r"n(um)?_(routed_|local_)?experts|moe_num_experts": 4,
    r"num_experts_per_tok|moe_k|(mamba_)?expand|type_vocab_size": 2,
    r"n_group|topk_group|n(um)?_shared_experts|first_k_dense_replace|(mamba_)?n_groups": 1,
    r"max_position_embeddings|n_positions|n_ctx": 1024,
    r"(attention|attn|hidden|activation|resid|embd|embed)\w*_(dropout|pdrop|dropout_prob)|.*_pdrop|dropout": 0.0,
    r"bos_token_id": 1,
    r"eos_token_id": 2,
    r"pad_token_id|num_kv_shared_layers": 0,
    r"is_decoder": True,
    r"q_lora_rank": 24,
}
# what a model type needs besides
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "mistral": {"sliding_window": None},  # as in all since its first version
    "moshi": {"audio_vocab_size": 32},
    "recurrent_gemma": {"lru_width": 64, "block_types": ["recurrent", "attention"]},
}


def tiny_config(kind: str, **settings: Any) -> Any:
    """Return the configuration of a model type, of one layer of each kind that it has, or of two equal ones."""
    cls = hf.CONFIG_MAPPING[kind]
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    settings = {**MORE.get(kind, {}), **settings}
    sizes: dict[str, Any] = {}
    for name, default in fields.items():
        size = next((x for pattern, x in SIZES.items() if re.fullmatch(pattern, name)), None)
        if size is not None and not ("window" in name and default is None) and not isinstance(default, list):
            sizes[name] = size
    if "qk_rope_head_dim" in fields:  # latent attention has no groups of heads
        sizes.pop("head_dim", None)
        sizes |= {"num_key_value_heads": 4} if "num_key_value_heads" in fields else {}
    if (
        "layer_types" in fields
        and "layer_types" not in settings
        and (kinds := [*dict.fromkeys(cls().layer_types or [])])
    ):
        kinds = kinds if kinds[1:] else kinds * 2
        sizes |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    return cls(**sizes | settings)
