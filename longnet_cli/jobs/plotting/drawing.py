"""Curves and panels to draw, whatever was measured: as a picture by matplotlib, or in characters for a terminal."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longnet_cli.basics.atomic import write_file
from longnet_cli.basics.errors import ConfigError, LongNetError
from longnet_cli.basics.sizes import short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis as MatplotlibAxis
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Axis:
    """An axis: its title, its scale, the format of its numbers (`write`), and of its places in a sentence (`at`).

    `base` is the base of a logarithmic scale, or 0 for a linear one. `unit` is that of a picture's plain numbers.
    """

    title: str
    base: int = 0
    unit: str = ""
    write: Callable[[float], str] = short_number
    at: str = "{}"

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
    try:
        return float(value) if type(value) in (int, float) and math.isfinite(value) else None
    except OverflowError:
        return None


def points(rows: Iterable[Row], axes: tuple[Axis, Axis], x_key: str, y_key: str, error_key: str = "") -> list[Point]:
    """Return the points of rows that the axes can show, in rising order of x: of several at one x, the last."""
    found: dict[float, Point] = {}
    for row in rows:
        x, y = number(row.get(x_key)), number(row.get(y_key))
        if x is None or y is None:
            continue
        if all(value > 0 or not axis.base for axis, value in zip(axes, (x, y), strict=True)):
            found[x] = Point(x, y, number(row.get(error_key)))
    return [found[x] for x in sorted(found)]


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
        raise LongNetError(
            "pictures need matplotlib: pip install 'longnet-cli[plot]'; leave out -o to draw in the terminal"
        ) from None
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
    lines = {curve.name: _draw_curve(axes, panel, curve, colors[curve.name]) for curve in reversed(panel.curves)}
    dashed = {curve.name for curve in panel.curves if curve.extrapolated}
    axes.grid(alpha=0.3)
    axes.set(xlabel=panel.x.title, ylabel=panel.y.title + panel.y.unit)
    axes.set(xscale="log" if panel.x.base else "linear", yscale="log" if panel.y.base else "linear")
    for axis, kind in ((axes.xaxis, panel.x), (axes.yaxis, panel.y)):
        if kind.base:
            _set_ticks(axis, kind)
    return {f"{name} (dashed: extrapolated)" if name in dashed else name: lines[name] for name in panel.names}


def _draw_curve(axes: Axes, panel: Panel, curve: Curve, color: str) -> object:
    x, y, known = zip(*curve.points, strict=True)
    errors = [math.nan if error is None else error for error in known]
    style: dict[str, Any] = {"linewidth": 1.2, "color": color, "linestyle": "--" if curve.extrapolated else "-"}
    if len(x) == 1 or (panel.x.base and not curve.extrapolated):  # a line cannot show one point; of few, show each
        style |= {"marker": "o", "markersize": 4 if panel.x.base else 6}
    if not all(map(math.isnan, errors)):
        low, high = ([b + sign * e for b, e in zip(y, errors, strict=True)] for sign in (-1, 1))
        if len(x) == 1:
            axes.errorbar(x, y, errors, color=color, linewidth=1.2, capsize=2)
        else:
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    return axes.plot(x, y, **style)[0]


def _set_ticks(axis: MatplotlibAxis, kind: Axis) -> None:
    """Give a logarithmic axis ticks at powers of its base, at least two: 10^3 or, for a base of 2, 1Ki or 1 GiB."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = (kind.scale(value) for value in sorted(axis.get_view_interval()))
    powers = range(math.ceil(low), math.floor(high) + 1)
    if len(powers) < 2:
        powers = range(math.floor(low), math.ceil(high) + 1)
        axis.set_view_interval(kind.unscale(powers[0]), kind.unscale(powers[-1]), ignore=True)
    ticks = [kind.unscale(power) for power in powers[:: -(-len(powers) // 9)]]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    if kind.base == 2:
        axis.set_major_formatter(FuncFormatter(lambda value, _: kind.write(value)))


_NO_DOTS = "\u2800"
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # the bit of each dot, by row and column
_COLORS = (36, 33, 35, 32, 34, 31)
_MARGIN = 10  # characters for the numbers on the left
_HEIGHT = 8  # lines of a panel


def draw_text(panels: Sequence[Panel], width: int, *, color: bool = False, braille: bool = True) -> str:
    """Return the panels in characters, in lines of at most `width` (40 at least).

    Curves differ by colour or, without `color`, by letter, a for the first. `braille`: draw with dots, eight to a
    character, if no letters are needed. A standard error is a vertical line of dots or colons. An extrapolated curve
    has only every third dot.
    """
    return "\n".join(line for panel in panels for line in _Drawing(panel, max(width, 40), color, braille).lines())


class _Drawing:
    """One panel: its scales, and the content of each character cell."""

    def __init__(self, panel: Panel, width: int, color: bool, braille: bool) -> None:
        self.panel, self.names = panel, panel.names
        self.columns, self.color = width - _MARGIN - 2, color and len(self.names) > 1
        self.dots = braille and (color or len(self.names) == 1)
        self.across, self.down = (2, 4) if self.dots else (1, 1)  # dots per character
        points = [point for curve in panel.curves for point in curve.points]
        self.x = sorted((panel.x.scale(point.x), point.x) for point in points)
        edges = [edge for point in points for edge in self._band(point)]
        self.y = min(edges), max(edges)
        self.cells: dict[tuple[int, int], tuple[int, str]] = {}  # (row, column) -> owner, character
        for draw in (self._draw_errors, self._draw_curve):
            for curve in panel.curves:
                draw(curve, self.names.index(curve.name))

    def _band(self, point: Point) -> tuple[float, float]:
        """Return the ends of a value's standard error, on the scale of the axis."""
        scale, error = self.panel.y.scale, point.error or 0.0
        return scale(point.y - error), scale(point.y + error)

    def _draw_errors(self, curve: Curve, owner: int) -> None:
        for point in curve.points:
            low, high = map(self._row, self._band(point))
            for y in range(high, low + 1, 2 if self.dots else 1) if point.error is not None else ():
                self._mark(self._column(point), y, owner, ":")

    def _draw_curve(self, curve: Curve, owner: int) -> None:
        scale = self.panel.y.scale
        places = [(self._column(point), self._row(scale(point.y))) for point in curve.points]
        for index, (x, y) in enumerate(_connected(places)):
            if not curve.extrapolated or index % 3 == 0:
                self._mark(x, y, owner, "." if curve.extrapolated else _letter(owner))

    def _column(self, point: Point) -> int:
        return _place(self.panel.x.scale(point.x), self.x[0][0], self.x[-1][0], self.across * self.columns)

    def _row(self, y: float) -> int:
        rows = self.down * _HEIGHT
        return rows - 1 - _place(y, *self.y, rows)

    def _mark(self, x: int, y: int, owner: int, mark: str) -> None:
        cell = y // self.down, x // self.across
        if self.dots:
            before, there = self.cells.get(cell, (owner, _NO_DOTS))
            mark = chr(ord(there if before == owner else _NO_DOTS) | _BRAILLE[y % 4][x % 2])
        self.cells[cell] = owner, mark

    def _cell(self, row: int, column: int) -> str:
        return self._colored(*self.cells[row, column]) if (row, column) in self.cells else " "

    def _colored(self, owner: int, text: str) -> str:
        return colored(owner, text) if self.color else text

    def lines(self) -> Iterator[str]:
        panel = self.panel
        low, high = self.y
        labels = {0: high, _HEIGHT - 1: low} if high > low else {(_HEIGHT - 1) // 2: high}
        yield panel.y.title
        for row in range(_HEIGHT):
            label = panel.y.write(panel.y.unscale(labels[row])) if row in labels else ""
            yield f"{label:>{_MARGIN}} |{''.join(self._cell(row, column) for column in range(self.columns)).rstrip()}"
        yield f"{'':>{_MARGIN}} +{'-' * self.columns}"
        begin, end = panel.x.write(self.x[0][1]), panel.x.write(self.x[-1][1])
        room = self.columns - len(begin) - len(end)
        yield f"{'':>{_MARGIN + 2}}{begin}{panel.x.title if len(panel.x.title) < room else '':^{room}}{end}"
        for curve in panel.curves:
            yield from (f"{'':>{_MARGIN + 2}}{line}" for line in self._last(curve))
        yield ""

    def _last(self, curve: Curve) -> Iterator[str]:
        """Yield the lines that name a curve and its last point: `a dense: 3.65 s at 64Ki tokens`."""
        owner, point = self.names.index(curve.name), curve.points[-1]
        more, x, y = ", extrapolated" if curve.extrapolated else "", self.panel.x, self.panel.y
        error = "" if point.error is None else f" +- {y.write(point.error)}"
        summary = f"{curve.name}{more}: {y.write(point.y)}{error} at {x.at.format(x.write(point.x))}"
        if len(self.names) == 1:
            yield from textwrap.wrap(summary, self.columns)
            return
        mark = self._colored(owner, "--") + " " if self.color else f"{_letter(owner)} "
        for line in textwrap.wrap(summary, self.columns - 3):
            yield mark + line
            mark = " " * (3 if self.color else 2)


def colored(owner: int, text: str, behind: int | None = None) -> str:
    """Return text for a terminal in the colour of curve or level `owner`, on the colour of `behind`."""
    ground = "" if behind is None else f";{_COLORS[behind % len(_COLORS)] + 10}"
    return f"\x1b[{_COLORS[owner % len(_COLORS)]}{ground}m{text}\x1b[0m"


def _letter(owner: int) -> str:
    return chr(ord("a") + owner % 26)


def _place(value: float, low: float, high: float, count: int) -> int:
    """Return the place of a value among `count` places from low to high; the middle if low equals high."""
    return round((value - low) / (high - low) * (count - 1)) if high > low else count // 2


def _connected(places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the places, and the places on straight lines between neighbours."""
    yield places[0]
    for (x0, y0), (x1, y1) in pairwise(places):
        steps = max(abs(x1 - x0), abs(y1 - y0))
        for i in range(1, steps + 1):
            yield round(x0 + (x1 - x0) * i / steps), round(y0 + (y1 - y0) * i / steps)
