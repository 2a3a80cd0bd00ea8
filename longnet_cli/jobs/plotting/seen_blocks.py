"""The blocks of the past that each group of tokens saw, from a file of `score --chosen`, for the page of its text."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from longnet_cli.basics.errors import DataError
from longnet_cli.data.columns import Wanted
from longnet_cli.data.formats import open_source
from longnet_cli.data.names import find_sources
from longnet_cli.data.tables import Table

_COLUMNS = ["doc_id", "layer", "start", "stop", "blocks"]


class SeenBlocks(NamedTuple):
    """The blocks that groups of tokens saw, in tokens of the whole page.

    Of group i, whose tokens are [starts[i], stops[i]), the blocks are those of [first[i], first[i + 1]): each begins
    at token `blocks[j]` and was seen in `layers[j]` of `num_layers` layers. A block has `size` tokens.
    """

    starts: np.ndarray
    stops: np.ndarray
    first: np.ndarray
    blocks: np.ndarray
    layers: np.ndarray
    num_layers: int
    size: int


def _open(name: str) -> Table | None:
    sources, _ = find_sources([name])
    table = open_source(sources[0], Wanted()) if len(sources) == 1 else None
    return table if isinstance(table, Table) and {*_COLUMNS} <= {*table.schema.names} else None


def has_blocks(name: str) -> bool:
    """Return whether a file is one of `score --chosen`. Stdin (-) is not looked into."""
    return name != "-" and _open(name) is not None


def read_blocks(name: str, places: dict[str, tuple[int, int]]) -> SeenBlocks:
    """Return the blocks in a file for the documents at `places`: by name, (first token on the page, count).

    The query at position i of a document predicts the i-th token that is scored, and reads the one before. Raises
    DataError for a file of other documents.
    """
    table = _open(name)
    assert table is not None
    size = int((table.schema.metadata or {}).get(b"longnet.chosen_block", b"0"))
    groups: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    layers = set[int]()
    for batch in table.read(_COLUMNS):
        for row in batch.to_pylist():
            place = places.get(row["doc_id"])
            if place is None or row["start"] >= place[1] or not size:
                raise DataError(f"{table.where}: it has tokens of document {row['doc_id']!r} that the other file lacks")
            begin, count = place
            layers.add(row["layer"])
            stop = min(row["stop"], count)
            groups[begin + row["start"], begin + stop].update(begin + max(0, b * size - 1) for b in row["blocks"])
    ordered = sorted(groups)
    counts = [sorted(groups[group].items()) for group in ordered]
    return SeenBlocks(
        np.array([start for start, _ in ordered], "<u4"),
        np.array([stop for _, stop in ordered], "<u4"),
        np.cumsum([0, *map(len, counts)]).astype("<u4"),
        np.array([block for blocks in counts for block, _ in blocks], "<u4"),
        np.array([times for blocks in counts for _, times in blocks], "<u2"),
        len(layers),
        size,
    )
