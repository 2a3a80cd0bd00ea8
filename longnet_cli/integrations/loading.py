"""The net in a folder, whoever made it: one that `longnet train` wrote, or a model of Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from longnet_cli.attention import Pattern
from longnet_cli.errors import ConfigError
from longnet_cli.model import LongNet
from longnet_cli.model.net import Net
from longnet_cli.presets import is_of_transformers


def load_net(
    folder: Path,
    *,
    pattern: Pattern | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Net:
    """In eval mode, on `device`. `pattern` takes the place of the model's own.

    The weights of a model of transformers are of type `dtype`; a LongNet's are float32, whatever it computes in.

    Raises ConfigError or CheckpointError, of one line that names the folder, also where transformers is not installed.
    """
    if not is_of_transformers(folder):
        return LongNet.from_pretrained(folder, device, torch.float32, pattern=pattern)
    try:
        from longnet_cli.integrations import transformers_net
    except ImportError as error:
        raise ConfigError(
            f"{folder} is a model of transformers, which cannot be imported ({error}): pip install 'longnet-cli[hf]'"
        ) from None
    return transformers_net.load_transformers(folder, pattern=pattern, device=device, dtype=dtype)
