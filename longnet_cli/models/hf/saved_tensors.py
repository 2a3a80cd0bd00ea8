"""The bytes that a Hugging Face model saves for its backward pass, measured on one and on two of its layers."""

from __future__ import annotations

import json
from functools import lru_cache

import torch
import transformers as hf
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.models.hf.attention import ATTENTION_NAME, write_pattern
from longnet_cli.models.hf.lora import add_lora
from longnet_cli.models.hf.pretrained_folder import with_infinities
from longnet_cli.models.hf.trying import hidden_states
from longnet_cli.running.device import precision

_TOKENS = 64


@lru_cache  # called for every chunk that might fit
def measured_bytes(source: str, lora: str, dtype: str) -> tuple[int, int]:
    """Return (bytes per layer, other bytes) that a token saves for the backward pass; `dtype` as in `running.device`.

    `source` and `lora` are JSON: the model's configuration, and the arguments of `add_lora`, or null. Models of one
    and of two layers are made in memory that is never written to, so they take almost no space. Tensors that do not
    grow with the tokens (weights, their casts) are not counted.
    """
    one, two = (_a_token(json.loads(source), layers, json.loads(lora), dtype) for layers in (1, 2))
    return two - one, 2 * one - two


def _a_token(settings: dict, layers: int, lora: dict | None, dtype: str) -> int:
    config = hf.CONFIG_MAPPING[settings["model_type"]].from_dict(with_infinities(settings))
    config.num_hidden_layers = layers
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[:layers]
    with torch.device("meta"):
        model = getattr(hf, settings["architectures"][0])(config)
    model = model.to_empty(device="cpu").train()
    write_pattern(model.config, Pattern.dense())
    model.set_attn_implementation(ATTENTION_NAME)  # its weights are no numbers: nothing can be tried
    if lora is not None:
        add_lora(model, **lora)
    few, many = (_saved(model, tokens, dtype) for tokens in (_TOKENS, 2 * _TOKENS))
    return (many - few) // _TOKENS


def _saved(model: hf.PreTrainedModel, tokens: int, dtype: str) -> int:
    """Return the bytes of all storages that a forward pass over `tokens` tokens saves."""
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x  # kept alive, so that its address is not reused
        return x

    ids = torch.zeros(1, tokens, dtype=torch.int64)
    with precision(dtype, ids.device), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = hidden_states(model, ids)
        del hidden
    return sum(x.untyped_storage().nbytes() for x in kept.values())
