"""`longnet plot`: the curves of training runs, in the terminal or as a picture."""

from __future__ import annotations

import shutil
from typing import Annotated

import typer

from longnet_cli.cli.options import OUTPUT, option
from longnet_cli.cli.output import can_print, shows_color


def plot(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Read the folder of a run, or its metrics.jsonl.", show_default=False),
    ],
    output: Annotated[
        str | None,
        option(
            OUTPUT,
            "--output -o",
            "FILE",
            "Draw a picture instead: .png, .svg or .pdf. It replaces an existing file, and needs the extra `plot`.",
        ),
    ] = None,
) -> None:
    """Draw loss, learning rate and speed of training runs, in the terminal or as a picture."""
    from longnet_cli.plotting import draw_picture, draw_text, metrics_file, read_runs

    if output:
        from longnet_cli.data.overwriting import refuse_overwriting

        refuse_overwriting("-o", [output], also=map(metrics_file, runs))
    found = read_runs(runs)
    if output:
        draw_picture(found, output)
        return
    color = shows_color()
    print(draw_text(found, shutil.get_terminal_size().columns, color=color, braille=can_print("\u2800")))
