"""`longnet plot`: pictures of training runs, benchmarks and scores, and pages of texts with the nats of each token."""

from collections.abc import Sequence
from dataclasses import dataclass

from longnet_cli.basics.errors import ConfigError

from .options import INPUT, OUTPUT, argument
from .output import tell

PICTURE = "curves.png"
PAGE = "surprise.html"


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
        "Draw this picture (.png, .svg, .pdf; needs the extra `plot`) or, of log-probabilities, write this page, "
        f".html. It replaces an existing file. (default: {PICTURE}, or {PAGE})",
    )


def plot(options: PlotCommand) -> None:
    """Draw training runs, benchmarks and scores as curves, or show where a model is surprised.

    Example: longnet plot docs/bench-1e9.jsonl --show seconds_per_token

    Runs: loss, learning rate and speed by step. Benchmarks: time and memory
    by length, a curve for each implementation. Scores: perplexity by context,
    loss by position, with standard errors.
    Log-probabilities: a page with the text, coloured by the nats of each token;
    of two files, by the nats that the second one saves.
    """
    from longnet_cli.data.outputs.output_paths import refuse_overwriting
    from longnet_cli.jobs.plotting.recognizing import metrics_file
    from longnet_cli.jobs.plotting.surprise import has_columns

    of_tokens = [*map(has_columns, options.files)]
    if len({*of_tokens}) > 1:
        raise ConfigError("curves and log-probabilities are drawn apart: name files of one kind")
    name, draw = (PAGE, _write_page) if all(of_tokens) else (PICTURE, _draw_curves)
    output = options.output or name
    refuse_overwriting(
        "-o",
        [output],
        also=[metrics_file(file) for file in options.files if file != "-"],
    )
    draw(options, output)
    tell(f"-> {output}")


def _draw_curves(options: PlotCommand, output: str) -> None:
    from longnet_cli.jobs.plotting import draw_picture, panels, read_all, title

    if options.tokenizer:
        raise ConfigError("--tokenizer is for files of `score --token-logprobs`: leave it out")
    measured = read_all(options.files)
    draw_picture(panels(measured, options.show or ()), output, title(measured))


def _write_page(options: PlotCommand, output: str) -> None:
    from longnet_cli.jobs.plotting.surprise import read_surprise, write_surprise

    if options.show:
        raise ConfigError("--show is for curves: leave it out for a file of log-probabilities")
    write_surprise(read_surprise(options.files, options.tokenizer), output)
