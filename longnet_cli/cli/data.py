"""`longnet data inspect`: the contents of files, and the problems in them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from longnet_cli.cli.command import Command, CommandGroup
from longnet_cli.cli.options import INPUT, OUTPUT, ColumnOption, EosOption, IdColumnOption, Names, QuietOption, option
from longnet_cli.cli.output import emit_json, printable
from longnet_cli.cli.progress import progress

if TYPE_CHECKING:
    from longnet_cli.jobs.inspecting import Inspection

Format = Literal["text", "json"]
BAR = 40  # characters of the longest bar

data = typer.Typer(name="data", cls=CommandGroup, no_args_is_help=True, help="Look at data before a model does.")


@data.callback()
def group() -> None:
    """Look at data before a model does."""


@data.command(cls=Command)
def inspect(
    inputs: Names,
    tokenizer: Annotated[
        str | None,
        option(
            INPUT,
            "--tokenizer",
            "NAME|PATH",
            "Check ids against a tokenizer, and count text in its tokens: bytes, a tokenizer.json, or that of a model.",
            "bytes, for text",
        ),
    ] = None,
    column: ColumnOption = None,
    id_column: IdColumnOption = None,
    eos: EosOption = None,
    format: Annotated[Format, option(OUTPUT, "--format", "text|json", "Print a table to read, or one JSON value.")] = (
        "text"
    ),
    quiet: QuietOption = False,
) -> None:
    """Count documents and tokens, and find everything that is wrong.

    The exit code is 3 if anything is wrong.
    """
    from longnet_cli.basics.errors import DataError
    from longnet_cli.data.inputs import Inputs
    from longnet_cli.data.tokenizer import Tokenizer, end_of_text
    from longnet_cli.jobs.inspecting import inspect as run

    words = Tokenizer.load(tokenizer) if tokenizer else None
    with progress("inspecting", total=None, quiet=quiet) as advance:
        reads = Inputs(inputs, words, column, id_column, eos_id=end_of_text(eos, words))
        found = run(reads, on_progress=advance)
    if format == "json":
        emit_json(found.as_dict())
    else:
        _print(found)
    if found.num_problems:
        plural = "s" * (found.num_problems > 1)
        raise DataError(f"{found.num_problems} problem{plural}, the first: {found.problems[0]}")


def _print(found: Inspection) -> None:
    def row(name: str, value: object) -> None:
        print(printable(f"{name:<12} {'-' if value is None else value}"))

    row("documents", found.documents)
    n_bytes = found.byte_tokens
    unit = "bytes" if n_bytes == found.tokens > 0 else "tokens"
    what = " (bytes)" if unit == "bytes" else f" ({n_bytes} of them bytes)" if n_bytes else ""
    row("tokens", f"{found.tokens}{what}")
    row("bytes", found.n_bytes)
    if found.documents:
        row("length", ", ".join(f"{name} {value:.10g}" for name, value in found.length().items()))
    row("ids", None if found.low is None else f"{found.low} .. {found.high}")
    row("formats", _counts(found.formats))
    row("token types", _counts(found.token_types))
    for key, values in found.metadata.items():
        row(key, _counts(values))
    histogram = found.histogram()
    most = max((count for _, _, count in histogram), default=0)
    if histogram:
        print(f"\n{unit:>27} {'documents':>12}")
    for low, high, count in histogram:
        between = f"{low} .. {high}" if low < high else str(low)
        print(f"{between:>27} {count:>12} {'#' * math.ceil(BAR * count / most)}".rstrip())
    print()
    for problem in found.problems:
        print(printable(f"problem: {problem}"))
    if found.num_problems > len(found.problems):
        print(f"... and {found.num_problems - len(found.problems)} more")
    if not found.num_problems:
        print("no problems found")


def _counts(values: dict[str, int]) -> str | None:
    return ", ".join(f"{value} ({count} file{'s' * (count > 1)})" for value, count in values.items()) or None
