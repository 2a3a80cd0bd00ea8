"""The net in a folder, whoever made it: one that `longnet train` wrote, or a model of Hugging Face transformers."""

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
    """In eval mode, on `device`. `pattern` takes the place of the model's own.

    The weights of a Hugging Face model are of type `dtype`; a LongNet's are float32, whatever it computes in.

    Raises ConfigError or CheckpointError, of one line that names the folder, also where transformers is not installed.
    """
    if not is_of_transformers(folder):
        return native_net(folder).from_pretrained(folder, device, torch.float32, pattern=pattern)
    return _transformers_net(folder).load_transformers(folder, pattern=pattern, device=device, dtype=dtype)


def native_net(folder: Path) -> type[LongNet]:
    """The class of the net in a folder of ours: a slide encoder's reads vectors. Raises as `load_config` does."""
    return VectorNet if isinstance(load_config(folder), SlideConfig) else LongNet


def read_facts(
    folder: Path, pattern: Pattern | None = None, lora: Mapping[str, Any] | None = None
) -> TransformersConfig:
    """Those of a Hugging Face model, without its weights; raises as `load_net` does, and `lora.add_lora`."""
    return _transformers_net(folder).read_facts(folder, pattern, lora)


def load_trainable(folder: Path, config: TransformersConfig, lora: Mapping[str, Any] | None = None) -> Net:
    """A Hugging Face model with these facts, to train: float32, on the CPU, of which the files are no part.

    `lora` are the arguments of `lora.add_lora`, or None for training all weights.
    Raises as `load_net` does, and ConfigError where the gradient of a long sequence cannot go through it.
    """
    pattern = None if config.as_trained else config.pattern
    net = _transformers_net(folder).load_transformers(folder, pattern=pattern)
    net.check_trainable()
    for parameter in net.parameters():  # mapped from the files until now, which a run may outlive
        parameter.data = parameter.data.clone()
    if lora is not None:
        net.add_lora(lora)
    return net


def saved_bytes(folder: Path, lora: Mapping[str, Any] | None, dtype: str) -> tuple[int, int]:
    """(bytes per layer, bytes besides) that a token leaves for the backward of a Hugging Face model."""
    from longnet_cli.integrations import saved

    return saved.saved_bytes(folder, lora, dtype)


def _transformers_net(folder: Path) -> ModuleType:
    try:
        from longnet_cli.integrations import transformers_net
    except ImportError as error:
        raise ConfigError(
            f"{folder} is a Hugging Face model, which cannot be imported ({error}): pip install 'longnet-cli[hf]'"
        ) from None
    return transformers_net
