"""Options as fields of dataclasses, and those that several commands share: one word means one thing everywhere."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import typer

from longnet_cli.basics.errors import ConfigError
from longnet_cli.basics.sizes import DTYPES_OF_TORCH, parse_size, parse_sizes

from .command import BARE, OTHER

if TYPE_CHECKING:
    from longnet_cli.attention import Pattern
    from longnet_cli.data.files.machine_shares import Share

Format = Literal["text", "json"]
DEFAULT_MODEL = "longnet-tiny"
KNOWS = "knows Python source"


def parse_device(text: str) -> str:
    """Return `auto`, `cpu`, `cuda` or `cuda:1`. Only torch, once loaded, knows whether that GPU exists."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text, re.ASCII):
        why = (
            ": it has no float64, in which positions are computed" if text.startswith("mps") else ""
        )
        raise ValueError(f"'{text}' is not a device{why}: write auto, cpu, cuda or cuda:1")
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


def parse_dtype(text: str, names: Sequence[str] = ("auto", "fp32", "bf16", "fp16")) -> str:
    """Return the name of a type of numbers, which may be written as in torch: float32, bfloat16, float16."""
    if (name := DTYPES_OF_TORCH.get(text, text)) not in names:
        raise ValueError(f"'{text}' is none of {', '.join(names)}")
    return name


def parse_names(text: str) -> tuple[str, ...]:
    """Parse `title,meta.url`: names with commas between them, each once."""
    names = tuple(map(str.strip, text.split(",")))
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"'{text}' is no list of names: write each once, with commas between them")
    return names


def parse_span(text: str) -> int | str:
    """Return a size, or a word, of which `EncodeOptions` knows whether it is a unit of a text."""
    return parse_size(text) if text[:1].isdigit() else text


def parse_share(text: str) -> Share:
    """Return a share of the input, such as `2/4`."""
    from longnet_cli.data.files.machine_shares import Share

    return Share.parse(text)


# What reads the value of an option, by what its help has for one. Sizes are of `HelpPanel.size`.
PARSERS: dict[str, Callable[[Any], Any]] = {
    "SIZE,...": parse_sizes,
    "SIZE|UNIT": parse_span,
    "I/N": parse_share,
    "NAME,...": parse_names,
    "COLUMN,...": parse_names,
    "auto|cpu|cuda[:i]": parse_device,
    "auto|fp32|bf16|fp16": parse_dtype,
    "auto|fp32|bf16": partial(parse_dtype, names=("auto", "fp32", "bf16")),
}


class HelpPanel(str):
    """A panel of the help, by its title, which makes the options in it: fields of a dataclass (`takes_options`).

    A panel appears where its first option does.
    """

    def option(
        self,
        names: str,
        help: str,
        *,
        default: Any = None,
        absent: str | None = None,
        common: bool = False,
        **more: Any,
    ) -> Any:
        """Return an option: `model: str = MODEL.option("--model -m NAME", "Use this model.", default="longnet-tiny")`.

        After its `names` stands what the help has for a value. The help ends with the default, or with what happens
        without the option: "(default: all)". MISSING is no default: the option is required. None with a value `absent`
        tells that value from a given one. An option of several values is a Sequence, because typer reads `list[int]` as
        an option that is given once for each item. Options that are `common` are in the short help.
        """
        flags = names.split()
        metavar = None if flags[-1].startswith("-") else flags.pop()
        shown = absent or default
        said = "(default: " in help or shown in (None, MISSING) or isinstance(shown, bool)
        help = help if said else f"{help} (default: {shown})"
        if metavar in PARSERS:
            more["parser"] = _option_parser(PARSERS[metavar])
        option = typer.Option(
            ... if default is MISSING else default,
            *flags,
            metavar=metavar,
            help=help,
            show_default=False,
            rich_help_panel=str(self),
            **more,
        )
        metadata = {"typer": option, "names": flags, "common": common}
        return field(default=default, metadata=metadata)

    def common(self, names: str, help: str, **more: Any) -> Any:
        """Return an option that is in the short help, too. The arguments are those of `option`."""
        return self.option(names, help, common=True, **more)

    def flag(self, names: str, help: str, *, common: bool = False) -> Any:
        """Return an option without a value, which is False if it is not given."""
        return self.option(names, help, default=False, common=common)

    def size(self, names: str, help: str, *, common: bool = False) -> Any:
        """Return a size: `seq: int | None = MODEL.size("--seq SIZE", "Tokens.")`."""
        return self.option(names, help, common=common, parser=_option_parser(parse_size))


def argument(metavar: str, help: str, default: Any = MISSING) -> Any:
    """Return an argument of a command, a field of a dataclass as `option` does: required, unless it has a default."""
    value = ... if default is MISSING else default
    shown = typer.Argument(value, metavar=metavar, help=help, show_default=False)
    return field(default=default, metadata={"typer": shown, "names": (), "common": True})


def bare_or(value: str | None, bare: Any, absent: Any = None) -> Any:
    """Return `bare` for an option without a value, `absent` for one that is not given, and any other value itself."""
    return absent if value is None else bare if value == BARE else value


def complete_model(incomplete: str) -> list[str]:
    """Return the shipped models whose names begin so; none for a path, which the shell completes."""
    from longnet_cli.hub.model_names import list_models

    return [name for name in list_models() if name.startswith(incomplete)]


INPUT = HelpPanel("Input")
MODEL = HelpPanel("Model")
PATTERN = HelpPanel("Pattern")
OUTPUT = HelpPanel("Output")
SAMPLING = HelpPanel("How to choose tokens")
COMPUTE = HelpPanel("Compute")
LAST = HelpPanel(OTHER)

# Single options of several commands. Those that always come together are in the dataclasses below.
inputs_argument = partial(
    argument,
    "INPUT",
    "Read files, folders, globs, URIs (s3://...), @list (a file with one input per line), or - for stdin. "
    "They hold Arrow, Parquet, JSON Lines or UTF-8 text, also compressed.",
)
tokenizer_option = partial(
    INPUT.option,
    "--tokenizer NAME|PATH",
    "Use bytes, a tokenizer.json, a folder that holds one, or the tokenizer of a model: shipped, or ORG/NAME. "
    "(default: the model's)",
)
differs_flag = partial(
    INPUT.flag,
    "--tokenizer-differs",
    "Accept a tokenizer that is not the model's.",
)
column_option = partial(
    INPUT.common,
    "--column NAME",
    "Read this column, or a field of a struct: doc.body. (default: input_ids, tokens, token_ids or ids, otherwise "
    "text, otherwise messages)",
)
id_column_option = partial(
    INPUT.option,
    "--id-column NAME",
    "Name documents by this column. (default: doc_id, otherwise id)",
)
eos_option = partial(
    INPUT.option,
    "--eos TOKEN|ID",
    "Cut a flat column of ids into documents at this token. (default: the tokenizer's, otherwise the file's)",
)
bos_option = partial(
    INPUT.option,
    "--bos none|TOKEN|ID",
    "Put this token before each document, or nothing. (default: what the tokenizer's template or the model says)",
)
skip_bad_flag = partial(INPUT.flag, "--skip-bad", "Leave out what cannot be read: exit code 6.")
model_option = partial(
    MODEL.common,
    "--model -m NAME|DIR",
    "Use a shipped model, a folder, a GGUF file, or a model on the Hugging Face hub: "
    f"ORG/NAME, ORG/NAME@REVISION, ORG/NAME:FILE.gguf. {DEFAULT_MODEL} {KNOWS}.",
    autocompletion=complete_model,
)
update_flag = partial(
    MODEL.flag,
    "--update",
    "Ask the hub what ORG/NAME is now, instead of taking what was downloaded before.",
)
pattern_option = partial(
    PATTERN.common,
    "--pattern PATTERN",
    "Attend by this pattern: paper, geometric:1e9, window:1Ki,sinks=4, pretrained, finding, dense, or "
    "levels such as 1Ki/1,4Ki/4. `longnet pattern PATTERN` describes one. (default: the model's own)",
)
shard_format_option = partial(
    OUTPUT.option,
    "--shard-format arrow|parquet",
    "Write shards of this format.",
    default="arrow",
)
resume_flag = partial(
    OUTPUT.flag,
    "--resume",
    "Continue an interrupted run in the output folder, with the same inputs and options.",
    common=True,
)
device_option = partial(
    COMPUTE.option,
    "--device auto|cpu|cuda[:i]",
    "Compute on this device.",
    default="auto",
)
dtype_option = partial(
    COMPUTE.common,
    "--dtype auto|fp32|bf16|fp16",
    "Compute matrix products in this precision.",
    default="auto",
)
share_option = partial(
    INPUT.option,
    "--share I/N",
    "Read the I-th of N shares of the input, each for a machine: of its files by size, or of its documents if there "
    "are fewer files. (default: all)",
)
keep_option = partial(INPUT.option, "--keep COLUMN,...", "Carry these columns to the output.")
quiet_flag = partial(LAST.flag, "--quiet -q", "Show no progress, only errors.")


@dataclass(frozen=True)
class Documents:
    """The documents that `score` and `encode` read, and how they become tokens."""

    inputs: list[str] = inputs_argument()
    tokenizer: str | None = tokenizer_option()
    tokenizer_differs: bool = differs_flag()
    column: str | None = column_option()
    id_column: str | None = id_column_option()
    keep: Sequence[str] | None = keep_option()
    eos: str | None = eos_option()
    bos: str | None = bos_option()
    skip_bad: bool = skip_bad_flag()
    share: Any = share_option()  # a Share

    @property
    def kept(self) -> tuple[str, ...]:
        """The columns that are carried to the output."""
        return tuple(self.keep or ())


@dataclass(frozen=True)
class ModelChoice:
    """The model that a command reads with, None for DEFAULT_MODEL, and its pattern."""

    model: str | None = model_option(absent=DEFAULT_MODEL)
    update: bool = update_flag()
    pattern: str | None = pattern_option()

    @property
    def name(self) -> str:
        return self.model or DEFAULT_MODEL


@dataclass(frozen=True)
class Sampling:
    """The choice of each new token, and the end of a text."""

    temperature: float = SAMPLING.common(
        "--temperature T",
        "Draw tokens from softmax(logits / T). At 0, take the likeliest token each time.",
        default=0.0,
    )
    top_p: float = SAMPLING.option(
        "--top-p P",
        "Draw only from the fewest tokens whose probabilities sum to P. (default: from all)",
        default=1.0,
    )
    seed: int | None = SAMPLING.option(
        "--seed N",
        "Seed the draws. Runs with the same seed give the same text. (default: a new one each run)",
    )
    stop: list[str] | None = SAMPLING.common(
        "--stop TEXT", "End before this text. You can repeat it."
    )

    def __post_init__(self) -> None:
        from longnet_cli.jobs.job_options import check_sampling

        check_sampling(self.temperature, self.top_p)
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"--seed {self.seed} is not a number from 0 to 2^63 - 1")

    def seed_in_words(self, seed: int) -> str:
        """Return what a line about a new text says of the seed with which it was drawn."""
        return f", seed {seed}" if self.temperature else ""

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `jobs.generating.generate`, with a new seed if none is given."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": secrets.randbelow(1 << 32) if self.seed is None else self.seed,
            "stop": self.stop or (),
        }


@dataclass(frozen=True)
class Running:
    """The choice to continue an interrupted run, or only to estimate one."""

    resume: bool = resume_flag()
    dry_run: bool = OUTPUT.flag(
        "--dry-run",
        "Print documents, tokens, memory, FLOPs and time, and stop. The exit code is 5 if it does not fit.",
        common=True,
    )


@dataclass(frozen=True)
class Mesh:
    """The processes that share the work."""

    nproc: int | None = COMPUTE.size(
        "--nproc N", "Start N processes (ranks) on this machine. (default: what --dp and --sp need)"
    )
    sp: int | None = COMPUTE.size(
        "--sp N", "Split each sequence over N ranks. (default: all of a group)"
    )
    dp: int | None = COMPUTE.size(
        "--dp N", "Make N groups of ranks, each with its own sequences. (default: 1)"
    )

    @property
    def groups(self) -> int:
        """The groups of ranks."""
        return self.dp or 1


@dataclass(frozen=True)
class Computing:
    """The device and the memory that a process computes with."""

    device: str = device_option()
    dtype: str = dtype_option()
    chunk: int | None = COMPUTE.size(
        "--chunk SIZE",
        "Process this many tokens at a time. Fewer need less memory and change no result. (default: what fits the "
        "memory)",
    )
    spill: str | None = COMPUTE.option(
        "--spill DIR",
        "Keep a bidirectional model's hidden states, which grow with a document, here and not in memory.",
    )
    quiet: bool = quiet_flag()
