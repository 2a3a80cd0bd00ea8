"""Special tokens: the end of a text, the tokens that options name, and tokenizer_config.json, which names some."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longnet_cli.configuration import parse, read_text
from longnet_cli.errors import ConfigError
from longnet_cli.shipped import END_OF_TEXT

if TYPE_CHECKING:
    from longnet_cli.data.tokenizer import Tokenizer

SETTINGS = "tokenizer_config.json"  # what transformers writes beside a tokenizer.json

# The end-of-text token: the one that SETTINGS names (models that mask tokens have only `sep_token`), otherwise the
# first of EOS_NAMES in the vocabulary.
EOS_KEYS = ("eos_token", "sep_token")
EOS_NAMES = (
    *(END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>"),
    *("<|eot_id|>", "<|im_end|>", "<|end\u2581of\u2581sentence|>", "[SEP]"),
)
NO_END = (
    f"the tokenizer has no end-of-text token: neither {SETTINGS} ({' or '.join(EOS_KEYS)}) names one of its tokens, "
    f"nor is any of {' '.join(EOS_NAMES)} among them"
)

_MEANING = {"--eos": "end-of-text", "--bos": "begin-of-text"}


def end_of_text(written: str | int | bool | None, tokenizer: Tokenizer | None) -> int | None:
    """Return the id that `--eos` names (see `token_id`): the tokenizer's own for True, None for None and False.

    Raises ConfigError for an unknown token or id, and for True if the tokenizer has no end-of-text token.
    """
    if written is None or written is False:
        return None
    if written is True:
        found = tokenizer.eos_id if tokenizer else None
        if found is None:
            raise ConfigError(f"{NO_END}: name a token or an id (--eos)")
        return found
    return token_id("--eos", written, tokenizer)


def token_id(option: str, written: str | int, tokenizer: Tokenizer | None) -> int:
    """Return the id that an option names: a number, or a token of the tokenizer.

    Raises ConfigError for a token that the tokenizer does not have, and for an id that does not fit its vocabulary.
    """
    size = tokenizer.vocab_size if tokenizer else 1 << 63
    if isinstance(written, int) or re.fullmatch(r"[-+]?[0-9]+", written):
        number = int(written) if len(str(written)) < 20 else -1
        if not 0 <= number < size:
            limit = f"a vocabulary of {size}" if tokenizer else "64 bits"
            raise ConfigError(f"the {_MEANING[option]} id {written} ({option}) does not fit {limit}")
        return number
    if tokenizer is None:
        raise ConfigError(f"{option} {written} is no id, and there is no tokenizer that has it as a token: give its id")
    found = tokenizer.id_of(written)
    if found is None:
        raise ConfigError(f"{option} {written}: the tokenizer has no such token; name one of its tokens, or an id")
    return found


def special_token(written: Any) -> str:
    """Return the text of a special token as tokenizer_config.json writes it, plain or in a table; empty for none."""
    found = written.get("content") if isinstance(written, dict) else written
    return found if isinstance(found, str) else ""


def read_settings(path: Path) -> dict[str, Any]:
    """Return the contents of a tokenizer_config.json, empty if it is missing. Raises ConfigError for a damaged one."""
    try:
        found = parse(read_text(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    return found if isinstance(found, dict) else {}
