"""Axes, curves and panels to draw, whatever was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from longnet_cli.basics.sizes import short_number

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Axis:
    """An axis: its title, its scale, the format of its numbers (`write`), and of its places in a sentence (`at`).

    `base` is the base of a logarithmic scale, or 0 for a linear one.
    """

    title: str
    base: int = 0
    write: Callable[[float], str] = short_number
    at: str = "{}"

    def name(self, value: float) -> str:
        """Return the name of a place in a sentence."""
        return self.at.format(self.write(value))

    def scale(self, value: float) -> float:
        """Return the place of a value. On a logarithmic scale, it is the logarithm of a positive value."""
        return math.log(value, self.base) if self.base else value

    def unscale(self, place: float) -> float:
        """Return the value whose `scale` is `place`."""
        return float(self.base) ** place if self.base else place


class Point(NamedTuple):
    """A measured value and its standard error, None where that is unknown."""

    x: float
    y: float
    error: float | None = None


class Curve(NamedTuple):
    """Points in rising order of x. Curves of the same name are parts of one curve.

    `extrapolated`: the first point was measured, and the others were computed from it.
    """

    name: str
    points: list[Point]
    extrapolated: bool = False


class Panel(NamedTuple):
    """Curves of one quantity, whose name in the files is `key`."""

    key: str
    x: Axis
    y: Axis
    curves: list[Curve]

    @property
    def names(self) -> list[str]:
        """The names of the curves, each once."""
        return list(dict.fromkeys(curve.name for curve in self.curves))


def number(value: Any) -> float | None:
    """Return a number from a file as a float; None for anything else, and for numbers that are not finite floats."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def point(row: Row, x: float | None, key: str, axes: tuple[Axis, Axis], error: str = "") -> list[Point]:
    """Return the point of a row in a list, which is empty if the axes can show none."""
    y = number(row.get(key))
    if x is None or y is None or any(axis.base and value <= 0 for axis, value in zip(axes, (x, y), strict=True)):
        return []
    return [Point(x, y, number(row.get(error)))]


def merged(panels: Sequence[Panel]) -> list[Panel]:
    """Merge the panels of each key, in the order of their first ones. Leave out empty curves and empty panels."""
    keys: dict[str, Panel] = {}
    for panel in panels:
        first = keys.setdefault(panel.key, panel._replace(curves=[]))
        first.curves.extend(curve for curve in panel.curves if curve.points)
    return [panel for panel in keys.values() if panel.curves]
