"""Functions for the commands with `-o`: checks before a model is loaded, the counts of --skip-bad, exit code 6."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from longnet_cli.cli.output import note
from longnet_cli.errors import LEFT_OUT, ConfigError

if TYPE_CHECKING:
    from longnet_cli.data.left_out import LeftOut
    from longnet_cli.data.manifest import Manifest
    from longnet_cli.errors import LongNetError


def check_output(
    output: str, where_to: str, for_folder: Mapping[str, Any], *, resume: bool, dry_run: bool = False
) -> Manifest | None:
    """Return the manifest of the earlier run that `resume` continues, if any. A `dry_run` does not look for one.

    `where_to` is the error for a terminal. `for_folder` maps the names of options for a folder of shards to their
    values. Raises ConfigError for an output that cannot be written, and for options that do not fit it.
    """
    if output == "-" and not dry_run and sys.stdout and sys.stdout.isatty():
        raise ConfigError(where_to)
    from longnet_cli.data.outputs import is_folder
    from longnet_cli.data.shards import run_to_resume

    for name in (name for name, value in for_folder.items() if value and not is_folder(output)):
        why = "one file is what its name says" if name == "--shard-format" else "a single file or stream has no parts"
        raise ConfigError(f"{output}: {name} is for a folder of shards: {why}")
    return run_to_resume(output, resume=resume) if is_folder(output, resume=resume) and not dry_run else None


def count_left_out(skip_bad: bool, quiet: bool) -> LeftOut:
    """Return a count of what --skip-bad leaves out and of empty documents, with a note on stderr unless `quiet`."""
    from longnet_cli.data.left_out import LeftOut

    def tell(_: Any, error: LongNetError) -> None:
        note(f"left out: {getattr(error, 'why', str(error))}", quiet)

    return LeftOut(tell if skip_bad else None)


def end(left_out: LeftOut, *, first: bool, quiet: bool) -> None:
    """Report the counts, unless `quiet`. If documents were skipped, the `first` rank exits with code 6."""
    for number, what in ((left_out.empty, "empty"), (left_out.skipped, "left out")):
        if number:
            note(f"{number} document{'s' * (number > 1)} {what}", quiet)
    if left_out.skipped and first:
        raise typer.Exit(LEFT_OUT)
