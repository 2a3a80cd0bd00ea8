"""The start of a command: the processes of `--nproc`, what several cannot do, and what its documents will keep.

What is imported stays, so the garbage collector is kept away from it.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longnet_cli.basics.errors import ConfigError, MemoryLimitError
from longnet_cli.basics.sizes import format_bytes
from longnet_cli.cli.options import Computing
from longnet_cli.cli.output import tell
from longnet_cli.running.ranks.launch import start_ranks, started_by_torchrun, under_torchrun

if TYPE_CHECKING:
    import torch

    from longnet_cli.jobs.estimating.estimate import Room
    from longnet_cli.models.folder import ModelFolder
    from longnet_cli.nets.net import Net


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


def room(folder: ModelFolder, dtype: str, device: torch.device) -> Room:
    """Return the memory before the model is loaded. Raises MemoryLimitError if its weights do not fit."""
    from longnet_cli.jobs.estimating.estimate import Room

    before = Room.now(device)
    folder.check_weights_fit(dtype, device, before.free)
    return before


def check_spill(spill: str | None, net: Net | None = None) -> None:
    """Raise ConfigError for a --spill that is no folder, and for a `net` that would keep nothing there."""
    if spill and not os.path.isdir(spill):
        raise ConfigError(f"--spill {spill}: no such folder")
    if spill and net and net.config.causal and not net.config.pattern.chosen:
        raise ConfigError("--spill is for keys and values of chosen blocks, and the pattern has none: leave it out")


class StateTeller:
    """A line on stderr for what a document keeps while it is read in chunks with chosen blocks: call it before.

    The longest one so far has a line, and later one that is twice as long. `more` tokens follow each document. Each is
    read whole, or at the longest of `contexts`, by `sp` processes.
    """

    def __init__(
        self,
        net: Net,
        computing: Computing,
        *,
        contexts: Sequence[int] | None = None,
        more: int = 0,
        sp: int = 1,
        quiet: bool,
    ) -> None:
        from longnet_cli.running.chunk_size import chunk_of, default_chunk

        self.config, self.device = net.config, next(net.parameters()).device
        self.computing, self.contexts, self.more, self.sp, self.quiet = computing, contexts, more, sp, quiet
        self.free = shutil.disk_usage(computing.spill).free if computing.spill else 0
        self.chunk = chunk_of(computing.chunk, default_chunk(self.config, self.device))
        self.said = self.chunk / 2

    def __call__(self, tokens: int) -> None:
        """Say what a document of so many tokens keeps.

        Raises MemoryLimitError if its part in the folder of --spill is larger than what was free there at first.
        """
        if not self.config.pattern.chosen:
            return
        from longnet_cli.jobs.estimating.memory import cache_bytes, itemsize_of

        spill = self.computing.spill
        tokens = min(tokens, max(self.contexts or (tokens,))) + self.more
        kept = cache_bytes(self.config, tokens, itemsize_of(self.computing.dtype, self.device), self.sp)
        size, blocks = sum(kept), kept.blocks
        if spill and blocks > self.free and tokens > self.chunk:
            raise MemoryLimitError(
                f"--spill {spill}: {tokens:,} tokens keep {format_bytes(blocks)} there, and {format_bytes(self.free)} "
                "are free"
            )
        if tokens <= 2 * self.said:
            return
        self.said = tokens
        where = f"{format_bytes(size - blocks)} of memory and {format_bytes(blocks)} in {spill}"
        where = where if spill else f"{format_bytes(size)} of memory"
        each = f" in each of {self.sp} processes" if self.sp > 1 else ""
        tell(f"{tokens:,} tokens keep {where} for chosen blocks{each}", self.quiet)
