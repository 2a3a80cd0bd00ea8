"""Chat templates, which turn messages into the text of a prompt or of a whole chat.

A template is Jinja source in the model's folder. It runs in Jinja's sandbox, within limits of time and memory: it sees
only the messages, the special tokens and the time, and can change nothing. Only the template itself can write special
tokens: text in a message that looks like one is encoded as its characters, as in any document.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from longnet_cli.basics.configuration import digest, read_text
from longnet_cli.basics.errors import ConfigError, RefusedError
from longnet_cli.data.rendering import Template
from longnet_cli.data.tokenizer import SETTINGS, Tokenizer, library_call, read_settings, special_token

TEMPLATE = "chat_template.jinja"


def chat_settings(tokenizer: Tokenizer | None) -> dict[str, str]:
    """Return the digest of the chat template beside a tokenizer, which a resumed run must match; empty without one."""
    if tokenizer is None or tokenizer.folder is None:
        return {}
    settings = read_settings(tokenizer.folder / SETTINGS)
    template = _template(tokenizer.folder, settings)
    return {} if template is None else {"chat_template": digest([template, _named_tokens(settings)])}


# Not apply_chat_template: a base install has no transformers, and text in a message could be a special token there.
class ChatTemplate:
    """The chat template in a model's folder, for its `tokenizer`.

    Raises ConfigError for a template that is missing or cannot be read.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        settings = read_settings(folder / SETTINGS)
        template = _template(folder, settings)
        if template is None:
            raise ConfigError(f"{folder}: no chat template ({TEMPLATE}, or chat_template in {SETTINGS}) for chats")
        self._template, self._named = Template(template, str(folder)), _named_tokens(settings)
        self.tokenizer = tokenizer
        self._special = [added["content"] for added in tokenizer.added_tokens if added["special"]]
        self._inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        self._inner.encode_special_tokens = False

    def encode(self, message: str, system: str | None = None) -> np.ndarray:
        """Return the prompt in which a user says `message` and an assistant is to answer: (tokens,) int64.

        Before it, `system` says how. It begins the user's message where a template has no such role. Raises
        RefusedError for a message that the template refuses.
        """
        messages = [{"role": "system", "content": system}] if system else []
        try:
            return self._encode(*self._render([*messages, {"role": "user", "content": message}], prompt=True))
        except RefusedError:
            if not system:
                raise
            return self.encode(f"{system}\n\n{message}")

    def read_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, Callable[[], np.ndarray]]:
        """Return the text of a chat, and a function that returns its ids, (tokens,) int64.

        Each message has a `role` and a `content`. The ids leave out the `bos_token` that a template may put first:
        the reader of a document puts its own there. Raises RefusedError for messages that the template refuses.
        """
        rendered, mark = self._render(messages, prompt=False)
        return rendered.replace(mark, ""), partial(self._encode_chat, rendered, mark)

    def _encode_chat(self, rendered: str, mark: str) -> np.ndarray:
        ids = self._encode(rendered, mark)
        bos = self.tokenizer.id_of(self._named["bos_token"])
        return ids[1:] if bos is not None and len(ids) and ids[0] == bos else ids

    def _render(self, messages: Sequence[Mapping[str, str]], *, prompt: bool) -> tuple[str, str]:
        """Return the text that the template makes of messages, and the mark that breaks special tokens in them."""
        said = "".join(text for message in messages for text in message.values())
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in said)
        special = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or "(?!)")
        marked = [
            {key: special.sub(lambda match: match[0][:1] + mark + match[0][1:], text) for key, text in message.items()}
            for message in messages
        ]
        variables = {"messages": marked, "add_generation_prompt": prompt, "tools": None, "documents": None}
        return self._template.render(variables | self._named), mark

    def _encode(self, rendered: str, mark: str) -> np.ndarray:
        """Return the ids of a rendered text, (tokens,) int64. Marked special tokens are encoded as characters."""
        broken = "|".join(re.escape(text[:1] + mark + text[1:]) for text in self._special)
        ids: list[int] = []
        for part in re.split(f"({broken or '(?!)'})", rendered):
            if mark in part:
                ids += self.tokenizer.encode(part.replace(mark, "")).tolist()
            else:
                with library_call():
                    ids += self._inner.encode(part, add_special_tokens=False).ids
        return np.array(ids, np.int64)


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that a template may name."""
    return {key: special_token(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """Return the template in its own file, otherwise the one in tokenizer_config.json: of several, the default."""
    if (folder / TEMPLATE).exists():
        try:
            return read_text(folder / TEMPLATE)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder / TEMPLATE}: cannot be read: {' '.join(str(error).split())}") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {x.get("name"): x.get("template") for x in template if isinstance(x, dict)}.get("default")
    return template if isinstance(template, str) else None
