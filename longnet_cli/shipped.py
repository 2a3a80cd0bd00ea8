"""The models and recipes that ship with `longnet`, and the names of a model folder's files and metadata keys."""

from __future__ import annotations

import os
from pathlib import Path

from longnet_cli.configuration import nearest
from longnet_cli.errors import ConfigError, refuse_web_address

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
SHARDED = "model.safetensors.index.json"  # what transformers writes beside the shards of a large model
GENERATION = "generation_config.json"
# files that may stand beside a tokenizer.json: they tell a library how to build the tokenizer and write a chat
BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# sentence-transformers' file for prompts; the key of config.json for the pooling of a net that was trained by contrast
PROMPTS, POOL_KEY = "config_sentence_transformers.json", "embedding_pool"
END_OF_TEXT = "<|endoftext|>"  # of the tokenizers that `longnet` makes
# `model_type` in config.json of a LongNet: the error of a library that does not know it shows nothing else of a folder
MODEL_TYPE = "longnet: import longnet_cli.integrations.transformers"
OLDER_TYPE = "longnet"  # of older folders; the oldest have none

# Metadata keys of model.safetensors: digests of what was saved together. Other tools drop them when they save.
TENSORS_SHA256, CONFIG_SHA256 = "longnet.tensors_sha256", "longnet.config_sha256"
TOKENIZER_SHA256 = "longnet.tokenizer_sha256"


def preset_dir() -> Path:
    """Return the repository's `models/`: inside the package if installed from a wheel, beside it in a checkout."""
    shipped = Path(__file__).parent / "models"
    return shipped if shipped.is_dir() else Path(__file__).parents[1] / "models"


def list_models() -> list[str]:
    """Return the names of the shipped models with weights, sorted; recipes (`*.toml`) are not included."""
    return sorted(path.parent.name for path in preset_dir().glob(f"*/{CONFIG}"))


def model_path(name_or_path: str) -> Path:
    """Return the path that `--model` names. A name is looked up among the shipped models, never in the current folder.

    Raises ConfigError for a name that is not shipped. A path may lead to nothing.
    """
    refuse_web_address(name_or_path)
    if "/" in name_or_path or os.sep in name_or_path or name_or_path.endswith(".toml"):
        return Path(name_or_path)
    if name_or_path not in list_models():
        raise ConfigError(_unknown(name_or_path))
    return preset_dir() / name_or_path


def _unknown(name: str) -> str:
    shipped = list_models()
    match = nearest(name, shipped)
    hint = f": did you mean '{match}'?" if match else "."
    if (preset_dir() / f"{name}.toml").is_file():
        hint = ": it is shipped as a recipe, without weights; `longnet train` makes them."
    return (
        f"unknown model '{name}'{hint} Shipped models: {', '.join(shipped) or 'none'}; "
        f"a path needs a slash, e.g. ./{name or 'my-run'}"
    )
