"""Curves of training runs: loss, learning rate and speed by step, from their metrics.jsonl."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longnet_cli.basics.atomic import write_file
from longnet_cli.basics.configuration import parse, read_text
from longnet_cli.basics.errors import (
    ConfigError,
    DataError,
    LongNetError,
    extra,
    refuse_web_address,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = (".png", ".svg", ".pdf")
EXPECTED = "expected the folder of a training run, or its metrics.jsonl"
# Of each panel: its title, and the keys of its curves, each with what its name has after that of the run
PANELS = (
    ("loss, nats per token", {"loss": "", "held_out_loss": " held out"}),
    ("learning rate", {"lr": ""}),
    ("tokens per second", {"tokens_per_second": ""}),
)


def metrics_file(path: str | Path) -> Path:
    """Return the metrics.jsonl in the folder of a run, or the path itself if it is no folder."""
    return Path(path, "metrics.jsonl") if Path(path).is_dir() else Path(path)


def read_run(path: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics, with steps in rising order.

    A resumed run may have lines of steps that it then repeated: the later lines count. An incomplete last line is left
    out: it is still being written. Raises DataError, with file and row, for anything else.
    """
    refuse_web_address(str(path))
    file = metrics_file(path)
    try:
        text = read_text(file)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; {EXPECTED}") from None
    except ValueError:
        raise DataError(f"{file}: not UTF-8; {EXPECTED}") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(io.StringIO(text), 1):
        try:
            row = parse(line)
        except ValueError:
            if not line.endswith("\n"):
                break
            raise DataError(f"{file}: row {number}: not JSON; {EXPECTED}") from None
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise DataError(
                f"{file}: row {number}: not a line of metrics: it has no whole number 'step'; {EXPECTED}"
            )
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    if not rows:
        raise DataError(f"{file}: no line of metrics yet; {EXPECTED}")
    return rows


def curve(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return (step, value) of each row in which both are finite numbers."""
    points = []
    for row in rows:
        step = _number(row["step"])
        value = _number(row.get(key))
        if step is not None and value is not None:
            points.append((step, value))
    return points


def _number(value: Any) -> float | None:
    try:
        return float(value) if type(value) in (int, float) and math.isfinite(value) else None
    except OverflowError:
        return None


def draw_runs(paths: Sequence[str], output: str | Path) -> None:
    """Write a picture of runs, whole or not at all: a panel of each quantity that they have, below one another.

    Raises DataError for what `read_run` refuses, and if there is nothing to draw; ConfigError for a name that ends in
    none of PICTURES, LongNetError if matplotlib is not installed.
    """
    runs = {path: read_run(path) for path in paths}
    panels = {title: dict(_curves(runs, keys)) for title, keys in PANELS}
    drawable = {title: curves for title, curves in panels.items() if curves}
    if not drawable:
        raise DataError(f"{', '.join(paths)}: nothing to draw: no line has a loss")
    figure = _new_figure(output, 5.0, 2.0 * len(drawable) + 0.7)
    every_axes = figure.subplots(len(drawable), sharex=True, squeeze=False)[:, 0]
    for axes, (title, curves) in zip(every_axes, drawable.items(), strict=True):
        for name, points in curves.items():
            # a line cannot show one point
            axes.plot(
                *zip(*points, strict=True), marker="o" if len(points) == 1 else None, label=name
            )
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize="small")
    every_axes[-1].set_xlabel("step")
    figure.align_ylabels()
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(output).suffix.lower()[1:], dpi=300)
    write_file(output, picture.getvalue())


def _curves(
    runs: dict[str, list[dict[str, Any]]],
    keys: dict[str, str],
) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Yield the name and the points of each curve of a panel that has points."""
    for path, rows in runs.items():
        for key, words in keys.items():
            if points := curve(rows, key):
                yield f"{path}{words}", points


def _new_figure(output: str | Path, width: float, height: float) -> Figure:
    """Return an empty figure of `width` by `height` inches. Raises the ConfigError and LongNetError of `draw_runs`."""
    if Path(output).suffix.lower() not in PICTURES:
        raise ConfigError(f"{output}: a picture's name ends in {', '.join(PICTURES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LongNetError(f"pictures need matplotlib: {extra('plot')}") from None
    return Figure(figsize=(width, height), layout="constrained")
