"""Readers of files of measurements: training runs, benchmarks, scores. The content of a file tells its kind.

Each kind is a class with `of`, which reads the rows of a file, and `curves`, which names those of each curve. What is
drawn of the rows of a curve are the `QUANTITIES` that they have.
"""

from __future__ import annotations

import io
import sys
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, TypeAdapter, ValidationError

from longnet_cli.basics.configuration import as_list, nearest, parse, read_text
from longnet_cli.basics.errors import ConfigError, DataError, refuse_web_address
from longnet_cli.basics.sizes import format_size

from .drawing import Axis, Curve, Panel, Row, number, points


def _size(number: float) -> str:
    return format_size(round(number))


STEP_AXIS = Axis("step")
LENGTH_AXIS = Axis("tokens in the sequence", base=10, write=_size)
CONTEXT_AXIS = Axis("context, tokens", base=2, write=_size)
SEEN_AXIS = Axis("tokens seen, from", base=2, write=_size)
SEGMENT_AXIS = Axis("place in the shortest segment, from")

# Of each panel: the key of what it shows, the key of what that depends on, and their axes. All keys are of rows.
QUANTITIES = (
    ("loss", "step", STEP_AXIS, Axis("loss, nats per token")),
    ("lr", "step", STEP_AXIS, Axis("learning rate")),
    ("tokens_per_second", "step", STEP_AXIS, Axis("tokens per second")),
    ("seconds", "length", LENGTH_AXIS, Axis("time", base=10, unit=", seconds")),
    ("seconds_per_token", "length", LENGTH_AXIS, Axis("time per token", base=10, unit=", seconds")),
    (
        "peak_rss_bytes",
        "length",
        LENGTH_AXIS,
        Axis("peak memory", base=2, write=lambda size: f"{_size(size)}B"),
    ),
    ("ppl", "context", CONTEXT_AXIS, Axis("perplexity")),
    ("ppl_ratio", "context", CONTEXT_AXIS, Axis("perplexity / that of the first")),
    ("by_position", "from", SEEN_AXIS, Axis("nats per token")),
    ("by_segment_position", "from", SEGMENT_AXIS, Axis("nats per token")),
)


class RowsOfCurve(NamedTuple):
    """The rows of a curve, in each panel that shows a quantity which they have. For `extrapolated`, see `Curve`."""

    name: str
    rows: Sequence[Row]
    extrapolated: bool = False


@dataclass(frozen=True)
class Measured(ABC):
    """The measurements of one file, by its name."""

    name: str
    rows: list[Row]

    @classmethod
    @abstractmethod
    def of(cls, name: str, rows: Iterator[tuple[str, Row]]) -> Measured:
        """Return those in rows, each with its place for errors. Raises DataError for a row of another kind."""

    @abstractmethod
    def curves(self, shared: Set[str]) -> Iterator[RowsOfCurve]:
        """Yield the curves, beside files that have measured the `shared` implementations, too."""


class Bench(Measured):
    """One benchmark: its rows in the order of the file, each with its `length` and `seconds_per_token`."""

    # in which rows of one implementation and length may differ
    DIFFERENCES = ("direction", "batch", "heads", "head_dim", "causal", "dtype", "device")

    @classmethod
    def of(cls, name: str, rows: Iterator[tuple[str, Row]]) -> Bench:
        """Return the benchmark of rows.

        The decades of a streamed run are left out: the row of the whole run includes them. A run that was stopped has
        the length that it had come to.
        """
        measured: list[Row] = []
        for where, row in rows:
            seq = number(row.get("seq"))
            if not isinstance(row.get("impl"), str) or not seq:
                raise DataError(f"{where}: not a row of bench: it has no 'impl' and 'seq'")
            stop = number(row.get("stop"))
            if stop and row.get("status") == "ok":
                continue
            rate = number(row.get("tokens_per_second"))
            per_token = 1 / rate if rate and number(row.get("seconds")) else None
            measured.append({**row, "length": stop or seq, "seconds_per_token": per_token})
        return cls(name, measured)

    def curves(self, shared: Set[str]) -> Iterator[RowsOfCurve]:
        """Yield a curve for each implementation, named by it, or by the file if it is a `shared` one.

        If several are shared, such a name has both. What else differs between the rows of the file follows.
        """
        differences = [
            key for key in self.DIFFERENCES if len({str(row.get(key)) for row in self.rows}) > 1
        ]
        curves = defaultdict[str, list[Row]](list)
        for row in self.rows:
            impl = row["impl"]
            words = [self.name] if impl in shared else []
            if shared != {impl}:
                words.append(impl)
            words += [
                value if isinstance(value, str) else f"{key} {value}"
                for key in differences
                if (value := row.get(key)) is not None
            ]
            curves[", ".join(words)].append(row)
        for name, rows in curves.items():
            yield RowsOfCurve(name, rows)
            if rows[0]["impl"] == "dense":
                yield RowsOfCurve(name, _extrapolated(rows), extrapolated=True)


def _extrapolated(rows: Sequence[Row]) -> list[Row]:
    """Return the longest row of dense attention that was measured, and those that were skipped, with computed times.

    FLOPs grow with the squared length. Nothing is returned if no row was skipped, or none was measured.
    """
    measured = [row for row in rows if row["seconds_per_token"]]
    skipped = [row for row in rows if row.get("status") == "skipped"]
    if not measured or not skipped:
        return []
    last = max(measured, key=lambda row: row["length"])
    further: list[Row] = []
    for row in (last, *skipped):
        times = row["length"] / last["length"]
        seconds = last["seconds"] * times**2
        per_token = last["seconds_per_token"] * times
        further.append(
            {"length": row["length"], "seconds": seconds, "seconds_per_token": per_token}
        )
    return further


class Run(Measured):
    """One training run: its lines of metrics, with steps in rising order."""

    @classmethod
    def of(cls, name: str, rows: Iterator[tuple[str, Row]]) -> Run:
        """Return the run of lines.

        A resumed run may have lines of steps that it then repeated: the later lines count. Raises DataError for a line
        without a step.
        """
        lines: list[Row] = []
        for where, row in rows:
            step = row.get("step")
            if type(step) is not int:
                raise DataError(f"{where}: not a line of metrics: it has no whole number 'step'")
            while lines and lines[-1]["step"] >= step:
                lines.pop()
            lines.append(row)
        return cls(name, lines)

    def curves(self, shared: Set[str]) -> Iterator[RowsOfCurve]:
        """Yield the curve of the run, and that of its held-out documents."""
        yield RowsOfCurve(self.name, self.rows)
        held_out = [{"step": row["step"], "loss": row.get("held_out_loss")} for row in self.rows]
        yield RowsOfCurve(f"{self.name} held out", held_out)


class _ListsOfTotal(BaseModel):
    """The lists of a total, which has other keys, too. Null, as tools for tables write it, is none."""

    by_position: list[dict[str, Any]] | None = None
    by_segment_position: list[dict[str, Any]] | None = None


_LISTS_OF_TOTALS = TypeAdapter(list[_ListsOfTotal])


class Scores(Measured):
    """The results of one `longnet score`: its totals, one for each context."""

    @classmethod
    def of(cls, name: str, rows: Iterator[tuple[str, Row]]) -> Scores:
        """Return the scores in rows of `--format json` (one value) or `jsonl`."""
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
        if len(all_totals) > 1:  # ratios are relative to the first context
            all_totals[0] = {"ppl_ratio": 1.0, "ppl_ratio_se": 0.0, **all_totals[0]}
        return cls(name, all_totals)

    def curves(self, shared: Set[str]) -> Iterator[RowsOfCurve]:
        """Yield a curve of the totals, by context, and one of each of their lists."""
        yield RowsOfCurve(self.name, self.rows)
        for total in self.rows:
            name = self.name
            if context := number(total.get("context")):
                name += f", context {_size(context)}"
            for key in _ListsOfTotal.model_fields:
                of_list = [
                    {"from": row.get("from"), key: row.get("nll"), f"{key}_se": row.get("nll_se")}
                    for row in total.get(key) or ()
                ]
                yield RowsOfCurve(name, of_list)


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
    if str(path) == "-":
        file = Path("stdin")
        text = _text(file, _read_stdin)
    else:
        file = metrics_file(path)
        text = _text(file, partial(read_text, file))
    rows = _rows(file, text)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{file}: no line of metrics yet, nor of bench or score")
    named = file.parent if file.name == "metrics.jsonl" else file.with_suffix("")
    name = named.absolute().name  # "." has no name of its own
    return _kind(*first).of(name, chain([first], rows))


def read_all(paths: Sequence[str | Path]) -> list[Measured]:
    """Read several files. Each is named by its path if another one has the same name."""
    measured = [*map(read, paths)]
    times = Counter(file.name for file in measured)
    for index, file in enumerate(measured):
        if times[file.name] > 1:
            measured[index] = replace(file, name=str(paths[index]))
    return measured


def panels(measured: Sequence[Measured], show: Sequence[str] = ()) -> list[Panel]:
    """Return the panels to draw: all, or only the panels with the keys in `show`, in that order.

    Raises DataError if there is nothing to draw, ConfigError for a key that no panel has.
    """
    times = Counter[str]()
    for file in measured:
        times.update({row["impl"] for row in file.rows if "impl" in row})
    shared = {impl for impl, files in times.items() if files > 1}
    named = [*chain.from_iterable(file.curves(shared) for file in measured)]
    drawable: dict[str, Panel] = {}
    for key, x_key, of_x, of_y in QUANTITIES:
        curves = [
            Curve(name, shown, extrapolated)
            for name, rows, extrapolated in named
            if (shown := points(rows, of_x, of_y, x_key, key))
        ]
        if curves:
            drawable[key] = Panel(key, of_x, of_y, curves)
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
    rows = [*chain.from_iterable(file.rows for file in measured)]
    words = [
        f"one attention layer of {row['heads']} heads x {row['head_dim']}"
        for row in rows
        if row.get("op") == "attention"
    ]
    for key in ("model", "machine", "date"):
        words += [str(row[key]) for row in rows if row.get(key)]
    return ", ".join(dict.fromkeys(words or [file.name for file in measured]))


def _read_stdin() -> str:
    if sys.stdin is None:
        raise DataError("stdin is closed")
    return sys.stdin.buffer.read().decode()


def _text(file: Path, read: Callable[[], str]) -> str:
    """Return the text that `read` reads of a file. Raises DataError."""
    try:
        return read()
    except OSError as error:
        raise DataError(
            f"{file}: {error.strerror}; expected the folder of a training run, or {KINDS}"
        ) from None
    except ValueError:
        raise DataError(f"{file}: not UTF-8; expected {KINDS}") from None


def _rows(file: Path, text: str) -> Iterator[tuple[str, Row]]:
    """Yield the objects of a text, each with its place for errors: of one JSON value, or of one on each line.

    A value may be a list of objects.
    """
    try:
        parse(text.partition("\n")[0])
        parts = [*io.StringIO(text)]  # the lines
    except ValueError:
        parts = [text]
    for line, part in enumerate(parts, 1):
        try:
            value = parse(part)
        except ValueError as error:
            if "\n" not in part:
                return  # the last line is still being written
            place = f"{file}: row {line + getattr(error, 'lineno', 1) - 1}"
            raise DataError(
                f"{place}: not JSON: {getattr(error, 'msg', error)}; expected {KINDS}"
            ) from None
        where = f"{file}: row {line}"
        for row in as_list(value):
            if not isinstance(row, dict):
                raise DataError(
                    f"{where}: not a line of metrics, of bench or of score: not an object"
                )
            yield where, row


_KIND_OF_KEY = {"step": Run, "impl": Bench, "total": Scores, "kind": Scores}


def _kind(where: str, row: Row) -> type[Measured]:
    for key, kind in _KIND_OF_KEY.items():
        if key in row:
            return kind
    raise DataError(f"{where}: not a line of metrics, nor of bench or score; expected {KINDS}")
