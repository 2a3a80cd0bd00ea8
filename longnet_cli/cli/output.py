"""Results on stdout: JSON, JSON lines and Markdown rows, each row written as soon as it is known.

JSON keeps full precision and never contains NaN or Infinity, which it does not have: they become null. Rich tables are
not used: in a pipe they are cut at 80 columns.

Commands with `-o` check it before a model is loaded. Exit code 6 says what --skip-bad has left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer

from longnet_cli.basics.errors import LEFT_OUT, ConfigError, LongNetError
from longnet_cli.basics.finite_json import finite, to_json
from longnet_cli.basics.sizes import count_of

if TYPE_CHECKING:
    from longnet_cli.basics.events import LeftOut


def emit_json(value: Any) -> None:
    """Write one JSON document, indented, to stdout."""
    _write(to_json(value, indent=2) + "\n")


def emit_jsonl(value: object) -> None:
    """Write one line of JSON to stdout."""
    _write(to_json(value) + "\n")


class MarkdownTable:
    """A table of Markdown on stdout: `MarkdownTable(["seq", "seconds"]).write({...})` writes a row at once.

    A key that a row lacks is an empty cell. `human` gives cells their units, for example `{"peak_rss_bytes":
    format_bytes}`, and `titles` gives columns other names.
    """

    def __init__(
        self,
        columns: Sequence[str],
        human: Mapping[str, Callable[[Any], str]],
        titles: Mapping[str, str],
    ) -> None:
        self.columns = list(columns)
        self.human = human
        self.titles = [titles.get(column, column) for column in self.columns]
        self.widths: list[int] = []  # set by the first row

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row, and the header before the first one."""
        values = [finite(row.get(column)) for column in self.columns]
        cells = [*map(self._cell, self.columns, values)]
        signs = [">" if isinstance(value, (int, float)) else "<" for value in values]
        lines = [cells]
        if not self.widths:  # columns fit the first row
            self.widths = [max(8, *map(len, pair)) for pair in zip(self.titles, cells, strict=True)]
            ends = {">": ":", "<": "-"}  # numbers are aligned to the right
            columns = zip(self.widths, signs, strict=True)
            rules = ["-" * (width - 1) + ends[sign] for width, sign in columns]
            lines = [self.titles, rules, cells]
        for line in lines:
            aligned = map("{:{}{}}".format, line, signs, self.widths)
            _write(f"| {' | '.join(aligned)} |\n")

    def _cell(self, column: str, value: object) -> str:
        if value is None:
            return ""
        if column in self.human:
            return self.human[column](value)
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return printable(" ".join(text.replace("|", "\\|").split()))


# Control characters, line separators, marks that change the direction of writing, and lone surrogates
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def tell(line: str, quiet: bool = False) -> None:
    """Print a line to stderr, unless `quiet` or stderr is closed."""
    if not quiet and sys.stderr:  # print(file=None) would write to stdout
        print(printable(line), file=sys.stderr, flush=True)


_last_words: list[str] = []


def tell_last(line: str, quiet: bool = False) -> None:
    """Print a line as the last of the process, unless `quiet`: when ranks are stopped, libraries print much."""
    _last_words.extend([line] * (not quiet))


def say_last_words() -> None:
    """Print the lines that were kept for the end."""
    with suppress(OSError):  # the terminal is gone: the exit code still tells
        for line in _last_words:
            tell(f"longnet: {line}")


def note(line: str, quiet: bool = False) -> None:
    """Print a note to stderr, unless `quiet` or stderr is closed."""
    tell(f"longnet: note: {line}", quiet)


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
    parts = re.split(r"([\n\t])", text) if sys.stdout.isatty() else []
    _write("".join(part if part in "\n\t" else printable(part) for part in parts) or text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not valid text
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _write(text: str) -> None:
    # looked up each time: a progress bar on the same terminal replaces sys.stdout while it is shown
    sys.stdout.write(text)
    sys.stdout.flush()


def check_output(
    output: str,
    where_to: str,
    for_folder: Mapping[str, object],
    *,
    resume: bool,
    dry_run: bool = False,
) -> None:
    """Raise ConfigError for an output that cannot be written, and for options that do not fit it.

    `where_to` is the error for a terminal; without it, a terminal may show the output. `for_folder` maps the names of
    options for a folder of shards to their values, and `resume` is for one.
    """
    if where_to and output == "-" and not dry_run and sys.stdout and sys.stdout.isatty():
        raise ConfigError(where_to)
    from longnet_cli.data.output_paths import is_folder

    asked = [name for name, value in for_folder.items() if value]
    if not is_folder(output, resume=resume and not asked) and asked:
        why = "a single file or stream has no parts"
        if asked[0] == "--shard-format":
            why = "one file is what its name says"
        raise ConfigError(f"{output}: {asked[0]} is for a folder of shards: {why}")


@contextmanager
def say_what_is_kept(output: str, quiet: bool) -> Iterator[None]:
    """Run a job that writes rows to `output`. If it is stopped, say what is kept and how to go on, unless `quiet`.

    One of several ranks says so for Ctrl-C alone. torchrun ends it by SIGTERM if another rank failed too, and then the
    error of that rank is all there is to say.
    """
    from longnet_cli.data.output_paths import is_folder
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
        tell(f"stopped: {what}", quiet)
        raise


def _kept_in_folder(folder: str) -> str:
    from longnet_cli.data.manifest import read_manifest

    try:
        manifest = read_manifest(folder)
    except LongNetError as error:
        return str(error)
    if manifest is None:
        return f"nothing is kept in {folder}, in which no shard was begun: the same command starts again"
    kept = f"{folder} keeps {manifest.totals['documents']:,} documents"
    return f"{kept}: the same command with --resume goes on"


def count_left_out(skip_bad: bool, quiet: bool) -> LeftOut:
    """Return a count of what --skip-bad leaves out and of empty documents, with a note on stderr unless `quiet`."""
    from longnet_cli.basics.events import LeftOut

    def tell(_: Any, error: LongNetError) -> None:
        note(f"left out: {getattr(error, 'why', str(error))}", quiet)

    return LeftOut(tell if skip_bad else None)


def end(left_out: LeftOut, *, first: bool, quiet: bool) -> None:
    """Report the counts, unless `quiet`. If documents were skipped, the `first` rank exits with code 6."""
    if left_out.empty:
        note(f"{count_of(left_out.empty, 'document')} empty", quiet)
    if left_out.short:
        note(f"{count_of(left_out.short, 'document')} too short, and left out", quiet)
    if left_out.skipped:
        note(str(left_out), quiet)
    if left_out.skipped and first:
        raise typer.Exit(LEFT_OUT)
