"""Where a model's own texts end: the ids at which generation stops."""

from __future__ import annotations

from pathlib import Path

from longnet_cli.configuration import parse, read_text
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.presets import is_of_transformers


def end_ids(folder: Path, words: Tokenizer | None) -> frozenset[int]:
    """Return the `eos_token_id`s of a model of transformers, in generation_config.json, otherwise in config.json.

    Without them, and for a LongNet, the end-of-text id of its tokenizer; nothing where it has none.
    """
    for name in ("generation_config.json", "config.json") if is_of_transformers(folder) else ():
        try:
            settings = parse(read_text(folder / name))
        except (OSError, ValueError):
            continue
        found = settings.get("eos_token_id") if isinstance(settings, dict) else None
        ids = {x for x in (found if isinstance(found, list) else [found]) if isinstance(x, int)}
        if ids:
            return frozenset(ids)
    return frozenset() if words is None or words.eos_id is None else frozenset({words.eos_id})
