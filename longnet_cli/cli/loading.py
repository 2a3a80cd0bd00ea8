"""What `--model` and `--tokenizer` name: loaded for the commands that read with a model, and never written over."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longnet_cli.cli.output import printable

if TYPE_CHECKING:
    import torch

    from longnet_cli.attention import Pattern
    from longnet_cli.data.documents import Document
    from longnet_cli.errors import LongNetError
    from longnet_cli.opening import Loaded


def refuse_overwriting(
    option: str, outputs: Sequence[str], inputs: Sequence[str], model: str, tokenizer: str | None
) -> None:
    """Raise ConfigError for an output that is an input, or a file of the model or the tokenizer."""
    from longnet_cli.data import overwriting
    from longnet_cli.data.tokenizer import Tokenizer
    from longnet_cli.presets import find_model

    overwriting.refuse_overwriting(
        option, outputs, inputs, [find_model(model, files=True), Tokenizer.find(tokenizer) if tokenizer else None]
    )


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
) -> Loaded:
    """Load what `opening.load_model` does, and raise what it raises; what it says goes to stderr, unless `quiet`."""
    from longnet_cli import opening

    def say(line: str) -> None:
        if not quiet and sys.stderr:
            print(printable(line), file=sys.stderr)

    return opening.load_model(name, tokenizer, tokenizer_differs, device, dtype, pattern, bos, chat=chat, say=say)


class Skipped:
    """Tells on stderr of each document that --skip-bad leaves out, unless `quiet`, and counts them."""

    def __init__(self, quiet: bool) -> None:
        self.number, self._quiet = 0, quiet

    def __call__(self, document: Document, error: LongNetError) -> None:
        self.number += 1
        if not self._quiet and sys.stderr:
            why = getattr(error, "why", str(error))
            print(printable(f"longnet: note: left out: {why}"), file=sys.stderr)

    def say(self) -> None:
        """Say how many they were."""
        if self.number and not self._quiet and sys.stderr:
            print(f"longnet: note: {self.number} document{'s' * (self.number > 1)} left out", file=sys.stderr)
