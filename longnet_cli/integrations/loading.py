"""The net in a folder, whoever made it: one that `longnet train` wrote, or a model of Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from longnet_cli.attention import Pattern
from longnet_cli.errors import ConfigError
from longnet_cli.model import LongNet
from longnet_cli.model.net import Net
from longnet_cli.presets import is_of_transformers

if TYPE_CHECKING:
    from longnet_cli.integrations.transformers_net import TransformersNet


def load_net(
    folder: Path,
    *,
    attention: Literal["dilated", "dense"] = "dilated",
    pattern: Pattern | None = None,
    device: torch.device | str = "cpu",
) -> Net:
    """In float32, in eval mode. `pattern` takes the place of the model's own; `attention` is of those of transformers.

    Raises ConfigError or CheckpointError, of one line that names the folder.
    """
    if is_of_transformers(folder):
        return load_transformers(folder, attention=attention, pattern=pattern, device=device)
    if attention == "dense":
        raise ConfigError(
            f"{folder}: --attention dense is for models of transformers; a LongNet sees as much with one segment that "
            "is long enough: --pattern 64Ki/1"
        )
    return LongNet.from_pretrained(folder, device, torch.float32, pattern=pattern)


def load_transformers(
    folder: Path,
    *,
    attention: Literal["dilated", "dense"] = "dilated",
    pattern: Pattern | None = None,
    device: torch.device | str = "cpu",
) -> TransformersNet:
    """`transformers_net.load_transformers`, where transformers is installed. Raises ConfigError where it is not."""
    try:
        from longnet_cli.integrations import transformers_net
    except ImportError as error:
        raise ConfigError(
            f"{folder} is a model of transformers, which cannot be imported ({error}): pip install 'longnet-cli[hf]'"
        ) from None
    return transformers_net.load_transformers(folder, attention=attention, pattern=pattern, device=device)
