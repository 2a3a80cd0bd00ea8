"""Curves of runs, benchmarks and scores: every mistake is named, and they fit any terminal and become pictures."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from places import ROOT

from longnet_cli.basics.errors import ConfigError
from longnet_cli.jobs import plotting
from longnet_cli.jobs.plotting import Curve, Point, panels, read, read_all
from longnet_cli.jobs.plotting.recognizing import Run


def draw_text(runs: list[Run], width: int, **options: bool) -> str:
    return plotting.draw_text(panels(runs), width, **options)


def draw_picture(runs: list[Run], output: Path) -> None:
    plotting.draw_picture(panels(runs), output)


def curve(run: Run, key: str) -> list[tuple[float, float]]:
    (found,) = panels([run], [key])
    return [(x, y) for x, y, _ in found.curves[0].points]


def write_run(folder: Path, steps: range | list[int] = range(10, 110, 10), **more: float) -> Path:
    folder.mkdir()
    lines = [{"step": n, "loss": 100 / n, "lr": 1e-3, "tokens_per_second": 5e3 + n, **more} for n in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_are_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read(write_run(tmp_path / "run"))
    assert run.name == "run"
    assert curve(run, "loss") == [(n, 100 / n) for n in range(10, 110, 10)]
    assert read(tmp_path / "run/metrics.jsonl") == run
    monkeypatch.chdir(tmp_path / "run")
    assert read(".") == read("metrics.jsonl") == run
    assert [panel.key for panel in panels([run])] == ["loss", "lr", "tokens_per_second"]
    assert [panel.key for panel in panels([run], ["lr", "loss"])] == ["lr", "loss"]


def test_of_a_step_made_twice_the_later_line_counts(tmp_path: Path) -> None:
    """And what a resumed run has not come to again is gone, as it will be otherwise."""
    folder = write_run(tmp_path / "run", [10, 20, 30, 40])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "loss": 7.0}\n')
    assert curve(read(folder), "loss") == [(10, 10.0), (20, 5.0), (30, 7.0)]


def test_missing_values_are_gaps(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": 3, "held_out_loss": 4}\n')
    (panel,) = panels([read(tmp_path / "run.jsonl")])
    assert panel.curves == [Curve("run", [Point(2, 3)]), Curve("run held out", [Point(2, 4)])]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    paths = [write_run(tmp_path / "a/run"), write_run(tmp_path / "b/run"), write_run(tmp_path / "other")]
    assert [run.name for run in read_all(paths)] == [str(paths[0]), str(paths[1]), "other"]


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "lo')
    assert read(folder).rows[-1]["step"] == 100


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("braille", [True, False])
def test_a_falling_curve_falls_and_fits(tmp_path: Path, width: int, braille: bool) -> None:
    text = draw_text([read(write_run(tmp_path / "run"))], width, braille=braille)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    rows = [line.partition("|")[2] for line in lines[1:9]]
    left = [next((i for i, mark in enumerate(row) if mark != " "), None) for row in rows]
    assert left[0] == 0
    assert left == sorted(left)  # it begins ever further to the right
    assert lines[1].split()[0] == "10"  # the numbers at the axis: highest, lowest
    assert lines[8].split()[0] == "1"
    assert lines[11].strip() == "run: 1 at step 100"
    assert text.isascii() != braille


def test_runs_are_told_apart_without_colour(tmp_path: Path) -> None:
    runs = [read(write_run(tmp_path / name, range(1, size))) for name, size in (("one", 5), ("two", 50))]
    text = draw_text(runs, 60)
    assert text.isascii()
    assert "a one: 25 at step 4" in text
    assert "b two: 2.041 at step 49" in text
    assert "\x1b[36m" in draw_text(runs, 60, color=True)


@pytest.mark.parametrize("points", [1, 2])
def test_one_point_and_a_flat_line(tmp_path: Path, points: int) -> None:
    folder = write_run(tmp_path / "run", list(range(1, points + 1)), loss=2.0, tokens_per_second=12345.6)
    for braille in (True, False):
        lines = draw_text([read(folder)], 40, braille=braille).splitlines()
        assert [line.split()[0] for line in lines[1:9] if line.partition("|")[2]] == ["2"]  # labelled once, beside it
        assert [line.split()[0] for line in lines if "12,346 |" in line] == ["12,346"]


def test_a_picture(tmp_path: Path) -> None:
    """A line cannot show one point: it is a circle."""
    pytest.importorskip("matplotlib")
    for steps in ([1], [1, 2]):
        runs = [Run(name, [{"step": n, "loss": 2.0} for n in steps]) for name in ("one", "two")]
        draw_picture(runs, tmp_path / "curves.svg")
        assert ("M 0 3" in (tmp_path / "curves.svg").read_text()) == (len(steps) == 1)
    draw_picture(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ConfigError, match=r"\.png, \.svg, \.pdf"):
        draw_picture(runs, tmp_path / "curves.gif")


def test_the_command(run_longnet, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    done = run_longnet("plot", "run", env={"COLUMNS": "50"})
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) == 50
    assert "\x1b" not in done.stdout
    ascii_only = run_longnet("plot", "run", env={"PYTHONIOENCODING": "ascii"}, fresh=True)
    assert ascii_only.stdout.isascii()
    assert ascii_only.returncode == 0


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path: Path, run_longnet) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "hidden/matplotlib").mkdir(parents=True)
    (tmp_path / "hidden/matplotlib/__init__.py").write_text("raise ImportError('hidden')")
    path = os.pathsep.join([str(tmp_path / "hidden"), str(ROOT)])
    done = run_longnet("plot", "run", "-o", "curves.png", env={"PYTHONPATH": path}, fresh=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "pip install 'longnet-cli[plot]'" in done.stderr
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_are_for_terminals(
    tmp_path: Path, command_env: dict[str, str], variables: dict[str, str], coloured: bool
) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "longnet_cli", "plot", "one", "two"]
    env = command_env | {"TERM": "xterm"} | variables
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=theirs) as process:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # the other end is closed
            while piece := os.read(ours, 65536):
                shown += piece
    os.close(ours)
    assert process.returncode == 0
    assert (b"\x1b[36m" in shown) == coloured
