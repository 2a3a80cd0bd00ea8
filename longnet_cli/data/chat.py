"""Messages as the text that a tokenizer's chat template makes of them: a prompt, or a whole chat.

A template is a text of Jinja in the model's folder. It runs in Jinja's sandbox, which reads and changes nothing but
what it is given here: messages and the names of special tokens. Special tokens come from the template alone: what looks
like one in a message is encoded as its characters, as everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import numpy as np
import tokenizers
from jinja2 import ext, nodes, parser, sandbox

from longnet_cli.configuration import digest, read_text
from longnet_cli.data.tokenizer import SETTINGS, Tokenizer, read_settings, special_token
from longnet_cli.errors import ConfigError
from longnet_cli.finite_json import to_json

TEMPLATE = "chat_template.jinja"


def chat_settings(words: Tokenizer | None) -> dict[str, str]:
    """Return the digest of the template beside a tokenizer, which a resumed run must have the same; nothing without."""
    if words is None or words.folder is None:
        return {}
    settings = read_settings(words.folder / SETTINGS)
    template = _template(words.folder, settings)
    return {} if template is None else {"chat_template": digest([template, _named_tokens(settings)])}


class ChatTemplate:
    """The chat template in a model's folder, for its tokenizer `words`.

    Raises ConfigError where there is none, or one that cannot be read.
    """

    def __init__(self, folder: Path, words: Tokenizer) -> None:
        self.where, self.words = str(folder), words
        self._settings = read_settings(folder / SETTINGS)
        found = _template(folder, self._settings)
        if found is None:
            raise ConfigError(f"{folder}: no chat template ({TEMPLATE}, or chat_template in {SETTINGS}) for chats")
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: to_json(value, indent=indent, ensure_ascii=False)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(found)
        except jinja2.TemplateError as error:
            raise self._error(error) from None
        self._special = [added["content"] for added in words.added_tokens if added["special"]]
        self._inner = tokenizers.Tokenizer.from_str(words.to_json())
        self._inner.encode_special_tokens = False

    def encode(self, message: str) -> np.ndarray:
        """The prompt in which a user says `message` and an assistant is to answer: (tokens,) int64."""
        return self._encode(*self._marked([{"role": "user", "content": message}], prompt=True))

    def read_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, Callable[[], np.ndarray]]:
        """The text of a chat of messages, each with a `role` and its `content`, and what gives its (tokens,) int64.

        The `bos_token` that a template may put at its beginning is no token: who reads a document puts its own there.
        Raises ConfigError for what the template refuses.
        """
        rendered, mark = self._marked(messages, prompt=False)
        return rendered.replace(mark, ""), partial(self._encode_chat, rendered, mark)

    def _encode_chat(self, rendered: str, mark: str) -> np.ndarray:
        ids = self._encode(rendered, mark)
        first = self.words.id_of(special_token(self._settings.get("bos_token")))
        return ids[1:] if first is not None and len(ids) and ids[0] == first else ids

    def _marked(self, messages: Sequence[Mapping[str, str]], *, prompt: bool) -> tuple[str, str]:
        """The text that the template makes of messages, and the mark that breaks special tokens in them."""
        said = "".join(text for message in messages for text in message.values())
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in said)
        special = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or "(?!)")
        marked = [
            {key: special.sub(lambda found: found[0][:1] + mark + found[0][1:], text) for key, text in message.items()}
            for message in messages
        ]
        return self._render(marked, prompt=prompt), mark

    def _encode(self, rendered: str, mark: str) -> np.ndarray:
        """(tokens,) int64; broken by a mark in its middle, a special token of a message is one no more."""
        broken = "|".join(re.escape(text[:1] + mark + text[1:]) for text in self._special)
        ids: list[int] = []
        for part in re.split(f"({broken or '(?!)'})", rendered):
            if mark in part:
                ids += self.words.encode(part.replace(mark, "")).tolist()
            else:
                ids += self._inner.encode(part, add_special_tokens=False).ids
        return np.array(ids, np.int64)

    def render(self, message: str) -> str:
        """The text of the prompt. Raises ConfigError for what the template refuses."""
        return self._render([{"role": "user", "content": message}], prompt=True)

    def _render(self, messages: Sequence[Mapping[str, str]], *, prompt: bool) -> str:
        names = _named_tokens(self._settings)
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=prompt, tools=None, documents=None, **names
            )
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise self._error(error) from None

    def _error(self, error: Exception) -> ConfigError:
        return ConfigError(f"{self.where}: the chat template fails: {' '.join(str(error).split())}")


class _Generation(ext.Extension):
    """`{% generation %}`, which marks an assistant's words for training: here its body, as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that a template may name."""
    return {key: special_token(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The file of its own, otherwise the one in tokenizer_config.json; of several by name, the default."""
    if (folder / TEMPLATE).exists():
        try:
            return read_text(folder / TEMPLATE)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder / TEMPLATE}: cannot be read: {' '.join(str(error).split())}") from None
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = {x.get("name"): x.get("template") for x in found if isinstance(x, dict)}.get("default")
    return found if isinstance(found, str) else None
