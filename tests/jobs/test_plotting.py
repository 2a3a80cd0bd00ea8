"""Curves of runs, benchmarks and scores: every mistake is named, and they become pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from places import ROOT

from longnet_cli.basics.errors import ConfigError
from longnet_cli.jobs import plotting
from longnet_cli.jobs.plotting import Curve, Point, panels, read, read_all
from longnet_cli.jobs.plotting.recognizing import Run


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
    """Without a name, the picture has one; drawn again, it takes the place of the first."""
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "run")
    for _ in range(2):
        done = run_longnet("plot", "run")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "-> curves.png\n")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path: Path, run_longnet) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "hidden/matplotlib").mkdir(parents=True)
    (tmp_path / "hidden/matplotlib/__init__.py").write_text("raise ImportError('hidden')")
    path = os.pathsep.join([str(tmp_path / "hidden"), str(ROOT)])
    done = run_longnet("plot", "run", "-o", "curves.png", env={"PYTHONPATH": path}, fresh=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "pip install '.[plot]'" in done.stderr
    assert not (tmp_path / "curves.png").exists()
