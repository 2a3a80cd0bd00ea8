"""The net in a folder, whoever made it: one that `longnet train` wrote, or a model of Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from longnet_cli.attention import Pattern
from longnet_cli.errors import ConfigError
from longnet_cli.model import LongNet
from longnet_cli.model.net import Net
from longnet_cli.presets import is_of_transformers


def load_net(
    folder: Path,
    *,
    attention: Literal["dilated", "dense"] = "dilated",
    pattern: Pattern | None = None,
    device: torch.device | str = "cpu",
) -> Net:
    """In float32, in eval mode. `pattern` takes the place of the model's own; `attention` is of those of transformers.

    Raises ConfigError or CheckpointError, of one line that names the folder, also where transformers is not installed.
    """
    if not is_of_transformers(folder):
        if attention == "dense":
            raise ConfigError(
                f"{folder}: --attention dense is for models of transformers; a LongNet sees as much with one segment "
                "that is long enough: --pattern 64Ki/1"
            )
        return LongNet.from_pretrained(folder, device, torch.float32, pattern=pattern)
    try:
        from longnet_cli.integrations import transformers_net
    except ImportError as error:
        raise ConfigError(
            f"{folder} is a model of transformers, which cannot be imported ({error}): pip install 'longnet-cli[hf]'"
        ) from None
    return transformers_net.load_transformers(folder, attention=attention, pattern=pattern, device=device)
