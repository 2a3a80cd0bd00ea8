"""The command `longnet`: its subcommands, with an exit code and at most one error line for every way they can end."""

import codecs
import errno
import io
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, NoReturn, TextIO

import typer

from longnet_cli.basics.errors import (
    ConfigError,
    InputWarning,
    LongNetError,
    MemoryLimitError,
    first_line,
    is_of_system,
    is_out_of_memory,
)
from longnet_cli.basics.version import __version__
from longnet_cli.running.ranks.launch import (
    LAUNCHED,
    LOST,
    end_with_parent,
    started_by_torchrun,
    under_torchrun,
    unwind_on_signals,
)

from .ask import ask
from .bench import bench
from .command import USAGE_ERROR, Command, CommandGroup, takes_options
from .convert import convert
from .data import data
from .encode import encode
from .generate import generate
from .output import note, printable, say_last_words
from .patterns import pattern
from .plot import plot
from .score import score
from .tokenize import tokenize
from .train import train

EPILOG = (
    "Results go to stdout, everything else to stderr. Sizes: 1e9, 1_000_000, 32k (32 000), 64Ki (65 536). "
    "Exit codes: 0 ok, 1 failure, 2 usage or configuration, 3 bad data, 4 checkpoint, 5 does not fit in memory, "
    "6 done but for what --skip-bad left out, 129, 130 or 143 stopped, 141 closed pipe."
)

# One function per command, with its panel in the help. Their modules import torch only when they run.
COMMANDS: dict[Callable[..., None], str] = {
    score: "Models",
    encode: "Models",
    generate: "Models",
    ask: "Models",
    train: "Models",
    tokenize: "Data",
    pattern: "Tools",
    plot: "Tools",
    bench: "Tools",
    convert: "Tools",
}

_python_warning = warnings.showwarning

app = typer.Typer(
    name="longnet",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # `run` is the one place that shows errors
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)
for command, panel in COMMANDS.items():
    app.command(cls=Command, rich_help_panel=panel)(takes_options(command))
app.add_typer(data, rich_help_panel="Data")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"longnet {__version__}")
        raise typer.Exit


@app.callback()
def longnet(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """Measure what long context is worth, embed long documents, and read text of any length, on a CPU."""


def main() -> NoReturn:
    """Run `longnet`: the entry point of the console script and of `python -m longnet_cli`."""
    run(app)


def run(app: typer.Typer) -> NoReturn:
    """Run `app` on the command line and exit with its exit code.

    A failure is one line `longnet: error: ...` on stderr. A bug also prints its traceback with LONGNET_TRACEBACK=1.
    """
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An unset locale claims ASCII, which says nothing: use UTF-8 for text, as Python's UTF-8 mode does.
            unset = codecs.lookup(stream.encoding).name == "ascii"
            unset = unset and "PYTHONIOENCODING" not in os.environ
            # stdout shows names that are not text as stderr does
            stream.reconfigure(encoding="utf-8" if unset else None, errors="backslashreplace")
    _hold_standard_handles()
    try:
        if started_by_torchrun():
            end_with_parent()
        else:
            unwind_on_signals()
        code = _invoke(app)
    except BaseException as error:
        code = _explain(error)
    _drop_unwritable_output()
    say_last_words()
    if under_torchrun():
        # Skip interpreter shutdown: there, threads of gloo may abort the process, even after a job that went well. A
        # rank that only lost another, or was stopped, would look like the one that failed. All `finally` blocks ran.
        os._exit(code)
    sys.exit(code)


def _invoke(app: typer.Typer) -> int:
    """Run the command, flush stdout, and return the exit code. Raises what `_explain` explains."""
    code = typer.main.get_command(app).main(prog_name="longnet", standalone_mode=False)
    # A full disk or a closed pipe often shows only here. At interpreter shutdown it could not become one error line.
    _flush(sys.stdout)
    return code or 0


def _flush(stream: TextIO | None) -> None:
    """Flush a stream that is open."""
    if stream and not stream.closed:
        stream.flush()


def _hold_standard_handles() -> None:
    """Open /dev/null in place of a closed stdin, stdout or stderr, whose objects in `sys` stay None.

    Otherwise the next opened file would get the descriptor of, say, stderr, and libraries would write into that file.
    """
    for handle in (0, 1, 2):
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _explain(error: BaseException) -> int:
    """Return the exit code for `error`, and print one line about it if the user needs to know."""
    if isinstance(error, SystemExit):
        # typer makes exit code 1 of a closed pipe, a failure
        if isinstance(error.__context__, BrokenPipeError):
            return 141
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, BrokenPipeError):  # the reader, say `head`, has read enough
        return 141
    is_lost_rank = _is_lost_rank(error)
    if is_lost_rank and LAUNCHED in os.environ:
        # torchrun now ends the other ranks by SIGTERM, and this one must end with LOST
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return LOST
    if under_torchrun():
        _let_the_first_speak(is_lost_rank)
    if isinstance(error, LongNetError):
        _say(str(error))
        return error.exit_code
    if isinstance(error, USAGE_ERROR):
        if type(error).__name__ != "NoArgsIsHelpError":  # then the help is already printed
            advice = f"(help: {error.ctx.command_path} -h)" if error.ctx else ""
            _say(f"{error.format_message()} {advice}")
        return ConfigError.exit_code
    if is_lost_rank:
        _say("another rank ended, and this one with it")
        return 1
    if os.environ.get("LONGNET_TRACEBACK") == "1":
        traceback.print_exception(error)
    if is_out_of_memory(error):
        _say(_with("out of memory", str(error)))
        return MemoryLimitError.exit_code
    if is_of_system(error):
        _say(_with(first_line(error), error.filename))
        return ConfigError.exit_code if error.errno == errno.ENAMETOOLONG else 1
    _say(f"{type(error).__name__}: {error} (run with LONGNET_TRACEBACK=1 for the traceback)")
    return 1


def _with(what: str, more: object) -> str:
    """Return what has happened, with more about it unless that is empty."""
    return f"{what}: {more}" if more else what


def _let_the_first_speak(is_lost_rank: bool) -> None:
    """Wait a moment if another rank is likely to report the error of this one, or to have caused it.

    When one rank has failed, torchrun ends the others. So only rank 0 reports a failure that all ranks share, and a
    rank that lost another reports after that one, if at all.
    """
    if is_lost_rank or os.environ.get("RANK") != "0":
        time.sleep(2)


def _is_lost_rank(error: BaseException) -> bool:
    """Return whether a collective of several ranks failed because another rank is gone.

    NCCL and the store raise a DistError. gloo raises a RuntimeError, which names the file and the line of gloo.
    """
    if not under_torchrun():
        return False
    typed = getattr(sys.modules.get("torch.distributed"), "DistError", ())
    line_of_gloo = r"\[\S*/gloo/\S+:\d+\] "
    return isinstance(error, typed) or (
        isinstance(error, RuntimeError) and bool(re.search(line_of_gloo, str(error)))
    )


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    *where: Any,
    **more: Any,
) -> None:
    """Print an InputWarning as one line, on rank 0 only, and any other warning as Python does."""
    if not issubclass(category, InputWarning):
        _python_warning(message, category, *where, **more)
    elif os.environ.get("RANK", "0") == "0":
        note(str(message))


def _say(message: str) -> None:
    lines = (line.strip() for line in message.splitlines())
    line = printable(" ".join(line for line in lines if line))
    if under_torchrun():
        line = f"rank {os.environ.get('RANK')}: {line}"
    with suppress(OSError):  # stderr is gone too: the exit code still tells
        if sys.stderr:
            print(f"longnet: error: {line}", file=sys.stderr)


def _drop_unwritable_output() -> None:
    """Point stdout at /dev/null if it cannot be flushed.

    Python flushes it again at shutdown: a failure there prints "Exception ignored" and makes the exit code 120.
    """
    try:
        _flush(sys.__stdout__)  # not sys.stdout: typer may have wrapped that one
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
