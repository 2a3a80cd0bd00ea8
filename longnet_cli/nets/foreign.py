"""Files that other libraries read in a model directory, beside its weights and its tokenizer.json.

transformers reads keys of config.json and tokenizer_config.json; sentence-transformers reads two small files. Their
classes for a LongNet are in `models.hf.auto_longnet`; nothing here imports them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from longnet_cli.basics.errors import ConfigError
from longnet_cli.basics.model_files import END_OF_TEXT, MODEL_TYPE, MODULES, TRANSFORMER_CONFIGS
from longnet_cli.nets.config import LongNetConfig, NetConfig

TOKENIZER_CONFIG, SENTENCES = "tokenizer_config.json", TRANSFORMER_CONFIGS[0]

# Keys that transformers writes into config.json, or `longnet`, without effect on what a LongNet computes
TRANSFORMERS_KEYS = frozenset(
    {
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "experts_implementation",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def own_keys(data: Any) -> Any:
    """Return a LongNet's config.json without `TRANSFORMERS_KEYS`, or `data` as it is if that is not a mapping.

    Raises ConfigError for a configuration of another model.
    """
    if not isinstance(data, Mapping):
        return data
    if (kind := data.get("model_type", MODEL_TYPE)) != MODEL_TYPE:
        raise ConfigError(f"model_type {kind!r} is not that of a LongNet, {MODEL_TYPE!r}")
    return {key: value for key, value in data.items() if key not in TRANSFORMERS_KEYS}


def architecture(config: NetConfig) -> str:
    """Return the name of the class that reads the model in transformers."""
    if not config.vocab_size:
        return "LongNetModel"
    return "LongNetForCausalLM" if config.causal else "LongNetForMaskedLM"


def foreign_keys(config: NetConfig, tokenizer_json: str | None, eos: str | None) -> dict[str, Any]:
    """Return the keys of config.json for transformers: the class, the dtype, and the id that ends documents.

    Weights are read as float32, as the commands do, whatever dtype they are stored in. `eos` is as in `foreign_files`.
    A net that is more than a LongNet has no keys, because transformers has no class for it.
    """
    if type(config) is not LongNetConfig:
        return {}
    keys: dict[str, Any] = {"model_type": MODEL_TYPE, "architectures": [architecture(config)], "dtype": "float32"}
    eos_id = _ids(tokenizer_json).get(eos or END_OF_TEXT)
    return keys if eos_id is None else keys | {"bos_token_id": eos_id, "eos_token_id": eos_id}


def foreign_files(tokenizer_json: str | None, eos: str | None) -> dict[str, Any]:
    """Return the files that stand beside a tokenizer.json, name -> JSON data; none without a tokenizer.json.

    `eos` is the token that ends documents, and so stands before each. It is by default END_OF_TEXT, if the tokenizer
    has that.
    """
    if tokenizer_json is None:
        return {}
    eos = eos or (END_OF_TEXT if END_OF_TEXT in _ids(tokenizer_json) else None)
    words: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    # a text is nothing but text: a special token in it is encoded as its characters
    options = {"split_special_tokens": True, **({"pad_token": eos} if eos else {})}
    reading = {"text": {"method": "embed", "method_output_name": None}}
    module = "sentence_transformers.base.modules.transformer.Transformer"
    return {
        TOKENIZER_CONFIG: words | ({"bos_token": eos, "eos_token": eos} if eos else {}),
        SENTENCES: {
            "modality_config": reading,
            "module_output_name": "sentence_embedding",
            "processor_kwargs": options,
        },
        MODULES: [{"idx": 0, "name": "0", "path": "", "type": module}],
    }


def _ids(tokenizer_json: str | None) -> dict[str, int]:
    """Return the id of each token that a tokenizer.json lists, added ones included."""
    data = json.loads(tokenizer_json) if tokenizer_json else {}
    vocab = (data.get("model") or {}).get("vocab")
    added = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
    return (vocab if isinstance(vocab, dict) else {}) | added
