"""`longnet train`: a recipe and token shards in, a model directory out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from longnet_cli.cli.dry_run import Format, show
from longnet_cli.cli.options import DeviceOption, NprocOption, QuietOption, size_option
from longnet_cli.cli.progress import progress


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A recipe (.toml), or the name of a shipped one.", show_default=False),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="Folder to write the model, its recipe and metrics to.")
    ] = "runs/train",
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="INPUT", help="Training data, in place of the recipe's; may be repeated."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="FILE|bytes", help="Tokenizer, in place of the recipe's.")
    ] = None,
    seq_len: Annotated[
        int | None, size_option("--seq-len", help="Context in tokens: one stage in place of the recipe's.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps, together with --seq-len.")] = None,
    chunk: Annotated[
        int | None,
        size_option(
            "--chunk",
            help="Tokens whose activations are in memory at a time; it changes no number.",
            show_default="the recipe's train.chunk",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any value of the recipe, e.g. optimizer.lr=1e-3; repeatable."),
    ] = None,
    initial: Annotated[
        str | None, typer.Option("--init", metavar="NAME|DIR", help="Start from this model's weights.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print memory, FLOPs and time, and stop: exit code 5 where it does not fit."),
    ] = False,
    format: Annotated[Format, typer.Option("--format", help="Of what --dry-run prints.")] = "text",
    nproc: NprocOption = None,
    sp: Annotated[
        int | None,
        typer.Option("--sp", min=1, metavar="N", help="Ranks that share a sequence.", show_default="all"),
    ] = None,
    dp: Annotated[
        int | None,
        typer.Option("--dp", min=1, metavar="N", help="Groups of them, each with other sequences.", show_default="1"),
    ] = None,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Train a causal language model. Progress is on stderr, metrics.jsonl in the output folder.

    Runs under torchrun too, which --nproc starts.
    """
    if nproc is not None:
        from longnet_cli.runtime.launch import start_ranks

        start_ranks(nproc)
    from longnet_cli.errors import ConfigError
    from longnet_cli.runtime.launch import join, leave
    from longnet_cli.training.loop import train as run
    from longnet_cli.training.metrics import Metrics
    from longnet_cli.training.recipe import load_recipe, parse_overrides

    overrides: dict[str, Any] = parse_overrides(settings or [])
    if data:
        overrides["data.train"] = data
    if tokenizer:
        overrides["data.tokenizer"] = tokenizer
    if (seq_len is None) != (steps is None):
        raise ConfigError("--seq-len and --steps make one stage together: give both")
    if seq_len is not None:
        overrides["train.stages"] = [{"seq_len": seq_len, "steps": steps}]
    if chunk is not None:
        overrides["train.chunk"] = chunk
    if recipe is None and not overrides:
        raise ConfigError("nothing to train: name a recipe (`longnet train my-recipe.toml`) or --set its values")
    found = load_recipe(recipe, overrides)
    if Path(output, "model.safetensors").exists() and initial is None and not dry_run:
        raise ConfigError(f"{output} already holds a model: name another folder with -o, or remove it")

    ranks, where = join(device, sp=sp, dp=dp)
    if dry_run:
        from longnet_cli.training.estimate import estimate

        estimated = estimate(found, where, ranks)
        leave()
        if ranks.first:
            show(estimated, format)
        return
    quiet = quiet or not ranks.first
    total = sum(
        stage.steps * max(1, found.train.batch_tokens // stage.seq_len // ranks.dp) * ranks.dp * stage.seq_len
        for stage in found.train.stages
    )

    def say(line: str) -> None:
        if ranks.first:
            typer.echo(line, err=True)

    mesh = f" on {ranks.dp} x {ranks.sp} ranks" if ranks.world > 1 else ""
    say(f"training {found.model.num_parameters():,} parameters for {found.train.steps:,} steps, {total:,} tokens{mesh}")
    with progress("training", total, quiet=quiet) as advance:
        shown: dict[str, str] = {}

        def on_step(tokens: int, line: Metrics | None) -> None:
            if line:
                shown.update(step=str(line.step), loss=f"{line.loss:.4f}", lr=f"{line.lr:.2e}")
            advance(tokens, **shown)

        try:
            result = run(found, output, device=where, initial=initial, ranks=ranks, on_step=on_step)
        except (KeyboardInterrupt, SystemExit):
            if Path(output, "model.safetensors").exists():
                say(f"stopped: the weights so far are in {output}, `--init` starts from them")
            raise
    leave()
    say(f"saved {result.output} after {result.steps:,} steps, loss {result.loss:.4f} nats a token")
    say(f"score it: longnet score --ppl --model ./{Path(result.output).as_posix()} FILE")
