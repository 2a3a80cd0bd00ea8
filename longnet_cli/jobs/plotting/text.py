"""Panels in characters, for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise

from .axes import Curve, Panel, Point

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
        self.cells: dict[tuple[int, int], tuple[int, str | int]] = {}  # (row, column) -> owner, mark or dots
        for bands in (True, False):
            for curve in panel.curves:
                self._draw(curve, bands)

    def _band(self, point: Point) -> tuple[float, float]:
        """Return the ends of a value's standard error, on the scale of the axis."""
        scale, error = self.panel.y.scale, point.error or 0.0
        return scale(point.y - error), scale(point.y + error)

    def _draw(self, curve: Curve, bands: bool) -> None:
        """Draw the standard errors of a curve if `bands`, otherwise the curve itself."""
        owner = self.names.index(curve.name)
        if bands:
            for point in curve.points:
                if point.error is not None:
                    x, (low, high) = self._column(point), map(self._row, self._band(point))
                    for y in range(high, low + 1, 2 if self.dots else 1):
                        self._mark(x, y, owner, ":")
            return
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
        bit = _BRAILLE[y % 4][x % 2]
        before, there = self.cells.get(cell, (owner, 0))
        dots = (there if before == owner and isinstance(there, int) else 0) | bit
        self.cells[cell] = (owner, dots if self.dots else mark)

    def _cell(self, row: int, column: int) -> str:
        if (row, column) not in self.cells:
            return " "
        owner, there = self.cells[row, column]
        return self._colored(owner, chr(0x2800 + there) if isinstance(there, int) else there)

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
        more = ", extrapolated" if curve.extrapolated else ""
        error = "" if point.error is None else f" +- {self.panel.y.write(point.error)}"
        summary = f"{curve.name}{more}: {self.panel.y.write(point.y)}{error} at {self.panel.x.name(point.x)}"
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
