"""Drawings of patterns, in characters or as a picture: the keys that each query sees, one colour per level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from longnet_cli.describing import NOTHING, Subject, picture
from longnet_cli.plotting import new_figure, save_figure
from longnet_cli.plotting.text import colored
from longnet_cli.sizes import format_size

_SIZE = 480  # rows and columns of a picture


def draw_text(
    subject: Subject, seq: int, *, causal: bool, size: int = 32, color: bool = False, blocks: bool = True
) -> str:
    """Return the keys that queries see as text: `size` queries down, keys across, each cell with its first level.

    With `color` and `blocks`, half blocks show two queries per line. Otherwise each level is a digit or a letter, and
    sinks are s.
    """
    cells = picture(subject.pattern, seq, size, subject.heads, causal).tolist()
    levels = len(subject.pattern.levels)
    if not (color and blocks):
        return "\n".join("".join(_letter(cell, levels) for cell in row).rstrip() for row in cells)
    return "\n".join(
        _half_blocks(*pair) for pair in zip(cells[::2], [*cells[1::2], [NOTHING] * len(cells)], strict=False)
    )


def legend(subject: Subject, *, color: bool = False, blocks: bool = True) -> str:
    """Return a line that explains the marks of `draw_text`."""
    names = [f"level {i}" for i in range(len(subject.pattern.levels))]
    names += ["sinks"] * (subject.pattern.sinks > 0) + ["some, chosen"] * (subject.pattern.chosen > 0)
    levels = len(subject.pattern.levels)
    if color and blocks:
        return "  ".join(colored(i, "\u2588") + f" {name}" for i, name in enumerate(names))
    return "  ".join(f"{_letter(i, levels)} {name}" for i, name in enumerate(names))


def _letter(cell: int, levels: int) -> str:
    if cell == NOTHING:
        return " "
    if cell == levels:
        return "s"
    return "0123456789abcdefghijklmnopqrtuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"[min(cell, 60)]


def _half_blocks(above: Sequence[int], below: Sequence[int]) -> str:
    def cells() -> Iterator[str]:
        for top, bottom in zip(above, below, strict=True):
            if top == NOTHING and bottom == NOTHING:
                yield " "
            elif top == NOTHING:
                yield colored(bottom, "\u2584")
            else:
                yield colored(top, "\u2580", None if bottom == NOTHING else bottom)

    return "".join(cells()).rstrip()


def draw_picture(subjects: Sequence[Subject], seq: int, output: str | Path, *, causal: bool | None = None) -> None:
    """Write a picture with one panel per pattern, atomically.

    Raises what `plotting.new_figure` raises.
    """
    figure = new_figure(output, 4.2 * len(subjects), 4.6)
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, to_hex
    from matplotlib.patches import Patch

    for axes, subject in zip(figure.subplots(1, len(subjects), squeeze=False)[0], subjects, strict=True):
        looks_back = subject.causal is not False if causal is None else causal
        cells = picture(subject.pattern, seq, _SIZE, subject.heads, looks_back)
        levels = len(subject.pattern.levels)
        tones = [to_hex(colormaps["viridis"](i / max(1, levels))) for i in range(levels)]
        colors = ["white", *tones, "crimson"]
        extent = (0, seq, seq, 0)
        axes.imshow(cells, cmap=ListedColormap(colors), vmin=-1, vmax=levels, interpolation="nearest", extent=extent)
        rows = np.flatnonzero((cells == levels).any(1))
        if subject.pattern.sinks and len(rows):  # a few tokens wide: invisible as cells
            axes.vlines(0, rows[0] * seq / len(cells), seq, color="crimson", linewidth=5)
        axes.set_title(subject.name, fontsize=9)
        axes.set_xlabel("key")
        axes.set_ylabel("query")
        ticks = [seq * i // 4 for i in range(5)]
        names = [format_size(tick) if tick else "0" for tick in ticks]
        axes.set_xticks(ticks, names)
        axes.set_yticks(ticks, names)
        marks = [(f"{format_size(w)}, rate {r}", colors[i + 1]) for i, (w, r) in enumerate(subject.pattern.levels)]
        marks += [("sinks", "crimson")] if subject.pattern.sinks else []
        marks += [("some, chosen", "crimson")] if subject.pattern.chosen else []
        axes.legend(handles=[Patch(color=c, label=n) for n, c in marks], fontsize=7, loc="upper right", frameon=False)
    save_figure(figure, output, dpi=120)
