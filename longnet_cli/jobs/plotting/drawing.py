"""Curves and panels of whatever was measured, and the pictures that matplotlib draws of them."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from longnet_cli.attention.pattern import ceil_div
from longnet_cli.basics.atomic import write_file
from longnet_cli.basics.errors import ConfigError, LongNetError, extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis as MatplotlibAxis
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Axis:
    """An axis: its title, and the base of its logarithmic scale, or 0 for a linear one.

    `unit` is that of plain numbers. `write` is the format of ticks that are not powers of ten.
    """

    title: str
    base: int = 0
    unit: str = ""
    write: Callable[[float], str] = "{:g}".format

    def place(self, value: Any) -> float | None:
        """Return a value from a file as a number that the axis can show, otherwise None."""
        place = number(value)
        if place is not None and place <= 0 and self.base:
            return None
        return place


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
    try:
        return float(value) if type(value) in (int, float) and math.isfinite(value) else None
    except OverflowError:
        return None


def points(
    rows: Iterable[Row],
    of_x: Axis,
    of_y: Axis,
    x_key: str,
    y_key: str,
) -> list[Point]:
    """Return the points of rows that the axes can show, in rising order of x: of several at one x, the last.

    The standard error of a `key` is that of `key_se`.
    """
    points: dict[float, Point] = {}
    for row in rows:
        x = of_x.place(row.get(x_key))
        y = of_y.place(row.get(y_key))
        if x is not None and y is not None:
            points[x] = Point(x, y, number(row.get(f"{y_key}_se")))
    return sorted(points.values())


PICTURES = (".png", ".svg", ".pdf")


def new_figure(output: str | Path, width: float, height: float) -> Figure:
    """Return an empty figure of `width` by `height` inches.

    Raises ConfigError for a name that ends in none of PICTURES, LongNetError if matplotlib is not installed.
    """
    if Path(output).suffix.lower() not in PICTURES:
        raise ConfigError(f"{output}: a picture's name ends in {', '.join(PICTURES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LongNetError(f"pictures need matplotlib: {extra('plot')}") from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, output: str | Path) -> None:
    """Write a figure, whole or not at all, in 300 dots per inch."""
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(output).suffix.lower()[1:], dpi=300)
    write_file(output, picture.getvalue())


def draw_picture(panels: Sequence[Panel], output: str | Path, title: str = "") -> None:
    """Write a picture, whole or not at all: the panels below one another.

    Standard errors are bands, extrapolated curves are dashed. Raises the errors of `new_figure`.
    """
    figure = new_figure(output, 5.0, 2.0 * len(panels) + 0.7)
    figure.suptitle(textwrap.fill(title, 70), fontsize="small")
    legend: list[str] = []
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        lines = _draw(axes, panel)
        if len(panel.names) > 1 and panel.names != legend:  # the same one would stand below it
            axes.legend(lines.values(), lines, frameon=False, fontsize="small")
            legend = panel.names
    figure.align_ylabels()
    save_figure(figure, output)


def _draw(axes: Axes, panel: Panel) -> dict[str, object]:
    """Draw a panel; return a line of each curve by the words for it in a legend."""
    colors = {name: f"C{index % 10}" for index, name in enumerate(panel.names)}
    lines = {
        curve.name: _draw_curve(axes, panel, curve, colors[curve.name])
        for curve in reversed(panel.curves)
    }
    words = {
        curve.name: f"{curve.name} (dashed: extrapolated)"
        for curve in panel.curves
        if curve.extrapolated
    }
    axes.grid(alpha=0.3)
    axes.set(xlabel=panel.x.title, ylabel=panel.y.title + panel.y.unit)
    if panel.x.base:
        axes.set_xscale("log")
        _set_ticks(axes.xaxis, panel.x)
    if panel.y.base:
        axes.set_yscale("log")
        _set_ticks(axes.yaxis, panel.y)
    return {words.get(name, name): lines[name] for name in panel.names}


def _draw_curve(axes: Axes, panel: Panel, curve: Curve, color: str) -> object:
    # (3, points): None becomes NaN
    x, y, errors = np.array(curve.points, float).T
    is_one = len(x) == 1
    marks = None
    # a line cannot show one point; of few, show each
    if is_one or (panel.x.base and not curve.extrapolated):
        marks = "o"
    if not np.isnan(errors).all():
        if is_one:
            axes.errorbar(x, y, errors, color=color, linewidth=1.2, capsize=2)
        else:
            low = y - errors
            high = y + errors
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    lines = axes.plot(
        x,
        y,
        color=color,
        linewidth=1.2,
        linestyle="--" if curve.extrapolated else "-",
        marker=marks,
        markersize=4 if panel.x.base else 6,
    )
    return lines[0]


# Multiples of a power of the base at which a logarithmic axis has ticks: the first of these that give enough
MULTIPLES = {
    10: ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)),
    2: ((1,), (1, 1.5), (1, 1.25, 1.5, 1.75), (1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875)),
}
FEWEST_TICKS = 3
MOST_TICKS = 9


def _set_ticks(axis: MatplotlibAxis, kind: Axis) -> None:
    """Give a logarithmic axis three to nine ticks: 10^3, 10^4, 10^5; or 1k, 2k, 5k; or 1Ki, 2Ki, 4Ki.

    If the axis is too short for three, it is made longer, up to the next tick on each side.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = sorted(axis.get_view_interval())
    base = float(kind.base)
    powers = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
    for multiples in MULTIPLES[kind.base]:
        places = np.array([multiple * base**power for power in powers for multiple in multiples])
        ticks = places[(low <= places) & (places <= high)].tolist()
        if len(ticks) >= FEWEST_TICKS:
            break
    else:
        before = places[places < low][-1]
        after = places[places > high][0]
        ticks = [before, *ticks, after]
        axis.set_view_interval(before, after, ignore=True)
    axis.set_major_locator(FixedLocator(ticks[:: ceil_div(len(ticks), MOST_TICKS)]))
    axis.set_minor_locator(NullLocator())
    if kind.base == 2 or len(multiples) > 1:
        axis.set_major_formatter(FuncFormatter(lambda value, _: kind.write(value)))
