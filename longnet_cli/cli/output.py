"""Results on stdout, JSON and JSON lines, each written as soon as it is known; and what is told on stderr.

JSON keeps full precision and never contains NaN or Infinity, which it does not have: they become null. Commands with
`-o` check it before a model is loaded. Exit code 6 says that --skip-bad has left something out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer

from longnet_cli.basics.errors import LEFT_OUT, ConfigError, LongNetError
from longnet_cli.basics.finite_json import to_json
from longnet_cli.basics.sizes import count_of

if TYPE_CHECKING:
    from longnet_cli.basics.events import LeftOut
    from longnet_cli.data.files.manifest import Manifest


def emit_json(value: Any) -> None:
    """Write one JSON document, indented, to stdout."""
    print(to_json(value, indent=2), flush=True)


def emit_jsonl(value: object) -> None:
    """Write one line of JSON to stdout."""
    print(to_json(value), flush=True)


# Control characters, line separators, marks that change the direction of writing, and lone surrogates
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


_quiet = False


def be_quiet(quiet: bool) -> None:
    """Let this process tell nothing but errors from here on, or again all: --quiet, and ranks that only compute."""
    global _quiet
    _quiet = quiet


def may_tell() -> bool:
    """Return whether lines for people go to stderr, which may be closed."""
    return not _quiet and sys.stderr is not None


def tell(line: str) -> None:
    """Print a line to stderr, if the process may tell anything."""
    if may_tell():  # print(file=None) would write to stdout
        print(printable(line), file=sys.stderr, flush=True)


_last_words: list[str] = []


def tell_last(line: str) -> None:
    """Print a line as the last of the process: when ranks are stopped, libraries print much."""
    _last_words.append(line)


def say_last_words() -> None:
    """Print the lines that were kept for the end."""
    with suppress(OSError):  # the terminal is gone: the exit code still tells
        for line in _last_words:
            tell(f"longnet: {line}")


def note(line: str) -> None:
    """Print a note to stderr, if the process may tell anything."""
    tell(f"longnet: note: {line}")


def printable(text: str) -> str:
    """Return text from a file, its name or an error, safe to show: a control character becomes its escape, `\\x1b`.

    Tables, errors, progress and all other text for people pass through here; JSON has its own escapes.
    """
    with suppress(UnicodeEncodeError):
        # In a locale other than UTF-8, Python keeps the bytes of a UTF-8 name as lone surrogates: decode them.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return _UNPRINTABLE.sub(_escape, text)


def write_text(text: str) -> None:
    """Write text from a model to stdout. On a terminal, control characters but newlines and tabs have no effect."""
    if sys.stdout.isatty():
        text = re.sub(r"[^\n\t]+", lambda part: printable(part.group()), text)
    print(text, end="", flush=True)


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not valid text
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


FOR_FOLDERS = {"--shard-tokens", "--shard-rows", "--shard-format"}


def check_output(
    output: str,
    where_to: str,
    given: Set[str],
    *,
    resume: bool,
    dry_run: bool = False,
) -> Manifest | None:
    """Return the earlier run that goes on in an output folder; None for another output, and without such a run.

    Raises ConfigError for an output that cannot be written, and for options that do not fit it. `where_to` is the error
    for a terminal; without it, a terminal may show the output. `given` are the names of all options that are given.
    """
    if where_to and output == "-" and not dry_run and sys.stdout and sys.stdout.isatty():
        raise ConfigError(where_to)
    from longnet_cli.data.outputs.output_paths import is_folder
    from longnet_cli.data.outputs.shards import run_to_resume

    if is_folder(output, resume=resume):
        return run_to_resume(output, resume=resume)
    for name in sorted(FOR_FOLDERS & given):
        raise ConfigError(
            f"{output}: {name} is for a folder of shards, and a single file or stream has no parts"
        )
    return None


@contextmanager
def say_what_is_kept(output: str) -> Iterator[None]:
    """Run a job that writes rows to `output`. If it is stopped, say what is kept and how to go on.

    Under torchrun, this is said after Ctrl-C only. SIGTERM may mean that another rank failed, and its error says
    enough.
    """
    from longnet_cli.data.outputs.output_paths import is_folder
    from longnet_cli.running.ranks.launch import under_torchrun

    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and under_torchrun():
            raise
        if output == "-":
            what = "only what was written to stdout is kept"
        elif not is_folder(output):
            what = f"nothing is kept in {output}, which is written whole; of a folder (-o NAME), finished shards are"
        else:
            what = _kept_in_folder(output)
        tell(f"stopped: {what}")
        raise


def _kept_in_folder(folder: str) -> str:
    from longnet_cli.data.files.manifest import read_manifest

    try:
        manifest = read_manifest(folder)
    except LongNetError as error:
        return str(error)
    if manifest is None:
        return f"nothing is kept in {folder}, in which no shard was begun: the same command starts again"
    documents = manifest.totals["documents"]
    if not documents:
        return f"{folder} keeps nothing: a shard ends with a document, so --resume begins again"
    kept = f"{folder} keeps {documents:,} documents"
    return f"{kept}: the same command with --resume goes on"


def count_left_out(skip_bad: bool) -> LeftOut:
    """Return a count of documents without a row. With --skip-bad, each that cannot be read is noted on stderr."""
    from longnet_cli.basics.events import LeftOut

    def note_one(_: Any, error: LongNetError) -> None:
        note(f"left out: {getattr(error, 'why', str(error))}")

    return LeftOut.of(skip_bad, note_one)


def note_without_rows(left_out: LeftOut) -> None:
    """Report the documents that can be read and have no row."""
    if left_out.empty:
        note(f"{count_of(left_out.empty, 'document')} empty")
    if left_out.short:
        note(f"{count_of(left_out.short, 'document')} too short, and left out")


def say_left_out(left_out: LeftOut, *, first: bool = True) -> None:
    """Report the counts. If documents were skipped, the `first` rank exits with code 6."""
    note_without_rows(left_out)
    if left_out.skipped:
        note(str(left_out))
        if first:
            raise typer.Exit(LEFT_OUT)
