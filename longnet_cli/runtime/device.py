"""Which device and which precision a job computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from longnet_cli.errors import ConfigError


def select_device(name: str = "auto") -> torch.device:
    """`auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:1`. Raises ConfigError for a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ConfigError(f"there is no device {name!r} here ({found} CUDA devices): use --device cpu or auto")
    return device


def precision(name: str, device: torch.device) -> AbstractContextManager:
    """The autocast context of `--dtype`: fp32 computes as it is; auto is bf16 on a GPU that has it, else fp32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if name == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[name])
