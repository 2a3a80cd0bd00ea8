"""Surprise in a terminal: the text, with a colour or a mark for the nats of each token."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from rich.cells import cell_len

from .surprise import Surprise, SurpriseDocument

_Colors = tuple[tuple[int, int], ...]

# A step is twice the nats. From dark to bright, as cividis, which people with any sight for colours can tell apart:
# ground and text of 256 colours, because a terminal may be light or dark.
NATS: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
_NATS_COLORS: _Colors = ((17, 255), (60, 255), (242, 255), (144, 16), (179, 16), (226, 16))
GAINS: tuple[float, ...] = (
    -4.0,
    -1.0,
    -0.25,
    0.25,
    1.0,
    4.0,
)  # orange where the second file costs more, blue where it saves
_GAIN_COLORS: _Colors = ((214, 16), (166, 16), (94, 255), (236, 255), (24, 255), (32, 16), (45, 16))
_TAB = "    "


def draw_surprise(
    surprise: Surprise, width: int, *, color: bool = False, printable: Callable[[str], str] = str
) -> Iterator[str]:
    """Yield lines of at most `width` columns (20 at least): a legend, then each document with its name before it.

    Without `color`, a line of marks follows each line of text that has any: a digit for the nats of the token that
    begins there, or for those that the second file saves, a letter for those that it costs more. `printable` makes
    text safe to print.
    """
    width = max(width, 20)
    yield from _legend(surprise, width, color, printable)
    for document in surprise.documents:
        yield ""
        yield printable(_title(document))
        gains = len(surprise.names) > 1
        values = document.gains if gains else document.nats
        levels = np.searchsorted(GAINS if gains else NATS, values, side="right").tolist()
        marks = [_mark(value) for value in values.tolist()]
        colors = _GAIN_COLORS if gains else _NATS_COLORS
        for line in _lines(document.pieces, width, printable):
            if color:
                yield "".join(_colored(text, *colors[levels[token]]) for token, text, _ in line)
            else:
                yield "".join(text for _, text, _ in line).rstrip()
                marked = "".join(
                    (marks[token] if begins else " ").ljust(cell_len(text)) for token, text, begins in line
                )
                if marked.strip():
                    yield marked.rstrip()


def _title(document: SurpriseDocument) -> str:
    mean = f"{document.nats.mean():.3f} nats per token"
    if document.other_nats is not None:
        mean += f", {document.other_nats.mean():.3f} in the second file"
    first = f", from token {document.start} on" if document.start > 1 else ""
    return f"{document.doc_id}: {len(document.pieces):,} tokens{first}, {mean}"


def _legend(surprise: Surprise, width: int, color: bool, printable: Callable[[str], str]) -> Iterator[str]:
    gains = len(surprise.names) > 1
    what = "nats per token"
    if gains:
        one, other = map(printable, surprise.names)
        what += f" that {other} saves, compared with {one}"
    if color:
        bounds, colors = (GAINS, _GAIN_COLORS) if gains else (NATS, _NATS_COLORS)
        names = [f" <{bounds[0]:g} ", *(f" {bound:g} " for bound in bounds[:-1]), f" {bounds[-1]:g}+ "]
        yield from textwrap.wrap(f"{what}, from", width)
        yield "".join(_colored(name, *pair) for name, pair in zip(names, colors, strict=True))
    else:
        costs = "; a letter costs more: a 1, b 2" if gains else ""
        marks = f"{what}, rounded, below the first character of each; 9 is 9 or more{costs}"
        yield from textwrap.wrap(marks, width)


def _mark(value: float) -> str:
    """Return the digit of nats, the letter of negative ones; a space for 0."""
    nats = min(9, round(abs(value)))
    return " " if not nats else str(nats) if value > 0 else chr(ord("a") + nats - 1)


def _colored(text: str, ground: int, ink: int) -> str:
    return f"\x1b[48;5;{ground};38;5;{ink}m{text}\x1b[0m"


def _lines(pieces: Sequence[str], width: int, printable: Callable[[str], str]) -> Iterator[list[tuple[int, str, bool]]]:
    """Yield lines of (index of a token, a part of its text, whether it begins there). A newline is a space."""
    line, column = list[tuple[int, str, bool]](), 0
    for token, piece in enumerate(pieces):
        part, begins = "", True
        for character in piece:
            shown = {"\n": " ", "\t": _TAB}.get(character) or printable(character)
            size = cell_len(shown)
            if column + size > width:
                yield [*line, *([(token, part, begins)] if part else [])]
                begins, part, line, column = begins and not part, "", [], 0
            part, column = part + shown, column + size
            if character == "\n":
                yield [*line, (token, part, begins)]
                part, begins, line, column = "", False, [], 0
        if part:
            line.append((token, part, begins))
    if line:
        yield line
