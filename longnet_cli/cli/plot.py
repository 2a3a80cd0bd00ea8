"""`longnet plot`: a picture of training runs, and a page of a text with the nats of each token."""

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
        "Read the folder of a run or its metrics.jsonl, or a file of `score --token-logprobs` (- for stdin).",
    )
    tokenizer: str | None = INPUT.option(
        "--tokenizer NAME|PATH",
        "Read the text of log-probabilities with this one, as in score. (default: that of the file's model)",
    )
    output: str | None = OUTPUT.option(
        "--output -o FILE",
        "Draw this picture (.png, .svg, .pdf; needs the extra `plot`) or, of log-probabilities, write this page, "
        f".html. It replaces an existing file. (default: {PICTURE}, or {PAGE})",
    )


def plot(options: PlotCommand) -> None:
    """Draw training runs as curves, or show where a model is surprised.

    Example: longnet plot runs/train

    Runs: loss, learning rate and speed by step.
    Log-probabilities: a page with the text, coloured by the nats of each token;
    of two files, by the nats that the second one saves.
    """
    from longnet_cli.data.outputs.output_paths import refuse_overwriting
    from longnet_cli.jobs.plotting.runs import draw_runs, metrics_file
    from longnet_cli.jobs.plotting.surprise import has_columns, read_surprise, write_surprise

    of_tokens = [*map(has_columns, options.files)]
    if len({*of_tokens}) > 1:
        raise ConfigError("runs and log-probabilities are drawn apart: name files of one kind")
    output = options.output or (PAGE if all(of_tokens) else PICTURE)
    refuse_overwriting(
        "-o",
        [output],
        also=[metrics_file(file) for file in options.files if file != "-"],
    )
    if all(of_tokens):
        write_surprise(read_surprise(options.files, options.tokenizer), output)
    elif options.tokenizer:
        raise ConfigError("--tokenizer is for files of `score --token-logprobs`: leave it out")
    else:
        draw_runs(options.files, output)
    tell(f"-> {output}")
