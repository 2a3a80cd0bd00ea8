"""Ids that a model reads before each document and ends its texts with, by its tokenizer and its configuration.

`--bos` says the first otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longnet_cli.configuration import parse, read_text
from longnet_cli.data.tokenizer import SETTINGS, Tokenizer, special_token, token_id
from longnet_cli.presets import is_of_transformers

NONE = "none"


def document_start(folder: Path, words: Tokenizer | None, written: str | None = None) -> int | tuple[int, ...] | None:
    """Return the id, or ids, that the model in `folder` reads before each document; None for nothing.

    `written` is `--bos`: none, a token of the tokenizer `words`, or an id. Without it, a LongNet reads the end-of-text
    id, with which its documents ended in training. A Hugging Face model reads what its tokenizer's template puts
    before a text, otherwise `bos_token` where tokenizer_config.json says `add_bos_token`, otherwise the `bos_token_id`
    of config.json, otherwise the end-of-text id. Raises ConfigError for a token or an id that is none.
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
    """Return the ids at which the texts of the model in `folder` end; none where nothing says so.

    They are the `eos_token_id` of a Hugging Face model, one or several, in generation_config.json, otherwise in
    config.json. Without it, and for a LongNet, the end-of-text id of its tokenizer.
    """
    for name in ("generation_config.json", "config.json") if is_of_transformers(folder) else ():
        found = _table(folder / name).get("eos_token_id")
        ids = {x for x in (found if isinstance(found, list) else [found]) if isinstance(x, int)}
        if ids:
            return frozenset(ids)
    return frozenset() if words is None or words.eos_id is None else frozenset({words.eos_id})


def _table(path: Path) -> dict[str, Any]:
    """A file of settings; nothing where there is none that can be read."""
    try:
        found = parse(read_text(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
