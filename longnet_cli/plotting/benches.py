"""Benchmarks: time and memory against length, from the rows of `longnet bench`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from longnet_cli.errors import DataError
from longnet_cli.sizes import short_bytes, short_duration, short_size

from .axes import Axis, Curve, Panel, Point, Row, number, point

TOKENS = Axis("tokens in the sequence", base=10, write=short_size, at="{} tokens")

# The key of each panel, its axis, and the power of the length with which dense attention grows (None: unknown)
PANELS = (
    ("seconds", Axis("time", base=10, write=short_duration), 2),
    ("seconds_per_token", Axis("time per token", base=10, write=short_duration), 1),
    ("peak_rss_bytes", Axis("peak memory", base=2, write=short_bytes), None),
    ("bytes", Axis("received by a rank", base=2, write=short_bytes), None),
)

# Keys in which rows of one length may differ, and the words that a curve's name then has for them
_DIFFERENCES: dict[str, Callable[[Any], str]] = {
    "op": str,
    "direction": str,
    "batch": "batch of {}".format,
    "heads": "{} heads".format,
    "head_dim": "{} a head".format,
    "causal": lambda causal: "causal" if causal else "bidirectional",
    "dtype": str,
    "device": str,
    "ranks": "{} ranks".format,
}


@dataclass(frozen=True)
class Bench:
    """One benchmark: its name and its rows, in the order of the file."""

    KIND: ClassVar[str] = "a row of bench"

    name: str
    rows: list[Row]

    @classmethod
    def of(cls, name: str, rows: Iterator[tuple[str, Row]]) -> Bench:
        """Return the benchmark of rows, each with its place for errors. Raises DataError for a row of another kind."""
        found: list[Row] = []
        for where, row in rows:
            if not isinstance(row.get("impl"), str) or not number(row.get("seq")):
                raise DataError(f"{where}: not a row of bench: it has no 'impl' and 'seq'")
            found.append({**row, "seconds_per_token": _inverse(number(row.get("tokens_per_second")))})
        return cls(name, found)

    def panels(self, several: bool) -> Iterator[Panel]:
        """Yield a panel for each quantity, with a curve for each implementation. Other differences are in its name.

        Dense attention that was skipped is extrapolated from its longest run: its FLOPs grow with the squared length.
        """
        differing = [key for key in _DIFFERENCES if len({str(row.get(key)) for row in self.rows}) > 1]
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            words = [str(row["impl"]), *(_DIFFERENCES[key](row[key]) for key in differing if row.get(key) is not None)]
            groups.setdefault(", ".join([self.name] * several + words), []).append(row)
        for key, axis, power in PANELS:
            curves = []
            for name, rows in groups.items():
                points = {p.x: p for row in rows for p in point(row, _length(row), key, (TOKENS, axis))}
                curves.append(Curve(name, [points[x] for x in sorted(points)]))
                if power and points and all(row["impl"] == "dense" and row.get("op") == "attention" for row in rows):
                    curves.append(_extrapolated(curves[-1], rows, power))
            yield Panel(key, TOKENS, axis, curves)


def _inverse(value: float | None) -> float | None:
    return 1 / value if value else None


def _length(row: Row) -> float | None:
    """Return the tokens that a row measured: the whole sequence, or the tokens that a run had read when it stopped.

    Returns None for the decades of a streamed run, which the row of the whole run includes.
    """
    if row.get("stop") is None:
        return number(row["seq"])
    return None if row.get("status") == "ok" else number(row["stop"])


def _extrapolated(curve: Curve, rows: list[Row], power: int) -> Curve:
    """Return the continuation of a curve to the lengths that were skipped."""
    last = curve.points[-1]
    skipped = sorted({float(row["seq"]) for row in rows if row.get("status") == "skipped" and row["seq"] > last.x})
    found = [Point(x, last.y * (x / last.x) ** power) for x in skipped]
    return Curve(curve.name, [last, *found] if found else [], extrapolated=True)
