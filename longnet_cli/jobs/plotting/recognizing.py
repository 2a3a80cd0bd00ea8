"""Readers of files of measurements: training runs, benchmarks, scores. The content of a file tells its kind.

Each kind is a class with `of`, which reads rows, and `panels`, which draws them.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from longnet_cli.basics.configuration import nearest, parse, read_text
from longnet_cli.basics.errors import ConfigError, DataError, refuse_web_address
from longnet_cli.basics.sizes import format_size

from .drawing import Axis, Curve, Panel, Point, Row, number, points


def _size(number: float) -> str:
    return format_size(round(number))


LENGTH_AXIS = Axis("tokens in the sequence", base=10, write=_size)

# The key of each panel, its axis, and the power of the length with which dense attention grows (None: unknown)
BENCH_PANELS = (
    ("seconds", Axis("time", base=10, unit=", seconds"), 2),
    ("seconds_per_token", Axis("time per token", base=10, unit=", seconds"), 1),
    (
        "peak_rss_bytes",
        Axis("peak memory", base=2, write=lambda size: f"{_size(size)}B"),
        None,
    ),
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
}


@dataclass(frozen=True)
class _Measurements:
    """The measurements of one file, by its name."""

    name: str
    rows: list[Row]


class Bench(_Measurements):
    """One benchmark: its rows in the order of the file, each with its `length` and `seconds_per_token`."""

    @classmethod
    def of(cls, name: str, rows: Iterator[tuple[str, Row]]) -> Bench:
        """Return the benchmark of rows, each with its place for errors. Raises DataError for a row of another kind."""
        measured: list[Row] = []
        for where, row in rows:
            if not isinstance(row.get("impl"), str) or not number(row.get("seq")):
                raise DataError(f"{where}: not a row of bench: it has no 'impl' and 'seq'")
            rate = number(row.get("tokens_per_second"))
            measured.append(
                {**row, "length": _length(row), "seconds_per_token": 1 / rate if rate else None}
            )
        return cls(name, measured)

    def panels(self, others: Sequence[Bench]) -> Iterator[Panel]:
        """Yield a panel for each quantity, with a curve for each implementation. Other differences are in its name.

        Beside `others`, the file's name is in it, and the implementation if the file has several. Dense attention that
        none of them has measured is called dense alone.
        Dense attention that was skipped is extrapolated from its longest run: its FLOPs grow with the squared length.
        """
        values = {key: {str(row.get(key)) for row in self.rows} for key in _DIFFERENCES}
        theirs = {row["impl"] for other in others for row in other.rows}
        shared = {row["impl"] for row in self.rows} - ({"dense"} - theirs)
        groups = defaultdict[str, list[Row]](list)
        for row in self.rows:
            words = [row["impl"]]
            if others and row["impl"] in shared:
                words = [self.name, *words] if len(shared) > 1 else [self.name]
            for key, in_words in _DIFFERENCES.items():
                if len(values[key]) > 1 and row.get(key) is not None:
                    words.append(in_words(row[key]))
            groups[", ".join(words)].append(row)
        for key, axis, power in BENCH_PANELS:
            curves = []
            for name, rows in groups.items():
                curve = Curve(name, points(rows, (LENGTH_AXIS, axis), "length", key))
                curves.append(curve)
                of_rows = rows[0]["impl"], rows[0].get("op")
                if power and curve.points and of_rows == ("dense", "attention"):
                    curves.append(_extrapolated(curve, rows, power))
            yield Panel(key, LENGTH_AXIS, axis, curves)


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
    skipped = {float(row["seq"]) for row in rows if row.get("status") == "skipped"}
    lengths = sorted(length for length in skipped if length > last.x)
    further = [Point(x, last.y * (x / last.x) ** power) for x in lengths]
    return Curve(curve.name, [last, *further] if further else [], extrapolated=True)


STEP_AXIS = Axis("step")

# The axis of each panel, and its keys in metrics.jsonl, each with an addition to the run's name
RUN_PANELS = (
    (Axis("loss, nats per token"), (("loss", ""), ("held_out_loss", " held out"))),
    (Axis("learning rate"), (("lr", ""),)),
    (Axis("tokens per second"), (("tokens_per_second", ""),)),
)


class Run(_Measurements):
    """One training run: its lines of metrics, with steps in rising order."""

    @classmethod
    def of(cls, name: str, rows: Iterator[tuple[str, Row]]) -> Run:
        """Return the run of lines, each with its place for errors.

        A resumed run may have lines of steps that it then repeated: the later lines count. Raises DataError for a line
        without a step.
        """
        lines: list[Row] = []
        for where, row in rows:
            step = row.get("step")
            if not isinstance(step, int) or number(step) is None:
                raise DataError(f"{where}: not a line of metrics: it has no whole number 'step'")
            while lines and lines[-1]["step"] >= step:
                lines.pop()
            lines.append(row)
        return cls(name, lines)

    def panels(self, others: Sequence[Run]) -> Iterator[Panel]:
        """Yield a panel for each quantity. Its curves are empty if no line has the quantity."""
        for axis, keys in RUN_PANELS:
            curves = []
            for key, more in keys:
                of_key = points(self.rows, (STEP_AXIS, axis), "step", key)
                curves.append(Curve(self.name + more, of_key))
            yield Panel(keys[0][0], STEP_AXIS, axis, curves)


CONTEXT_AXIS = Axis("context, tokens", base=2, write=_size)
NATS_AXIS = Axis("nats per token")

# Keys of a total, with their axes and the keys of their standard errors
TOTALS = (
    ("ppl", Axis("perplexity"), "ppl_se"),
    ("ppl_ratio", Axis("perplexity / that of the first"), "ppl_ratio_se"),
)
# Keys of a total's lists, with their axes. A row is drawn where its range starts.
LISTS = (
    ("by_position", Axis("tokens seen, from", base=2, write=_size)),
    ("by_segment_position", Axis("place in the shortest segment, from")),
)


class _ListsOfTotal(BaseModel):
    """The lists of a total, which has other keys, too."""

    by_position: list[dict[str, Any]] | None = None
    by_segment_position: list[dict[str, Any]] | None = None


_LISTS_OF_TOTALS = TypeAdapter(list[_ListsOfTotal])


class Scores(_Measurements):
    """The results of one `longnet score`: its totals, one for each context."""

    @classmethod
    def of(cls, name: str, rows: Iterator[tuple[str, Row]]) -> Scores:
        """Return the scores in rows of `--format json` (one value) or `jsonl`, with their places. Raises DataError."""
        all_totals: list[Row] = []
        for where, row in rows:
            if row.get("kind") == "document":
                continue
            totals = row.get("totals") or [row.get("total", row)]
            try:
                _LISTS_OF_TOTALS.validate_python(totals)
            except ValidationError:
                raise DataError(f"{where}: not a score: its total has other types") from None
            all_totals += totals
        if all_totals and all_totals[0].get("context") is not None:
            # ratios are relative to the first context
            all_totals[0] = {"ppl_ratio": 1.0, "ppl_ratio_se": 0.0, **all_totals[0]}
        return cls(name, all_totals)

    def panels(self, others: Sequence[Scores]) -> Iterator[Panel]:
        """Yield a panel for perplexity by context, one for its ratio to the first context, and one for each list."""
        for key, axis, error in TOTALS:
            curve = Curve(self.name, points(self.rows, (CONTEXT_AXIS, axis), "context", key, error))
            is_drawn = key == "ppl" or len(curve.points) > 1
            yield Panel(key, CONTEXT_AXIS, axis, [curve] if is_drawn else [])
        for key, place in LISTS:
            curves = []
            for total in self.rows:
                context = number(total.get("context"))
                words = [self.name] if others or context is None else []
                if context is not None:
                    words.append(f"context {format_size(round(context))}")
                losses = points(total.get(key) or (), (place, NATS_AXIS), "from", "nll", "nll_se")
                curves.append(Curve(", ".join(words), losses))
            yield Panel(key, place, NATS_AXIS, curves)


Measured = Run | Bench | Scores

KINDS = "the metrics of a run, `bench --format jsonl` or `score --format json`"


def metrics_file(path: str | Path) -> Path:
    """Return the metrics.jsonl in the folder of a run, or the path itself if it is no folder."""
    return Path(path, "metrics.jsonl") if Path(path).is_dir() else Path(path)


def read(path: str | Path) -> Measured:
    """Read the folder of a run, or a file of metrics, of bench or of scores; - is stdin.

    An incomplete last line is left out: it is still being written. Raises DataError, with file and row, for anything
    else.
    """
    refuse_web_address(str(path))
    file = metrics_file(path) if str(path) != "-" else Path("stdin")
    rows = _rows(file, _text(path, file))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{file}: no line of metrics yet, nor of bench or score")
    named = file.parent if file.name == "metrics.jsonl" else file.with_suffix("")
    name = named.name or named.resolve().name  # "." has no name of its own
    return _kind(*first).of(name, chain([first], rows))


def read_all(paths: Sequence[str | Path]) -> list[Measured]:
    """Read several files. Each is named by its path if another one has the same name."""
    measured = [read(path) for path in paths]
    times = Counter(file.name for file in measured)
    for index, file in enumerate(measured):
        if times[file.name] > 1:
            measured[index] = replace(file, name=str(paths[index]))
    return measured


def panels(measured: Sequence[Measured], show: Sequence[str] = ()) -> list[Panel]:
    """Return the panels to draw: all, or only the panels with the keys in `show`, in that order.

    Raises DataError if there is nothing to draw, ConfigError for a key that no panel has.
    """
    every: dict[str, Panel] = {}
    for file in measured:
        others: list[Any] = [x for x in measured if x is not file and type(x) is type(file)]
        for panel in file.panels(others):
            curves = every.setdefault(panel.key, panel._replace(curves=[])).curves
            curves.extend(curve for curve in panel.curves if curve.points)
    drawable = {key: panel for key, panel in every.items() if panel.curves}
    if not drawable:
        names = ", ".join(file.name for file in measured)
        raise DataError(
            f"{names}: nothing to draw; of scores, give several contexts, or --by-position"
        )
    for key in {*show} - drawable.keys():
        similar = nearest(key, drawable)
        advice = f"did you mean {similar}?" if similar else f"choose from {', '.join(drawable)}"
        raise ConfigError(f"--show: there is no {key!r} to draw: {advice}")
    return [drawable[key] for key in show or drawable]


def title(measured: Sequence[Measured]) -> str:
    """Return what a picture is of: a layer, models, machines and dates in the files, or else the names of the files."""
    rows = [row for file in measured for row in file.rows]
    words = []
    for row in rows:
        if row.get("op") == "attention":
            words.append(f"one attention layer of {row['heads']} heads x {row['head_dim']}")
    for key in ("model", "machine", "date"):
        words += [str(row[key]) for row in rows if row.get(key)]
    return ", ".join(dict.fromkeys(words or [file.name for file in measured]))


def _text(path: str | Path, file: Path) -> str:
    try:
        if str(path) != "-":
            return read_text(file)
        if sys.stdin is None:
            raise DataError("stdin is closed")
        return sys.stdin.buffer.read().decode()
    except OSError as error:
        raise DataError(
            f"{file}: {error.strerror}; expected the folder of a training run, or {KINDS}"
        ) from None
    except ValueError:
        raise DataError(f"{file}: not UTF-8; expected {KINDS}") from None


def _rows(file: Path, text: str) -> Iterator[tuple[str, Row]]:
    """Yield the objects of a text, each with its place for errors: JSON values, or lists of them, over any lines."""
    decode = json.JSONDecoder().raw_decode
    line = 1
    start = 0
    end = 0
    while found := re.compile(r"\S").search(text, end):
        line += text.count("\n", start, found.start())
        start = found.start()
        try:
            value, end = parse(text, decode, idx=start)
        except ValueError as error:
            if "\n" not in text[start:]:
                return  # the last line is still being written
            line = getattr(error, "lineno", line)
            why = getattr(error, "msg", error)
            raise DataError(f"{file}: row {line}: not JSON: {why}; expected {KINDS}") from None
        where = f"{file}: row {line}"
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, dict):
                raise DataError(
                    f"{where}: not a line of metrics, of bench or of score: not an object"
                )
            yield where, row


def _kind(where: str, row: Row) -> type[Run] | type[Bench] | type[Scores]:
    if "step" in row:
        return Run
    if "impl" in row:
        return Bench
    if "total" in row or row.get("kind") in ("document", "total"):
        return Scores
    raise DataError(f"{where}: not a line of metrics, nor of bench or score; expected {KINDS}")
