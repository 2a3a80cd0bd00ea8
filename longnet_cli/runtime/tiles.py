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

CROWD = 8  # tiles that share a cell, on average, where its size is most likely wrong; overlapping tiles are 4


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
    """The rows of `model.slide.VectorNet`: that of CLS, then those of the document, from `first` on."""

    first = 1

    def __init__(self, document: Tiles, cells: np.ndarray | None) -> None:
        """`cells` (len(document), 2) are those of the tiles, None for a net without a grid."""
        self.document, self.cells = document, cells

    def read(self, start: int, stop: int, /) -> np.ndarray:
        """The rows [start, stop), (stop - start, width + 2) float32."""
        width = self.document.width
        rows = np.full((stop - start, width + 2), CLS_CELL, np.float32)
        begin, end = max(start - 1, 0), max(stop - 1, 0)
        if begin < end:
            tiles = rows[len(rows) - (end - begin) :]
            tiles[:, :width] = self.document.read(begin, end)
            tiles[:, width:] = 0 if self.cells is None else self.cells[begin:end]
        return rows


def tile_cells(document: Tiles, config: SlideConfig, tile_size: float | None = None) -> np.ndarray | None:
    """The cells of a document's tiles, (len, 2) float64; None for a net without a grid.

    The side of a tile is `tile_size`, otherwise what the document says, otherwise the model's. Raises DataError for a
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
    """Return what a net with a CLS reads of a document; None for any other net."""
    config = net.config
    return AfterCls(document, tile_cells(document, config, tile_size)) if isinstance(config, SlideConfig) else None


def check_vectors(net: Net, document: Tiles, tile_size: float | None) -> None:
    """Look at a document without reading its vectors, and warn where its tiles share their cells.

    Raises DataError for vectors of another size than the net's, and as `tile_cells` does.
    """
    if document.width != net.row_size:
        raise DataError(
            f"{document.where}: its vectors have {document.width} numbers, and the model reads {net.row_size}"
        )
    if isinstance(net.config, SlideConfig):
        cells = tile_cells(document, net.config, tile_size)
        if cells is not None:
            _warn_of_crowds(document, cells, _side(document, net.config, tile_size))


def _side(document: Tiles, config: SlideConfig, tile_size: float | None) -> float:
    """The side of a tile in the pixels that the document's coordinates count."""
    return tile_size or document.tile_size or config.tile_size


def _warn_of_crowds(document: Tiles, cells: np.ndarray, side: float) -> None:
    """Warn where most tiles share their cells: then positions say little, and `side` is not that of the coordinates."""
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
