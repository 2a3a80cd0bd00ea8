"""A document of vectors as the rows that a slide encoder reads: CLS first, then each vector with its cell."""

from __future__ import annotations

import warnings
from typing import Protocol

import numpy as np
import torch

from longnet_cli.errors import DataError, InputWarning
from longnet_cli.model.config import SlideConfig
from longnet_cli.model.net import Net
from longnet_cli.model.slide import CLS_CELL, grid_cells, outside_grid

CROWD = 8  # mean tiles per cell from which the cell size is most likely wrong; overlapping tiles have 4


class Tiles(Protocol):
    """A document of vectors, as `data.vectors.Vectors` is."""

    doc_id: str
    where: str
    width: int
    coords: np.ndarray | None
    tile_size: float | None

    def __len__(self) -> int: ...
    def read(self, start: int, stop: int, /) -> np.ndarray: ...  # (stop - start, width) float32
    def place(self, index: int) -> str: ...


class AfterCls:
    """The rows that `model.slide.VectorNet` reads: the row of CLS, then, from index `first` on, the document's rows."""

    first = 1

    def __init__(self, document: Tiles, cells: np.ndarray | None) -> None:
        """Take a document and the `cells` (len(document), 2) of its tiles, None for a net without a grid."""
        self.document, self.cells = document, cells

    def read(self, start: int, stop: int, /) -> np.ndarray:
        """Return the rows [start, stop), (stop - start, width + 2) float32."""
        width = self.document.width
        rows = np.full((stop - start, width + 2), CLS_CELL, np.float32)
        begin, end = max(start - 1, 0), max(stop - 1, 0)
        if begin < end:
            tiles = rows[len(rows) - (end - begin) :]
            tiles[:, :width] = self.document.read(begin, end)
            tiles[:, width:] = 0 if self.cells is None else self.cells[begin:end]
        return rows


def tile_cells(document: Tiles, config: SlideConfig, tile_size: float | None = None) -> np.ndarray | None:
    """Return the cells of a document's tiles, (len, 2) float64; None for a net without a grid.

    The side of a tile is `tile_size`, otherwise the document's own, otherwise the model's. Raises DataError for a
    document without coordinates, and for a tile outside the grid.
    """
    if not config.grid:
        return None
    if document.coords is None:
        raise DataError(
            f"{document.where}: document {document.doc_id!r} has no coordinates, which the model needs: a column "
            "coords of pairs, or x and y"
        )
    cells = grid_cells(torch.from_numpy(document.coords), side := _side(document, config, tile_size))
    if outside := outside_grid(cells, config.grid):
        index, problem = outside
        x, y = document.coords[index]
        raise DataError(
            f"{document.place(index)}: the tile at ({x:g}, {y:g}): {problem} of {side:g} pixels: give the side of a "
            "tile with --tile-size"
        )
    return cells.numpy()


def rows_of_tiles(net: Net, document: Tiles, tile_size: float | None) -> AfterCls | None:
    """Return the rows that a net with a CLS row reads for a document; None for any other net."""
    config = net.config
    return AfterCls(document, tile_cells(document, config, tile_size)) if isinstance(config, SlideConfig) else None


def check_vectors(net: Net, document: Tiles, tile_size: float | None) -> None:
    """Check a document without reading its vectors, and warn where most tiles share their cells. Any net reads none.

    Raises DataError for vectors of another size than the net's, and as `tile_cells` does.
    """
    if not len(document):
        return
    if document.width != net.row_size:
        raise DataError(
            f"{document.where}: its vectors have {document.width} numbers, and the model reads {net.row_size}"
        )
    if isinstance(net.config, SlideConfig):
        cells = tile_cells(document, net.config, tile_size)
        if cells is not None:
            _warn_of_crowds(document, cells, _side(document, net.config, tile_size))


def _side(document: Tiles, config: SlideConfig, tile_size: float | None) -> float:
    """Return the side of a tile, in pixels of the document's coordinates."""
    return tile_size or document.tile_size or config.tile_size


def _warn_of_crowds(document: Tiles, cells: np.ndarray, side: float) -> None:
    """Warn where most tiles share their cells: then positions say little, and `side` does not fit the coordinates."""
    occupied = len(np.unique(cells, axis=0))
    if len(document) < 2 * CROWD or occupied * CROWD > len(document):
        return
    assert document.coords is not None
    steps = np.concatenate([np.diff(np.unique(document.coords[:, axis])) for axis in (0, 1)])
    sizes, times = np.unique(steps, return_counts=True)
    fits = f": a tile of {sizes[times.argmax()]:g} would fit (--tile-size)" if len(sizes) else ""
    warnings.warn(
        f"{document.where}: the {len(document)} tiles of {document.doc_id!r} fall into {occupied} "
        f"cell{'s' * (occupied > 1)} of {side:g} pixels{fits}",
        InputWarning,
        stacklevel=2,
    )
