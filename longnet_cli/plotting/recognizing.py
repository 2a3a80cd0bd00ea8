"""Readers of files of measurements. The content of a file tells its kind."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longnet_cli.configuration import nearest, parse, read_text
from longnet_cli.errors import ConfigError, DataError, refuse_web_address

from .axes import Panel, Row, merged
from .benches import Bench
from .runs import Run
from .scores import Scores

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

    def all_rows() -> Iterator[tuple[str, Row]]:
        yield first
        yield from rows

    return _kind(*first).of(name, all_rows())


def read_all(paths: Sequence[str | Path]) -> list[Measured]:
    """Read several files. Each is named by its path if another one has the same name."""
    found = [read(path) for path in paths]
    times = Counter(each.name for each in found)
    return [
        each if times[each.name] == 1 else replace(each, name=str(path))
        for each, path in zip(found, paths, strict=True)
    ]


def panels(found: Sequence[Measured], show: Sequence[str] = ()) -> list[Panel]:
    """Return the panels to draw: all, or only the panels with the keys in `show`, in that order.

    Raises DataError if there is nothing to draw, ConfigError for a key that no panel has.
    """
    times = Counter(type(each) for each in found)
    every = merged([panel for each in found for panel in each.panels(times[type(each)] > 1)])
    if not every:
        names = ", ".join(each.name for each in found)
        raise DataError(f"{names}: nothing to draw; of scores, give several contexts, --by-position or --by-recall")
    known = {panel.key: panel for panel in every}
    for key in show:
        if key not in known:
            meant = nearest(key, known)
            also = f"did you mean {meant}?" if meant else f"choose from {', '.join(known)}"
            raise ConfigError(f"--show: there is no {key!r} to draw: {also}")
    return [known[key] for key in show] or every


def _text(path: str | Path, file: Path) -> str:
    try:
        if str(path) != "-":
            return read_text(file)
        if sys.stdin is None:
            raise DataError("stdin is closed")
        return sys.stdin.buffer.read().decode("utf-8")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; expected the folder of a training run, or {KINDS}") from None
    except ValueError:
        raise DataError(f"{file}: not UTF-8; expected {KINDS}") from None


def _rows(file: Path, text: str) -> Iterator[tuple[str, Row]]:
    """Yield each row of JSON lines, or of one JSON value over several lines, with its place for errors."""
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = parse(line)
        except ValueError as error:
            if number == len(lines):
                return
            if any(map(str.strip, lines[: number - 1])):
                raise DataError(f"{file}: row {number}: not JSON: {_why(error)}") from None
            value = _whole(file, text)
            lines = []
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, dict):
                raise DataError(f"{file}: row {number}: not a line of metrics, of bench or of score: not an object")
            yield f"{file}: row {number}", row
        if not lines:
            return


def _whole(file: Path, text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        row = getattr(error, "lineno", 1)
        raise DataError(f"{file}: row {row}: not JSON: {_why(error)}; expected {KINDS}") from None


def _why(error: ValueError) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _kind(where: str, row: Row) -> type[Run] | type[Bench] | type[Scores]:
    if "step" in row:
        return Run
    if "impl" in row:
        return Bench
    if "total" in row or row.get("kind") in ("document", "total"):
        return Scores
    raise DataError(f"{where}: not a line of metrics, nor of bench or score; expected {KINDS}")
