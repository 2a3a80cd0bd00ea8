"""The loading of `--model` and `--tokenizer` for jobs that read documents: the net, its tokenizer, its start ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from longnet_cli.attention import Pattern
from longnet_cli.data.bos import document_end, document_start
from longnet_cli.data.chat import ChatTemplate
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.errors import ConfigError
from longnet_cli.integrations.converting import unpacked
from longnet_cli.integrations.loading import load_net
from longnet_cli.model.net import Net
from longnet_cli.presets import find_model
from longnet_cli.runtime.device import DTYPES, check_kernel, keep_freed_memory, resolve_dtype


class Loaded(NamedTuple):
    """A model, its tokenizer, and the ids `bos` that it reads before each document; None for a missing part.

    `ends` are the ids at which the model's own texts end, `chat` is its chat template if you asked for it.
    """

    net: Net
    tokenizer: Tokenizer | None
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
    *,
    chat: bool = False,
    vectors: bool = False,
    say: Callable[[str], None] | None = None,
) -> Loaded:
    """Load the model `name` (--model) on `device` for `dtype` (--dtype), with `tokenizer` (--tokenizer) or its own.

    `bos` is --bos. `say` gets a line for each thing that the user should know about the way the model reads documents.
    Raises ConfigError for a tokenizer that is not the model's, unless `tokenizer_differs`; for a tokenizer with more
    ids than the model; for a model that reads vectors, unless `vectors`; and for an attention kernel that cannot run in
    `dtype`.
    """
    say = say or (lambda line: None)
    found, kind = find_model(name, files=True), resolve_dtype(dtype, device)
    if found.is_file():
        say(f"{name}: converted for this run; longnet convert does it once")
    if device.type == "cpu":
        keep_freed_memory()
    with unpacked(found, kind) as folder:
        tokenizer_used = Tokenizer.of_model(folder, tokenizer, differs=tokenizer_differs)
        before, ends = document_start(folder, tokenizer_used, bos), document_end(folder, tokenizer_used)
        template = _template(folder, tokenizer_used) if chat else None
        net = load_net(folder, pattern=pattern, device=device, dtype=DTYPES[kind])
    check_kernel(device, dtype, net.config.head_dim)
    if not net.config.vocab_size:
        if not vectors:
            raise ConfigError(f"{name}: this model has no vocabulary: it reads vectors, not tokens")
        tokenizer_used = before = None
    if tokenizer_used and tokenizer_used.vocab_size > net.config.vocab_size:
        raise ConfigError(
            f"{tokenizer or found / 'tokenizer.json'}: the tokenizer has {tokenizer_used.vocab_size} ids and the model "
            f"{net.config.vocab_size}: they do not belong together"
        )
    if net.note:
        say(f"{name}: {net.note}")
    return Loaded(net, tokenizer_used, before, ends, template)


def _template(folder: Path, tokenizer_used: Tokenizer | None) -> ChatTemplate:
    if tokenizer_used is None:
        raise ConfigError(f"{folder}: there is no tokenizer, which --chat needs: give --tokenizer")
    return ChatTemplate(folder, tokenizer_used)
