"""The `plot` job: the curves of training runs, from their metrics.jsonl, as a picture or in characters.

Loads no torch, and matplotlib only for a picture.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from longnet_cli.atomic import write_file
from longnet_cli.configuration import parse, read_text
from longnet_cli.errors import ConfigError, DataError, LongNetError, refuse_web_address

# A panel: its title, and the keys of metrics.jsonl that it shows, with what to add to a run's name for each
PANELS = (
    ("loss, nats per token", (("loss", ""), ("held_out_loss", " held out"))),
    ("learning rate", (("lr", ""),)),
    ("tokens per second", (("tokens_per_second", ""),)),
)
PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Run:
    """One training run: its name and its lines of metrics, the steps in rising order."""

    name: str
    lines: list[dict[str, Any]]

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever the value is a finite number."""
        return [
            (line["step"], value)
            for line in self.lines
            if isinstance(value := line.get(key), int | float) and math.isfinite(value)
        ]


class Curve(NamedTuple):
    name: str
    points: list[tuple[float, float]]


class Panel(NamedTuple):
    title: str
    curves: list[Curve]


def metrics_file(path: str | Path) -> Path:
    """The metrics.jsonl of a run that its folder names, or this file itself."""
    return Path(path, "metrics.jsonl") if Path(path).is_dir() else Path(path)


def read_run(path: str | Path) -> Run:
    """A run from its folder, or from its metrics.jsonl.

    A run that was resumed may have lines of steps that it then made again: the later ones count. A last line without
    an end is still being written, and left out. Raises DataError for anything else that is no line of metrics, with
    its file and row.
    """
    refuse_web_address(str(path))
    path, file = Path(path), metrics_file(path)
    try:
        text = read_text(file)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; expected the folder of a training run") from None
    except ValueError as error:
        raise DataError(f"{file}: not metrics of a training run: {error}") from None
    lines: list[dict[str, Any]] = []
    rows = text.split("\n")
    for row, line in enumerate(rows, 1):
        if not line.strip():
            continue
        try:
            found = parse(line)
        except ValueError as error:
            if row == len(rows):
                break
            raise DataError(f"{file}: row {row}: not JSON: {getattr(error, 'msg', error)}") from None
        step = found.get("step") if isinstance(found, dict) else None
        if not isinstance(step, int) or isinstance(step, bool):
            raise DataError(f"{file}: row {row}: not a line of metrics: it has no whole number 'step'")
        while lines and lines[-1]["step"] >= step:
            lines.pop()
        lines.append(found)
    if not lines:
        raise DataError(f"{file}: no line of metrics yet")
    named = path.parent if path.name == "metrics.jsonl" else path
    return Run(named.name or named.resolve().name, lines)  # "." has no name of its own


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Several runs, each by its name, or by its path where two have one name."""
    found = [read_run(path) for path in paths]
    times = Counter(run.name for run in found)
    return [
        run if times[run.name] == 1 else replace(run, name=str(path)) for run, path in zip(found, paths, strict=True)
    ]


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Return what there is to draw; raises DataError for nothing."""
    found = []
    for title, keys in PANELS:
        curves = [Curve(run.name + more, run.curve(key)) for run in runs for key, more in keys]
        curves = [curve for curve in curves if curve.points]
        if curves:
            found.append(Panel(title, curves))
    if not found:
        raise DataError(f"{', '.join(run.name for run in runs)}: no loss, lr or tokens_per_second to draw")
    return found


def draw_picture(runs: Sequence[Run], output: str | Path) -> None:
    """Write a picture, whole or not at all. Raises ConfigError for a name that is none of PICTURES."""
    suffix = Path(output).suffix.lower()
    if suffix not in PICTURES:
        raise ConfigError(f"{output}: a picture's name ends in {', '.join(PICTURES)}")
    found = panels(runs)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LongNetError(
            "pictures need matplotlib: pip install 'longnet-cli[plot]'; leave out -o to draw in the terminal"
        ) from None
    figure = Figure(figsize=(7, 2.4 * len(found) + 0.3), layout="constrained")
    for axes, panel in zip(figure.subplots(len(found), sharex=True, squeeze=False)[:, 0], found, strict=True):
        for curve in panel.curves:
            marker = "o" if len(curve.points) == 1 else None  # which no line would show
            axes.plot(*zip(*curve.points, strict=True), label=curve.name, linewidth=1.2, marker=marker)
        axes.set_ylabel(panel.title)
        axes.grid(alpha=0.3)
        if len(panel.curves) > 1:
            axes.legend(frameon=False)
    axes.set_xlabel("step")
    picture = io.BytesIO()
    figure.savefig(picture, format=suffix[1:], dpi=150)
    write_file(output, picture.getvalue())


def draw_text(runs: Sequence[Run], width: int, *, color: bool = False, braille: bool = True) -> str:
    """The panels in characters, lines of at most `width` (40 at least).

    Curves are told apart by their colour, or without `color` by a letter, a for the first. `braille`: draw with dots,
    eight to a character, where letters are not needed.
    """
    return "\n".join(line for panel in panels(runs) for line in _panel(panel, max(width, 40), color, braille))


_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # the bit of each dot, by row and column
_COLORS = (36, 33, 35, 32, 34, 31)
_MARGIN = 10  # characters of the numbers at the left
_HEIGHT = 8  # lines of a panel


def _panel(panel: Panel, width: int, color: bool, braille: bool) -> Iterator[str]:
    columns, height = width - _MARGIN - 2, _HEIGHT
    points = [point for curve in panel.curves for point in curve.points]
    low, high = min(y for _, y in points), max(y for _, y in points)
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    dots = braille and (color or len(panel.curves) == 1)
    across, down = (2, 4) if dots else (1, 1)  # of a character
    cells: dict[tuple[int, int], tuple[int, int]] = {}  # (row, column) -> the dots there, and whose
    for owner, curve in enumerate(panel.curves):
        places = [
            (_place(x, first, last, across * columns), down * height - 1 - _place(y, low, high, down * height))
            for x, y in curve.points
        ]
        for x, y in _connected(places):
            bits, before = cells.get((y // down, x // across), (0, owner))
            bits = bits if before == owner else 0
            cells[y // down, x // across] = (bits | (_BRAILLE[y % 4][x % 2] if dots else 0), owner)

    def cell(row: int, column: int) -> str:
        if (row, column) not in cells:
            return " "
        bits, owner = cells[row, column]
        mark = chr(0x2800 + bits) if dots else _letter(owner)
        return f"\x1b[{_COLORS[owner % len(_COLORS)]}m{mark}\x1b[0m" if color and len(panel.curves) > 1 else mark

    labels = {0: high, height - 1: low} if high > low else {(height - 1) // 2: high}
    yield panel.title
    for row in range(height):
        label = _number(labels[row]) if row in labels else ""
        yield f"{label:>{_MARGIN}} |{''.join(cell(row, column) for column in range(columns)).rstrip()}"
    yield f"{'':>{_MARGIN}} +{'-' * columns}"
    begin, end = f"{first:g}", f"step {last:g}"
    yield f"{'':>{_MARGIN + 2}}{begin}{end:>{columns - len(begin)}}"
    for owner, curve in enumerate(panel.curves):
        step, value = curve.points[-1]
        mark = "" if len(panel.curves) == 1 else f"{_letter(owner)} "
        if color and mark:
            mark = f"\x1b[{_COLORS[owner % len(_COLORS)]}m--\x1b[0m "
        yield f"{'':>{_MARGIN + 2}}{mark}{curve.name}: {_number(value)} at step {step:g}"
    yield ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"


def _letter(owner: int) -> str:
    return chr(ord("a") + owner % 26)


def _place(value: float, low: float, high: float, count: int) -> int:
    """Return which of `count` places from low to high; the middle where all values are one."""
    return round((value - low) / (high - low) * (count - 1)) if high > low else count // 2


def _connected(places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The places and those on straight lines between neighbours."""
    yield places[0]
    for (x0, y0), (x1, y1) in pairwise(places):
        steps = max(abs(x1 - x0), abs(y1 - y0))
        for i in range(1, steps + 1):
            yield round(x0 + (x1 - x0) * i / steps), round(y0 + (y1 - y0) * i / steps)
