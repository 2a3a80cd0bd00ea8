"""The count of what a run leaves out of its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from longnet_cli.basics.errors import LongNetError

OnSkip = Callable[[Any, LongNetError], None]  # called with a document or a text that is left out, and the reason


class LeftOut:
    """The number of documents that have no row: `skipped` ones, which cannot be read, and `empty` ones.

    `skipped_files` of the skipped ones are files, whose documents nobody has counted.

    A job calls `skip` with each document, row or file that it cannot read, and this calls `on_skip`. Without `on_skip`,
    `skip` is None: such a document ends the run.
    """

    def __init__(self, on_skip: OnSkip | None = None) -> None:
        self.skipped = self.skipped_files = self.empty = 0
        self._on_skip = on_skip
        self.skip: OnSkip | None = self._skip if on_skip else None

    def pass_over(self, document: Any) -> None:
        """Count an empty document."""
        self.empty += 1

    def take(self, totals: Mapping[str, int]) -> None:
        """Take the counts from the totals of a manifest instead."""
        self.skipped, self.empty = totals.get("skipped", 0), totals.get("empty", 0)
        self.skipped_files = totals.get("skipped_files", 0)

    def __str__(self) -> str:
        """Return what was skipped, such as `2 documents and 1 file left out`."""
        counts = {"document": self.skipped - self.skipped_files, "file": self.skipped_files}
        counted = [f"{count} {what}{'s' * (count > 1)}" for what, count in counts.items() if count]
        return f"{' and '.join(counted)} left out"

    def _skip(self, document: Any, error: LongNetError) -> None:
        self.skipped += 1
        self.skipped_files += getattr(document, "file", False)  # an Unread has it
        if self._on_skip:
            self._on_skip(document, error)
