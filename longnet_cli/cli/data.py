"""`longnet data inspect`: the contents of files, and the problems in them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import typer

from longnet_cli.basics.sizes import count_of

from . import options as shared
from .command import Command, CommandGroup, takes_options
from .options import INPUT, OUTPUT, Format
from .output import emit_json, printable
from .progress import progress

if TYPE_CHECKING:
    from longnet_cli.jobs.inspecting import Inspection

BAR = 40  # characters of the longest bar

data = typer.Typer(name="data", cls=CommandGroup, no_args_is_help=True)


@data.callback()
def group() -> None:
    """Look at data before a model does."""


@dataclass(frozen=True)
class InspectCommand:
    """The options of `data inspect`."""

    inputs: list[str] = shared.inputs_argument()
    tokenizer: str | None = INPUT.option(
        "--tokenizer NAME|PATH",
        "Check ids against a tokenizer, and count text in its tokens: bytes, a tokenizer.json, or that of a model. "
        "(default: bytes, for text)",
    )
    column: str | None = shared.column_option()
    id_column: str | None = shared.id_column_option()
    eos: str | None = shared.eos_option()
    format: Format = OUTPUT.option(
        "--format text|json",
        "Print a table to read, or one JSON value.",
        default="text",
    )
    quiet: bool = shared.quiet_flag()


def inspect(options: InspectCommand) -> None:
    """Count documents, tokens and vectors, and find everything that is wrong.

    Example: longnet data inspect docs/*.md examples/*.py

    The exit code is 3 if anything is wrong.
    """
    from longnet_cli.basics.errors import DataError
    from longnet_cli.basics.events import Events
    from longnet_cli.data.documents.input_documents import Inputs
    from longnet_cli.data.documents.tokenizer import Tokenizer, end_of_text
    from longnet_cli.jobs.inspecting import inspect as run

    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    with progress("inspecting", total=None) as advance:
        eos_id = end_of_text(options.eos, tokenizer)
        reads = Inputs(options.inputs, tokenizer, options.column, options.id_column, eos_id=eos_id)
        inspection = run(reads, events=Events(progress=advance))
    if options.format == "json":
        emit_json(inspection.as_dict())
    else:
        _print(inspection)
    if inspection.num_problems:
        problems = count_of(inspection.num_problems, "problem")
        raise DataError(f"{problems}, the first: {inspection.problems[0]}")


data.command(cls=Command)(takes_options(inspect))


def _print(inspection: Inspection) -> None:
    def row(name: str, value: object) -> None:
        print(printable(f"{name:<12} {'-' if value is None else value}"))

    row("documents", inspection.documents)
    unit = "vectors" if inspection.vectors else "tokens"
    n_bytes = inspection.byte_tokens
    what = ""
    if n_bytes:
        what = f" ({n_bytes} of them bytes)"
        if n_bytes == inspection.tokens:
            unit = "bytes"
            what = " (bytes)"
    row("tokens", f"{inspection.tokens}{what}")
    if inspection.vectors:
        row("vectors", f"{inspection.vectors} of {' or '.join(map(str, inspection.sizes))} numbers")
    row("bytes", inspection.n_bytes)
    if inspection.documents:
        lengths = (f"{name} {value:.10g}" for name, value in inspection.length().items())
        row("length", ", ".join(lengths))
    row("ids", None if inspection.low is None else f"{inspection.low} .. {inspection.high}")
    row("formats", _counts(inspection.formats))
    row("token types", _counts(inspection.token_types))
    for key, values in inspection.metadata.items():
        row(key, _counts(values))
    histogram = inspection.histogram()
    most = max((count for _, _, count in histogram), default=0)
    if histogram:
        print(f"\n{unit:>27} {'documents':>12}")
    for low, high, count in histogram:
        between = f"{low} .. {high}" if low < high else str(low)
        print(f"{between:>27} {count:>12} {'#' * math.ceil(BAR * count / most)}".rstrip())
    print()
    for problem in inspection.problems:
        print(printable(f"problem: {problem}"))
    if inspection.num_problems > len(inspection.problems):
        print(f"... and {inspection.num_problems - len(inspection.problems)} more")
    if not inspection.num_problems:
        print("no problems found")


def _counts(values: dict[str, int]) -> str | None:
    counts = (f"{value} ({count_of(count, 'file')})" for value, count in values.items())
    return ", ".join(counts) or None
