"""Start the processes of `--nproc`, after refusing what several processes cannot do."""

from __future__ import annotations

import os
from collections.abc import Sequence

from longnet_cli.errors import ConfigError
from longnet_cli.runtime.launch import start_ranks, under_torchrun


def launch(
    nproc: int | None,
    inputs: Sequence[str] = (),
    model: str | None = None,
    *,
    sp: int | None = None,
    dp: int | None = None,
) -> None:
    """Run this command as `nproc` processes, or as many as `dp` groups of `sp` are, and end as they do.

    Without any of them, and under torchrun, go on as this process. Raises ConfigError for a model that is not shipped,
    and under several processes for stdin, which they cannot share, and a Hugging Face model that would have to share a
    sequence; CheckpointError for a folder that holds no model.
    """
    from longnet_cli.presets import find_model, is_of_transformers

    needed = (dp or 1) * (sp or 1)
    if nproc is None and not under_torchrun() and needed > 1:
        nproc = needed
    world = int(os.environ.get("WORLD_SIZE", "1")) if under_torchrun() else nproc or 1
    shared = (sp or world // (dp or 1)) > 1
    if model is not None and is_of_transformers(find_model(model, files=True)) and shared:
        raise ConfigError(
            f"{model}: a Hugging Face model reads a document in one process: give every process its own documents "
            f"(--dp {world})"
        )
    if {"-", "@-"} & {*inputs} and world > 1:
        raise ConfigError("stdin can be read by one process: save it to a file, which every rank reads for itself")
    if nproc is not None:
        start_ranks(nproc)
