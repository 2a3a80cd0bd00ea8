"""Rules for every command and option: the look of the help, values that may be omitted, values that are refused.

Pairs of options that exclude or need each other are data, and one loop checks them.
"""

import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from inspect import Parameter, Signature
from typing import Any, ClassVar, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from longnet_cli.basics.errors import ConfigError, LongNetError
from longnet_cli.basics.sizes import MAX_SIZE
from longnet_cli.running.ranks.launch import under_torchrun

from .output import be_quiet

USAGE_ERROR: Any = typer.BadParameter.__base__  # click's, or that of the copy of click in typer
OTHER = "Other"  # the last panel
SHORT_COLUMN = 28  # in which the texts of a short help begin
FEW = 12  # arguments and options that all fit into a short help
SIZES = "SIZE: 32k is 32000, 32Ki is 32768."
# What options of other programs are here: the last word is an option of the command, or else the next one counts.
ELSEWHERE = {
    "--batch-size": ("batches are made by --chunk",),
    **dict.fromkeys(
        ("--max-length", "--max-model-len", "--ctx-size"), ("it is --context", "it is --max-tokens")
    ),
    "--max-new-tokens": ("it is --max-tokens",),
}
BARE = "\0"  # stands for an omitted value: no word of a command line can hold it


def _show_short_help(ctx: typer.Context, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        typer.echo(short_help(ctx))
        raise typer.Exit


SHORT_HELP = typer.Option(
    False,
    "-h",
    callback=_show_short_help,
    is_eager=True,
    help="Show the options that are used most.",
    rich_help_panel=OTHER,
    show_default=False,
)


def takes_options(command: Callable[[Any], None]) -> Callable[..., None]:
    """Return a command for typer, with an option for each field of the dataclass that `command` takes.

    Fields are made by `options.option` and `options.argument`, in the order of the help. A field may also be another
    such dataclass, of options that several commands share.
    """
    taken, _ = get_type_hints(command).values()  # and None, which it returns

    def run(**values: Any) -> None:
        command(_filled(taken, values))

    run.__name__ = command.__name__
    run.__doc__ = command.__doc__
    short = Parameter("short_help", Parameter.KEYWORD_ONLY, default=SHORT_HELP, annotation=bool)
    options = [*_options_of(taken)]
    parameters = [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=field.metadata["typer"],
            annotation=kind,
        )
        for field, kind in options
    ]
    run.__signature__ = Signature([*parameters, short])  # type: ignore[attr-defined]
    run.common = {field.name for field, _ in options if field.metadata["common"]}  # type: ignore[attr-defined]
    return run


def _options_of(taken: Any) -> Iterator[tuple[Field[Any], Any]]:
    """Yield the fields of a dataclass, and of those in it, with their types."""
    kinds = get_type_hints(taken)
    for field in fields(taken):
        kind = kinds[field.name]
        if is_dataclass(kind):
            yield from _options_of(kind)
        else:
            yield field, kind


def _filled(options: Any, values: Mapping[str, Any]) -> Any:
    """Return the options of a dataclass, in which others may be, with these values."""
    kinds = get_type_hints(options).items()
    return options(
        **{
            name: _filled(kind, values) if is_dataclass(kind) else values[name]
            for name, kind in kinds
        }
    )


class CommandGroup(TyperGroup):
    """A group of commands whose help shows no type for flags. `help COMMAND` is `COMMAND --help`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a command line."""
        return super().parse_args(ctx, [*args[1:], "--help"] if args[:1] == ["help"] else args)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return all parameters, --help included. What shells call to complete words is not shown."""
        params = _plain(super().get_params(ctx))
        for parameter in params:
            parameter.hidden = parameter.name == "show_completion"
        return params


class Command(TyperCommand):
    """A command that refuses option values that are empty, NaN or beyond an int64, and a closed stdout for its result.

    If the metavar of an option has brackets (`[PATH]`), its value may be omitted: it is then BARE. `--help` shows all
    options, and `-h` those that people use most.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        """Return all parameters, --help at the end of the last panel."""
        params = _plain(super().get_params(ctx))
        params[-1].rich_help_panel = OTHER
        return params

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, with the notation of SIZE if an option takes one."""
        if any("SIZE" in str(parameter.metavar) for parameter in self.params):
            self.epilog = SIZES
        super().format_help(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a command line. Raises ConfigError for an option that took an argument."""
        names = {name: str(option.metavar) for option in self.params for name in option.opts}
        # options whose value may be omitted
        optional = {name for name, metavar in names.items() if metavar.startswith("[")}
        words = args[: [*args, "--"].index("--")]
        marked = list(_mark_bare(words, optional))
        taking = [index for index, word in enumerate(marked) if word in optional]
        try:
            return super().parse_args(ctx, [*marked, *args[len(words) :]])
        except typer.BadParameter as error:
            # pydantic's words, by which typer parses
            error.message = error.message.removeprefix("Value error, ")
            missing: Any = error.param
            if not taking or missing is None or missing.param_type_name != "argument":
                raise
            name, value = words[taking[0] : taking[0] + 2]
            raise ConfigError(
                f"{name} took '{value}' as its value, and no {missing.metavar} is left: write {name} last"
            ) from None
        except USAGE_ERROR as error:
            for advice in ELSEWHERE.get(getattr(error, "option_name", ""), ()):
                if advice.split()[-1] in names:
                    raise ConfigError(f"there is no {error.option_name} here: {advice}") from None
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises ConfigError for a refused value and, if torchrun has started several processes, for a
        command without --nproc; LongNetError for a closed stdout.
        """
        if under_torchrun() and "nproc" not in ctx.params:
            raise ConfigError(
                f"{ctx.info_name} is for one process, and torchrun has started several: start one"
            )
        for parameter in self.params:
            name = str(parameter.metavar)
            if parameter.param_type_name == "option":
                name = max(parameter.opts, key=len)
            value = ctx.params.get(parameter.name)
            for single in value if isinstance(value, list | tuple) else [value]:
                _check(name, single)
        quiet = ctx.params.get("quiet", False)
        be_quiet(quiet)
        if quiet:
            # of downloads; read when they are imported
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        # in a dry run, without --output, and with --output -, the result goes to stdout
        prints = ctx.params.get("dry_run") or ctx.params.get("output") in (None, "-")
        if sys.stdout is None and prints:  # closed by `>&-`
            raise LongNetError(
                "stdout is closed, and what this command finds goes there: nothing was done"
            )
        return super().invoke(ctx)


def short_help(ctx: Any) -> str:
    """Return what a command does, an example, and its arguments and common options: a screen of 80 columns."""
    command = ctx.command
    common: set[str] = getattr(command.callback, "common", set())
    parameters = [parameter for parameter in command.params if "-h" not in parameter.opts]
    if len(parameters) > FEW:
        parameters = [parameter for parameter in parameters if parameter.name in common]
    summary, example, *_ = command.help.split("\n\n")
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    lines = [f"Usage: {usage}", "", *textwrap.wrap(summary, 80), "", example, ""]
    for parameter in parameters:
        lines += _short_row(parameter)
    text = "\n".join([*lines, "", f"All options: {ctx.command_path} --help"])
    return f"{text}. {SIZES}" if "SIZE" in text else text


def _short_row(parameter: Any) -> list[str]:
    """Return the lines of an argument or an option: its names, the first sentence of its help, and a short default."""
    names = str(parameter.metavar)
    if parameter.param_type_name == "option":
        spellings = [*sorted(parameter.opts, key=len), *parameter.secondary_opts]
        names = f"{', '.join(spellings)} {parameter.metavar or ''}".strip()
    sentence = re.match(r".*?\.(?= |$)|.*", parameter.help)
    default = re.search(r"( \(default: [^)]{,40}\))?$", parameter.help)
    text = "".join(match[0] for match in (sentence, default) if match)
    indent = " " * SHORT_COLUMN
    lines = textwrap.wrap(
        text,
        80,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
    if len(names) < SHORT_COLUMN:
        lines[0] = names.ljust(SHORT_COLUMN) + lines[0].lstrip()
        return lines
    return [names, *lines]


def _plain(params: list[Any]) -> list[Any]:
    """Return the parameters without types that help need not show: `<bool>` of a flag, `<list[str]>` of INPUT."""
    for parameter in params:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
        elif parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: None
    return params


def _mark_bare(words: Sequence[str], optional: set[str]) -> Iterator[str]:
    """Yield the words, with the value BARE for each option of `optional` that is last or before another option."""
    for word, following in zip(words, [*words, "-"][1:], strict=True):
        yield f"{word}={BARE}" if word in optional and following.startswith("-") else word


def _check(name: str, value: Any) -> None:
    if value == "":  # in a script, a variable that is not set
        raise ConfigError(f"{name} is empty: give it a value, or leave it out")
    if not isinstance(value, int | float):
        return
    if MAX_SIZE < abs(value) < math.inf:
        raise ConfigError(f"{name} is out of range: {value:.3g} is not less than 2^63")
    if math.isnan(value):
        raise ConfigError(f"{name} is not a number: {value}")


@dataclass(frozen=True)
class Needs:
    """`option` is refused without `other`. With alternatives (`--output|--dry-run`), one of them is enough.

    The error is `OPTION WHY: give GIVE`. Without `give`, that is the name of the other one.
    """

    option: str
    other: str
    why: str
    give: str = ""

    refused_beside: ClassVar[bool] = False

    @property
    def advice(self) -> str:
        return f"give {self.give or self.other}"


@dataclass(frozen=True)
class Excludes:
    """`option` is refused beside `other`. The error is `OPTION WHY: leave out OTHER`."""

    option: str
    other: str
    why: str

    refused_beside: ClassVar[bool] = True

    @property
    def advice(self) -> str:
        return f"leave out {self.other}"


TOP_P = Needs(
    "--top-p",
    "--temperature",
    "needs a temperature above 0",
    "--temperature: 1 is the model's own choice",
)


def check_pairs(pairs: Sequence[Needs | Excludes], options: Any) -> None:
    """Raise ConfigError for the first pair that the `options`, a dataclass of a command, break.

    An option counts as given unless it has its default or is `--dp 1`, which changes nothing.
    """
    names = given_names(options)
    for pair in pairs:
        is_beside = not names.isdisjoint(pair.other.split("|"))
        if pair.option in names and is_beside is pair.refused_beside:
            raise ConfigError(f"{pair.option} {pair.why}: {pair.advice}")


def given_names(options: Any) -> set[str]:
    """Return the names of the `options`, a dataclass of a command, that are given: see `check_pairs`."""
    names = set[str]()
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            names |= given_names(value)
        elif value != field.default and (field.name, value) != ("dp", 1):
            names.update(field.metadata["names"])
    return names
