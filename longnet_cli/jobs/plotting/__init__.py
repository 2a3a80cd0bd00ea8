"""The job `plot`: curves of runs, benchmarks and scores; and a text with the nats of each token (surprise*.py).

Loads no torch, and matplotlib only for a picture.
"""

from .drawing import PICTURES, Axis, Curve, Panel, Point, draw_picture, draw_text, new_figure, save_figure
from .recognizing import metrics_file, panels, read, read_all, title
from .surprise import draw_surprise, has_columns, read_surprise
from .surprise_page import write_surprise

__all__ = [
    "PICTURES",
    "Axis",
    "Curve",
    "Panel",
    "Point",
    "draw_picture",
    "draw_surprise",
    "draw_text",
    "has_columns",
    "metrics_file",
    "new_figure",
    "panels",
    "read",
    "read_all",
    "read_surprise",
    "save_figure",
    "title",
    "write_surprise",
]
