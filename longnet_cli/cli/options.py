"""Types of options that several commands share, so that one word means one thing everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longnet_cli.errors import ConfigError
from longnet_cli.sizes import parse_size, parse_sizes

if TYPE_CHECKING:
    from longnet_cli.attention import Pattern

DEFAULT_MODEL = "longnet-tiny"

Dtype = Literal["auto", "fp32", "bf16", "fp16"]

_SIZE_HELP = "32k is 32000, 32Ki is 32768."


def parse_device(text: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:1`; whether that GPU exists is only known once torch is loaded."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text, re.ASCII):
        raise ValueError(f"'{text}' is not a device: write auto, cpu, cuda or cuda:1")
    return text


def read_pattern(
    segment_lengths: Sequence[int] | None, dilation_rates: Sequence[int] | None, pattern: str | None = None
) -> Pattern | None:
    """The pattern of --pattern, or the levels of the other two; None where none is given. Raises ConfigError."""
    from longnet_cli.attention import Pattern
    from longnet_cli.patterns import parse_pattern

    if pattern is not None:
        if segment_lengths is not None or dilation_rates is not None:
            raise ConfigError(
                "--pattern says the whole pattern, --segment-lengths and --dilation-rates list levels: give one"
            )
        try:
            return parse_pattern(pattern)
        except ValueError as error:
            raise ConfigError(f"--pattern: {error}") from None
    if segment_lengths is None and dilation_rates is None:
        return None
    try:
        return Pattern(tuple(segment_lengths or ()), tuple(dilation_rates or ()))
    except ValueError as error:
        raise ConfigError(f"--segment-lengths, --dilation-rates: {error}") from None


def _option_parser(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`parse` for typer, which would put "Value error, " before the message of a plain ValueError."""

    def parse_option(value: Any) -> Any:
        try:
            return parse(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parse_option


def size_option(*names: str, help: str, **settings: Any) -> Any:
    """`seq: Annotated[int, size_option("--seq", help="Tokens.")] = 4096`, or `int | None` with default None."""
    return typer.Option(
        *names, parser=_option_parser(parse_size), metavar="SIZE", help=f"{help} {_SIZE_HELP}", **settings
    )


def sizes_option(*names: str, help: str, **settings: Any) -> Any:
    """`seq: Annotated[Sequence[int], sizes_option("--seq", help="...")] = (8192, 32768)`.

    Sequence, because typer reads `list[int]` as an option that is given once for each item.
    """
    return typer.Option(
        *names, parser=_option_parser(parse_sizes), metavar="SIZE,...", help=f"{help} {_SIZE_HELP}", **settings
    )


Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT",
        help="Arrow, Parquet, JSON Lines or UTF-8 text: files, folders, globs, URIs (s3://...), @list (inputs in a "
        "file, one a line), - for stdin.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", metavar="NAME|DIR", help="A shipped model, or a folder (with a slash: ./my-run)."),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="bytes|FILE|MODEL",
        help="A tokenizer.json, that of a folder or of a shipped model, or one id for each byte.",
        show_default="the model's own",
    ),
]
TokenizerDiffersOption = Annotated[
    bool,
    typer.Option("--tokenizer-differs", help="Take --tokenizer though the model was trained with another one."),
]
ColumnOption = Annotated[
    str | None,
    typer.Option(
        "--column",
        metavar="NAME",
        help="Column to read.",
        show_default="input_ids, tokens, token_ids or ids, else text",
    ),
]
AttentionOption = Annotated[
    Literal["dilated", "dense"],
    typer.Option("--attention", help="Of a model of transformers: dilated, or its own."),
]
PatternOption = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        metavar="PATTERN",
        help="Attend by this pattern: paper, geometric:1e9, window:1Ki,sinks=4, nested:1Mi, pretrained, or levels as "
        "1Ki/1,4Ki/4. `longnet pattern` shows what it is.",
        show_default="the model's own",
    ),
]
SegmentLengthsOption = Annotated[
    Sequence[int] | None,
    sizes_option(
        "--segment-lengths",
        help="Levels in place of --pattern, with --dilation-rates.",
        show_default="the model's own",
    ),
]
DilationRatesOption = Annotated[
    Sequence[int] | None, sizes_option("--dilation-rates", help="One for each segment length.")
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device", parser=_option_parser(parse_device), metavar="auto|cpu|cuda[:i]", help="Where to compute."
    ),
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Precision of the matrix products.")]
EosOption = Annotated[
    int | None,
    typer.Option(
        "--eos",
        min=0,
        metavar="ID",
        help="The id that ends a document in a flat column of ids.",
        show_default="the tokenizer's, or what the file says",
    ),
]
ChunkOption = Annotated[
    int | None,
    size_option(
        "--chunk",
        help="Most tokens in memory at a time; it changes no number.",
        show_default="what fits the model and the memory",
    ),
]
NprocOption = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        min=1,
        metavar="N",
        help="Start N processes with torchrun, which share every sequence.",
        show_default="this one",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr; errors are still shown.")]
