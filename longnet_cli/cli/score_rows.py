"""The output of `longnet score -o`: a row per document, in a file or a folder of shards."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from longnet_cli.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

    from longnet_cli.data.documents import Document
    from longnet_cli.data.shards import ShardFolder
    from longnet_cli.gains import GainOptions
    from longnet_cli.model.net import Net
    from longnet_cli.runtime.ranks import Ranks


def check(
    output: str | None, *, resume: bool, shard_tokens: int | None, others: Mapping[str, Any], dry_run: bool = False
) -> int:
    """Check the output before a model is loaded, and return the number of tokens that an earlier run has scored.

    `others` maps the names of options that only printed scores can have to their values. A `dry_run` writes nothing, so
    it takes any output. Raises ConfigError for an output that cannot be written, and for options that do not fit it.
    """
    if output is None:
        if given := [name for name, value in (("--resume", resume), ("--shard-tokens", shard_tokens)) if value]:
            raise ConfigError(f"{given[0]} is for a folder of rows: name it (-o FOLDER)")
        return 0
    if given := [name for name, value in others.items() if value]:
        raise ConfigError(f"{given[0]} is for scores that are printed, and -o writes rows: leave one out")
    if output == "-" and not dry_run and sys.stdout and sys.stdout.isatty():
        raise ConfigError("the rows are binary, stdout is a terminal: name a file (-o gains.parquet) or pipe them")
    from longnet_cli.data.outputs import is_folder
    from longnet_cli.data.shards import run_to_resume

    if not is_folder(output):
        for name, value in (("--resume", resume), ("--shard-tokens", shard_tokens)):
            if value:
                raise ConfigError(f"{output}: {name} is for a folder of shards: a single file or stream has no parts")
        return 0
    earlier = None if dry_run else run_to_resume(output, resume=resume)
    return earlier.totals["tokens"] if earlier else 0


def write(
    net: Net,
    documents: Iterable[Document],
    output: str,
    options: GainOptions,
    *,
    settings: Mapping[str, Any],
    shard_tokens: int | None,
    resume: bool,
    kept_fields: Sequence[pa.Field],
    ranks: Ranks,
    **running: Any,
) -> ShardFolder | None:
    """Write a row per document to `output`, on the first of the `ranks`. `running` is as in `gains.gains`.

    Return the closed folder of shards if the output is one, otherwise None.
    """
    from longnet_cli.data.outputs import ShardWriter, is_folder
    from longnet_cli.gains import SHARD_TOKENS, gains, gains_to_folder

    running |= {"kept_fields": kept_fields, "ranks": ranks}
    if is_folder(output):
        return gains_to_folder(
            net,
            documents,
            output,
            options,
            settings=settings,
            shard_tokens=shard_tokens or SHARD_TOKENS,
            resume=resume,
            **running,
        )
    with ShardWriter(output, options.schema(kept_fields)) if ranks.first else nullcontext() as writer:
        for batch in gains(net, documents, options, **running):
            if writer and batch.num_rows:
                writer.write(batch)
    return None
