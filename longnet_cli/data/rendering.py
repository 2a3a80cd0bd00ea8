"""Jinja templates of strangers, in a process of their own, which bounds their time and memory.

The process reads lines of JSON from stdin, and answers each with a line of JSON: first the template, then its
variables. It ends with stdin, also if its parent was killed, and by an alarm where a template runs on.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import jinja2
from jinja2 import ext, nodes, parser, sandbox

from longnet_cli.basics.errors import ConfigError, RefusedError, one_line

SECONDS = 20
MEMORY = 1 << 29  # bytes of address space, and GROWTH for each character that is rendered
GROWTH = 64
MOST_TEXT = 1 << 24  # characters of a rendered text, and 16 for each that is given


class Template:
    """A Jinja template in a sandbox. `where` is the folder that it is from, in messages.

    Raises RefusedError, with the line of the template, for one that is no Jinja, and for variables with which it fails;
    ConfigError when it takes more time than it may: its process was ended.
    """

    def __init__(self, source: str, where: str) -> None:
        self._fails = f"{where}: the chat template fails"
        root = str(Path(__file__).parents[2])
        path = f"sys.path[:] = [{root!r}, *filter(None, sys.path)]"  # no module of the current folder is run
        serve = f"{path}; from longnet_cli.data.rendering import serve; serve({SECONDS})"
        command, pipe = [sys.executable, "-c", f"import sys; {serve}"], subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)
        self._to, self._from = (
            cast(IO[bytes], end) for end in (self._process.stdin, self._process.stdout)
        )
        weakref.finalize(self, _end, self._process)
        self._ask(source)

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the text for these variables, which are JSON."""
        return self._ask(variables)

    def _ask(self, what: Any) -> str:
        try:
            self._to.write(json.dumps(what).encode() + b"\n")
            self._to.flush()
            answer = self._from.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            late = self._process.wait() == -signal.SIGALRM
            why = f"it takes more than {SECONDS} seconds" if late else "its process was killed"
            raise ConfigError(f"{self._fails}: {why}")
        reply = json.loads(answer)
        if "failure" in reply:
            raise RefusedError(f"{self._fails}: {reply['failure']}")
        return str(reply["text"])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def serve(seconds: int) -> None:
    """Render templates for the parent process, each in so many seconds, until stdin ends."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    template: jinja2.Template | None = None
    for line in sys.stdin.buffer:
        signal.alarm(seconds)
        try:
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            wanted = MEMORY + GROWTH * len(line)
            resource.setrlimit(
                resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard)
            )
            what = json.loads(line)
            if isinstance(what, str):
                template, answer = _environment().from_string(what), {"text": ""}
            else:
                assert template
                answer = {"text": _render(template, what, MOST_TEXT + 16 * len(line))}
            said = json.dumps(answer)
        except MemoryError:
            said = json.dumps({"failure": f"it takes more than {MEMORY >> 20} MiB"})
        except Exception as error:  # a template may raise anything
            said = json.dumps({"failure": _described(error, template)})
        signal.alarm(0)
        print(said, flush=True)


def _render(template: jinja2.Template, variables: dict[str, Any], most: int) -> str:
    stream: Any = template.root_render_func(template.new_context(variables))
    parts, size = [], 0
    for part in stream:
        size += len(part)
        line = _line(template, stream.gi_frame.f_lineno)
        if size > most:
            raise jinja2.TemplateError(f"it writes more than {most} characters{line}")
        try:
            part.encode()
        except UnicodeEncodeError:
            raise jinja2.TemplateError(
                f"it writes half of a character (a surrogate){line}"
            ) from None
        parts.append(part)
    return "".join(parts)


def _described(error: Exception, template: jinja2.Template | None) -> str:
    """Return the message of an error, with the line of the template unless `_render` or the template refuses."""
    said = one_line(error) or type(error).__name__
    if type(error) is jinja2.TemplateError:
        return said
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"{said} (line {error.lineno})"
    line, trace = "", error.__traceback__
    while trace:
        if template and "__jinja_template__" in trace.tb_frame.f_globals:
            line = _line(template, trace.tb_lineno)
        trace = trace.tb_next
    return said + line


def _line(template: jinja2.Template, line_of_code: int) -> str:
    return f" (line {template.get_corresponding_lineno(line_of_code)})"


def _environment() -> sandbox.SandboxedEnvironment:
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
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
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Generation(ext.Extension):
    """The tag `{% generation %}`, which marks an assistant's words for training. Here it renders its body unchanged."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
