"""Load what `--model` and `--tokenizer` name, for the commands that read with a model, and never written over."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from longnet_cli.cli.output import printable
from longnet_cli.errors import LEFT_OUT

if TYPE_CHECKING:
    import torch

    from longnet_cli.attention import Pattern
    from longnet_cli.data.chat import ChatTemplate
    from longnet_cli.data.documents import Document
    from longnet_cli.data.tokenizer import Tokenizer
    from longnet_cli.errors import LongNetError
    from longnet_cli.model.net import Net


def refuse_overwriting(
    option: str, outputs: Sequence[str], inputs: Sequence[str], model: str, tokenizer: str | None, skip_bad: bool
) -> None:
    """Raise ConfigError for an output that is an input, or a file of the model or the tokenizer."""
    from longnet_cli.data import overwriting
    from longnet_cli.data.tokenizer import Tokenizer
    from longnet_cli.presets import find_model

    also = [find_model(model, files=True), Tokenizer.find(tokenizer) if tokenizer else None]
    overwriting.refuse_overwriting(option, outputs, inputs, also, skip_bad=skip_bad)


class Loaded(NamedTuple):
    """A model, its tokenizer, and what it reads before each document; None for what there is not.

    `ends` are the ids at which the model's own texts end, `chat` its chat template where that is asked for.
    """

    net: Net
    words: Tokenizer | None
    bos: int | tuple[int, ...] | None
    ends: frozenset[int]
    chat: ChatTemplate | None


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
    """The model that --model names, for --dtype on `device`, and --tokenizer, or its own without it; `bos` is --bos.

    Says on stderr, unless `quiet`, what the user should know of how it reads documents.
    Raises ConfigError for a tokenizer that is not the model's, unless `tokenizer_differs`, or has ids that the
    model does not have, a model that reads `vectors` where these are not taken, or an attention kernel that cannot run
    in `dtype`.
    """
    from longnet_cli.data.bos import document_end, document_start
    from longnet_cli.data.tokenizer import Tokenizer
    from longnet_cli.errors import ConfigError
    from longnet_cli.integrations.converting import unpacked
    from longnet_cli.integrations.loading import load_net
    from longnet_cli.presets import find_model
    from longnet_cli.runtime.device import DTYPES, check_kernel, keep_freed_memory, resolve_dtype

    found, kind = find_model(name, files=True), resolve_dtype(dtype, device)
    if found.is_file() and not quiet and sys.stderr:
        print(printable(f"{name}: converted for this run; longnet convert does it once"), file=sys.stderr)
    if device.type == "cpu":
        keep_freed_memory()
    with unpacked(found, kind) as folder:
        words = Tokenizer.of_model(folder, tokenizer, differs=tokenizer_differs)
        before, ends = document_start(folder, words, bos), document_end(folder, words)
        template = _template(folder, words) if chat else None
        net = load_net(folder, pattern=pattern, device=device, dtype=DTYPES[kind])
    check_kernel(device, dtype, net.config.head_dim)
    if not net.config.vocab_size:
        if not vectors:
            raise ConfigError(f"{name}: this model has no vocabulary: it reads vectors, not tokens")
        words = before = None
    if words and words.vocab_size > net.config.vocab_size:
        raise ConfigError(
            f"{tokenizer or found / 'tokenizer.json'}: the tokenizer has {words.vocab_size} ids and the model "
            f"{net.config.vocab_size}: they do not belong together"
        )
    if net.note and not quiet and sys.stderr:
        print(printable(f"{name}: {net.note}"), file=sys.stderr)
    return Loaded(net, words, before, ends, template)


def _template(folder: Path, words: Tokenizer | None) -> ChatTemplate:
    from longnet_cli.data.chat import ChatTemplate
    from longnet_cli.errors import ConfigError

    if words is None:
        raise ConfigError(f"{folder}: there is no tokenizer, which --chat needs: give --tokenizer")
    return ChatTemplate(folder, words)


class Skipped:
    """Tells on stderr of what --skip-bad leaves out, and how many documents are empty, unless `quiet`; counts them."""

    def __init__(self, quiet: bool) -> None:
        self.number, self.empty, self._quiet = 0, 0, quiet

    def __call__(self, document: Document, error: LongNetError) -> None:
        """Take a document, a row or a file that is left out, and why."""
        self.number += 1
        self._say(f"left out: {getattr(error, 'why', str(error))}")

    def pass_over(self, document: Document) -> None:
        """Take a document in which there is nothing."""
        self.empty += 1

    def end(self, first: bool) -> None:
        """Say how many they were, and end with exit code 6 where one was left out and this is the `first` rank."""
        for number, what in ((self.empty, "empty"), (self.number, "left out")):
            if number:
                self._say(f"{number} document{'s' * (number > 1)} {what}")
        if self.number and first:
            raise typer.Exit(LEFT_OUT)

    def _say(self, line: str) -> None:
        if not self._quiet and sys.stderr:
            print(printable(f"longnet: note: {line}"), file=sys.stderr)
