"""What holds for every command and every option alike, whichever they are: checked after parsing, before any work."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from typer.core import TyperCommand

from longnet_cli.errors import ConfigError, LongNetError
from longnet_cli.sizes import MAX_SIZE


class Command(TyperCommand):
    """A command none of whose options is empty, NaN or beyond an int64, and whose result has somewhere to go."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises ConfigError for such an option, LongNetError for a closed stdout."""
        for parameter in self.params:
            name = max(parameter.opts, key=len) if parameter.param_type_name == "option" else str(parameter.metavar)
            for value in _items(ctx.params.get(parameter.name or "")):
                _check(name, value)
        if sys.stdout is None and _prints(ctx.params):  # closed by `>&-`
            raise LongNetError("stdout is closed, and what this command finds goes there: nothing was done")
        return super().invoke(ctx)


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _items(item)
    else:
        yield value


def _check(name: str, value: Any) -> None:
    if value == "":
        raise ConfigError(
            f"{name} is empty: give it a value, or leave it out"
        )  # in a script, a variable that is not set
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{name} is not a number: {value}")
    if isinstance(value, int | float) and MAX_SIZE < abs(value) < math.inf:
        raise ConfigError(f"{name} is out of range: {value:.3g} is not less than 2^63")


def _prints(params: Mapping[str, Any]) -> bool:
    """Whether the result goes to stdout: what has no --output, or - there; of `train`, the result of --dry-run."""
    if "dry_run" in params:
        return bool(params["dry_run"])
    return params.get("output") in (None, "-")
