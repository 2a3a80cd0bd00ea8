"""The state that a document keeps while it is read: where it is kept (`--spill`), and the line that says how much."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from longnet_cli.basics.errors import ConfigError, MemoryLimitError
from longnet_cli.basics.sizes import format_bytes
from longnet_cli.cli.options import Computing
from longnet_cli.cli.output import tell

if TYPE_CHECKING:
    from longnet_cli.data.documents import Document
    from longnet_cli.nets.net import Net


def check_spill(spill: str | None, net: Net | None = None) -> None:
    """Raise ConfigError for a --spill that is no folder, and for a `net` that would keep nothing there."""
    if spill and not os.path.isdir(spill):
        raise ConfigError(f"--spill {spill}: no such folder")
    if spill and net and net.config.causal and not net.config.pattern.chosen:
        raise ConfigError("--spill is for keys and values of chosen blocks, and the pattern has none: leave it out")


def say_state(
    documents: Iterable[Document],
    *,
    stored: Iterable[Document] = (),
    net: Net,
    computing: Computing,
    contexts: Sequence[int] | None = None,
    more: int = 0,
    sp: int = 1,
    quiet: bool,
) -> Iterator[Document]:
    """Yield the documents, and say on stderr what the longest one keeps, if it is read in chunks with chosen blocks.

    Lengths of `stored` documents are known before the first one; otherwise, one that is twice as long as those before
    has a line of its own. `more` tokens follow each document. Each is read whole, or at the longest of `contexts`,
    by `sp` processes.
    Raises MemoryLimitError for one whose part in the folder of --spill is larger than what was free there at first.
    """
    from longnet_cli.jobs.estimating.memory import cache_bytes, itemsize_of
    from longnet_cli.running.chunk_size import chunk_of, default_chunk

    config, device, spill = net.config, next(net.parameters()).device, computing.spill
    free = shutil.disk_usage(spill).free if spill else 0
    chunk = chunk_of(computing.chunk, default_chunk(config, device))
    said = chunk / 2

    def say(tokens: int) -> None:
        nonlocal said
        tokens = min(tokens, max(contexts or (tokens,))) + more
        kept = cache_bytes(config, tokens, itemsize_of(computing.dtype, device), sp)
        size, blocks = sum(kept), kept.blocks
        if spill and blocks > free and tokens > chunk:
            raise MemoryLimitError(
                f"--spill {spill}: {tokens:,} tokens keep {format_bytes(blocks)} there, and {format_bytes(free)} "
                "are free"
            )
        if tokens <= 2 * said:
            return
        said = tokens
        where = f"{format_bytes(size - blocks)} of memory and {format_bytes(blocks)} in {spill}"
        where = where if spill else f"{format_bytes(size)} of memory"
        each = f" in each of {sp} processes" if sp > 1 else ""
        tell(f"{tokens:,} tokens keep {where} for chosen blocks{each}", quiet)

    if config.pattern.chosen:
        say(max(map(len, stored), default=0))
    for document in documents:
        if config.pattern.chosen:
            say(len(document))
        yield document
