"""Surprise as one HTML file: the text, the nats of each token as its background, and a strip of the whole.

The strip alone is a picture, too.

A page holds its data in two script elements that no browser runs: `facts`, JSON, and `data`, base64 of zlib of

    top        uint32  of each token, the index of the most likely one in `tops`; if the files have it
    lengths    uint16  of each token, UTF-16 units of text
    nats       uint16  of each token, in thousandths
    other      uint16  the same of the second file, if there is one
    top_nats   uint16  the same of the most likely token; if the files have it
    text       UTF-8   of all documents

little-endian, each list without a gap after the one before. Elements are made for the tokens in sight alone.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longnet_cli.basics.atomic import write_file
from longnet_cli.basics.errors import ConfigError

from .drawing import PICTURES, new_figure, save_figure
from .surprise import Surprise

PAGE = ".html"
STEPS = 1000  # of a nat
# From the least to the most, on a light ground: the page has these, too
COLORS = {
    "nats": ["#ffffff", "#fff0c2", "#fdc86b", "#f0883a", "#b93a0c", "#5c1808"],
    "gains": ["#8a3b00", "#e08214", "#fdd9a8", "#ffffff", "#bcd9f5", "#4292d6", "#08366b"],
}
ACROSS, MOST_ROWS = 16, 240  # stretches of a strip
_TEMPLATE = Path(__file__).with_suffix(PAGE)


def write_surprise(surprise: Surprise, output: str | Path) -> None:
    """Write a page, or its strip as a picture, whole or not at all. Raises ConfigError for other names of files."""
    kind = Path(output).suffix.lower()
    if kind in PICTURES:
        _draw_strip(surprise, output)
        return
    if kind != PAGE:
        raise ConfigError(f"{output}: name a page, .html, or a picture of its strip: {', '.join(PICTURES)}")
    before, between, after = re.split("@FACTS@|@DATA@", _TEMPLATE.read_text(encoding="utf-8"))
    facts = json.dumps(_facts(surprise), ensure_ascii=False).replace("<", "\\u003c")
    data = base64.b64encode(zlib.compress(_data(surprise), 6)).decode()
    write_file(output, (before + facts + between + data + after).encode("utf-8", "replace"))


def _draw_strip(surprise: Surprise, output: str | Path) -> None:
    """Draw the mean of each stretch of the text, in rows of ACROSS, coloured from the least to the most of these."""
    documents, gains = surprise.documents, len(surprise.names) > 1
    values = np.concatenate([each.values for each in documents])
    across = min(ACROSS, len(values))
    rows = min(MOST_ROWS, len(values) // across)
    edges = np.linspace(0, len(values), rows * across + 1).astype(int)
    means = (np.add.reduceat(values, edges[:-1]) / np.diff(edges)).reshape(rows, across)
    low, high = np.quantile(means, [0.02, 0.99])
    if gains:
        high = max(-low, high)
        low = -high
    figure = new_figure(output, 4.0, 5.0)
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("", COLORS["gains" if gains else "nats"])
    axes = figure.subplots()
    extent = (0, len(values) / rows, len(values), 0)
    strip = axes.imshow(means, colors, vmin=low, vmax=high, aspect="auto", extent=extent, interpolation="nearest")
    if 1 < len(documents) <= 20:
        starts = np.cumsum([0, *(len(each.pieces) for each in documents)])
        axes.set_yticks(starts[:-1], [each.doc_id for each in documents])
    else:
        axes.set_ylabel("tokens")
    axes.set_xticks([])
    figure.colorbar(strip, label="nats that the second file saves" if gains else "nats per token")
    figure.suptitle(" and ".join(surprise.names), fontsize="small")
    save_figure(figure, output, dpi=150)


def _facts(surprise: Surprise) -> dict[str, object]:
    """Return what a page knows of its documents: names, numbers of tokens, and which lists its data has."""
    documents = surprise.documents
    each_document = [
        {"id": each.doc_id, "start": each.start, "tokens": len(each.pieces), "nats": each.means} for each in documents
    ]
    tokens, has_top = sum(len(each.pieces) for each in documents), any(each.top is not None for each in documents)
    lists = {"tokens": tokens, "other": len(surprise.names) > 1, "top": has_top}
    facts = {"names": surprise.names, "documents": each_document, "tops": surprise.tops}
    return {**facts, **lists, "steps": STEPS, "colors": COLORS}


def _data(surprise: Surprise) -> bytes:
    """Return the lists of a page, one after the other: those that it does not have are empty."""
    documents = surprise.documents
    pieces = [piece.encode("utf-16-le", "replace") for each in documents for piece in each.pieces]
    lists = [_joined([each.top for each in documents]).astype("<u4")]
    lists += [np.array([len(piece) // 2 for piece in pieces], "<u2")]
    for nats in zip(*((each.nats, each.other_nats, each.top_nats) for each in documents), strict=True):
        lists += [np.rint(_joined(nats) * STEPS).clip(0, 65535).astype("<u2")]
    return b"".join([*(values.tobytes() for values in lists), b"".join(pieces).decode("utf-16-le").encode()])


def _joined(lists: Sequence[np.ndarray | None]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.float32), *(values for values in lists if values is not None)])
