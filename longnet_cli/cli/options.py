"""Types of options that several commands share, so that one word means one thing everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longnet_cli.basics.sizes import parse_size, parse_sizes
from longnet_cli.cli.command import BARE, OTHER

if TYPE_CHECKING:
    from longnet_cli.attention import Pattern

DEFAULT_MODEL = "longnet-tiny"

Dtype = Literal["auto", "fp32", "bf16", "fp16"]

# Panels of the help. A panel appears where its first option does.
INPUT, MODEL, PATTERN, OUTPUT, COMPUTE = "Input", "Model", "Pattern", "Output", "Compute"


def parse_device(text: str) -> str:
    """Return `auto`, `cpu`, `cuda` or `cuda:1`. Only torch, once loaded, knows whether that GPU exists."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text, re.ASCII):
        raise ValueError(f"'{text}' is not a device: write auto, cpu, cuda or cuda:1")
    return text


def read_pattern(pattern: str | None) -> Pattern | None:
    """Return the pattern of --pattern, None without one. Raises ConfigError."""
    from longnet_cli.attention import notation

    return notation.read_pattern(pattern, "--pattern")


def _option_parser(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Wrap `parse` for typer, which would put "Value error, " before the message of a plain ValueError."""

    def parse_option(value: Any) -> Any:
        try:
            return parse(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parse_option


def parse_names(text: str) -> tuple[str, ...]:
    """Parse `title,meta.url`: names with commas between them, each once."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"'{text}' is no list of names: write each once, with commas between them")
    return names


def option(panel: str, names: str, metavar: str | None, help: str, default: str | bool = True, **more: Any) -> Any:
    """Define an option in a panel: `Annotated[str, option(MODEL, "--model -m", "NAME|DIR", "Use this model.")]`.

    `default` describes, in the help, what happens without the option; True shows the default itself.
    """
    return typer.Option(*names.split(), metavar=metavar, help=help, show_default=default, rich_help_panel=panel, **more)


def size_option(
    panel: str, names: str, help: str, default: str | bool = True, *, metavar: str = "SIZE", **more: Any
) -> Any:
    """Define a size: `Annotated[int, size_option(OUTPUT, "--seq", "Tokens.")] = 4096`, or `int | None` with None."""
    return option(panel, names, metavar, help, default, parser=_option_parser(parse_size), **more)


def sizes_option(panel: str, names: str, help: str, default: str | bool = True, **more: Any) -> Any:
    """Define sizes: `Annotated[Sequence[int], sizes_option(OUTPUT, "--seq", "Tokens.")] = (8192, 32768)`.

    Write Sequence, because typer reads `list[int]` as an option that is given once for each item.
    """
    return option(panel, names, "SIZE,...", help, default, parser=_option_parser(parse_sizes), **more)


def names_option(panel: str, names: str, help: str, default: str | bool = True, **more: Any) -> Any:
    """Define names: `Annotated[Sequence[str], names_option(OUTPUT, "--show", "Draw these.")]`. The job checks them."""
    return option(panel, names, "NAME,...", help, default, parser=_split, **more)


def _split(value: str | Sequence[str]) -> list[str]:
    """Split `dilated,dense` into ["dilated", "dense"]."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)


def bare_or(value: str | None, bare: Any, absent: Any = None) -> Any:
    """Return `bare` for an option without a value, `absent` for one that is not given, and any other value itself."""
    return absent if value is None else bare if value == BARE else value


def complete_model(incomplete: str) -> list[str]:
    """Return the shipped and the cached models whose names begin so; none for a path, which the shell completes."""
    from longnet_cli.hub.model_names import list_cached, list_models

    return [name for name in (*list_models(), *list_cached()) if name.startswith(incomplete)]


Names = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT",
        help="Read files, folders, globs, URIs (s3://...), @list (a file with one input per line), or - for stdin. "
        "They hold Arrow, Parquet, JSON Lines or UTF-8 text.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str,
    option(
        MODEL,
        "--model -m",
        "NAME|DIR",
        "Use a shipped model, a folder (with a slash: ./my-run), a GGUF file, or a model on the Hugging Face hub: "
        "ORG/NAME, ORG/NAME@REVISION, ORG/NAME:FILE.gguf.",
        autocompletion=complete_model,
    ),
]
UpdateOption = Annotated[
    bool,
    option(MODEL, "--update", None, "Ask the hub what ORG/NAME is now, instead of taking what was downloaded before."),
]
TokenizerOption = Annotated[
    str | None,
    option(
        INPUT,
        "--tokenizer",
        "NAME|PATH",
        "Use bytes, a tokenizer.json, a folder that holds one, or the tokenizer of a model: shipped, or ORG/NAME.",
        "the model's",
    ),
]
TokenizerDiffersOption = Annotated[
    bool, option(INPUT, "--tokenizer-differs", None, "Accept a tokenizer that is not the model's.")
]
ColumnOption = Annotated[
    str | None,
    option(
        INPUT,
        "--column",
        "NAME",
        "Read this column, or a field of a struct: doc.body.",
        "input_ids, tokens, token_ids or ids, otherwise text",
    ),
]
IdColumnOption = Annotated[
    str | None,
    option(INPUT, "--id-column", "NAME", "Name documents by this column.", "doc_id, otherwise id"),
]
KeepOption = Annotated[
    Sequence[str] | None,
    option(
        INPUT,
        "--keep",
        "COLUMN,...",
        "Carry these columns to the output.",
        parser=_option_parser(parse_names),
    ),
]
EosOption = Annotated[
    str | None,
    option(
        INPUT,
        "--eos",
        "TOKEN|ID",
        "Cut a flat column of ids into documents at this token.",
        "the tokenizer's, otherwise the file's",
    ),
]
BosOption = Annotated[
    str | None,
    option(
        INPUT,
        "--bos",
        "none|TOKEN|ID",
        "Put this token before each document, or nothing.",
        "what the tokenizer's template or the model says",
    ),
]
SkipBadOption = Annotated[
    bool,
    option(
        INPUT,
        "--skip-bad",
        None,
        "Leave out what cannot be read: exit code 6.",
    ),
]
PatternOption = Annotated[
    str | None,
    option(
        PATTERN,
        "--pattern",
        "PATTERN",
        "Attend by this pattern: paper, geometric:1e9, window:1Ki,sinks=4, nested:1Mi, pretrained, finding, dense, or "
        "levels such as 1Ki/1,4Ki/4. `longnet pattern PATTERN` describes one.",
        "the model's own",
    ),
]
ShardFormatOption = Annotated[
    Literal["arrow", "parquet"],
    option(OUTPUT, "--shard-format", "arrow|parquet", "Write shards of this format."),
]
ResumeOption = Annotated[
    bool,
    option(
        OUTPUT, "--resume", None, "Continue an interrupted run in the output folder, with the same inputs and options."
    ),
]
DryRunOption = Annotated[
    bool,
    option(
        OUTPUT,
        "--dry-run",
        None,
        "Print documents, tokens, memory, FLOPs and time, and stop. The exit code is 5 if it does not fit.",
    ),
]
SampleOption = Annotated[
    int | None,
    size_option(
        OUTPUT,
        "--sample",
        "For --dry-run, tokenize a uniform sample of N texts. All texts are read, and their tokens per byte are taken "
        "to be those of the sample.",
        "all",
        metavar="N",
    ),
]
DeviceOption = Annotated[
    str,
    option(
        COMPUTE,
        "--device",
        "auto|cpu|cuda[:i]",
        "Compute on this device.",
        parser=_option_parser(parse_device),
    ),
]
DtypeOption = Annotated[
    Dtype, option(COMPUTE, "--dtype", "auto|fp32|bf16|fp16", "Compute matrix products in this precision.")
]
ChunkOption = Annotated[
    int | None,
    size_option(
        COMPUTE,
        "--chunk",
        "Process this many tokens at a time. Fewer need less memory and change no result.",
        "what fits the memory",
    ),
]
SpillOption = Annotated[
    str | None,
    option(
        COMPUTE,
        "--spill",
        "DIR",
        "Keep here, not in memory, what grows with a document: keys and values, for a pattern with chosen blocks, or "
        "a bidirectional model's hidden states.",
        "in memory",
    ),
]
NprocOption = Annotated[
    int | None,
    size_option(
        COMPUTE, "--nproc", "Start N processes (ranks) on this machine.", "what --dp and --sp need", metavar="N"
    ),
]
SpOption = Annotated[
    int | None, size_option(COMPUTE, "--sp", "Split each sequence over N ranks.", "all of a group", metavar="N")
]
DpOption = Annotated[
    int | None,
    size_option(COMPUTE, "--dp", "Make N groups of ranks, each with its own sequences.", "1", metavar="N"),
]
QuietOption = Annotated[bool, option(OTHER, "--quiet -q", None, "Show no progress, only errors.")]
