"""Draw the keys that each query sees, with one colour for each level: python patterns_picture.py OUTPUT PATTERN ..."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from longnet_cli.basics.sizes import format_size
from longnet_cli.jobs.describing import (
    NOTHING,
    Subject,
    cells_between,
    default_length,
    find_subject,
    keys_seen,
    picture,
)

_PICTURE_SIZE = 480
_INSET_SIZE = 64


def draw(output: str, *patterns: str) -> None:
    """Write a picture with one panel for each pattern. An inset shows single tokens if a level is dilated."""
    subjects = [*map(find_subject, patterns)]
    seq = max(default_length(subject.pattern) for subject in subjects)
    figure = Figure(figsize=(4.2 * len(subjects), 4.5), layout="constrained")
    panels = figure.subplots(1, len(subjects), squeeze=False)[0]
    for axes, subject in zip(panels, subjects, strict=True):
        cells = picture(subject.pattern, seq, _PICTURE_SIZE, subject.heads, subject.causal)
        levels = len(subject.pattern.levels)
        tones = [to_hex(colormaps["viridis"](i / max(1, levels))) for i in range(levels)]
        colors = [*tones, "crimson", "white"]  # the last one is of NOTHING
        _show(axes, cells, colors, (0, seq, seq, 0))
        rows = np.flatnonzero((cells == levels).any(1))
        if subject.pattern.sinks and len(rows):  # a few tokens wide: invisible as cells
            axes.vlines(0, rows[0] * seq / len(cells), seq, color="crimson", linewidth=5)
        axes.set_title(subject.name, fontsize=9)
        axes.set(xlabel="key", ylabel="query")
        ticks = [seq * i // 4 for i in range(5)]
        names = [*map(format_size, ticks)]
        axes.set_xticks(ticks, names)
        axes.set_yticks(ticks, names)
        words = [f"{format_size(w)}, rate {r}" for w, r in subject.pattern.levels]
        labels = filter(None, [*words, subject.pattern.apart])
        handles = [Patch(color=colors[i], label=label) for i, label in enumerate(labels)]
        axes.legend(
            handles=handles,
            fontsize=7,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.13),
            ncols=3,
            frameon=False,
        )
        if subject.causal and seq > 4 * _INSET_SIZE and max(subject.pattern.dilation_rates) > 1:
            _draw_inset(axes, subject, seq, tones[-1])
    figure.savefig(output, dpi=300)


def _show(axes: Axes, cells: np.ndarray, colors: list[str], extent: Any) -> None:
    """Draw cells, each in the colour that it counts from 0 on."""
    axes.imshow(to_rgba_array(colors)[cells], extent=extent, interpolation="nearest")


def _draw_inset(axes: Axes, subject: Subject, seq: int, color: str) -> None:
    """Draw single tokens of the widest level into the empty half: what head 0 sees in a colour, other heads in grey."""
    pattern = subject.pattern
    first_query = seq - _INSET_SIZE
    intervals = keys_seen(pattern, len(pattern.levels) - 1, np.array([first_query]), seq, True)
    first_key = int(intervals[0][0][0])
    queries = np.arange(first_query, seq + 1)
    keys = np.arange(_INSET_SIZE + 1) + first_key
    cells: Any = NOTHING
    for heads in (1, subject.heads):
        shown = cells_between(queries, keys, pattern, seq, heads, True)
        cells = cells + (shown != NOTHING)
    inset = axes.inset_axes((0.54, 0.48, 0.44, 0.44), xticks=[], yticks=[])
    extent = (first_key, first_key + _INSET_SIZE, seq, first_query)
    _show(inset, cells, ["0.75", color, "white"], extent)
    inset.set_title(
        f"{_INSET_SIZE} x {_INSET_SIZE} tokens, at the widest level:\nhead 0, and in grey the others",
        fontsize=6,
        pad=3,
    )


if __name__ == "__main__":
    draw(*sys.argv[1:])
