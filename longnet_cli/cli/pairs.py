"""Pairs of options that exclude or need each other, as data, and the one loop that checks them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from longnet_cli.basics.errors import ConfigError


@dataclass(frozen=True)
class Needs:
    """`option` is refused without `other`. With alternatives (`--output|--dry-run`), one of them is enough.

    The error is `OPTION WHY: give GIVE`. Without `give`, that is the name of the other one.
    """

    option: str
    other: str
    why: str
    give: str | None = None

    def error(self, given: set[str]) -> str | None:
        """Return the error if the options `given` break the rule."""
        broken = self.option in given and not given & {*self.other.split("|")}
        return f"{self.option} {self.why}: give {self.give or self.other}" if broken else None


@dataclass(frozen=True)
class Excludes:
    """`option` is refused beside `other`. The error is `OPTION WHY: leave out OTHER`."""

    option: str
    other: str
    why: str

    def error(self, given: set[str]) -> str | None:
        """Return the error if the options `given` break the rule."""
        broken = {self.option, self.other} <= given
        return f"{self.option} {self.why}: leave out {self.other}" if broken else None


SAMPLE = Needs("--sample", "--dry-run", "is for --dry-run, which estimates", "both, or leave it out")


def check_pairs(pairs: Sequence[Needs | Excludes], options: Any) -> None:
    """Raise ConfigError for the first pair that the `options`, a dataclass of a command, break.

    An option counts as given unless it has its default or is `--dp 1`, which changes nothing.
    """
    given = {*_given(options)}
    for pair in pairs:
        if error := pair.error(given):
            raise ConfigError(error)


def _given(options: Any) -> Iterator[str]:
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            yield from _given(value)
        elif value != field.default and (field.name, value) != ("dp", 1):
            yield from field.metadata["typer"].param_decls or ()
