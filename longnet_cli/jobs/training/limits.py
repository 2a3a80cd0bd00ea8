"""The limits that a recipe must keep: the memory of the machine, and windows that ranks can share."""

import math

import torch

from longnet_cli.basics.errors import ConfigError, MemoryLimitError
from longnet_cli.running.device import free_memory
from longnet_cli.running.ranks.ranks import Ranks

from .recipe import Recipe


def check_memory(recipe: Recipe) -> None:
    """Raise MemoryLimitError for a net whose weights alone exceed the free memory, before the net is built."""
    needed = 4 * recipe.model.trained + recipe.model.frozen_bytes
    free = free_memory(torch.device("cpu"))
    if needed > free:
        change = (
            "take a smaller model" if recipe.pretrained else "lower model.dim or model.num_layers"
        )
        raise MemoryLimitError(
            f"the weights take {needed / 2**30:,.1f} GiB and {free / 2**30:,.1f} GiB of memory are free: {change}"
        )


def check_ranks(recipe: Recipe, ranks: Ranks) -> None:
    """Raise ConfigError for windows that the ranks cannot share or that a bidirectional net cannot see as a whole."""
    train = recipe.train
    for stage in train.stages:
        windows = train.windows(stage)
        seq_len = stage.seq_len
        if windows % ranks.dp:
            shared = math.gcd(windows, ranks.world)
            fits = ", ".join(str(dp) for dp in range(1, shared + 1) if shared % dp == 0)
            raise ConfigError(
                f"a step has {windows} windows of {seq_len} tokens, which {ranks.dp} groups of ranks cannot share "
                f"equally: --dp {fits} would fit, or other train.batch_tokens"
            )
        if seq_len < ranks.sp:
            raise ConfigError(
                f"{ranks.sp} ranks cannot share a window of {seq_len} tokens: --sp {seq_len} or less would fit, or "
                "longer windows"
            )
    if recipe.model.causal:
        return
    if train.longest > train.chunk * ranks.sp:
        raise ConfigError(
            f"a bidirectional net sees a window as a whole: train.chunk = {train.chunk} on {ranks.sp} ranks is less "
            f"than the longest seq_len, {train.longest}"
        )
    if ranks.sp > 1 and not train.across_documents:
        raise ConfigError(
            "a bidirectional net over several ranks cannot keep the documents of a window apart: set "
            "train.across_documents = true, or give each rank its own windows (--dp)"
        )
