"""Loaders for the net in a folder: a LongNet that `longnet train` wrote, or a model of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from longnet_cli.attention import Pattern
from longnet_cli.errors import ConfigError
from longnet_cli.integrations.transformers_config import TransformersConfig
from longnet_cli.model import LongNet, SlideConfig
from longnet_cli.model.net import Net
from longnet_cli.model.slide import VectorNet
from longnet_cli.model.weights import load_config
from longnet_cli.presets import is_of_transformers


def load_net(
    folder: Path,
    *,
    pattern: Pattern | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Net:
    """Load the net of a folder, in eval mode, on `device`. `pattern` replaces the model's own.

    The weights of a Hugging Face model are of type `dtype`. A LongNet's weights are float32, whatever `dtype` is.

    Raises ConfigError or CheckpointError, in one line that names the folder, also if transformers is not installed.
    """
    if not is_of_transformers(folder):
        return native_net(folder).from_pretrained(folder, device, torch.float32, pattern=pattern)
    return _transformers_net(folder).load_transformers(folder, pattern=pattern, device=device, dtype=dtype)


def native_net(folder: Path) -> type[LongNet]:
    """Return the class of the net in a LongNet folder: VectorNet for a slide encoder. Raises as `load_config` does."""
    return VectorNet if isinstance(load_config(folder), SlideConfig) else LongNet


def read_facts(
    folder: Path, pattern: Pattern | None = None, lora: Mapping[str, Any] | None = None
) -> TransformersConfig:
    """Read the facts of a Hugging Face model, but not its weights. Raises as `load_net` and `lora.add_lora` do."""
    return _transformers_net(folder).read_facts(folder, pattern, lora)


def load_trainable(folder: Path, config: TransformersConfig, lora: Mapping[str, Any] | None = None) -> Net:
    """Load a Hugging Face model for training, with the pattern of `config`: float32, on the CPU, not mapped from files.

    `lora` holds the arguments of `lora.add_lora`, or is None to train all weights.
    Raises as `load_net` does, and ConfigError if the gradient of a long sequence cannot go through the model.
    """
    pattern = None if config.as_trained else config.pattern
    net = _transformers_net(folder).load_transformers(folder, pattern=pattern)
    net.check_trainable()
    for parameter in net.parameters():  # mapped from files until now, which may vanish during a run
        parameter.data = parameter.data.clone()
    if lora is not None:
        net.add_lora(lora)
    return net


def _transformers_net(folder: Path) -> ModuleType:
    try:
        from longnet_cli.integrations import transformers_net
    except ImportError as error:
        raise ConfigError(
            f"{folder} is a Hugging Face model, which cannot be imported ({error}): pip install 'longnet-cli[hf]'"
        ) from None
    return transformers_net
