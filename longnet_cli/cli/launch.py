"""Start the processes of `--nproc`, after refusing what several processes cannot do."""

from __future__ import annotations

from collections.abc import Sequence

from longnet_cli.errors import ConfigError
from longnet_cli.runtime.launch import start_ranks, under_torchrun


def launch(nproc: int | None, inputs: Sequence[str] = (), model: str | None = None) -> None:
    """Run this command as `nproc` processes and end as they do; without --nproc, go on as this process.

    Raises ConfigError for a model that is not shipped, and under several processes for stdin, which they cannot share,
    and a Hugging Face model; CheckpointError for a folder that holds no model.
    """
    from longnet_cli.presets import find_model, is_of_transformers

    several = under_torchrun() or (nproc or 1) > 1
    if model is not None and is_of_transformers(find_model(model, files=True)) and several:
        raise ConfigError(f"{model}: a Hugging Face model runs in one process, without --nproc or torchrun")
    if {"-", "@-"} & {*inputs} and several:
        raise ConfigError("stdin can be read by one process: save it to a file, which every rank reads for itself")
    if nproc is not None:
        start_ranks(nproc)
