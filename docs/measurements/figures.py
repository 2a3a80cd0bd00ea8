"""Measure the figures of the pages, and check that the pages say what was measured.

    python docs/measurements/figures.py run NAME ...      # or --all, which takes hours
    python docs/measurements/figures.py check             # the pages, the entries and their scripts
    python docs/measurements/figures.py draw COMMIT       # run a cheap figure again, chosen by this text

docs/figures/figures.toml defines each figure: `run`, a shell command; `before`, commands that prepare it; `rows`, the
keys of its JSON that hold rows; `keep`, what is kept of a row; `timed`, what no run has to repeat; `model`, what it
reads by; `pictures`, the files that it draws; `reads`, files that the command does not name; `cheap`, whether CI may
draw it. `run` writes docs/figures/NAME.json, and nothing else does: the rows, and what they were measured by. What was
measured once, by hand, has no `run` but `date`, `machine`, `commit`, `command` and `rows`, and a line in results.md.

On a page, a line `<!-- figure: NAME -->` stands before a table, a paragraph, a list or a block of output, up to the
next empty line. Each number of it is one of the entry's, rounded as it is printed. All numbers of a line of a table or
of output are of one row. Numbers in backticks and in words (fp32) do not count. What looks measured needs a marker.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import random
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import typer.main

from longnet_cli import LongNetError, parse_pattern
from longnet_cli.cli.app import app
from longnet_cli.cli.command import USAGE_ERROR
from longnet_cli.jobs.benchmark import device_name
from longnet_cli.jobs.training.recipe import tomllib

ROOT = Path(__file__).resolve().parents[2]
MARKER = re.compile(
    r"^<!-- figure: ([\w -]+?) -->\n\s*(```.*?^```$|(?:[^\n]+\n?)+)", re.MULTILINE | re.DOTALL
)
UNITS = {
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "Ki": 2**10,
    "Mi": 2**20,
}
UNITS |= {"ms": 1e-3, "k": 1e3, "M": 1e6, "MFLOPs": 1e6, "G": 1e9, "T": 1e12, "million": 1e6}
_UNIT = "|".join(sorted([*UNITS, "%"], key=len, reverse=True))
_PLAIN = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+(?:e\d+)?"
NUMBER = re.compile(
    rf"(?<![\w.^-])(\d{{4}}-\d\d-\d\d|\d+\.\d+\.\d+|10\^\d+|{_PLAIN})"
    rf"(?:(?=\s(?:\+-|±|to)\s(?:{_PLAIN})\s?({_UNIT})(?!\w))|\s?({_UNIT})(?!\w)|(?!\w|\.\d))"
)
MEASURED = re.compile(  # what looks so: an error, a machine, a day, a rate, a ratio
    r"\d\s(?:±|\+-)|AMD EPYC|Intel Xeon|\b20\d\d-\d\d-\d\d|\d (?:ms|s|min|tokens/s)\b|\d\s%\s(?:more|less|better|worse)"
    r"|CPU\s(?:time|seconds?)|\d\.\d+\s(?:times|nats)"
)
FACTS = ("machine", "torch", "python", "date")  # of an entry, or of a row that was measured before
PATTERN = re.compile(r"(?:[a-z]+:\d[\w.]*|\d+(?:[KM]i)?/\d+)(?:,[\w=./]+)*")  # what looks like one


def defined(by_hand: bool = False) -> dict[str, dict[str, Any]]:
    """Return the figures that can be measured, or those that were measured once, by hand, by name."""
    figures = tomllib.loads((ROOT / "docs/figures/figures.toml").read_text(encoding="utf-8"))
    return {name: figure for name, figure in figures.items() if ("run" not in figure) == by_hand}


def entries() -> dict[str, dict[str, Any]]:
    """Return the figures that were measured, by name."""
    once = {name: {"threads": 1, **figure} for name, figure in defined(by_hand=True).items()}
    return once | {
        path.stem: json.loads(path.read_text("utf-8"))
        for path in (ROOT / "docs/figures").glob("*.json")
    }


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def model_sha256(model: str) -> str | None:
    """Return the SHA-256 of a model's weights: one that ships, or a folder. None if it is not here."""
    weights = (ROOT / folder / model / "model.safetensors" for folder in ("models", "."))
    return next((sha256(path) for path in weights if path.exists()), None)


def files_of(figure: dict[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each file of this tree that a figure's command names, but for what it draws."""
    words = {word.removeprefix("@") for word in shlex.split(figure["run"])}
    names = (words | {*figure.get("reads", ())}) - {*figure.get("pictures", ())}
    made = ("runs", "build", ".", "\n")  # the last one, of a script on the command line
    return {
        name: sha256(ROOT / name)
        for name in sorted(names)
        if not name.startswith(made) and (ROOT / name).is_file()
    }


def measured(figure: dict[str, Any]) -> tuple[list[Any], str]:
    """Run the command of a figure. Return the rows that it prints, and the SHA-256 of its output."""
    output = _printed(figure["run"])
    return [*_rows(output, figure)], hashlib.sha256(output.encode()).hexdigest()


def _printed(command: str) -> str:
    """Return what a shell command prints, with `python` and `longnet` of this environment and tree."""
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env = {"OMP_NUM_THREADS": "1", **os.environ, **paths}
    words = ["bash", "-c", f"set -euo pipefail\n{command}"]
    return subprocess.run(
        words, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def _rows(output: str, figure: dict[str, Any]) -> Iterator[Any]:
    """Yield the rows of an output: of JSON, JSON Lines, or other text, whose lines they are."""
    try:
        found = [json.loads(output)]
    except ValueError:
        lines = [line for line in output.splitlines() if line.strip()]
        found = [json.loads(line) if line.startswith("{") else line.strip() for line in lines]
    keep = figure.get("keep", "").split()
    for each in found:
        parts = [each[key] for key in figure["rows"].split()] if "rows" in figure else [each]
        for row in (row for part in parts for row in (part if isinstance(part, list) else [part])):
            yield {key: row[key] for key in keep if key in row} if keep else row


def run(name: str) -> None:
    """Measure a figure and write its entry."""
    figure = defined()[name]
    for command in figure.get("before", ()):
        print(_printed(command), file=sys.stderr)
    threads = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows, output = measured(figure)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    entry = {
        "command": figure["run"],
        "files": files_of(figure),
        "models": {name: model_sha256(name) for name in figure.get("model", "").split()},
        "output_sha256": output,
        "pictures": {path: sha256(ROOT / path) for path in figure.get("pictures", ())},
        "commit": _commit(),
        "machine": device_name(torch.device("cpu")),
        "threads": threads,
        "torch": torch.__version__.partition("+")[0],
        "python": sys.version.partition(" ")[0],
        "date": time.strftime("%Y-%m-%d"),
        "cpu_seconds": round(sum(ended[:2]) - sum(began[:2]), 1),
    }
    facts = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in entry.items())
    lines = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in rows)
    text = f'{{\n{facts} "rows": [\n{lines}\n ]\n}}\n'
    (ROOT / f"docs/figures/{name}.json").write_text(text, encoding="utf-8")


def _commit() -> str:
    """Return the commit of this tree, and whether files other than entries differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run(
        [*git, "rev-parse", "--short=12", "HEAD"], check=False, capture_output=True, text=True
    ).stdout
    changed = [
        *git,
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ".",
        ":!docs/figures/*.json",
    ]
    dirty = subprocess.run(changed, check=False, capture_output=True).stdout
    return head.strip() + ("-dirty" if dirty else "")


def draw(commit: str) -> Iterator[str]:
    """Run one of the cheap figures again. Yield what differs by more than its standard error."""
    figures, found = defined(), entries()
    cheap = [name for name in sorted(figures) if figures[name].get("cheap") and name in found]
    name = random.Random(commit).choice(cheap)
    rows, _ = measured(figures[name])
    if len(rows) != len(found[name]["rows"]):
        yield f"{name}: {len(rows)} rows, and its entry has {len(found[name]['rows'])}"
    for before, now in zip(found[name]["rows"], rows, strict=False):
        if not _agree(before, now, figures[name].get("timed", "").split()):
            yield f"{name}: {now}, and its entry has {before}"


def _agree(before: Any, now: Any, timed: list[str]) -> bool:
    """Return whether two rows are equal: fractions within their standard error, or to 1e-4, and all else exactly."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return before == now
    for key in {*before, *now} - {*timed}:
        some, other = before.get(key), now.get(key)
        if isinstance(some, float) and isinstance(other, float):
            near = 0.1 if key.endswith("_se") else 1e-4
            if not math.isclose(some, other, rel_tol=near, abs_tol=before.get(f"{key}_se") or 0.0):
                return False
        elif some != other:
            return False
    return True


def check() -> Iterator[str]:
    """Yield what is wrong with pages, entries and pictures."""
    figures, found = defined(), entries()
    yield from (
        f"{name} was never measured: make figures/{name}" for name in figures if name not in found
    )
    yield from _unlisted(defined(by_hand=True))
    for name, entry in found.items():
        if "output_sha256" not in entry:
            continue  # by hand
        if name not in figures or figures[name]["run"] != entry["command"]:
            yield f"docs/figures/{name}.json: its command is not that of figures.toml: make figures/{name}"
            continue
        for path, digest in {**entry["files"], **entry["pictures"]}.items():
            if not (ROOT / path).exists():
                yield f"docs/figures/{name}.json: {path} is gone"
            elif sha256(ROOT / path) != digest:
                yield f"docs/figures/{name}.json: {path} has changed: make figures/{name}"
        for model, digest in entry["models"].items():
            if model_sha256(model) not in (None, digest):
                yield f"docs/figures/{name}.json: {model} has changed: make figures/{name}"
        for line in _commands(entry["command"]):
            yield from (f"docs/figures/{name}.json: {error}" for error in _refused(line))
        scripts = [
            path for path in entry["files"] if path.endswith(".py") and (ROOT / path).exists()
        ]
        texts = [text for path in scripts for text in _texts(ROOT / path)] + shlex.split(
            entry["command"]
        )
        yield from (f"docs/figures/{name}.json: {error}" for error in _refused_patterns(texts))
    for path in sorted((ROOT / "docs").rglob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        texts = [str(row.get(key) or "") for row in rows for key in ("pattern", "notation")]
        yield from (f"{path.relative_to(ROOT)}: {error}" for error in _refused_patterns(texts))
    for page in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "models").rglob("*.md")),
    ):
        text = page.read_text(encoding="utf-8")
        if page.name != "dropped.md":  # whose every line names the commit
            yield from (
                f"{page.relative_to(ROOT)}: measured, without a marker: {line}"
                for line in unmarked(text)
            )
        for names, block in MARKER.findall(text):
            if missing := [name for name in names.split() if name not in found]:
                yield f"{page.relative_to(ROOT)}: no entry docs/figures/{missing[0]}.json: make figures/{missing[0]}"
            else:
                wrong = wrong_numbers(block, [found[name] for name in names.split()])
                yield from (
                    f"{page.relative_to(ROOT)}: {number} is not in {names}: {line}"
                    for number, line in wrong
                )


def _unlisted(by_hand: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield what was measured by hand and has no line in the table of results.md with its date, machine and commit."""
    page = ROOT / "docs/measurements/results.md"
    lines = page.read_text(encoding="utf-8").splitlines() if by_hand else []
    for name, figure in by_hand.items():
        told = [line for line in lines if line.startswith(f"| {name} |")]
        if not told or not all(figure[key] in told[0] for key in ("date", "machine", "commit")):
            yield f"{page.relative_to(ROOT)}: no line of {name}, its date, machine and commit"


def unmarked(text: str) -> Iterator[str]:
    """Yield the first line of each block of a page that has measured numbers, but no marker, nor a line by hand."""
    prose = re.sub(
        r"^```.*?^```$|^    .*?$|`[^`]*`|\]\([^)]*\)",
        "",
        MARKER.sub("", text),
        flags=re.MULTILINE | re.DOTALL,
    )
    for block in re.split(r"\n\s*\n", prose):
        if (found := MEASURED.search(block)) and "| date | machine |" not in block:
            yield next(line for line in block.splitlines() if found[0].split("\n")[0] in line)


def wrong_numbers(block: str, entries: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield (number, line) for each number of a block that the entries do not have."""
    told = [
        facts for entry in entries for facts in (entry, *entry["rows"]) if isinstance(facts, dict)
    ]
    facts = {
        word
        for each in told
        for key in FACTS
        if key in each
        for word in str(each[key]).replace(",", "").split()
    }
    rows = [[*_values(row), float(entry["threads"])] for entry in entries for row in entry["rows"]]
    every, lines = [value for row in rows for value in row], block.splitlines()
    header = lines[0] if lines[0].startswith("|") else ""
    for line in lines:
        shown = re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)
        numbers = [number for number in NUMBER.finditer(shown) if number[1] not in facts]
        of_row = block.startswith("```") or (line.startswith("|") and line != header)
        units = {*NUMBER.sub("", header).split()} & {*UNITS, "%"}
        wrong = [_not_in(values, numbers, units) for values in (rows if of_row else [every])]
        yield from ((number, line) for number in min(wrong, key=len))


def _not_in(values: list[float], numbers: list[re.Match[str]], of_header: set[str]) -> list[str]:
    """Return the numbers of a line that are none of the values; of `1.5 +- 0.3`, the error must be the next value."""
    wrong = []
    for number, after in zip_longest(numbers, numbers[1:]):
        has_error = after and re.fullmatch(
            r"\s(\+-|±)\s", number.string[number.end(1) : after.start()]
        )
        pairs = zip(values, [*values[1:], math.nan], strict=True)
        if not any(
            _is_printed(value, number, of_header)
            and (not has_error or _is_printed(error, after, of_header))
            for value, error in pairs
        ):
            wrong.append(number[0])
    return wrong


def _values(row: Any) -> Iterator[float]:
    if isinstance(row, dict | list):
        for each in row.values() if isinstance(row, dict) else row:
            yield from _values(each)
    elif isinstance(row, str):
        for number in NUMBER.finditer(row):
            if re.fullmatch(_PLAIN, number[1]):
                yield float(number[1].replace(",", "")) * UNITS.get(number[3] or "", 1)
    elif isinstance(row, int | float) and not isinstance(row, bool):
        yield float(row)


def _is_printed(value: float, number: re.Match[str], of_header: set[str]) -> bool:
    """Return whether a value is printed as this number, in its unit or in one of the table's header."""
    text, unit = number[1].replace(",", "").replace("10^", "1e"), number[2] or number[3]
    if not re.fullmatch(_PLAIN, text):
        return False  # a date or a version
    shown, half = [value], 0.5 * 10.0 ** -len(text.partition(".")[2]) * (1 + 1e-9)
    for each in {unit} if unit else of_header:
        shown += (
            [100 * value, 100 - 100 * value, 100 * value - 100]
            if each == "%"
            else [value / UNITS[each]]
        )
    return any(abs(each - float(text)) <= half for each in shown)


def _commands(text: str) -> list[list[str]]:
    """Return the words of each `longnet` command of a shell command."""
    lines = re.split(r"\s(?:\|\|?|&&|>)\s|\n", text.replace("\\\n", " "))
    stripped = [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line.strip()) for line in lines]
    return [shlex.split(line)[1:] for line in stripped if line.startswith("longnet ")]


def _refused(words: list[str]) -> Iterator[str]:
    """Yield why the program refuses the words of a command, and patterns among them."""
    name, *rest = words
    try:
        typer.main.get_command(app).commands[name].make_context(name, [*rest])  # type: ignore[attr-defined]
    except KeyError:
        yield f"there is no command {name}"
    except (USAGE_ERROR, LongNetError) as error:
        yield f"longnet {shlex.join(words)}: {error}"
    given = [rest[i + 1] for i, word in enumerate(rest[:-1]) if word == "--pattern"]
    yield from _refused_patterns(given, any_text=True)


def _refused_patterns(texts: Iterable[str], any_text: bool = False) -> Iterator[str]:
    for text in texts:
        if any_text or PATTERN.fullmatch(text):
            try:
                parse_pattern(text)
            except ValueError as error:
                yield f"{text}: {error}"


def _texts(script: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_run = commands.add_parser("run")
    of_run.add_argument("names", nargs="*", metavar="NAME", help="of docs/figures/figures.toml")
    of_run.add_argument("--all", action="store_true")
    commands.add_parser("check")
    commands.add_parser("draw").add_argument("commit")
    args = parser.parse_args()
    if args.command == "run":
        for name in defined() if args.all else args.names:
            run(name)
    elif wrong := [*(check() if args.command == "check" else draw(args.commit))]:
        parser.exit(1, "\n".join(wrong) + "\n")
