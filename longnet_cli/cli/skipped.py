"""The counts of documents that `--skip-bad` leaves out, and exit code 6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer

from longnet_cli.cli.output import note
from longnet_cli.errors import LEFT_OUT

if TYPE_CHECKING:
    from longnet_cli.data.documents import Document
    from longnet_cli.errors import LongNetError


class Skipped:
    """A counter of the documents that --skip-bad leaves out and of empty ones. Reports to stderr, unless `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self.number, self.empty, self._quiet = 0, 0, quiet

    def __call__(self, document: Document, error: LongNetError) -> None:
        """Count a document, a row or a file that is left out, and report the reason."""
        self.number += 1
        note(f"left out: {getattr(error, 'why', str(error))}", self._quiet)

    def pass_over(self, document: Document) -> None:
        """Count an empty document."""
        self.empty += 1

    def set_counts(self, totals: Mapping[str, int]) -> None:
        """Take the counts from a folder's totals: if an earlier run finished it, this run has counted nothing."""
        self.number, self.empty = totals.get("skipped", 0), totals.get("empty", 0)

    def end(self, first: bool, *, reported: bool = False) -> None:
        """Report the counts, unless `reported` already. If some were left out, the `first` rank exits with code 6."""
        for number, what in ((self.empty, "empty"), (self.number, "left out")):
            if number and not reported:
                note(f"{number} document{'s' * (number > 1)} {what}", self._quiet)
        if self.number and first:
            raise typer.Exit(LEFT_OUT)
