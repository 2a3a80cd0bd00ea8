"""The job `plot`: curves of runs, benchmarks and scores; and a text with the nats of each token (surprise*.py).

Loads no torch, and matplotlib only for a picture.
"""

from .drawing import Axis, Curve, Panel, Point, draw_picture
from .recognizing import panels, read, read_all, title

__all__ = ["Axis", "Curve", "Panel", "Point", "draw_picture", "panels", "read", "read_all", "title"]
