"""Training runs: loss, learning rate and speed by step, from the lines of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from longnet_cli.errors import DataError

from .axes import Axis, Curve, Panel, Row, number, point

STEP = Axis("step", at="step {}", write=lambda value: f"{value:g}")

# The axis of each panel, and its keys in metrics.jsonl, each with an addition to the run's name
PANELS = (
    (Axis("loss, nats per token"), (("loss", ""), ("held_out_loss", " held out"))),
    (Axis("learning rate"), (("lr", ""),)),
    (Axis("tokens per second"), (("tokens_per_second", ""),)),
)


@dataclass(frozen=True)
class Run:
    """One training run: its name, and its lines of metrics with steps in rising order."""

    KIND: ClassVar[str] = "a line of metrics"

    name: str
    rows: list[Row]

    @classmethod
    def of(cls, name: str, rows: Iterator[tuple[str, Row]]) -> Run:
        """Return the run of lines, each with its place for errors.

        A resumed run may have lines of steps that it then repeated: the later lines count. Raises DataError for a line
        without a step.
        """
        found: list[Row] = []
        for where, row in rows:
            step = row.get("step")
            if not isinstance(step, int) or number(step) is None:
                raise DataError(f"{where}: not a line of metrics: it has no whole number 'step'")
            while found and found[-1]["step"] >= step:
                found.pop()
            found.append(row)
        return cls(name, found)

    def panels(self, several: bool) -> Iterator[Panel]:
        """Yield a panel for each quantity. Its curves are empty if no line has the quantity."""
        for axis, keys in PANELS:
            curves = []
            for key, more in keys:
                points = [p for row in self.rows for p in point(row, number(row["step"]), key, (STEP, axis))]
                curves.append(Curve(self.name + more, points))
            yield Panel(keys[0][0], STEP, axis, curves)
