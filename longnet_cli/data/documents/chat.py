"""Chat templates, which turn messages into the text of a prompt or of a whole chat.

A template is Jinja source in the model's folder. It runs in Jinja's sandbox: it sees only the messages, the special
tokens and the time, and can change nothing.

Only the template itself can write special tokens. Text in a message that looks like one is encoded as its characters,
as in any document: while the template runs, a character that no text has stands for the first character of such text.
"""

import json
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jinja2
import numpy as np
from jinja2 import ext, nodes, parser, sandbox

from longnet_cli.basics.configuration import read_text
from longnet_cli.basics.digests import json_sha256
from longnet_cli.basics.errors import ConfigError, LongNetError, RefusedError, one_line
from longnet_cli.data.files.local_files import Part

from .tokenizer import SETTINGS, Tokenizer, read_settings, refuse_damaged, special_token

TEMPLATE = "chat_template.jinja"
# By Unicode, no text has the characters U+FDD0 to U+FDEF. They stand for the first characters of special tokens, and
# the last one for the tags around what a model is to answer.
NO_TEXT = re.compile("[\ufdd0-\ufdef]")
FIRST_HIDDEN = 0xFDD0
MOST_HIDDEN = 31
ANSWER_EDGE = "\ufdef"


def chat_settings(tokenizer: Tokenizer | None) -> dict[str, str]:
    """Return the digest of the chat template beside a tokenizer, which a resumed run must match; empty without one."""
    if tokenizer is None or tokenizer.folder is None:
        return {}
    template, named = _read_template(tokenizer.folder)
    if template is None:
        return {}
    return {"chat_template": json_sha256([template, named])}


class _Stretch(NamedTuple):
    """A part of a rendered text, from the character `start` on: text, or a special token with its `token_id`."""

    start: int
    text: str
    token_id: int | None = None


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
        with _refusing(folder):
            self._template = _environment().from_string(template)
        self.tokenizer = tokenizer
        self._within = tokenizer.within_text()
        special = [added for added in tokenizer.added_tokens if added["special"]]
        self._special = {added["content"]: added for added in special if added["content"]}
        if tokenizer.changes_ends and any(added["normalized"] for added in special):
            raise ConfigError(
                f"{folder}: the tokenizer changes the ends of a text before it finds special tokens: it cannot read "
                "chats"
            )
        longest_first = sorted(self._special, key=len, reverse=True)
        any_special = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._any = re.compile(any_special)
        self._start = re.compile(f"(?={any_special}).", re.DOTALL)
        characters = sorted({name[0] for name in self._special})
        if len(characters) > MOST_HIDDEN:
            raise ConfigError(
                f"{folder}: the special tokens begin with {len(characters)} different characters: in a tokenizer for "
                f"chats, {MOST_HIDDEN} are the most"
            )
        self._hidden = {sign: chr(FIRST_HIDDEN + n) for n, sign in enumerate(characters)}
        self._shown = str.maketrans({hidden: sign for sign, hidden in self._hidden.items()})

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
        before = [{"role": "system", "content": system}] if system else []
        try:
            rendered, _ = self._render([*before, *messages], prompt=True)
            return np.asarray(self._encode(rendered).ids)
        except RefusedError:
            if not (before and messages):
                raise
            first, *others = messages
            content = f"{system}\n\n{first.get('content', '')}"
            return self.encode([{**first, "content": content}, *others])

    def read_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        answers: bool = False,
    ) -> tuple[str, Callable[[], Part]]:
        """Return the text of a chat, and a function that returns its ids, (tokens,) int64, as a part.

        Each message has a `role` and a `content`. The ids leave out the `bos_token` that a template may put first:
        the reader of a document puts its own there. With `answers`, the part says which ids the assistant is to write.
        Raises RefusedError for messages that the template refuses, and where it does not show which text is an answer.
        """
        rendered, edges = self._render(messages)
        if answers and not edges:
            edges = self._edges_of_answers(messages, rendered)
        encode = partial(self._encode_chat, rendered, edges if answers else None)
        return rendered.translate(self._shown), encode

    def _encode_chat(self, rendered: str, edges: Sequence[int] | None) -> Part:
        part = self._encode(rendered, edges)
        bos = self.tokenizer.id_of(self._named["bos_token"])
        if np.asarray(part.ids[:1]).tolist() != [bos]:
            return part
        is_answer = part.is_answer
        return Part(part.ids[1:], is_answer=None if is_answer is None else is_answer[1:])

    def _edges_of_answers(
        self,
        messages: Sequence[Mapping[str, str]],
        rendered: str,
    ) -> list[int]:
        """Return where each answer begins and ends in a rendered text, by renderings that end before and after it.

        The special token that ends an answer belongs to it, and white space behind that does not.
        """
        edges = []
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before, _ = self._render(messages[:index], prompt=True)
            until, _ = self._render(messages[: index + 1])
            ended = until.rstrip()
            if ended.endswith(tuple(self._special)):
                until = ended
            if not (until.startswith(before) and rendered.startswith(until)):
                raise RefusedError(
                    "the chat template does not show which text is an answer: it has no {% generation %}, and what "
                    "follows a message changes the text before it"
                )
            edges += [len(before), len(until)]
        return edges

    def _render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        prompt: bool = False,
    ) -> tuple[str, list[int]]:
        """Return what the template makes of messages, and the characters at which its marked answers begin and end.

        Text that looks like a special token is hidden in it.
        """
        variables = {
            "messages": [*map(self._hide, messages)],
            "add_generation_prompt": prompt,
            "tools": None,
            "documents": None,
        }
        with _refusing(self._folder):
            text = self._template.render(variables | self._named)
            text.encode()  # raises an error for half of a character
        parts = text.split(ANSWER_EDGE)
        return "".join(parts), [*accumulate(map(len, parts[:-1]))]

    def _hide(self, message: Mapping[str, str]) -> dict[str, str]:
        """Return a message in which no text is a special token."""
        try:
            if NO_TEXT.search("".join(message.values())):
                raise RefusedError(
                    "a message has a character from U+FDD0 to U+FDEF, which no text has"
                )
            return {
                key: self._start.sub(lambda start: self._hidden[start[0]], text)
                for key, text in message.items()
            }
        except (AttributeError, TypeError):
            raise RefusedError(
                "a message is a mapping with a role and a content, which are texts"
            ) from None

    def _stretches(self, rendered: str) -> Iterator[_Stretch]:
        """Yield the special tokens that the template wrote, and the text between them, as the library splits it."""
        start = 0
        for special in self._any.finditer(rendered):
            added = self._special[special[0]]
            text = rendered[start : special.start()]
            yield _Stretch(start, text.rstrip() if added["lstrip"] else text)
            yield _Stretch(special.start(), special[0], added["id"])
            start = special.end()
            if added["rstrip"]:
                start += len(rendered[start:]) - len(rendered[start:].lstrip())
        yield _Stretch(start, rendered[start:])

    def _encode(self, rendered: str, edges: Sequence[int] | None = None) -> Part:
        """Return the ids of a rendered text, (tokens,) int64.

        With the `edges` at which answers begin and end, in turn, say which ids have a character of an answer.
        """
        ids = [np.empty(0, np.int64)]
        places = [np.empty((0, 2), np.int64)]
        for stretch in self._stretches(rendered):
            if stretch.token_id is not None:
                ids.append(np.array([stretch.token_id]))
                places.append(np.array([[0, len(stretch.text)]]) + stretch.start)
            elif stretch.text:
                text_ids, text_places = self._encode_text(stretch, placed=edges is not None)
                ids.append(text_ids)
                places.append(text_places + stretch.start)
        if edges is None:
            return Part(np.concatenate(ids))
        begin, end = np.concatenate(places).T
        edges_before = np.searchsorted(edges, begin, "right")
        edges_before_end = np.searchsorted(edges, end, "left")
        is_answer = (edges_before % 2 == 1) | (edges_before_end > edges_before)
        return Part(np.concatenate(ids), is_answer=is_answer)

    def _encode_text(self, stretch: _Stretch, *, placed: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of text, (tokens,) int32, and the characters [start, end) of each if they are asked for.

        Raises RefusedError for a message in which a special token stays.
        """
        text = stretch.text.translate(self._shown)
        reader = self._within if stretch.start else self.tokenizer
        places = np.empty((0, 2), np.int32)
        if placed:
            ids, places = reader.encode_placed(text)
        else:
            ids = reader.encode(text)
        if text != stretch.text and not self.tokenizer.special_ids.isdisjoint(ids.tolist()):
            raise RefusedError(
                "a message has the text of a special token, which this tokenizer cannot read as characters"
            )
        return ids, places


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
def _refusing(folder: Path) -> Iterator[None]:
    """Raise RefusedError, with the line of the template, where the template of a folder fails."""
    try:
        yield
    except LongNetError:
        raise
    except Exception as error:  # a template may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = ["?", *(frame.lineno for frame in frames if frame.filename == "<template>")]
        line = getattr(error, "lineno", lines[-1])
        what = one_line(error) or type(error).__name__
        raise RefusedError(f"{folder}: the chat template fails: {what} (line {line})") from None


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
    """The tag `{% generation %}`, which marks an assistant's words for training: a character before and after them."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        edge = nodes.Output([nodes.TemplateData(ANSWER_EDGE)], lineno=line)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [edge, *body, edge]


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
