"""Make a small slide encoder, and tiles of slides for it, to see how `longnet encode` reads vectors.

    python examples/tiles.py made        # made/encoder and made/slides.parquet
    longnet encode made/slides.parquet --model ./made/encoder --pool mean -o slides.arrow
    python examples/nearest.py slides.arrow

The weights are random, and nothing is learned. The tiles of a slide scatter around one of two points, red or blue, and
even a random encoder keeps the two apart.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from longnet_cli import SlideConfig, SlideEncoder

IN_FEATURES, SIDE = 16, 40  # numbers of a tile; slides are squares of SIDE x SIDE tiles


def make_encoder(folder: Path) -> None:
    torch.manual_seed(0)
    config = SlideConfig(
        dim=64,
        num_layers=2,
        num_heads=4,
        ffn_dim=128,
        segment_lengths=(64, 256, 1024),
        dilation_rates=(1, 2, 4),
        in_features=IN_FEATURES,
    )
    SlideEncoder(config).save_pretrained(folder)


def make_slides(path: Path) -> None:
    """Write a row for each tile: its slide, its features, and the pixel at its upper left corner."""
    random = np.random.default_rng(0)
    points = {"red": random.normal(size=IN_FEATURES), "blue": random.normal(size=IN_FEATURES)}
    slides = []
    for index in range(6):
        kind = ("red", "blue")[index % 2]
        tissue = np.argwhere(random.random((SIDE, SIDE)) < 0.3)  # the tiles that show tissue
        features = points[kind] + random.normal(size=(len(tissue), IN_FEATURES))
        columns = {
            "slide_id": [f"{kind}-{index}"] * len(tissue),
            "features": pa.FixedSizeListArray.from_arrays(
                features.astype(np.float16).ravel(), IN_FEATURES
            ),
            "coords": pa.FixedSizeListArray.from_arrays((tissue * 256).ravel(), 2),
        }
        slides.append(pa.table(columns))
    pq.write_table(pa.concat_tables(slides), path)


def main(folder: str) -> None:
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    make_encoder(place / "encoder")
    make_slides(place / "slides.parquet")


if __name__ == "__main__":
    main(*sys.argv[1:])
