"""The configuration of a LongNet, for Hugging Face transformers."""

from __future__ import annotations

import json
from typing import Any

import transformers as hf

from longnet_cli.model import LongNetConfig
from longnet_cli.model.config import parse_config
from longnet_cli.model.foreign import TRANSFORMERS_KEYS, own_keys
from longnet_cli.shipped import MODEL_TYPE


class LongNetHFConfig(hf.PretrainedConfig):
    """A LongNet's config.json for transformers: the fields of `LongNetConfig` as attributes, with the same checks.

    Raises ConfigError for an unknown key, or a value that a LongNet cannot have.
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ("past_key_values", "cache")
    attribute_map = {  # noqa: RUF012 (transformers declares it)
        "hidden_size": "dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_dim",
    }

    def __init__(self, **settings: Any) -> None:
        own = parse_config(own_keys(settings), str(settings.get("name_or_path") or "config.json"))
        super().__init__(**{key: value for key, value in settings.items() if key in TRANSFORMERS_KEYS})
        for name in LongNetConfig.model_fields:
            setattr(self, name, getattr(own, name))

    @property
    def longnet(self) -> LongNetConfig:
        """The same settings as a `LongNetConfig`."""
        return LongNetConfig(**{name: getattr(self, name) for name in LongNetConfig.model_fields})

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json, with a LongNet's keys as `LongNet` writes them."""
        foreign = {key: value for key, value in super().to_dict().items() if key not in LongNetConfig.model_fields}
        return json.loads(self.longnet.model_dump_json()) | foreign
