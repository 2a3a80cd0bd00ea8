"""`longnet train`: a recipe and token shards in, a model directory out."""

from __future__ import annotations

import math
import os
import shlex
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longnet_cli.cli.dry_run import Format, show
from longnet_cli.cli.launch import launch
from longnet_cli.cli.options import DeviceOption, NprocOption, PatternOption, QuietOption, read_pattern, size_option
from longnet_cli.cli.output import format_bytes, printable
from longnet_cli.cli.progress import Advance, progress
from longnet_cli.runtime.launch import LAUNCHED

if TYPE_CHECKING:
    from longnet_cli.runtime.ranks import Ranks
    from longnet_cli.training.metrics import Metrics


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
        str | None,
        typer.Option("--tokenizer", metavar="bytes|FILE|MODEL", help="Tokenizer, in place of the recipe's."),
    ] = None,
    tokenizer_differs: Annotated[
        bool,
        typer.Option("--tokenizer-differs", help="Start from --init though it was trained with another tokenizer."),
    ] = False,
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
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            metavar="auto|never|PATH",
            help="Go on from the newest checkpoint in DIR, if there is one; never; or from the one at PATH.",
        ),
    ] = "auto",
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
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="none|full",
            help="full: each rank keeps its share of weights and optimizer state (FSDP2).",
            show_default="none",
        ),
    ] = None,
    pattern: PatternOption = None,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Train a model. Progress is on stderr; checkpoints, metrics.jsonl and the model are in the output folder.

    The same command goes on where it was stopped, and so does `longnet train -o DIR` alone. Runs under torchrun too.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # it waits until the run listens, and would kill before
    launch(nproc)
    from longnet_cli.errors import ConfigError
    from longnet_cli.runtime.device import MatmulPeak, keep_freed_memory
    from longnet_cli.runtime.ranks import join, leave
    from longnet_cli.training.loop import CHECKPOINTS, refuse_overwriting
    from longnet_cli.training.loop import train as run
    from longnet_cli.training.recipe import load_recipe, parse_overrides

    overrides: dict[str, Any] = parse_overrides(settings or [])
    if data:
        overrides["data.train"] = data
    if read_pattern(None, None, pattern):
        overrides["model.pattern"] = pattern
    if tokenizer:
        overrides["data.tokenizer"] = tokenizer
    overrides |= {f"parallel.{key}": value for key, value in (("sp", sp), ("dp", dp), ("shard", shard)) if value}
    if (seq_len is None) != (steps is None):
        raise ConfigError("--seq-len and --steps make one stage together: give both")
    if seq_len is not None:
        overrides["train.stages"] = [{"seq_len": seq_len, "steps": steps}]
    if chunk is not None:
        overrides["train.chunk"] = chunk
    folder = Path(output)
    if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        raise ConfigError(f"{file} is a file, and -o names the folder of a run: name another")
    own = None  # a recipe that the run itself wrote
    if recipe is None and resume != "never":
        runs = [folder] if resume == "auto" else [Path(resume), Path(resume).parent.parent]  # a run, or its checkpoint
        recipe = own = next((str(run / "recipe.json") for run in runs if (run / "recipe.json").exists()), None)
    if recipe is None and not overrides:
        raise ConfigError(
            f"nothing to train: there is no run in {output}; name a recipe (`longnet train my-recipe.toml`) or --set "
            "its values"
        )
    found = load_recipe(recipe, overrides)
    used = (folder / "model.safetensors").exists() and not (folder / CHECKPOINTS).exists()
    if used and not dry_run:
        raise ConfigError(f"{output} already holds a model: name another folder with -o, or remove it")
    if not dry_run:
        refuse_overwriting(folder, found, recipe if recipe != own else None, initial)

    ranks, where = join(device, sp=found.parallel.sp, dp=found.parallel.dp)
    if dry_run:
        from longnet_cli.training.estimate import estimate

        estimated = estimate(found, where, ranks)
        leave()
        if ranks.first:
            show(estimated, format)
        return
    if where.type == "cpu":
        keep_freed_memory()
    quiet = quiet or not ranks.first
    total = found.train.tokens

    def say(line: str) -> None:
        if ranks.first:
            typer.echo(printable(line), err=True)

    mesh = f" on {ranks.dp} x {ranks.sp} ranks" if ranks.world > 1 else ""
    say(f"training {found.model.num_parameters():,} parameters for {found.train.steps:,} steps, {total:,} tokens{mesh}")
    with ExitStack() as stack:
        shown: dict[str, str] = {}
        begun = False  # before, there is nothing to save
        advance: Advance = lambda amount, **fields: None  # noqa: E731

        def on_begin(step: int, tokens: int) -> None:
            nonlocal advance, begun
            begun = True
            if step:
                what = f"going on after step {step:,}" if step < found.train.steps else "all steps are done already"
                say(f"{what}; --init is for the begin of a run, and did nothing" if initial else what)
            advance = stack.enter_context(progress("training", total, start=tokens, quiet=quiet))

        def on_step(tokens: int, line: Metrics | None) -> None:
            if line:
                shown.update(describe(line))
            advance(tokens, **shown)

        try:
            result = run(
                found,
                output,
                device=where,
                initial=initial,
                tokenizer_differs=tokenizer_differs,
                resume=resume,
                ranks=ranks,
                peak=MatmulPeak(where, found.train.dtype),
                on_begin=on_begin,
                on_step=on_step,
                on_note=say,
            )
        except (KeyboardInterrupt, SystemExit):
            stack.close()
            if begun:
                say(f"stopped, and saved in {output}: {_again(output, ranks)} goes on")
            raise
    leave()
    loss = f", loss {result.loss:.4f} nats a token" if result.loss == result.loss else ""
    say(f"saved {result.output} after {result.steps:,} steps{loss}")
    use = "score it: longnet score --ppl" if found.model.causal else "use it: longnet encode"
    say(f"{use} --model {_path(output)} FILE")


def describe(line: Metrics) -> dict[str, str]:
    """The fields of a line of metrics that stand at the end of the progress."""
    fields = {
        "step": f"{line.step:,}",
        "loss": f"{line.loss:.4f}",
        "ppl": f"{math.exp(min(line.loss, 99)):.2f}",
        "lr": f"{line.lr:.2e}",
        "grad": f"{line.grad_norm:.2f}",
        "memory": format_bytes(line.peak_memory_bytes),
    }
    if line.mfu is not None:
        fields["mfu"] = f"{100 * line.mfu:.0f}%"
    if line.held_out_loss is not None:
        fields["held-out"] = f"{line.held_out_loss:.4f}"
    return fields


def _again(output: str, ranks: Ranks) -> str:
    """What a person types to go on."""
    if ranks.world == 1:
        return f"`longnet train -o {shlex.quote(output)}`"
    if LAUNCHED in os.environ:
        return f"`longnet train -o {shlex.quote(output)} --nproc {ranks.world}`"
    return "the same command"


def _path(output: str) -> str:
    """The output as --model takes it in a shell: a path with a slash."""
    path = Path(output).as_posix()
    return shlex.quote(path if "/" in path else f"./{path}")
