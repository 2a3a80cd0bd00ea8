"""Curves of runs: what the lines of a run say, whole, resumed or being written, and that they become a picture."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from places import ROOT

from longnet_cli.jobs.plotting.runs import curve, draw_runs, read_run


def write_run(folder: Path, steps: range | list[int] = range(10, 110, 10), **more: float) -> Path:
    folder.mkdir()
    lines = [
        {"step": n, "loss": 100 / n, "lr": 1e-3, "tokens_per_second": 5e3 + n, **more}
        for n in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_are_what_the_file_says(tmp_path, monkeypatch):
    rows = read_run(write_run(tmp_path / "run"))
    assert curve(rows, "loss") == [(n, 100 / n) for n in range(10, 110, 10)]
    monkeypatch.chdir(tmp_path / "run")
    assert read_run(".") == read_run("metrics.jsonl") == rows


@pytest.mark.parametrize(
    ("more", "points"),
    [
        # of a step made twice, the later line counts; what is not come to again is gone, as it will be otherwise
        ('{"step": 30, "loss": 7.0}\n', [(10, 10.0), (20, 5.0), (30, 7.0)]),
        # being written
        ('{"step": 50, "lo', [(10, 10.0), (20, 5.0), (30, 100 / 30), (40, 2.5)]),
        # a gap
        ('{"step": 50, "loss": null}\n{"step": 60, "loss": 1}\n',
         [(10, 10.0), (20, 5.0), (30, 100 / 30), (40, 2.5), (60, 1.0)]),
    ],
)  # fmt: skip
def test_a_run_that_goes_on(tmp_path, more, points):
    folder = write_run(tmp_path / "run", [10, 20, 30, 40])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(more)
    assert curve(read_run(folder), "loss") == points


def test_a_picture(tmp_path):
    """Panels of what the runs have, curves by their names; a line cannot show one point: it is a circle."""
    pytest.importorskip("matplotlib")
    names = [str(write_run(tmp_path / name, [1], held_out_loss=2.0)) for name in ("one", "two")]
    draw_runs(names, tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    said = ("loss, nats per token", "learning rate", "tokens per second", *names)
    assert all(f"<!-- {words} -->" in drawn for words in (*said, f"{names[0]} held out"))
    assert "M 0 3" in drawn
    write_run(tmp_path / "long", [1, 2])
    draw_runs([str(tmp_path / "long")], tmp_path / "curves.svg")
    assert "M 0 3" not in (tmp_path / "curves.svg").read_text()


def test_the_command(run_longnet, tmp_path):
    """Without a name, the picture has one; drawn again, it takes the place of the first."""
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "run")
    for _ in range(2):
        done = run_longnet("plot run")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "-> curves.png\n")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, run_longnet):
    write_run(tmp_path / "run")
    (tmp_path / "hidden/matplotlib").mkdir(parents=True)
    (tmp_path / "hidden/matplotlib/__init__.py").write_text("raise ImportError('hidden')")
    path = os.pathsep.join([str(tmp_path / "hidden"), str(ROOT)])
    done = run_longnet("plot run -o curves.png", env={"PYTHONPATH": path}, fresh=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "pip install '.[plot]'" in done.stderr
    assert not (tmp_path / "curves.png").exists()
