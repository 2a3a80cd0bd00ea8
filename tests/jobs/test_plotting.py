"""Curves of runs, benchmarks and scores: every mistake is named, and they become pictures; what rows of `bench` and
`score` say, from real rows, JSON of every shape and damaged files.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from files import write_lines
from places import ROOT

from longnet_cli.jobs.plotting import (
    Curve,
    Panel,
    Point,
    draw_picture,
    panels,
    read,
    read_all,
    title,
)
from longnet_cli.jobs.plotting.recognizing import Run


def curve(run: Run, key: str) -> list[tuple[float, float]]:
    (found,) = panels([run], [key])
    return [(x, y) for x, y, _ in found.curves[0].points]


def write_run(folder: Path, steps: range | list[int] = range(10, 110, 10), **more: float) -> Path:
    folder.mkdir()
    lines = [
        {"step": n, "loss": 100 / n, "lr": 1e-3, "tokens_per_second": 5e3 + n, **more}
        for n in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_are_what_the_file_says(tmp_path, monkeypatch):
    run = read(write_run(tmp_path / "run"))
    assert run.name == "run"
    assert curve(run, "loss") == [(n, 100 / n) for n in range(10, 110, 10)]
    assert read(tmp_path / "run/metrics.jsonl") == run
    monkeypatch.chdir(tmp_path / "run")
    assert read(".") == read("metrics.jsonl") == run
    assert [panel.key for panel in panels([run])] == ["loss", "lr", "tokens_per_second"]
    assert [panel.key for panel in panels([run], ["lr", "loss"])] == ["lr", "loss"]


def test_of_a_step_made_twice_the_later_line_counts(tmp_path):
    """And what a resumed run has not come to again is gone, as it will be otherwise."""
    folder = write_run(tmp_path / "run", [10, 20, 30, 40])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "loss": 7.0}\n')
    assert curve(read(folder), "loss") == [(10, 10.0), (20, 5.0), (30, 7.0)]


def test_missing_values_are_gaps(tmp_path):
    (tmp_path / "run.jsonl").write_text(
        '{"step": 1, "loss": null}\n{"step": 2, "loss": 3, "held_out_loss": 4}\n'
    )
    (panel,) = panels([read(tmp_path / "run.jsonl")])
    assert panel.curves == [Curve("run", [Point(2, 3)]), Curve("run held out", [Point(2, 4)])]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    paths = [
        write_run(tmp_path / "a/run"),
        write_run(tmp_path / "b/run"),
        write_run(tmp_path / "other"),
    ]
    assert [run.name for run in read_all(paths)] == [str(paths[0]), str(paths[1]), "other"]


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "lo')
    assert read(folder).rows[-1]["step"] == 100


def test_a_picture(tmp_path):
    """A line cannot show one point: it is a circle."""
    pytest.importorskip("matplotlib")
    for steps in ([1], [1, 2]):
        runs = [Run(name, [{"step": n, "loss": 2.0} for n in steps]) for name in ("one", "two")]
        draw_picture(panels(runs), tmp_path / "curves.svg")
        assert ("M 0 3" in (tmp_path / "curves.svg").read_text()) == (len(steps) == 1)
    draw_picture(panels(runs), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


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


DOCS = ROOT / "docs"
BILLION, TINY, BLOCKS = (
    DOCS / name for name in ("bench-1e9.jsonl", "longnet-tiny.json", "dense-in-blocks-of-1Ki.json")
)


def write(path: Path, *rows: Any) -> Path:
    return write_lines(path, [*rows])


def bench_row(impl: str, seq: int, seconds: float | None, **more: Any) -> dict[str, Any]:
    rate = seq / seconds if seconds else None
    status = "ok" if seconds else "skipped"
    row = {"op": "attention", "impl": impl, "direction": "forward", "seq": seq, "status": status}
    return (
        row | {"seconds": seconds, "tokens_per_second": rate, "peak_rss_bytes": 2**20 + seq} | more
    )


def comments(picture: Path) -> list[str]:
    """Return the texts of an SVG, which matplotlib draws as shapes and names in comments."""
    return re.findall(r"<!-- (.*?) -->", picture.read_text(encoding="utf-8"))


def by_key(*files: Path) -> dict[str, Panel]:
    return {panel.key: panel for panel in panels(read_all(files))}


def test_a_billion_tokens():
    """Each length is one point: the whole run, not its decades. Dense goes on as its square from the last measured."""
    rows = [json.loads(line) for line in BILLION.read_text().splitlines()]
    found = by_key(BILLION)
    assert list(found) == ["seconds", "seconds_per_token", "peak_rss_bytes"]
    time, each, memory = found.values()
    assert [(curve.name, curve.extrapolated) for curve in time.curves] == [
        ("dilated", False), ("dense", False), ("dense", True),
    ]  # fmt: skip
    whole = [row for row in rows if row["impl"] == "dilated" and row["stop"] is None]
    assert time.curves[0].points == [Point(row["seq"], row["seconds"]) for row in whole]
    assert [x for x, *_ in time.curves[0].points] == [1e6, 1e7, 1e8, 1e9]
    (last, *guesses), measured = time.curves[2].points, time.curves[1].points
    assert last == measured[-1]
    assert [x for x, *_ in guesses] == [1e6, 1e7, 1e8, 1e9]
    for (x, seconds, _), (_, per_token, _) in zip(guesses, each.curves[2].points[1:], strict=True):
        assert seconds == pytest.approx(last.y * (x / 131072) ** 2)
        assert per_token == pytest.approx(seconds / x)
    assert [curve.extrapolated for curve in memory.curves] == [False, False]


def test_what_differs_between_rows_is_in_the_names(tmp_path):
    directions = [
        bench_row("dilated", 64, 1.0),
        bench_row("dilated", 64, 2.0, direction="backward", heads=None),
    ]
    first, second = (
        write(tmp_path / "a.jsonl", *directions),
        write(tmp_path / "b.jsonl", bench_row("dilated", 64, 3.0)),
    )
    assert by_key(first)["seconds"].names == ["dilated, forward", "dilated, backward"]
    assert by_key(first, second)["seconds"].names == [
        "a, forward",
        "a, backward",
        "b",
    ]
    both = write(tmp_path / "d.jsonl", bench_row("dilated", 64, 1.0), bench_row("dense", 64, 4.0))
    assert by_key(both, second)["seconds"].names == ["d", "dense", "b"]
    assert by_key(both, write(tmp_path / "e.jsonl", bench_row("dense", 64, 3.0)))["seconds"].names == [
        "dilated", "d", "e",
    ]  # fmt: skip
    heads = [bench_row("dense", 64, 1.0, heads=n, causal=n > 2) for n in (2, 4)]
    assert by_key(write(tmp_path / "c.jsonl", *heads))["seconds"].names == [
        "dense, heads 2, causal False", "dense, heads 4, causal True",
    ]  # fmt: skip


def test_rows_without_a_measurement_give_no_point(tmp_path):
    stopped = bench_row("dilated", 10**9, 5.0, status="stopped", start=0, stop=4000)
    rows = [
        bench_row("dilated", 64, 1.0),
        bench_row("dilated", 128, None),
        bench_row("dilated", 256, 0.0),
        stopped,
    ]
    (curve,) = by_key(write(tmp_path / "a.jsonl", *rows))["seconds"].curves
    assert curve.points == [Point(64, 1.0), Point(4000, 5.0)]  # of a stopped run, how far it came


def test_contexts_are_a_curve_with_errors():
    found = by_key(TINY, BLOCKS)
    totals = json.loads(TINY.read_text())["totals"]
    tiny, blocks = found["ppl"].curves
    assert tiny == Curve(
        "longnet-tiny", [Point(row["context"], row["ppl"], row["ppl_se"]) for row in totals]
    )
    assert (blocks.name, [point.x for point in blocks.points]) == (
        "dense-in-blocks-of-1Ki",
        [2048, 16384],
    )
    assert found["ppl_ratio"].curves[0].points[1] == Point(
        2048, totals[1]["ppl_ratio"], totals[1]["ppl_ratio_se"]
    )


@pytest.mark.parametrize("format", ["json", "jsonl", "one line"])
def test_scores_in_every_form(tmp_path, format):
    rows = [
        {"from": 1, "to": 1, "n_tokens": 5, "nll": 3.0, "nll_se": 0.5},
        {"from": 2, "to": 3, "nll": 2.0},
    ]
    total = {"ppl": 9.0, "context": None, "by_position": rows, "by_segment_position": None}
    value = {"total": total, "totals": None, "documents": [{"doc_id": "a", "ppl": 9.0}]}
    file = tmp_path / "tiny.json"
    if format == "jsonl":
        write(file, {"kind": "document", "doc_id": "a"}, {"kind": "total", **total})
    else:
        file.write_text(json.dumps(value, indent=2 if format == "json" else None) + "\n")
    (panel,) = panels([read(file)])
    assert (panel.key, panel.curves) == (
        "by_position",
        [Curve("tiny", [Point(1, 3.0, 0.5), Point(2, 2.0)])],
    )


def test_rows_of_bench_in_every_form(tmp_path):
    row = bench_row("dilated", 64, 1.0)
    forms = (
        f"[\n  {json.dumps(row)}\n]\n",
        json.dumps([row]),
        json.dumps(row) + "\n",
        json.dumps(row) + '\n{"op',
    )
    for index, text in enumerate(forms):
        (tmp_path / f"{index}.json").write_text(text)
        assert by_key(tmp_path / f"{index}.json")["seconds"].curves[0].points == [Point(64, 1.0)]


def test_a_picture_says_what_of_which_machine(tmp_path, monkeypatch):
    """Panels below one another; ticks of an axis in one notation; in legends, a curve is named once."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(
        "longnet_cli.jobs.plotting.drawing.save_figure",
        lambda figure, *to, **how: figures.append(figure),
    )
    measured = read_all([BILLION, TINY])
    draw_picture(
        panels(measured, ["seconds", "seconds_per_token", "ppl"]),
        tmp_path / "all.png",
        title(measured),
    )
    said = "one attention layer of 2 heads x 32, longnet-tiny, AMD EPYC, 2 cores, 2026-11-24"
    assert figures[0].get_suptitle().replace("\n", " ") == said
    time, each, ppl = figures[0].get_axes()
    assert [name.get_text() for name in time.get_legend().get_texts()] == [
        "dilated",
        "dense (dashed: extrapolated)",
    ]
    assert (time.get_ylabel(), each.get_legend(), ppl.get_legend()) == ("time, seconds", None, None)
    ticks = [" ".join(tick.get_text() for tick in axes.get_xticklabels()) for axes in (each, ppl)]
    assert (re.findall(r"10\^{(\d)}", ticks[0]), ticks[1]) == (
        [*"56789"],
        "512 1Ki 2Ki 4Ki 8Ki 16Ki",
    )


@pytest.mark.parametrize(
    ("lengths", "sizes", "ticks"),
    [
        ((2048, 8192), (310, 400), "2k 3k 4k 5k 6k 7k 8k 320MiB 352MiB 384MiB"),
        ((2048, 2048), (350, 350), "1k 2k 5k 10k 128MiB 256MiB 512MiB 1GiB"),
        ((5000, 60_000), (335, 340), "5k 10k 20k 50k 320MiB 352MiB"),
        ((1, 10**12), (1, 1024), "10^{0} 10^{2} 10^{4} 10^{6} 10^{8} 10^{10} 10^{12} "
         "1MiB 4MiB 16MiB 64MiB 256MiB 1GiB"),
    ],
)  # fmt: skip
def test_a_logarithmic_axis_has_three_to_nine_ticks(tmp_path, lengths, sizes, ticks):
    """At powers of its base if there are enough, otherwise between them; a short axis ends at ticks."""
    pytest.importorskip("matplotlib")
    rows = [
        bench_row("dilated", seq, 1.0, peak_rss_bytes=size << 20)
        for seq, size in zip(lengths, sizes, strict=True)
    ]
    shown = by_key(write(tmp_path / "a.jsonl", *rows))["peak_rss_bytes"]
    draw_picture([shown], tmp_path / "a.svg")
    said = " ".join(comments(tmp_path / "a.svg"))
    assert re.findall(r"10\^{\d+}|\d\w+", said) == ticks.split()


def test_bench_and_score_go_into_plot(run_longnet, tmp_path):
    """The real commands, through a pipe and from a file."""
    pytest.importorskip("matplotlib")
    words = "bench --seq 64,128 --heads 1 --head-dim 8 --repeats 1 -q --format jsonl"
    rows = run_longnet(words).stdout
    assert all(row["machine"] and row["date"] for row in map(json.loads, rows.splitlines()))
    done = run_longnet("plot - --show peak_rss_bytes,seconds -o a.svg", input=rows)
    assert (done.returncode, done.stderr) == (0, "-> a.svg\n")
    said = comments(tmp_path / "a.svg")
    assert said.index("peak memory") < said.index("time, seconds") < len(said)
    assert "dense" in said
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"a text, {name}, and a text, and a text " * 3)
    words = "score a.txt b.txt -q --context 8,32 --by-position --format json"
    scores = run_longnet(words)
    (tmp_path / "scores.json").write_text(scores.stdout)
    done = run_longnet("plot scores.json -o b.svg")
    assert (done.returncode, done.stderr) == (0, "-> b.svg\n")
    assert {"scores, context 8", "scores, context 32", "perplexity"} <= {
        *comments(tmp_path / "b.svg")
    }
