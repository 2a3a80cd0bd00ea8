"""Functions that commands share: load `--model` and `--tokenizer`, protect files, count what is left out."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from longnet_cli.cli.output import printable
from longnet_cli.errors import LEFT_OUT

if TYPE_CHECKING:
    import torch

    from longnet_cli.attention import Pattern
    from longnet_cli.data.documents import Document
    from longnet_cli.data.tables import Text
    from longnet_cli.errors import LongNetError
    from longnet_cli.opening import Loaded


def refuse_overwriting(
    option: str, outputs: Sequence[str], inputs: Sequence[str], model: str, tokenizer: str | None, skip_bad: bool
) -> None:
    """Raise ConfigError for an output that is an input, or a file of the model or the tokenizer."""
    from longnet_cli.data import overwriting
    from longnet_cli.data.tokenizer import Tokenizer
    from longnet_cli.presets import find_model

    also = [find_model(model, files=True), Tokenizer.find(tokenizer) if tokenizer else None]
    overwriting.refuse_overwriting(option, outputs, inputs, also, skip_bad=skip_bad)


def load_model(
    name: str,
    tokenizer: str | None,
    tokenizer_differs: bool,
    device: torch.device,
    dtype: str,
    pattern: Pattern | None = None,
    bos: str | None = None,
    quiet: bool = False,
    *,
    chat: bool = False,
    vectors: bool = False,
) -> Loaded:
    """Call `opening.load_model`, and print the lines that it says to stderr, unless `quiet`."""
    from longnet_cli import opening

    def say(line: str) -> None:
        if not quiet and sys.stderr:
            print(printable(line), file=sys.stderr)

    return opening.load_model(
        name, tokenizer, tokenizer_differs, device, dtype, pattern, bos, chat=chat, vectors=vectors, say=say
    )


class Skipped:
    """A counter of the documents that --skip-bad leaves out and of empty ones. Reports to stderr, unless `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self.number, self.empty, self._quiet = 0, 0, quiet

    def __call__(self, document: Document | Text, error: LongNetError) -> None:
        """Count a document, a row or a file that is left out, and report the reason."""
        self.number += 1
        self._say(f"left out: {getattr(error, 'why', str(error))}")

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
                self._say(f"{number} document{'s' * (number > 1)} {what}")
        if self.number and first:
            raise typer.Exit(LEFT_OUT)

    def _say(self, line: str) -> None:
        if not self._quiet and sys.stderr:
            print(printable(f"longnet: note: {line}"), file=sys.stderr)
