"""`longnet train`: a recipe and token shards in, a model directory out."""

from __future__ import annotations

import math
import os
import shlex
import signal
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longnet_cli.basics.errors import ConfigError
from longnet_cli.basics.sizes import format_bytes
from longnet_cli.cli import options as shared
from longnet_cli.cli.dry_run import Format, show_training
from longnet_cli.cli.options import COMPUTE, INPUT, OUTPUT, bare_or, option, read_pattern, size_option
from longnet_cli.cli.output import tell
from longnet_cli.cli.progress import Advance, progress
from longnet_cli.cli.starting import ask_hub, freeze_imports, launch
from longnet_cli.running.ranks.launch import LAUNCHED

if TYPE_CHECKING:
    from longnet_cli.jobs.training.metrics import Metrics
    from longnet_cli.running.ranks.ranks import Ranks

RECIPE = "Recipe"
BY_RECIPE = "the recipe's"


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="Train by this recipe: a .toml file, or a shipped one's name.", show_default=False
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        option(RECIPE, "--set", "KEY=VALUE", "Set values of the recipe, one per --set: optimizer.lr=1e-3."),
    ] = None,
    seq_len: Annotated[
        int | None, size_option(RECIPE, "--seq-len", "Train in one stage, at this context length.")
    ] = None,
    steps: Annotated[
        int | None, size_option(RECIPE, "--steps", "Take N steps in that stage. A larger N extends a run.", metavar="N")
    ] = None,
    initial: Annotated[
        str | None,
        option(RECIPE, "--init", "NAME|DIR", "Start from this model, its tokenizer and sizes, as in --model of score."),
    ] = None,
    update: shared.UpdateOption = False,
    data: Annotated[
        list[str] | None, option(INPUT, "--data", "INPUT", "Train on these inputs, one per --data.", BY_RECIPE)
    ] = None,
    tokenizer: Annotated[
        str | None,
        option(
            INPUT,
            "--tokenizer",
            "NAME|PATH",
            "Use bytes, a tokenizer.json, or the tokenizer of a model: shipped, or ORG/NAME on the hub.",
            BY_RECIPE,
        ),
    ] = None,
    tokenizer_differs: Annotated[
        bool, option(INPUT, "--tokenizer-differs", None, "Accept a tokenizer that is not that of the --init model.")
    ] = False,
    column: Annotated[str | None, option(INPUT, "--column", "NAME", "Read this column.", BY_RECIPE)] = None,
    eos: Annotated[
        str | None,
        option(
            INPUT, "--eos", "TOKEN|ID", "Put this token between documents.", "the recipe's, otherwise the tokenizer's"
        ),
    ] = None,
    output: Annotated[
        str, option(OUTPUT, "--output -o", "DIR", "Write checkpoints, metrics.jsonl and the model to this folder.")
    ] = "runs/train",
    resume: Annotated[
        str | None,
        option(
            OUTPUT,
            "--resume",
            "[PATH]",
            "Continue the run in the output folder, or from PATH: another run, or a checkpoint.",
            "the output folder's run, if any",
        ),
    ] = None,
    no_resume: Annotated[
        bool, option(OUTPUT, "--no-resume", None, "Refuse an output folder that holds a run.")
    ] = False,
    dry_run: Annotated[
        bool,
        option(
            OUTPUT, "--dry-run", None, "Print memory, FLOPs and time, and stop. The exit code is 5 if it does not fit."
        ),
    ] = False,
    format: Annotated[Format, option(OUTPUT, "--format", "text|json", "Print --dry-run in this format.")] = "text",
    nproc: shared.NprocOption = None,
    sp: shared.SpOption = None,
    dp: shared.DpOption = None,
    shard: Annotated[
        str | None,
        option(
            COMPUTE,
            "--shard",
            "none|full",
            "Keep all weights on every rank, or divide weights and optimizer state between ranks (full, FSDP2).",
            "none",
        ),
    ] = None,
    pattern: shared.PatternOption = None,
    device: shared.DeviceOption = "auto",
    dtype: Annotated[
        str | None,
        option(COMPUTE, "--dtype", "auto|fp32|bf16", "Compute matrix products in this precision.", BY_RECIPE),
    ] = None,
    chunk: Annotated[
        int | None,
        size_option(COMPUTE, "--chunk", "Hold the activations of this many tokens. It changes no number.", BY_RECIPE),
    ] = None,
    spill: Annotated[
        str | None,
        option(
            COMPUTE,
            "--spill",
            "DIR",
            "Store here, not in memory, the keys and values that later chunks need.",
            BY_RECIPE,
        ),
    ] = None,
    quiet: shared.QuietOption = False,
) -> None:
    """Train a model by a recipe.

    The same command continues a stopped run, and so does `longnet train -o DIR`. You can also start it with torchrun.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # held until the run listens; before, it would kill
    if update:
        ask_hub(initial, tokenizer)
    from longnet_cli.jobs.estimating.training_job import estimate_training, settle_chunk
    from longnet_cli.jobs.training.loop import train as run
    from longnet_cli.jobs.training.recipe import parse_overrides
    from longnet_cli.jobs.training.start import prepare_run
    from longnet_cli.running.device import keep_freed_memory, matmul_peak
    from longnet_cli.running.ranks.ranks import join, leave

    if (seq_len is None) != (steps is None):
        raise ConfigError("--seq-len and --steps make one stage together: give both")
    read_pattern(pattern)  # so that an error names --pattern, not the recipe
    if resume is not None and no_resume:
        raise ConfigError("--resume and --no-resume exclude each other: give one")
    flags = {
        "init": initial,
        "data.train": data,
        "data.tokenizer": tokenizer,
        "data.column": column,
        "data.eos": eos,
        "model.pattern": pattern,
        "parallel.sp": sp,
        "parallel.dp": dp,
        "parallel.shard": shard,
        "train.stages": [{"seq_len": seq_len, "steps": steps}] if steps else None,
        "train.dtype": dtype,
        "train.chunk": chunk,
        "train.spill": spill,
    }
    overrides = parse_overrides(settings or []) | {key: value for key, value in flags.items() if value}
    going_on = not no_resume and bare_or(resume, True, True)
    found = prepare_run(recipe, overrides, output, resume=going_on, writes=not dry_run)

    launch(nproc, sp=sp, dp=dp)  # only now: one process downloads, and refuses what every rank would refuse
    freeze_imports()
    ranks, where = join(device, sp=found.parallel.sp, dp=found.parallel.dp)
    found = settle_chunk(found, where, ranks)
    if dry_run:
        estimated = estimate_training(found, where, ranks)
        leave()
        if ranks.first:
            show_training(estimated, format)
        return
    if where.type == "cpu":
        keep_freed_memory()
    quiet = quiet or not ranks.first
    total, most = found.tokens, "at most " if found.data.pair else ""

    print_note = partial(tell, quiet=quiet)
    mesh = f" on {ranks.dp} x {ranks.sp} ranks" if ranks.world > 1 else ""
    all_steps = f"{found.train.steps:,} steps, {most}{total:,} tokens"
    print_note(f"training {found.model.trained:,} parameters for {all_steps}{mesh}")
    with ExitStack() as stack:
        shown: dict[str, str] = {}
        begun = False  # until it is True, there is nothing to save
        advance: Advance = lambda amount, **fields: None  # noqa: E731

        def on_begin(step: int, tokens: int) -> None:
            nonlocal advance, begun
            begun = True
            if step:
                what = f"continuing after step {step:,}" if step < found.train.steps else "all steps are done already"
                unused = initial and not found.pretrained
                print_note(f"{what}; --init is ignored, because this run has already started" if unused else what)
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
                tokenizer_differs=tokenizer_differs,
                resume=going_on,
                ranks=ranks,
                peak=matmul_peak(where, found.train.dtype),
                on_begin=on_begin,
                on_step=on_step,
                on_note=print_note,
            )
        except (KeyboardInterrupt, SystemExit):
            stack.close()
            if begun:
                print_note(f"stopped, and saved in {output}: {_again(output, ranks)} goes on")
            else:
                print_note("stopped before a step: nothing new is saved, and the same command starts again")
            raise
    leave()
    contrast = found.train.objective == "contrast"
    unit = "text" if contrast else "token"
    loss = f", loss {result.loss:.4f} nats per {unit}" if result.loss == result.loss else ""
    print_note(f"saved {result.output} after {result.steps:,} steps{loss}")
    use = "score it: longnet score --ppl" if found.model.causal and not contrast else "use it: longnet encode"
    print_note(f"{use} --model {_path(output)} FILE")


def describe(line: Metrics) -> dict[str, str]:
    """Return the fields of a line of metrics that the progress line shows at its end."""
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
    if line.held_out_mrr is not None:
        fields["mrr"] = f"{line.held_out_mrr:.3f}"
    return fields


def _again(output: str, ranks: Ranks) -> str:
    """Return the command that continues the run."""
    if ranks.world == 1:
        return f"`longnet train -o {shlex.quote(output)}`"
    if LAUNCHED in os.environ:
        return f"`longnet train -o {shlex.quote(output)} --nproc {ranks.world}`"
    return "the same command"


def _path(output: str) -> str:
    """Return the output as --model takes it in a shell: a path with a slash."""
    path = Path(output).as_posix()
    return shlex.quote(path if "/" in path else f"./{path}")
