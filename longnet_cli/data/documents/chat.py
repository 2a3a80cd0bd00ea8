"""Chat templates, which turn messages into the text of a prompt or of a whole chat.

A template is Jinja source in the model's folder. It runs in Jinja's sandbox, for SECONDS at most: it sees only the
messages, the special tokens and the time, and can change nothing.

Only the template itself can write special tokens: text in a message that looks like one is encoded as its characters,
as in any document. For this, a private-use character that is in no message, the mark, stands before what is hidden: the
first character of a special token in a message, until the template's own special tokens are found; and each of these
when the text is encoded, by a tokenizer that knows them by these names alone. So no normalizer makes one of other text.
"""

import json
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import numpy as np
import tokenizers
from jinja2 import ext, nodes, parser, sandbox

from longnet_cli.basics.configuration import read_text
from longnet_cli.basics.digests import json_sha256
from longnet_cli.basics.errors import ConfigError, LongNetError, RefusedError, one_line

from .text_pieces import decodes_bytes
from .tokenizer import (
    SETTINGS,
    Tokenizer,
    library_call,
    read_settings,
    refuse_damaged,
    special_token,
)

TEMPLATE = "chat_template.jinja"
SECONDS = 20  # for a template to render a chat
TEXT_ROOM = 1 << 20  # characters of a chat at most
TEXT_GROWTH = 16  # and for each character of its messages
MARKS = range(0xE000, 0xF900)  # private-use characters
# Private-use characters after a mark, for special tokens, and for hidden characters
NAMED = 0xF0000
HIDDEN = 0x100000


def chat_settings(tokenizer: Tokenizer | None) -> dict[str, str]:
    """Return the digest of the chat template beside a tokenizer, which a resumed run must match; empty without one."""
    if tokenizer is None or tokenizer.folder is None:
        return {}
    template, named = _read_template(tokenizer.folder)
    if template is None:
        return {}
    return {"chat_template": json_sha256([template, named])}


# Not apply_chat_template: a base install has no transformers, and text in a message could be a special token there.
class ChatTemplate:
    """The chat template in a model's folder, for its `tokenizer`.

    Raises ConfigError for a template that is missing or cannot be read.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        template, self._named = _read_template(folder)
        if template is None:
            raise ConfigError(
                f"{folder}: no chat template ({TEMPLATE}, or chat_template in {SETTINGS}) for chats"
            )
        self._folder = folder
        with _limited(folder):
            self._template = _environment().from_string(template)
        self.tokenizer = tokenizer
        self._special = [added["content"] for added in tokenizer.added_tokens if added["special"]]
        self._first = sorted({text[0] for text in self._special})
        longest = "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or "(?!)"
        self._mark = MARKS.start
        self._signs = {*template, *"".join(self._special)}
        self._any = re.compile(longest)
        self._start = re.compile(f"(?={longest}).", re.DOTALL)

    def encode(
        self,
        message: str | Sequence[Mapping[str, str]],
        system: str | None = None,
    ) -> np.ndarray:
        """Return the prompt in which a user says `message` and an assistant is to answer: (tokens,) int64.

        Before it, `system` says how. It begins the user's message where a template has no such role. In place of one
        message there may be several, each with a `role` and a `content`. Raises RefusedError for what the template
        refuses, and for what are no messages.
        """
        asked = [{"role": "user", "content": message}] if isinstance(message, str) else message
        messages: list[Mapping[str, str]] = [*asked]
        try:
            _all_texts(messages)
        except (AttributeError, TypeError):
            raise RefusedError(
                "a message is a mapping with a role and a content, which are texts"
            ) from None
        before = [{"role": "system", "content": system}] if system else []
        try:
            return self._encode(*self._render([*before, *messages], prompt=True))
        except RefusedError:
            if not (before and messages):
                raise
            first, *others = messages
            content = f"{system}\n\n{first.get('content', '')}"
            return self.encode([{**first, "content": content}, *others])

    def read_chat(
        self, messages: Sequence[Mapping[str, str]]
    ) -> tuple[str, Callable[[], np.ndarray]]:
        """Return the text of a chat, and a function that returns its ids, (tokens,) int64.

        Each message has a `role` and a `content`. The ids leave out the `bos_token` that a template may put first:
        the reader of a document puts its own there. Raises RefusedError for messages that the template refuses.
        """
        rendered, mark = self._render(messages, prompt=False)
        return self._shown(rendered, mark), partial(self._encode_chat, rendered, mark)

    def _encode_chat(self, rendered: str, mark: str) -> np.ndarray:
        ids = self._encode(rendered, mark)
        bos = self.tokenizer.id_of(self._named["bos_token"])
        return ids[1:] if ids[:1].tolist() == [bos] else ids

    def _render(self, messages: Sequence[Mapping[str, str]], *, prompt: bool) -> tuple[str, str]:
        """Return the text that the template makes of messages, and the mark that hides special tokens in them."""
        written = _all_texts(messages)
        signs = self._signs.union(written)
        # the last mark first, and then on from there: `_renamed` is slow, and all chats soon share one mark
        marks = (*range(self._mark, MARKS.stop), *MARKS)
        self._mark = next((number for number in marks if chr(number) not in signs), MARKS.stop)
        if self._mark not in MARKS:
            raise RefusedError(
                "the messages have all private-use characters, of which one must be free"
            )
        mark = chr(self._mark)

        def hide(start: re.Match[str]) -> str:
            return mark + chr(HIDDEN + self._first.index(start[0]))

        hidden = []
        for message in messages:
            hidden.append({key: self._start.sub(hide, text) for key, text in message.items()})
        variables = {
            "messages": hidden,
            "add_generation_prompt": prompt,
            "tools": None,
            "documents": None,
        }
        with _limited(self._folder):
            text = self._template.render(variables | self._named)
            text.encode()  # raises an error for half of a character

            if len(text) > TEXT_ROOM + TEXT_GROWTH * len(written):
                raise ConfigError(
                    f"{self._folder}: the chat template makes {len(text):,} characters"
                )
        return text, mark

    def _shown(self, rendered: str, mark: str) -> str:
        """Return a text with the characters that are hidden in it."""
        hidden = f"{mark}([{chr(HIDDEN)}-\U0010ffff])"
        return re.sub(hidden, lambda match: self._first[ord(match[1]) - HIDDEN], rendered)

    def _encode(self, rendered: str, mark: str) -> np.ndarray:
        """Return the ids of a rendered text, (tokens,) int64, with the special tokens that the template wrote."""
        with library_call():
            inner, names, originals = _renamed(self.tokenizer, mark)
            text = self._shown(self._any.sub(lambda match: names[match[0]], rendered), mark)
            encoding = inner.encode(text, add_special_tokens=False)
        seen = 0
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            seen += index in originals and str(inner.id_to_token(index)) in text[start:end]
        # A token of whole words is none within a word, and a template that cuts texts may leave a mark alone.
        if seen != text.count(mark):
            raise RefusedError(
                f"{self._folder}: the chat template writes a special token that is none where it stands"
            )
        return np.array([originals.get(index, index) for index in encoding.ids], np.int64)


@lru_cache(maxsize=1)
def _renamed(
    tokenizer: Tokenizer, mark: str
) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int | None, int | None]]:
    """Return the tokenizer with other names for its special tokens, these names, and the usual id of each new id.

    The names are special tokens only: a special token that is also in the vocabulary is no word of a text any more.
    """
    data = json.loads(tokenizer.to_json())
    special = [added for added in data["added_tokens"] if added["special"]]
    names = {added["content"]: mark + chr(NAMED + index) for index, added in enumerate(special)}
    for added in special:
        added["content"] = name = names[added["content"]]
        if tokenizer.normalizer and name not in tokenizer.normalizer.normalize_str(name):
            added["normalized"] = False  # otherwise nothing would be left of the name
    model = data["model"]
    merges = model.get("merges", ())
    merged = {*chain.from_iterable(merges), *map("".join, merges)}
    words = {text: name for text, name in names.items() if text not in merged}
    if decodes_bytes(data):
        words = {}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {words.get(text, text): index for text, index in model["vocab"].items()}
    else:
        model["vocab"] = [[words.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = words.get(model["unk_token"], model["unk_token"])
    inner = tokenizers.Tokenizer.from_str(json.dumps(data))
    usual_ids = {inner.token_to_id(name): tokenizer.id_of(text) for text, name in names.items()}
    return inner, names, usual_ids


def _all_texts(messages: Iterable[Mapping[str, str]]) -> str:
    """Return all texts of some messages. Raises AttributeError or TypeError for what are no messages."""
    return "".join(chain.from_iterable(message.values() for message in messages))


def _read_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """Return the template of a folder, None without one, and the special tokens that it may name.

    It has a file of its own, or stands in tokenizer_config.json: of several, it is the default.
    """
    settings = read_settings(folder / SETTINGS)
    named = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        named[key] = special_token(settings.get(key))
    path = folder / TEMPLATE
    with refuse_damaged(path), suppress(FileNotFoundError):
        return read_text(path), named
    template = settings.get("chat_template")
    if isinstance(template, list):
        templates = {
            table.get("name"): table.get("template")
            for table in template
            if isinstance(table, dict)
        }
        template = templates.get("default")
    return template if isinstance(template, str) else None, named


@contextmanager
def _limited(folder: Path) -> Iterator[None]:
    """Run the template of a folder in the main thread for SECONDS at most; in another thread, without a limit.

    Raises RefusedError, with the line of the template, if it fails, and ConfigError if it takes longer. One operation
    of Python that takes long is not stopped in the middle.
    """
    fails = f"{folder}: the chat template fails"

    def stop(*_: object) -> NoReturn:
        raise ConfigError(f"{fails}: it takes more than {SECONDS} seconds")

    in_main_thread = threading.current_thread() is threading.main_thread()
    try:
        with _alarm(stop) if in_main_thread else nullcontext():
            yield
    except LongNetError:
        raise
    except Exception as error:  # a template may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = ["?", *(frame.lineno for frame in frames if frame.filename == "<template>")]
        line = getattr(error, "lineno", lines[-1])
        what = one_line(error) or type(error).__name__
        raise RefusedError(f"{fails}: {what} (line {line})") from None


@contextmanager
def _alarm(ring: Callable[..., NoReturn]) -> Iterator[None]:
    """Call `ring` after SECONDS, unless the block has ended by then."""
    handler_before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler_before)


def _environment() -> sandbox.SandboxedEnvironment:
    """Return the sandbox with the filters, tags and functions that transformers gives to a template."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as the filter of transformers does, with its parameters in its order."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Generation(ext.Extension):
    """The tag `{% generation %}`, which marks an assistant's words for training. Here it renders its body unchanged."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
