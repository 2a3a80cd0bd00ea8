"""The cells of a grid in which the tiles of a slide lie."""

from __future__ import annotations

import warnings
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from longnet_cli.errors import DataError, InputWarning
from longnet_cli.model.config import SlideConfig
from longnet_cli.model.sequence import DocumentLike

CROWD = 8  # mean tiles per cell from which the cell size is most likely wrong; overlapping tiles have 4


class Tiles(DocumentLike, Protocol):
    """A document of vectors, as `data.vectors.Vectors` is."""

    doc_id: str
    coords: np.ndarray | None
    tile_size: float | None

    def place(self, index: int) -> str: ...


def grid_cells(coords: Tensor, tile_size: float) -> Tensor:
    """Return the cells in which pixels (..., 2) lie, (..., 2) whole numbers in float64."""
    return torch.floor(coords.double() / tile_size)


def outside_grid(cells: Tensor, grid: int) -> tuple[int, str] | None:
    """Return the index of the first of the cells (N, 2) outside the grid, and a sentence; None if all are inside."""
    bad = ~((cells >= 0) & (cells < grid)).all(-1)
    if not bad.any():
        return None
    index = int(bad.nonzero()[0])
    first, second = cells[index].tolist()
    return index, f"its cell ({first:.0f}, {second:.0f}) is outside the grid of {grid} x {grid}"


def tile_cells(document: Tiles, config: SlideConfig, tile_size: float | None = None) -> np.ndarray:
    """Return the cells of a document's tiles, (len, 2) float32, zeros for a net without a grid; read no vectors.

    The side of a tile is `tile_size`, otherwise the document's own, otherwise the model's. Raises DataError for a
    document without coordinates, and for a tile outside the grid. Warns where most tiles share their cells.
    """
    if not config.grid:
        return np.broadcast_to(np.float32(0), (len(document), 2))
    if document.coords is None:
        raise DataError(
            f"{document.where}: document {document.doc_id!r} has no coordinates, which the model needs: a column "
            "coords of pairs, or x and y"
        )
    side = tile_size or document.tile_size or config.tile_size  # in pixels of the document's coordinates
    cells = grid_cells(torch.from_numpy(document.coords), side)
    if outside := outside_grid(cells, config.grid):
        index, problem = outside
        x, y = document.coords[index]
        raise DataError(
            f"{document.place(index)}: the tile at ({x:g}, {y:g}): {problem} of {side:g} pixels: give the side of a "
            "tile with --tile-size"
        )
    found = cells.float().numpy()
    _warn_of_crowds(document, document.coords, found, side)
    return found


def _warn_of_crowds(document: Tiles, coords: np.ndarray, cells: np.ndarray, side: float) -> None:
    """Warn where most tiles share their cells: then positions say little, and `side` does not fit the coordinates."""
    occupied = len(np.unique(cells, axis=0))
    if len(document) < 2 * CROWD or occupied * CROWD > len(document):
        return
    steps = np.concatenate([np.diff(np.unique(coords[:, axis])) for axis in (0, 1)])
    sizes, times = np.unique(steps, return_counts=True)
    fits = f": a tile of {sizes[times.argmax()]:g} would fit (--tile-size)" if len(sizes) else ""
    warnings.warn(
        f"{document.where}: the {len(document)} tiles of {document.doc_id!r} fall into {occupied} "
        f"cell{'s' * (occupied > 1)} of {side:g} pixels{fits}",
        InputWarning,
        stacklevel=2,
    )
