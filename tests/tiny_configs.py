"""A tiny configuration of any causal model of transformers: `tiny_config("llama")`. Windows have 16 tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import transformers as hf

# what a configuration class calls its sizes; those that it does not have are left out
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), 97),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embedding_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "v_head_dim", "index_head_dim", "dim_head"), 16),
    **dict.fromkeys(
        ("kv_channels", "mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16
    ),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "d_rel", "patch_size", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(
        ("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "ffn_dim", "dff"), 48
    ),
    **dict.fromkeys(("dim_ff", "n_inner", "intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("prefix_dense_intermediate_size",), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "index_n_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "mamba_expand", "expand", "type_vocab_size"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("index_topk", "rel_extent", "mamba_d_state", "state_size", "ssm_state_size", "kv_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 1024),
    **dict.fromkeys(("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "dropout"), 0.0),
    **dict.fromkeys(("activation_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout"), 0.0),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "is_decoder": True,
    "q_lora_rank": 24,
    "image_size": 16,
    "num_channels": 3,
}
# of Gemma 4's models that guess ahead, which have no embeddings of their own
ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# what a model type needs besides
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 100, "encoder_hash_byte_group_size": [3, 4]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "cpmant": {"prompt_length": 4, "prompt_types": 2, "segment_types": 2, "position_bias_max_distance": 64},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        "max_seq_len": 1024,
    },
    "dots3_note_audio_encoder": {
        "adapter_input_size": 64,
        "adapter_out_dim": 64,
        "downsample_hidden_size": 8,
        "feature_size": 16,
    },
    "dots3_note_text": {"num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse"]},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense"] * 2, "adapter_in_dim": 64, "adapter_out_dim": 64},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"moe_topk": 2, "zero_expert_num": 2, "head_dim": 8},
    "mamba2": {"num_heads": 8},
    "mistral": {"sliding_window": None},  # as in all since its first version
    "moshi": {"audio_vocab_size": 32},
    "mpt": {"attn_pdrop": 0},
    "prophetnet": {"ngram": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 50,
        "split_ngram_parts": 1,
        "hc_lowrank": 8,
    },
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False, "attention_head_size": 16, "feed_forward_size": 48},
    "roc_bert": {
        "pronunciation_vocab_size": 97,
        "shape_vocab_size": 97,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "whisper": {"max_target_positions": 1024, "max_source_positions": 32},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_key_value_heads": 4, "chunk_size": 16},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: str) -> Any:
    """Return the configuration of a model type, of one layer of each kind that it has, or of two equal ones."""
    return _shrunk(hf.CONFIG_MAPPING[kind])


def _shrunk(cls: Any, **given: Any) -> Any:
    names, more = {field.name: field.default for field in dataclasses.fields(cls)}, MORE.get(cls.model_type, {})
    sizes = {key: x for key, x in SIZES.items() if key in names and not ("window" in key and names[key] is None)}
    if "qk_rope_head_dim" in names:  # latent attention has no groups of heads
        sizes.pop("head_dim", None)
        sizes |= {"num_key_value_heads": 4} if "num_key_value_heads" in names else {}
    if "layer_types" in names and "layer_types" not in more:
        kinds = [*dict.fromkeys(cls().layer_types or [])]
        if kinds:
            sizes["layer_types"] = kinds if kinds[1:] else kinds * 2
            sizes["num_hidden_layers"] = len(sizes["layer_types"])
    for name, inner in (getattr(cls, "sub_configs_defaults", None) or {}).items():
        if name in names and name not in more:
            part, known = inner, {}
            if not isinstance(inner, type):
                part, known = inner.config_class, inner.init_kwargs or {}
                part = hf.CONFIG_MAPPING[inner.model_type] if part is hf.AutoConfig else part
            if cls.model_type.endswith("_assistant"):
                known = {**known, **ASSISTANT}
            kept = {key: x for key, x in known.items() if key not in SIZES or key in ASSISTANT}
            sizes[name] = _shrunk(part, **kept).to_dict()
    return cls(**sizes | given | more)
