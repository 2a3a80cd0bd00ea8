"""The grid of a slide: the cells in which tiles lie, and their position vectors.

Positions are computed only for the given tiles; nothing has the size of the grid.

B batch, N tiles.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from longnet_cli.basics.errors import DataError, InputWarning
from longnet_cli.nets.config import SlideConfig
from longnet_cli.nets.net import DocumentLike

CROWD = 8  # mean tiles per cell from which the cell size is most likely wrong; overlapping tiles have 4
TileSize = float | Sequence[float] | Tensor | None  # one side for all slides, or one for each; None is the model's own


class Tiles(DocumentLike, Protocol):
    """A document of vectors, as `data.vectors.Vectors` is."""

    doc_id: str
    coords: np.ndarray | None
    tile_size: float | None

    def place(self, index: int) -> str: ...


def grid_cells(coords: Tensor, tile_size: float | Tensor) -> Tensor:
    """Return the cells in which pixels (..., 2) lie, (..., 2) whole numbers in float64.

    A tensor has the side of a tile for each slide, as the first axis of `coords` counts them.
    """
    if isinstance(tile_size, Tensor):
        tile_size = tile_size.to(coords.device, torch.float64).view(-1, *[1] * (coords.dim() - 1))
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
    numbers = cells.float().numpy()
    _warn_of_crowds(document, document.coords, numbers, side)
    return numbers


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


def padded_cells(
    coords: Tensor | None, counts: Tensor, shape: tuple[int, int, int], config: SlideConfig, tile_size: TileSize = None
) -> Tensor:
    """Return the cells of the tiles of a padded batch, float64 of the `shape` (B, N, 2), zeros at padding.

    `counts` (B,) are the numbers of tiles. Raises ValueError for coords of another shape, for sides that are not above
    0 or too many, and for a tile outside the grid.
    """
    batch, tiles, _ = shape
    if coords is None or coords.shape != shape:
        raise ValueError(f"coords must have the shape {shape}, got {'none' if coords is None else tuple(coords.shape)}")
    given = config.tile_size if tile_size is None else tile_size
    sides = torch.as_tensor(given, dtype=torch.float64).flatten()
    if len(sides) not in (1, batch) or not (sides > 0).all():
        raise ValueError(f"tile_size must be above 0, one number or one for each of {batch} slides, got {given}")
    real = (torch.arange(tiles) < counts[:, None])[..., None].to(coords.device)  # padding may have any coords
    cells = grid_cells(torch.where(real, coords, coords.new_zeros(())), sides)
    if outside := outside_grid(cells.flatten(0, 1), config.grid):
        slide, tile = divmod(outside[0], tiles)
        (x, y), side = coords[slide, tile].tolist(), sides[slide % len(sides)]
        raise ValueError(
            f"slide {slide}, tile {tile}: the tile at ({x:.10g}, {y:.10g}): {outside[1]} of {side:g} pixels: give the "
            "side of a tile as tile_size"
        )
    return cells


def grid_positions(cells: Tensor, dim: int) -> Tensor:
    """Return the position vectors (..., dim), float32, of cells (..., 2).

    The first half is for a cell's second number, the second half for its first. A half is [sin, cos] of
    c / 10000^(i / (dim / 4)), for i in 0, ..., dim / 4 - 1.
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, device=cells.device, dtype=torch.float64) / (dim // 4))
    phases = cells.flip(-1).double()[..., None] * frequencies  # (..., 2, dim / 4)
    return torch.cat([phases.sin(), phases.cos()], -1).flatten(-2).float()
