"""Panels as a picture, drawn by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longnet_cli.basics.atomic import write_file
from longnet_cli.basics.errors import ConfigError, LongNetError

from .axes import Axis, Curve, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis as MatplotlibAxis
    from matplotlib.figure import Figure

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


def save_figure(figure: Figure, output: str | Path, dpi: int) -> None:
    """Write a figure, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(output).suffix.lower()[1:], dpi=dpi)
    write_file(output, picture.getvalue())


def draw_picture(panels: Sequence[Panel], output: str | Path) -> None:
    """Write a picture, whole or not at all: a column of panels for each horizontal axis.

    Standard errors are bands, extrapolated curves are dashed. Raises the errors of `new_figure`.
    """
    columns: dict[Axis, list[Panel]] = {}
    for panel in panels:
        columns.setdefault(panel.x, []).append(panel)
    rows = max(map(len, columns.values()))
    width = 7.0 if len(columns) == 1 else 5.0 * len(columns)
    figure = new_figure(output, width, 2.4 * rows + 0.3 if rows > 1 else 3.4)
    for column, each in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns.values(), strict=True):
        grid = column.subplots(len(each), sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(grid, each, strict=True):
            _draw(axes, panel)
        grid[-1].set_xlabel(each[0].x.title)
        column.align_ylabels(grid)
    save_figure(figure, output, dpi=150)


def _draw(axes: Axes, panel: Panel) -> None:
    colors = {name: f"C{index % 10}" for index, name in enumerate(panel.names)}
    for curve in panel.curves:
        _draw_curve(axes, panel, curve, colors[curve.name])
    axes.set_ylabel(panel.y.title)
    axes.grid(alpha=0.3)
    if panel.x.base:
        axes.set_xscale("log", base=panel.x.base)
        _set_ticks(axes.xaxis, panel.x)
    if panel.y.base:
        axes.set_yscale("log", base=panel.y.base)
        _set_ticks(axes.yaxis, panel.y)
    if len(panel.curves) > 1:
        axes.legend(frameon=False, fontsize="small")


def _draw_curve(axes: Axes, panel: Panel, curve: Curve, color: str) -> None:
    x = [point.x for point in curve.points]
    y = [point.y for point in curve.points]
    errors = [math.nan if point.error is None else point.error for point in curve.points]
    style: dict[str, Any] = {"linewidth": 1.2, "color": color, "linestyle": "--" if curve.extrapolated else "-"}
    if len(x) == 1 or (panel.x.base and not curve.extrapolated):  # a line cannot show one point; of few, show each
        style |= {"marker": "o", "markersize": 4 if panel.x.base else 6}
    label = f"{curve.name}, extrapolated" if curve.extrapolated else curve.name
    if any(line.get_label() == label for line in axes.get_lines()):
        label = f"_{label}"  # matplotlib leaves it out of the legend
    axes.plot(x, y, label=label, **style)
    if not all(map(math.isnan, errors)):
        low, high = ([b + sign * e for b, e in zip(y, errors, strict=True)] for sign in (-1, 1))
        if len(x) == 1:
            axes.errorbar(x, y, errors, color=color, linewidth=1.2, capsize=2)
        else:
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def _set_ticks(axis: MatplotlibAxis, kind: Axis) -> None:
    """Give a logarithmic axis ticks at powers of its base, at least two."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = (kind.scale(value) for value in sorted(axis.get_view_interval()))
    powers = range(math.ceil(low), math.floor(high) + 1)
    if len(powers) < 2:
        powers = range(math.floor(low), math.ceil(high) + 1)
        axis.set_view_interval(kind.unscale(powers[0]), kind.unscale(powers[-1]), ignore=True)
    ticks = [kind.unscale(power) for power in powers[:: -(-len(powers) // 9)]]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: kind.write(value)))
