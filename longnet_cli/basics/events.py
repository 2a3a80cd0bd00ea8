"""One object that is told what happens while a job runs. Every job takes one; without it, nobody is told anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .errors import LongNetError

# Called with a document, a text or a file that cannot be read, and why.
OnSkip = Callable[[Any, LongNetError], None]


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""


class LeftOut:
    """The number of documents that have no row.

    `skipped` ones cannot be read; `skipped_files` of these are files, whose documents nobody has counted. `empty` ones
    have no token, and `short` ones have fewer than the job needs.

    A job calls `skip` with each document, row or file that it cannot read, and this calls `on_skip`. Without `on_skip`,
    `skip` is None: such a document ends the run.
    """

    KINDS = ("skipped", "skipped_files", "empty", "short")

    def __init__(self, on_skip: OnSkip | None = None) -> None:
        self.skipped = 0
        self.skipped_files = 0
        self.empty = 0
        self.short = 0
        self.skip: OnSkip | None = partial(self._skip, on_skip) if on_skip else None

    @classmethod
    def of(cls, skip_bad: bool, on_skip: OnSkip = _nothing) -> LeftOut:
        """Return a count. Only with `skip_bad`, the job leaves out what it cannot read, and calls `on_skip` with it."""
        return cls(on_skip if skip_bad else None)

    def take(self, totals: Mapping[str, int]) -> None:
        """Take the counts from the totals of a manifest instead."""
        for kind in self.KINDS:
            setattr(self, kind, totals.get(kind, 0))

    def counts(self) -> dict[str, int]:
        """Return the counts for a manifest."""
        return {kind: getattr(self, kind) for kind in self.KINDS}

    def __str__(self) -> str:
        """Return what was skipped, such as `2 documents and 1 file left out`."""
        counts = {"document": self.skipped - self.skipped_files, "file": self.skipped_files}
        counted = [f"{count} {what}{'s' * (count > 1)}" for what, count in counts.items() if count]
        return f"{' and '.join(counted)} left out"

    def _skip(self, on_skip: OnSkip, document: Any, error: LongNetError) -> None:
        self.skipped += 1
        self.skipped_files += getattr(document, "file", False)  # an Unread has it
        on_skip(document, error)


@dataclass(frozen=True, kw_only=True)
class Events:
    """The functions that a job calls while it runs, and the counts that it keeps. If a function raises, the job ends.

    progress: the amount of work since the last call: tokens, or bytes, or percents, as the job says.
    total: the amount of all work, where it is known only while the job runs.
    note: a line for a person.
    left_out: counts the documents that have no row, and says whether those that cannot be read end the run.
    document: a document, before any of it is read, and the fraction of the inputs up to its end; None if unknown.
    logprobs: a document, a place in it, the ids from there on and their log-probabilities (n,), and, if the job was
        asked for them, the most likely ids and their log-probabilities. None: they are not computed.
    begin: the steps and tokens that an earlier run has trained.
    step: the tokens of a training step, and its line of metrics or None.
    evaluation: the fraction of the held-out tokens that is read.
    """

    progress: Callable[..., None] = _nothing
    total: Callable[[int], None] = _nothing
    note: Callable[[str], None] = _nothing
    left_out: LeftOut = field(default_factory=LeftOut)
    document: Callable[[Any, float | None], None] = _nothing
    logprobs: Callable[..., None] | None = None
    begin: Callable[[int, int], None] = _nothing
    step: Callable[[int, Any], None] = _nothing
    evaluation: Callable[[float], None] = _nothing
