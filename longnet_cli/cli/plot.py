"""`longnet plot`: curves of training runs, benchmarks and scores, and texts with the nats of each token."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from longnet_cli.basics.errors import ConfigError
from longnet_cli.cli.options import INPUT, OUTPUT, argument
from longnet_cli.cli.output import can_print, printable, shows_color


@dataclass(frozen=True)
class PlotCommand:
    """The options of `plot`."""

    files: list[str] = argument(
        "FILE",
        "Read the folder of a run or its metrics.jsonl, a file of `bench --format jsonl`, of `score --format json` or "
        "of `score --token-logprobs`, or - for stdin. The content says which.",
    )
    tokenizer: str | None = INPUT.option(
        "--tokenizer NAME|PATH",
        "Read the text of log-probabilities with this one, as in score. (default: that of the file's model)",
    )
    show: Sequence[str] | None = OUTPUT.option(
        "--show NAME,...",
        "Draw these alone, in this order, by their names in the files: loss, lr or tokens_per_second of runs; "
        "seconds, seconds_per_token or peak_rss_bytes of bench; ppl, ppl_ratio, by_position or "
        "by_segment_position of score. (default: all that the files have)",
    )
    output: str | None = OUTPUT.option(
        "--output -o FILE",
        "Draw a picture instead: .png, .svg or .pdf (needs the extra `plot`). Of log-probabilities, write a page, "
        ".html, or draw its strip. It replaces an existing file.",
    )


def plot(options: PlotCommand) -> None:
    """Draw training runs, benchmarks and scores as curves, or show where a model is surprised.

    Runs: loss, learning rate and speed by step. Benchmarks: time and memory
    by length, a curve for each implementation. Scores: perplexity by context,
    loss by position, with standard errors.
    Log-probabilities: the text, coloured by the nats of each token; of two
    files, by the nats that the second one saves.
    """
    from longnet_cli.jobs.plotting.recognizing import metrics_file
    from longnet_cli.jobs.plotting.surprise import has_columns

    files, output = options.files, options.output
    if output:
        from longnet_cli.data.outputs import refuse_overwriting

        refuse_overwriting("-o", [output], also=[metrics_file(file) for file in files if file != "-"])
    if not any(map(has_columns, files)):
        _draw_curves(options)
    elif all(map(has_columns, files)):
        _show_surprise(options)
    else:
        raise ConfigError("curves and log-probabilities are drawn apart: name files of one kind")


def _draw_curves(options: PlotCommand) -> None:
    from longnet_cli.jobs.plotting import draw_picture, draw_text, panels, read_all, title

    if options.tokenizer:
        raise ConfigError("--tokenizer is for files of `score --token-logprobs`: leave it out")
    measured = read_all(options.files)
    drawn = panels(measured, options.show or ())
    if options.output:
        draw_picture(drawn, options.output, title(measured))
        return
    drawn = [panel._replace(curves=[c._replace(name=printable(c.name)) for c in panel.curves]) for panel in drawn]
    color = shows_color()
    print(draw_text(drawn, shutil.get_terminal_size().columns, color=color, braille=can_print("\u2800")))


def _show_surprise(options: PlotCommand) -> None:
    from longnet_cli.jobs.plotting.surprise import draw_surprise, read_surprise, write_surprise

    if options.show:
        raise ConfigError("--show is for curves: leave it out for a file of log-probabilities")
    surprise = read_surprise(options.files, options.tokenizer)
    if options.output:
        write_surprise(surprise, options.output)
        return
    width = shutil.get_terminal_size().columns
    for line in draw_surprise(surprise, width, color=shows_color(), printable=_shown):
        print(line)


def _shown(text: str) -> str:
    """Return text safe to print, with ? for what stdout's encoding does not have."""
    text = printable(text)
    return text if can_print(text) else "?" * len(text)
