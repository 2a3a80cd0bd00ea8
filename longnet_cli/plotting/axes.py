"""Panels of curves to draw over an axis, whatever they were measured by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from longnet_cli.sizes import format_size

Row = Mapping[str, Any]


def plain(value: float) -> str:
    """12345.6 -> `12,346`, 0.00123 -> `0.00123`."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"


def size(value: float) -> str:
    """As sizes are written: 1e9 -> `1e9`, 131072 -> `128Ki`, 500 -> `500`."""
    power = round(math.log10(value)) if value >= 1e4 else 0
    return f"1e{power}" if power and value == 10**power else format_size(round(value))


def duration(seconds: float) -> str:
    """0.00000139 -> `1.39 us`, 22 -> `22 s`, 1e7 -> `116 days`."""
    units = ((31557600, "years"), (86400, "days"), (3600, "h"), (1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
    for scale, unit in units:
        if seconds >= scale * (3 if scale > 1 else 0.9995):  # 2 h are 7,200 s
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{seconds:.3g} s"


def memory(value: float) -> str:
    """3221225472 -> `3 GiB`."""
    power = 0
    while value >= 1023.5 and power < 6:
        value /= 1024
        power += 1
    return f"{_three_digits(value)} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[power]}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


@dataclass(frozen=True)
class Axis:
    """An axis: its title, its scale, how its numbers are written (`write`) and places on it are called (`at`).

    `base` is that of a logarithmic scale, 0 of a linear one. An infinite place stands behind all others, and is called
    `beyond`.
    """

    title: str
    base: int = 0
    write: Callable[[float], str] = plain
    at: str = "{}"
    beyond: str = "never"

    def show(self, value: float) -> str:
        """The number of a place, for a tick."""
        return self.beyond if math.isinf(value) else self.write(value)

    def name(self, value: float) -> str:
        """Return what a place is called in a sentence."""
        return self.beyond if math.isinf(value) else self.at.format(self.write(value))

    def scale(self, value: float) -> float:
        """The value on a linear scale. A logarithmic one takes positive values."""
        return math.log(value, self.base) if self.base else value

    def unscale(self, place: float) -> float:
        """The value whose `scale` is `place`."""
        return float(self.base) ** place if self.base else place


class Point(NamedTuple):
    """A measured value and its standard error, None where that is unknown."""

    x: float
    y: float
    error: float | None = None


class Curve(NamedTuple):
    """Points in rising order of x. Curves of one name are one curve in parts.

    `extrapolated`: the first point was measured, and what follows was computed from it.
    """

    name: str
    points: list[Point]
    extrapolated: bool = False


class Panel(NamedTuple):
    """Curves of one quantity, which the files have under `key`."""

    key: str
    x: Axis
    y: Axis
    curves: list[Curve]

    @property
    def names(self) -> list[str]:
        """The names of the curves, each once."""
        return list(dict.fromkeys(curve.name for curve in self.curves))

    @property
    def beyond(self) -> float | None:
        """Return where infinite places stand; None without any."""
        places = [point.x for curve in self.curves for point in curve.points]
        if math.inf not in places:
            return None
        last = max((x for x in places if x < math.inf), default=1)
        return last * self.x.base**2 if self.x.base else last + 1

    def place(self, x: float) -> float:
        """Return where x stands on the scale of its axis."""
        return self.x.scale((self.beyond or x) if math.isinf(x) else x)


def number(value: Any) -> float | None:
    """A number from a file; None for anything else, and for what no float holds."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def point(row: Row, x: float | None, key: str, axes: tuple[Axis, Axis], error: str = "") -> list[Point]:
    """The point of a row, where it has one that the axes can show."""
    y = number(row.get(key))
    if x is None or y is None or any(axis.base and value <= 0 for axis, value in zip(axes, (x, y), strict=True)):
        return []
    return [Point(x, y, number(row.get(error)))]


def merged(found: Sequence[Panel]) -> list[Panel]:
    """Panels of one key as one, in the order of the first of each, without empty curves and empty panels."""
    keys: dict[str, Panel] = {}
    for panel in found:
        first = keys.setdefault(panel.key, panel._replace(curves=[]))
        first.curves.extend(curve for curve in panel.curves if curve.points)
    return [panel for panel in keys.values() if panel.curves]
