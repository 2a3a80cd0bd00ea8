"""Which chunk a job takes: the tokens that go through a net at once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets.config import NetConfig
from longnet_cli.running.device import free_memory
from longnet_cli.running.ranks.ranks import Ranks

CHUNK_BYTES = 256 << 20  # for one chunk's activations; a GPU takes an eighth of its free memory if that is more
SHORTEST_CHUNK = 256  # below it, the calls cost more than the computation
# Other jobs have a number of tokens, on a CPU and on a GPU. A recipe trains with the same chunk on every CPU, and with
# the longest that fits on a GPU: beyond GPU_TRAINING_CHUNK, none keeps it busier. The rows of `bench` compare models
# and patterns, at the same chunk; with a shorter one, a GPU waits for the CPU.
TRAINING_CHUNK, GPU_TRAINING_CHUNK = 1 << 14, 1 << 17
BENCH_CHUNK, GPU_BENCH_CHUNK = 1 << 16, 1 << 20


def chunk_of(named: int | None, default: int, earlier: int | None = None, ranks: Ranks | None = None) -> int:
    """Return the tokens of a chunk of any job, the same on all `ranks`.

    The chunk that the user `named` counts first, then the chunk of the `earlier` run that this one continues, which
    only rank 0 needs to know, then the smallest of the ranks' defaults. Raises ConfigError for a chunk below 1.
    """
    if named is not None:
        if named < 1:
            raise ConfigError(f"chunk must be 1 or more, not {named}")
        return named
    ranks = ranks or Ranks()
    smallest = int(ranks.smallest(earlier or default))
    return int(ranks.largest(earlier or 0)) or smallest


def default_chunk(config: NetConfig, device: torch.device) -> int:
    """Return the default for reading: a forward pass without gradients then takes a modest share of memory.

    A power of two, so that the edges of chunks and of segments mostly coincide.
    """
    return chunk_beside(config, (free_memory(device) or 0) if device.type == "cuda" else 0)


def chunk_beside(config: NetConfig, free: int) -> int:
    """Return the default chunk for reading on a GPU with so many bytes free; 0 for a CPU."""
    budget = max(CHUNK_BYTES, free // 8)
    return max(SHORTEST_CHUNK, 1 << (budget // config.forward_bytes(1)).bit_length() - 1)


def fitting_chunk(
    needed: Callable[[int], float], longest: int, free: float | None, shortest: int = SHORTEST_CHUNK
) -> int | None:
    """Return `longest`, or the longest power of two below it and at least `shortest`, whose `needed` bytes are free.

    Returns None if none fits.
    """
    chunk = longest
    while free is not None and needed(chunk) > free:
        chunk = (1 << (chunk - 1).bit_length()) >> 1  # the power of two below
        if chunk < shortest:
            return None
    return chunk
