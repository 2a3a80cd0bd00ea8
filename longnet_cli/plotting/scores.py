"""Scores: perplexity by context, loss by position and by recall, from the JSON output of `longnet score`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from longnet_cli.errors import DataError
from longnet_cli.sizes import short_size

from .axes import Axis, Curve, Panel, Row, number, point

CONTEXT = Axis("context, tokens", base=2, write=short_size, at="context {}")
NATS = Axis("nats per token")

# Keys of a total, with their axes and the keys of their standard errors
TOTALS = (("ppl", Axis("perplexity"), "ppl_se"), ("ppl_ratio", Axis("perplexity / that of the first"), "ppl_ratio_se"))
# Keys of a total's lists, with their axes. A row is drawn where its range starts.
LISTS = (
    ("by_position", Axis("tokens seen, from", base=2, write=short_size, at="{} tokens seen")),
    ("by_segment_position", Axis("place in the shortest segment, from", at="place {}")),
    ("by_recall", Axis("said tokens ago, from", base=2, write=short_size, at="{} tokens ago", beyond="new")),
)


@dataclass(frozen=True)
class Scores:
    """The results of one `longnet score`: its name and its totals, one for each context."""

    KIND: ClassVar[str] = "a score"

    name: str
    rows: list[Row]

    @classmethod
    def of(cls, name: str, rows: Iterator[tuple[str, Row]]) -> Scores:
        """Return the scores in rows of `--format json` (one value) or `jsonl`, with their places. Raises DataError."""
        found = []
        for where, row in rows:
            if row.get("kind") == "document":
                continue
            totals = row.get("totals") or [row.get("total", row)]
            for total in totals if isinstance(totals, list) else [totals]:
                lists = [total.get(key) or [] for key, _ in LISTS] if isinstance(total, dict) else [None]
                if not all(isinstance(rows, list) and all(isinstance(row, dict) for row in rows) for rows in lists):
                    raise DataError(f"{where}: not a score: its total has other types")
                found.append(total)
        if found and found[0].get("context") is not None:
            found[0] = {
                "ppl_ratio": 1.0,
                "ppl_ratio_se": 0.0,
                **found[0],
            }  # ratios are relative to the first context
        return cls(name, found)

    def panels(self, several: bool) -> Iterator[Panel]:
        """Yield a panel for perplexity by context, one for its ratio to the first context, and one for each list."""
        for key, axis, error in TOTALS:
            points = [
                p for row in self.rows for p in point(row, number(row.get("context")), key, (CONTEXT, axis), error)
            ]
            enough = key == "ppl" or len(points) > 1
            yield Panel(key, CONTEXT, axis, [Curve(self.name, sorted(points))] if enough else [])
        for key, place in LISTS:
            curves = []
            for total in self.rows:
                context = number(total.get("context"))
                words = [self.name] if several or context is None else []
                name = ", ".join(words if context is None else [*words, f"context {short_size(context)}"])
                rows = [(_start(row, key), row) for row in total.get(key) or []]
                for beyond in (False, True):  # no line joins new tokens with the others
                    points = [
                        p
                        for x, row in rows
                        if x is None or math.isinf(x) == beyond
                        for p in point(row, x, "nll", (place, NATS), "nll_se")
                    ]
                    curves.append(Curve(name, sorted(points)))
            yield Panel(key, place, NATS, curves)


def _start(row: dict[str, Any], key: str) -> float | None:
    return math.inf if key == "by_recall" and "from" in row and row["from"] is None else number(row.get("from"))
