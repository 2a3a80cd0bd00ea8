"""The ids that a model reads before each document, and the ids that end its texts.

Both come from its tokenizer and its configuration. `--bos` overrides the first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longnet_cli.configuration import parse, read_text
from longnet_cli.data.special_tokens import SETTINGS, special_token, token_id
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.presets import is_of_transformers

NONE = "none"


def document_start(folder: Path, words: Tokenizer | None, written: str | None = None) -> int | tuple[int, ...] | None:
    """Return the id, or ids, that the model in `folder` reads before each document; None for nothing.

    `written` is the value of `--bos`: none, a token of the tokenizer `words`, or an id. Without it, a LongNet reads
    the end-of-text id, with which its documents ended in training. A Hugging Face model reads the ids that its
    tokenizer's template puts before a text, otherwise `bos_token` if tokenizer_config.json sets `add_bos_token`,
    otherwise the `bos_token_id` of config.json, otherwise the end-of-text id. Raises ConfigError for an unknown token
    and for an id outside of the vocabulary.
    """
    if written is not None:
        return None if written == NONE else token_id("--bos", written, words)
    end = words.eos_id if words else None
    if not is_of_transformers(folder):
        return end
    if words and (ids := words.ids_before):
        return ids if ids[1:] else ids[0]
    settings = _table(folder / SETTINGS)
    if words and settings.get("add_bos_token") is True:
        found = words.id_of(special_token(settings.get("bos_token")))
        if found is not None:
            return found
    found = _table(folder / "config.json").get("bos_token_id")
    return found if isinstance(found, int) else end


def document_end(folder: Path, words: Tokenizer | None) -> frozenset[int]:
    """Return the ids that end the texts of the model in `folder`; empty where none are known.

    For a Hugging Face model, they are the `eos_token_id`, one or several, of generation_config.json, otherwise of
    config.json. Without it, and for a LongNet, it is the end-of-text id of the tokenizer.
    """
    for name in ("generation_config.json", "config.json") if is_of_transformers(folder) else ():
        found = _table(folder / name).get("eos_token_id")
        ids = {x for x in (found if isinstance(found, list) else [found]) if isinstance(x, int)}
        if ids:
            return frozenset(ids)
    return frozenset() if words is None or words.eos_id is None else frozenset({words.eos_id})


def _table(path: Path) -> dict[str, Any]:
    """Return the settings in a file; empty where there is no readable file."""
    try:
        found = parse(read_text(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
