"""The job `plot`: measurements of runs, benchmarks and scores, as curves in a picture or in characters.

Loads no torch, and matplotlib only for a picture.
"""

from .axes import Axis, Curve, Panel, Point
from .picture import PICTURES, draw_picture, new_figure, save_figure
from .recognizing import metrics_file, panels, read, read_all
from .text import draw_text

__all__ = [
    "PICTURES",
    "Axis",
    "Curve",
    "Panel",
    "Point",
    "draw_picture",
    "draw_text",
    "metrics_file",
    "new_figure",
    "panels",
    "read",
    "read_all",
    "save_figure",
]
