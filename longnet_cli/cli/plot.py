"""`longnet plot`: curves of training runs, benchmarks and scores, in the terminal or as a picture."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from longnet_cli.cli.options import OUTPUT, argument
from longnet_cli.cli.output import can_print, printable, shows_color


@dataclass(frozen=True)
class PlotCommand:
    """The options of `plot`."""

    files: list[str] = argument(
        "FILE",
        "Read the folder of a run or its metrics.jsonl, a file of `bench --format jsonl` or of `score "
        "--format json`, or - for stdin. The content says which.",
    )
    show: Sequence[str] | None = OUTPUT.option(
        "--show NAME,...",
        "Draw these alone, in this order, by their names in the files: loss, lr or tokens_per_second of runs; "
        "seconds, seconds_per_token or peak_rss_bytes of bench; ppl, ppl_ratio, by_position, by_segment_position or "
        "by_recall of score. (default: all that the files have)",
    )
    output: str | None = OUTPUT.option(
        "--output -o FILE",
        "Draw a picture instead: .png, .svg or .pdf. It replaces an existing file, and needs the extra `plot`.",
    )


def plot(options: PlotCommand) -> None:
    """Draw training runs, benchmarks and scores as curves, in the terminal or as a picture.

    Runs: loss, learning rate and speed by step. Benchmarks: time and memory
    by length, a curve for each implementation. Scores: perplexity by context,
    loss by position and by recall, with standard errors.
    """
    from longnet_cli.jobs.plotting import draw_picture, draw_text, metrics_file, panels, read_all

    files, output = options.files, options.output
    if output:
        from longnet_cli.data.overwriting import refuse_overwriting

        refuse_overwriting("-o", [output], also=[metrics_file(file) for file in files if file != "-"])
    drawn = panels(read_all(files), options.show or ())
    if output:
        draw_picture(drawn, output)
        return
    drawn = [panel._replace(curves=[c._replace(name=printable(c.name)) for c in panel.curves]) for panel in drawn]
    color = shows_color()
    print(draw_text(drawn, shutil.get_terminal_size().columns, color=color, braille=can_print("\u2800")))
