"""Checks of saved tensors: unchanged since they were saved, of a known type, finite, and as many as expected."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from longnet_cli.errors import CheckpointError
from longnet_cli.model.config import LongNetConfig

# The types that weights can have, and their names in a file of safetensors
TYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SMALL = 1 << 24  # parameters of a net that is built in no time, whatever its shapes


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order: its own memory if that is on the CPU and in this order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hex, of the names, types, shapes and bytes of tensors, whatever their order in a file.

    Each tensor is hashed by itself, on all CPU cores. Then the hashes are hashed in the order of the names.
    """

    def one(name: str) -> bytes:
        tensor = tensors[name]
        head = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()
        part = hashlib.sha256(head)
        part.update(tensor_bytes(tensor))
        return part.digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return hashlib.sha256(b"".join(pool.map(one, sorted(tensors)))).hexdigest()


def check_header(config: LongNetConfig, found: Mapping[str, tuple[str, tuple[int, ...]]], where: str) -> None:
    """Compare the types and shapes in a safetensors file with a configuration, before a net of any size is built.

    Raises CheckpointError for weights of another type than `TYPE_NAMES`, for another number of layers, and for a
    configuration that needs far more parameters than the file has.
    """
    for name, (dtype, _) in found.items():
        if dtype not in TYPE_NAMES.values():
            raise CheckpointError(f"{where}: {name} is of type {dtype}: weights are {', '.join(TYPE_NAMES.values())}")
    layers = {name.split(".")[1] for name in found if name.startswith("layers.")}
    if len(layers) != config.num_layers:
        raise CheckpointError(f"{where}: it has {len(layers)} layers, its configuration needs {config.num_layers}")
    numbers, needed = sum(math.prod(shape) for _, shape in found.values()), config.num_parameters()
    if needed > 2 * numbers + _SMALL:
        raise CheckpointError(f"{where}: it has {numbers:,} numbers, its configuration needs {needed:,}")


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError that names the first tensor with NaN or infinite numbers."""
    for name, tensor in tensors.items():
        if tensor.numel():
            low, high = torch.aminmax(tensor)  # one pass, no copy; NaN propagates
            if not (math.isfinite(low) and math.isfinite(high)):
                raise CheckpointError(f"{where}: {name} has numbers that are NaN or infinite: the model is damaged")
