"""The slide encoder, such as Prov-GigaPath's: from vectors of tiles, and the tiles' places, to one vector.

    features -> projection -> + position of the tile's cell -> [CLS, tiles] -> LongNet -> CLS, or the mean -> norm

`VectorNet` is the LongNet in it, which jobs run chunk by chunk and over ranks. `SlideEncoder` is the class for users.
Positions are computed only for the given tiles; nothing has the size of the grid.

B batch, N tiles.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Literal, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import ConfigError, DataError, InputWarning
from longnet_cli.nets.config import LongNetConfig, SlideConfig
from longnet_cli.nets.longnet import Layer, LongNet, Placement
from longnet_cli.nets.net import Bos, D, DocumentLike, InputSequence
from longnet_cli.nets.weights import load_pretrained, save_pretrained

SlidePool = Literal["cls", "mean"]

HEAD_EPS = 1e-6  # of the last norm; the others have the configuration's
CLS_CELL = -1.0  # both numbers of the cell of the CLS row, whose vector is not read


# mean tiles per cell from which the cell size is most likely wrong; overlapping tiles have 4
CROWD = 8
# one side for all slides, or one for each; None is the model's own
TileSize = float | Sequence[float] | Tensor | None


class Tiles(DocumentLike, Protocol):
    """A document of vectors, as `data.documents.vectors.Vectors` is."""

    doc_id: str
    coords: np.ndarray | None
    tile_size: float | None

    def place(self, index: int) -> str: ...


def grid_cells(coords: Tensor, side: float | Tensor) -> Tensor:
    """Return the cells in which pixels (..., 2) lie, (..., 2) whole numbers in float64; `side` is that of a tile."""
    return torch.floor(coords.double() / side)


def outside_grid(cells: Tensor, grid: int) -> tuple[int, str] | None:
    """Return the index of the first of the cells (N, 2) outside the grid, and a sentence; None if all are inside."""
    bad = ~((cells >= 0) & (cells < grid)).all(-1)
    if not bad.any():
        return None
    index = int(bad.nonzero()[0])
    x, y = cells[index].tolist()
    return index, f"its cell ({x:.0f}, {y:.0f}) is outside the grid of {grid} x {grid}"


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
    # in pixels of the document's coordinates
    side = tile_size or document.tile_size or config.tile_size
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
    steps = np.concatenate([np.diff(np.unique(axis)) for axis in coords.T])
    sizes, times = np.unique(steps, return_counts=True)
    fits = f": a tile of {sizes[times.argmax()]:g} would fit (--tile-size)" if len(sizes) else ""
    warnings.warn(
        f"{document.where}: the {len(document)} tiles of {document.doc_id!r} fall into {occupied} "
        f"cell{'s' * (occupied > 1)} of {side:g} pixels{fits}",
        InputWarning,
        stacklevel=2,
    )


def padded_cells(
    coords: Tensor | None,
    counts: Tensor,
    shape: tuple[int, int, int],
    config: SlideConfig,
    tile_size: TileSize = None,
) -> Tensor:
    """Return the cells of the tiles of a padded batch, float64 of the `shape` (B, N, 2), zeros at padding.

    `counts` (B,) are the numbers of tiles. Raises ValueError for coords of another shape, for sides that are not above
    0 or too many, and for a tile outside the grid.
    """
    batch, tiles, _ = shape
    if coords is None or coords.shape != shape:
        raise ValueError(
            f"coords must have the shape {shape}, got {'none' if coords is None else tuple(coords.shape)}"
        )
    side = config.tile_size if tile_size is None else tile_size
    sides = torch.as_tensor(side, dtype=torch.float64).flatten()
    if len(sides) not in (1, batch) or not (sides > 0).all():
        raise ValueError(
            f"tile_size must be above 0, one number or one for each of {batch} slides, got {side}"
        )
    real = (torch.arange(tiles) < counts[:, None])[..., None].to(coords.device)
    of_tiles = torch.where(real, coords, coords.new_zeros(()))  # padding may have any coords
    cells = grid_cells(of_tiles, sides.view(-1, 1, 1).to(coords.device))
    if outside := outside_grid(cells.flatten(0, 1), config.grid):
        index, problem = outside
        slide, tile = divmod(index, tiles)
        x, y = coords[slide, tile].tolist()
        pixels = sides[slide % len(sides)]
        raise ValueError(
            f"slide {slide}, tile {tile}: the tile at ({x:.10g}, {y:.10g}): {problem} of {pixels:g} pixels: give the "
            "side of a tile as tile_size"
        )
    return cells


def grid_positions(cells: Tensor, dim: int) -> Tensor:
    """Return the position vectors (..., dim), float32, of cells (..., 2).

    The first half is for a cell's second number, the second half for its first. A half is [sin, cos] of
    c / 10000^(i / (dim / 4)), for i in 0, ..., dim / 4 - 1.
    """
    frequencies = 10000.0 ** -(
        torch.arange(dim // 4, device=cells.device, dtype=torch.float64) / (dim // 4)
    )
    phases = cells.flip(-1).double()[..., None] * frequencies  # (..., 2, dim / 4)
    return torch.cat([phases.sin(), phases.cos()], -1).flatten(-2).float()


class VectorNet(LongNet):
    """A LongNet whose tokens are rows (B, N, in_features + 2): a vector, then the two numbers of its cell.

    The row of CLS has the cell (-1, -1). Without a grid, other cells have no effect.
    """

    has_cls = True
    config: SlideConfig

    def __init__(self, config: LongNetConfig) -> None:
        """Build the net. Raises ConfigError for a configuration that is not a SlideConfig."""
        if not isinstance(config, SlideConfig):
            raise ConfigError("not the configuration of a slide encoder: it has no in_features")
        super().__init__(config)
        self.row_size = config.in_features
        self.has_grid = config.grid > 0
        self.project = nn.Linear(config.in_features, config.dim)
        self.cls = nn.Parameter(torch.empty(config.dim))
        self.dropout = nn.Dropout(config.dropout)  # of the first layer's input
        self.norm = nn.LayerNorm(config.dim, HEAD_EPS)
        for index, layer in enumerate(cast(Sequence[Layer], self.layers)):
            layer.drop_path.p = config.drop_path * index / max(1, config.num_layers - 1)
        if not self.cls.is_meta:
            nn.init.xavier_uniform_(self.project.weight)
            nn.init.zeros_(self.project.bias)
            nn.init.normal_(self.cls, std=0.02)

    def start_rows(self, bos: Bos) -> np.ndarray:
        """Return the row of CLS, (1, in_features + 2) float32."""
        return np.full((1, self.config.in_features + 2), CLS_CELL, np.float32)

    def sequence(
        self,
        document: D,
        bos: Bos = None,
        tile_size: float | None = None,
        closing: Sequence[int] | None = None,
    ) -> InputSequence[D]:
        """Return a document as the net reads it; see `Net.sequence`. Raises, and warns, as `tile_cells` does, too."""
        sequence = super().sequence(document, bos)
        if not len(document):
            return sequence  # no job reads it
        cells = tile_cells(cast(Tiles, document), self.config, tile_size)
        # no rows after the tiles, but with as many columns as those before them
        return replace(sequence, end_rows=sequence.start_rows[:0], cells=cells)

    def inputs_like(self, shape: tuple[int, int]) -> Tensor:
        return F.pad(super().inputs_like(shape), (0, 2))

    def embed(self, tokens: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        """Return the input of the first layer, (B, N, dim), from rows (B, N, in_features + 2).

        It has the dtype of the weights, also under autocast: this happens once per sequence, and chunks get the same
        as one forward pass.
        """
        if tokens is None or embeddings is not None:
            return super().embed(tokens, embeddings)
        with torch.autocast(tokens.device.type, enabled=False):
            features, cells = tokens.split([self.config.in_features, 2], -1)
            features = features.to(self.project.weight.dtype)
            x = self.project(features)
            if self.config.grid:
                positions = grid_positions(cells, self.config.dim)
                x = x + positions.to(x.dtype)
            is_cls = cells[..., :1] == CLS_CELL
            return torch.where(is_cls, self.cls, x)

    def head(self, pooled: Tensor) -> Tensor:
        return self.norm(pooled.to(self.norm.weight.dtype))

    def encode(
        self,
        features: Tensor,
        coords: Tensor | None = None,
        *,
        tile_size: TileSize = None,
        lengths: Sequence[int] | Tensor | None = None,
        pool: SlidePool = "mean",
        all_layers: bool = False,
        again: bool = False,
    ) -> list[Tensor]:
        """Return vectors (B, dim): one, or with `all_layers` num_layers + 1; see `SlideEncoder.forward`.

        With `again`, the backward pass computes each layer again, from its input.
        """
        if pool not in ("cls", "mean"):
            raise ValueError(f'pool must be "cls" or "mean", got {pool!r}')
        batch, tiles, _ = features.shape
        counts = torch.full((batch,), tiles) if lengths is None else torch.as_tensor(lengths).cpu()
        if counts.shape != (batch,) or not tiles or counts.min() < 1 or counts.max() > tiles:
            raise ValueError(
                f"lengths must be {batch} numbers of 1 to {tiles}, got {counts.tolist()}"
            )
        x = self.dropout(self.embed(self.rows(features, coords, counts, tile_size)))
        table = self.positions(x, 0)
        place = Placement(lengths=(counts + 1).tolist())
        vectors = [self.head(_pooled(x, counts, pool))] if all_layers else []
        again &= torch.is_grad_enabled()
        for layer in self.layers:
            x = (
                checkpoint(layer, x, table, place, use_reentrant=False)
                if again
                else layer(x, table, place)
            )
            if all_layers:
                vectors.append(self.head(_pooled(x, counts, pool)))
        return vectors or [self.head(_pooled(self.final_norm(x), counts, pool))]

    def rows(
        self,
        features: Tensor,
        coords: Tensor | None,
        counts: Tensor,
        tile_size: TileSize = None,
    ) -> Tensor:
        """Return the rows that the net reads, (B, 1 + N, in_features + 2), of slides with these counts of tiles."""
        batch, tiles, size = features.shape
        if size != self.config.in_features:
            raise ValueError(
                f"features have {size} numbers, the model reads {self.config.in_features}"
            )
        wide = torch.promote_types(features.dtype, torch.float32)
        cells = features.new_zeros(batch, tiles, 2, dtype=torch.float64)
        if self.config.grid:
            cells = padded_cells(coords, counts, (batch, tiles, 2), self.config, tile_size)
        elif coords is not None:
            raise ValueError("this model has no grid: it takes no coords")
        # 100,000 tiles: 0.6 GB, so once
        rows = features.new_full((batch, 1 + tiles, size + 2), CLS_CELL, dtype=wide)
        rows[:, 1:, :size] = features
        rows[:, 1:, size:] = cells
        return rows


class SlideEncoder(nn.Module):
    """An encoder of the tiles of a slide into one vector, initialised at random, float32.

        encoder = SlideEncoder.from_pretrained("./gigapath")
        vectors = encoder(features, coords)      # (B, N, in_features), (B, N, 2) in pixels -> (B, dim)

    Prov-GigaPath's weights were trained with `padding="zero_key"`: keys of zeros join the softmax wherever a slide does
    not fill a segment. `"exact"` leaves them out, and the vectors differ.

    To train slides of any length, the backward pass computes each layer again, from its input: it holds the inputs of
    all layers and the activations of one. `activation_checkpointing = False` saves that time and holds all activations.
    """

    activation_checkpointing = True

    def __init__(self, config: SlideConfig) -> None:
        super().__init__()
        self.net = VectorNet(config)

    @property
    def config(self) -> SlideConfig:
        return self.net.config

    def forward(
        self,
        features: Tensor,
        coords: Tensor | None = None,
        *,
        tile_size: TileSize = None,
        lengths: Sequence[int] | Tensor | None = None,
        pool: SlidePool = "mean",
        all_layers: bool = False,
    ) -> Tensor:
        """Return vectors (B, dim) of features (B, N, in_features) and coords (B, N, 2) in pixels.

        `tile_size` is the side of a tile in the pixels of `coords`, one number or one for each slide; None is the
        model's own, whatever the coords are. `lengths` gives the number of tiles of each right-padded row, at least 1:
        each slide comes out as it would alone. `pool` takes the mean over the tiles, or the hidden state of CLS, which
        Prov-GigaPath's pretraining does not train; the last norm follows. `all_layers` returns (num_layers + 1, B,
        dim): one vector for the first layer's input, then one for each layer's output. As in Prov-GigaPath, these skip
        the LongNet's final norm, so the last one differs from the vector that you get without `all_layers`. A net
        without a grid takes no coords. In training, dropout applies to the input of the first layer, too. Raises
        ValueError for wrong shapes, lengths, sides and `pool`, and for tiles outside the grid.
        """
        again = self.activation_checkpointing
        vectors = self.net.encode(
            features,
            coords,
            tile_size=tile_size,
            lengths=lengths,
            pool=pool,
            all_layers=all_layers,
            again=again,
        )
        return torch.stack(vectors) if all_layers else vectors[0]

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | PathLike[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = torch.float32,
        *,
        pattern: Pattern | None = None,
        padding: Literal["exact", "zero_key"] | None = None,
        verify: bool = True,
    ) -> SlideEncoder:
        """Load a saved encoder from its directory; see weights.load_pretrained. `padding` replaces the saved one."""
        net = load_pretrained(VectorNet, name_or_dir, device, dtype, pattern=pattern, verify=verify)
        config = (
            net.config
            if padding is None
            else SlideConfig(**{**dict(net.config), "padding": padding})
        )
        with torch.device("meta"):
            encoder = cls(config)
        encoder.net.load_state_dict(net.state_dict(), assign=True)
        return encoder.eval()

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Write config.json and model.safetensors; see weights.save_pretrained."""
        save_pretrained(self.net, directory)


def _pooled(x: Tensor, counts: Tensor, pool: SlidePool) -> Tensor:
    """Pool the hidden states (B, 1 + N, dim) of CLS and tiles into (B, dim)."""
    if pool == "cls":
        return x[:, 0]
    real = torch.arange(x.shape[1] - 1) < counts[:, None]
    # padding may be NaN
    tiles = torch.where(real[..., None].to(x.device), x[:, 1:], x.new_zeros(()))
    return tiles.sum(1, dtype=torch.float64) / counts[:, None].to(x.device)
