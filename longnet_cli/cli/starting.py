"""The start of a command: the processes of `--nproc`, what is done once before it, what several cannot do.

What is imported stays, so the garbage collector is kept away from it.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longnet_cli.basics.errors import ConfigError
from longnet_cli.running.ranks.launch import start_ranks, started_by_torchrun, under_torchrun

if TYPE_CHECKING:
    from longnet_cli.models.folder import ModelFolder


def freeze_imports() -> None:
    """Leave all objects out of later collections. Call it after the imports: torch's objects take 0.2 s each time."""
    gc.freeze()
    atexit.register(_free_triton)


def _free_triton() -> None:
    if "triton" in sys.modules:  # its bindings report what the last collection cannot free
        gc.unfreeze()


def launch(
    nproc: int | None,
    inputs: Sequence[str] = (),
    folder: ModelFolder | None = None,
    *,
    sp: int | None = None,
    dp: int | None = None,
) -> None:
    """Run this command as `nproc` processes, or as `dp` groups of `sp` processes, and exit with their exit code.

    Without any of these options, or without `nproc` under torchrun, return: the command goes on in this process. Raises
    ConfigError for `nproc` under torchrun; with several processes, for stdin or a pipe, which they cannot share, and
    for a Hugging Face model in `folder` that would have to share a sequence.
    """
    needed = (dp or 1) * (sp or 1)
    if nproc is None and not started_by_torchrun() and needed > 1:
        nproc = needed
    world = int(os.environ.get("WORLD_SIZE", "1")) if under_torchrun() else nproc or 1
    shared = (sp or world // (dp or 1)) > 1
    if shared and folder and folder.of_transformers:
        raise ConfigError(
            f"{folder.name}: a Hugging Face model reads a document in one process: give every process its own "
            f"documents (--dp {world})"
        )
    if world > 1 and (read_once := [item for item in inputs if _is_read_once(item)]):
        name = "stdin" if read_once[0] in ("-", "@-") else read_once[0]
        raise ConfigError(f"{name} can be read by one process: save it to a file, which every rank reads for itself")
    if nproc is not None:
        start_ranks(nproc)


def ask_hub(model: str | None, tokenizer: str | None) -> None:
    """Do what --update says: download what is new of a model or a tokenizer on a hub, before any rank is started.

    Raises ConfigError under torchrun, and as `hub.model_names.refresh` does.
    """
    from longnet_cli.hub.model_names import refresh

    if under_torchrun():
        raise ConfigError("--update is for one process, and torchrun starts several: update first, then start them")
    refresh(model, tokenizer)


def _is_read_once(item: str) -> bool:
    """Return whether an input is a stream, which only one process can read."""
    stream = item.startswith("/dev/") or (os.path.exists(item) and not (os.path.isfile(item) or os.path.isdir(item)))
    return item in ("-", "@-") or stream
