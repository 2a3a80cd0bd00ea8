"""`longnet train`: a recipe and token shards in, a model directory out."""

from __future__ import annotations

import math
import os
import shlex
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from longnet_cli.basics.errors import ConfigError, LongNetError
from longnet_cli.basics.events import Events
from longnet_cli.basics.sizes import format_bytes
from longnet_cli.running.ranks.launch import LAUNCHED, divide

from . import options as shared
from .command import Excludes, check_pairs
from .dry_run import check_fits, show_training
from .options import (
    COMPUTE,
    INPUT,
    OUTPUT,
    Format,
    HelpPanel,
    Mesh,
    argument,
    bare_or,
    read_pattern,
)
from .output import note, tell, tell_last, write_text
from .progress import Advance, progress
from .starting import (
    ask_hub,
    check_spill,
    join_ranks,
    launch,
    processes,
)

if TYPE_CHECKING:
    import torch

    from longnet_cli.jobs.training.loop import TrainResult
    from longnet_cli.jobs.training.metrics import Metrics
    from longnet_cli.jobs.training.recipe import Recipe
    from longnet_cli.running.ranks.ranks import Ranks

RECIPE = HelpPanel("Recipe")
# at the end of the progress line, the most telling first
FIELDS = ("loss", "step", "held-out", "lr", "grad", "memory", "mfu", "ppl")


PAIRS = [Excludes("--resume", "--no-resume", "continues a run")]


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """The options of `train`. What is None is as the recipe says."""

    recipe: str | None = argument(
        "RECIPE",
        "Train by this recipe: a .toml file, or a shipped one's name.",
        default=None,
    )
    keys: bool = RECIPE.flag(
        "--recipe",
        "Print a recipe with every key and what it means, and stop.",
        common=True,
    )
    settings: list[str] | None = RECIPE.common(
        "--set KEY=VALUE",
        "Set values of the recipe, one per --set: optimizer.lr=1e-3.",
    )
    seq_len: int | None = RECIPE.size(
        "--seq-len SIZE",
        "Train in one stage, at this context length. A step has as many sequences as train.batch_tokens holds "
        "(--set train.batch_tokens=1Ki; default: the recipe's, otherwise 16Ki).",
        common=True,
    )
    steps: int | None = RECIPE.size(
        "--steps N",
        "Take N steps in that stage. A larger N extends a run.",
        common=True,
    )
    initial: str | None = RECIPE.common(
        "--init NAME|DIR",
        "Start from this model, its tokenizer and sizes, as in --model of score.",
    )
    update: bool = shared.update_flag()
    data: list[str] | None = INPUT.common(
        "--data INPUT",
        "Train on these inputs, one per --data. (default: the recipe's)",
    )
    tokenizer: str | None = INPUT.common(
        "--tokenizer NAME|PATH",
        "Use bytes, a tokenizer.json, or the tokenizer of a model: shipped, or ORG/NAME on the hub. (default: the "
        "recipe's)",
    )
    tokenizer_differs: bool = INPUT.flag(
        "--tokenizer-differs", "Accept a tokenizer that is not that of the --init model."
    )
    column: str | None = INPUT.option("--column NAME", "Read this column. (default: the recipe's)")
    eos: str | None = INPUT.option(
        "--eos TOKEN|ID",
        "Put this token between documents. (default: the recipe's, otherwise the tokenizer's)",
    )
    output: str = OUTPUT.common(
        "--output -o DIR",
        "Write checkpoints, metrics.jsonl and the model to this folder.",
        default="runs/train",
    )
    resume: str | None = OUTPUT.common(
        "--resume [PATH]",
        "Continue the run in the output folder, or from PATH: another run, or a checkpoint. (default: the output "
        "folder's run, if any)",
    )
    no_resume: bool = OUTPUT.flag("--no-resume", "Refuse an output folder that holds a run.")
    dry_run: bool = OUTPUT.flag(
        "--dry-run",
        "Print memory, FLOPs and time, and stop. The exit code is 5 if it does not fit.",
        common=True,
    )
    format: Format = OUTPUT.option(
        "--format text|json",
        "Print --dry-run in this format.",
        default="text",
    )
    mesh: Mesh
    shard: str | None = COMPUTE.option(
        "--shard none|full",
        "Keep all weights on every rank, or divide weights and optimizer state between ranks (full, FSDP2). "
        "(default: none)",
    )
    pattern: str | None = shared.pattern_option()
    device: str = shared.device_option()
    dtype: str | None = COMPUTE.option(
        "--dtype auto|fp32|bf16",
        "Compute matrix products in this precision. (default: the recipe's)",
    )
    chunk: int | None = COMPUTE.size(
        "--chunk SIZE",
        "Hold the activations of this many tokens. It changes no number. (default: the recipe's)",
        common=True,
    )
    spill: str | None = COMPUTE.option(
        "--spill DIR",
        "Store here, not in memory, the keys and values that later chunks need. (default: the recipe's)",
    )
    quiet: bool = shared.quiet_flag()

    @property
    def goes_on(self) -> str | bool:
        """The run that may be continued: the one in the output folder, or in a path; False with --no-resume."""
        return False if self.no_resume else bare_or(self.resume, True, True)


def train(options: TrainCommand) -> None:
    """Train a model by a recipe.

    Example: longnet train examples/small.toml --data tokens --tokenizer tokens

    The same command continues a stopped run, and so does `longnet train -o DIR`. You can also start it with torchrun.
    """
    if options.keys:
        from longnet_cli.jobs.training.recipe_keys import recipe_keys

        write_text(recipe_keys())
        return
    if options.update:
        ask_hub(options.initial, options.tokenizer)
    check_pairs(PAIRS, options)
    _check_stage(options)
    read_pattern(options.pattern)  # so that an error names --pattern, not the recipe
    recipe = _recipe(options)
    check_spill(recipe.train.spill)
    # now: one process refuses what every rank would refuse
    mesh = options.mesh
    sp, dp = _divided(recipe, options)
    planned = launch(mesh, dry_run=options.dry_run)
    from longnet_cli.jobs.training.costs import estimate_memory, estimate_training, settle_chunk
    from longnet_cli.running.device import keep_freed_memory
    from longnet_cli.running.ranks.ranks import leave

    ranks, where = join_ranks(options.device, sp, dp, planned)
    recipe = settle_chunk(recipe, where, ranks)
    if options.dry_run:
        for line in recipe.notes():
            note(line)
        estimated = estimate_training(recipe, where, ranks)
        leave()
        if ranks.writes:
            show_training(estimated, options.format)
        return
    check_fits(estimate_memory(recipe, where, ranks), "training")
    keep_freed_memory(where)
    result = _run(recipe, options, where, ranks)
    leave()
    line = f"saved {result.output} after {result.steps:,} steps"
    if not math.isnan(result.loss):
        line += f", training loss {result.loss:.4f} nats per token"
    if result.best is not None:
        line += f"; held-out loss {result.best:.4f} at its lowest, of the model in best/"
    tell(line)
    use = "score it: longnet score --ppl" if recipe.model.causal else "use it: longnet encode"
    tell(f"{use} --model {_path(options.output)} FILE")


def _divided(recipe: Recipe, options: TrainCommand) -> tuple[int, int]:
    """Return sp and dp of the processes that there are or are to be. Raises ConfigError if they cannot share a step."""
    world = processes(options.mesh)
    try:
        sp, dp = divide(world, recipe.parallel.sp, recipe.parallel.dp)
    except ConfigError:
        if options.recipe is not None:
            raise
        # a run that goes on may have recorded other numbers of processes than there are now
        sp, dp = divide(world, options.mesh.sp, options.mesh.dp)
    if world > 1:
        from longnet_cli.jobs.training.limits import check_ranks
        from longnet_cli.running.ranks.ranks import Ranks

        check_ranks(recipe, Ranks(0, world, sp))
    return sp, dp


def _check_stage(options: TrainCommand) -> None:
    """Raise ConfigError for one of --steps and --seq-len alone. The error has the recipe's value of the other one."""
    if (options.steps is None) is (options.seq_len is None):
        return
    names = ["--steps", "--seq-len"]
    if options.seq_len:
        names.reverse()
    of_recipe = ""
    with suppress(LongNetError):  # the recipe may be incomplete
        stages = _recipe(replace(options, steps=None, seq_len=None)).train.stages
        if len(stages) == 1:
            value = stages[0].seq_len if options.steps else stages[0].steps
            of_recipe = f" (the recipe's {names[1]} is {value})"
    raise ConfigError(f"{' and '.join(names)} make one stage together: give both{of_recipe}")


def _recipe(options: TrainCommand) -> Recipe:
    """Return the recipe with the options in it."""
    from longnet_cli.jobs.training.recipe import parse_overrides
    from longnet_cli.jobs.training.run_folder import prepare_run

    flags: dict[str, object] = {
        "init": options.initial,
        "data.train": options.data,
        "data.tokenizer": options.tokenizer,
        "data.column": options.column,
        "data.eos": options.eos,
        "model.pattern": options.pattern,
        "parallel.sp": options.mesh.sp,
        "parallel.dp": options.mesh.dp,
        "parallel.shard": options.shard,
        "train.dtype": options.dtype,
        "train.chunk": options.chunk,
        "train.spill": options.spill,
    }
    if options.steps:
        flags["train.stages"] = [{"seq_len": options.seq_len, "steps": options.steps}]
    overrides = parse_overrides(options.settings or [])
    overrides |= {key: value for key, value in flags.items() if value}
    return prepare_run(
        options.recipe,
        overrides,
        options.output,
        resume=options.goes_on,
        writes=not options.dry_run,
    )


def _run(recipe: Recipe, options: TrainCommand, where: torch.device, ranks: Ranks) -> TrainResult:
    """Train, with the progress on stderr. If the run is stopped, say what it has saved."""
    from longnet_cli.jobs.training.loop import train as run
    from longnet_cli.running.device import matmul_peak

    on_ranks = f" on {ranks.dp} x {ranks.sp} ranks" if ranks.world > 1 else ""
    what = f"{recipe.model.trained:,} parameters: {recipe.steps_in_words}"
    tell(f"training {what}, {recipe.tokens:,} in all{on_ranks}")
    with ExitStack() as stack:
        shown = _Shown(recipe, options, stack)
        try:
            return run(
                recipe,
                options.output,
                device=where,
                tokenizer_differs=options.tokenizer_differs,
                resume=options.goes_on,
                ranks=ranks,
                peak=matmul_peak(where, recipe.train.dtype),
                events=Events(
                    begin=shown.begin,
                    step=shown.step,
                    evaluation=shown.evaluation,
                    note=tell,
                ),
            )
        except (KeyboardInterrupt, SystemExit):
            stack.close()
            last = "stopped before a step: nothing new is saved, and the same command starts again"
            if shown.done is not None:
                saved = f"stopped after step {shown.done:,}, and saved in {options.output}"
                last = f"{saved}: {_again(options.output, ranks)} goes on"
            tell_last(last)
            raise


class _Shown:
    """The progress of a run on stderr, until the `stack` ends. `done` counts steps; None while nothing can be saved."""

    done: int | None = None
    advance: Advance

    def __init__(self, recipe: Recipe, options: TrainCommand, stack: ExitStack) -> None:
        self.recipe = recipe
        self.options = options
        self.stack = stack
        self.fields: dict[str, str | None] = dict.fromkeys(FIELDS)  # None: not known yet

    def begin(self, step: int, tokens: int) -> None:
        self.done = step
        if step:
            line = f"continuing after step {step:,}"
            if step >= self.recipe.train.steps:
                line = "all steps are done already"
            if self.options.initial and not self.recipe.pretrained:
                line += "; --init is ignored, because this run has already started"
            tell(line)
        bar = progress("training", self.recipe.tokens, start=tokens)
        self.advance = self.stack.enter_context(bar)

    def step(self, tokens: int, line: Metrics | None) -> None:
        assert self.done is not None  # a run begins before its first step
        self.done += 1
        if line:
            self.fields |= describe(line)
        self.advance(tokens, **self.fields)

    def evaluation(self, share: float) -> None:
        self.advance(0, evaluating=f"{share:.0%}", **self.fields)


def describe(line: Metrics) -> dict[str, str]:
    """Return the FIELDS of a line of metrics that it has."""
    fields = {
        "loss": f"{line.loss:.4f}",
        "step": f"{line.step:,}",
        "lr": f"{line.lr:.2e}",
        "grad": f"{line.grad_norm:.2f}",
        "memory": format_bytes(line.peak_memory_bytes),
        "ppl": f"{math.exp(min(line.loss, 99)):.2f}",
    }
    if line.held_out_loss is not None:
        fields["held-out"] = f"{line.held_out_loss:.4f}"
    if line.mfu is not None:
        fields["mfu"] = f"{100 * line.mfu:.0f}%"
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
