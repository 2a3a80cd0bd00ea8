"""The training loop: windows of tokens in; checkpoints, metrics.jsonl and a model directory out."""

import gc
import math
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longnet_cli.basics.atomic import locked_folder, write_file
from longnet_cli.basics.errors import ConfigError, DataError, LongNetError, NotFiniteError
from longnet_cli.basics.events import Events
from longnet_cli.basics.version import __version__
from longnet_cli.jobs.scoring.measures import Score
from longnet_cli.running.device import check_kernel, peak_memory, random_state
from longnet_cli.running.memory_maps import MappedMemory
from longnet_cli.running.ranks import fsdp
from longnet_cli.running.ranks.launch import Signals, noted_signals
from longnet_cli.running.ranks.ranks import ALONE, Ranks

from .checkpoint import (
    Checkpoints,
    checkpoints_in,
    frozen_digest,
    read_checkpoint,
    restore,
    run_tensors,
)
from .costs import costly_evaluation, stored_bytes
from .initial_model import build_model, change_layers
from .limits import check_memory, check_ranks
from .metrics import Metrics, MetricsLog
from .objective import backward, evaluate, inputs_and_targets
from .optimizer import build_optimizer
from .recipe import Recipe, Stage
from .run_folder import BEST, CHECKPOINTS, RECIPE, Resume, find_checkpoint
from .training_data import build_data
from .windows import Batch


@dataclass(frozen=True)
class TrainResult:
    """The result of a run; `loss` is the last reported mean, nats per token, NaN where nothing was left to do.

    `best` is the lowest held-out loss, that of the model in best/; None without held-out documents.
    """

    steps: int
    tokens: int
    loss: float
    output: Path
    best: float | None


@dataclass
class Progress:
    """The progress of a run at its last whole step, as state.json has it."""

    step: int = 0
    reported: int = 0  # the last step whose line of metrics is written, with its evaluation
    data: dict[str, Any] | None = None  # the position in the windows of the current stage
    best: float | None = None  # the lowest held-out loss so far
    held_out: str | None = (
        None  # of the documents that have this loss: `TrainingData.held_out_digest`
    )


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    device: torch.device | str = "cpu",
    tokenizer_differs: bool = False,
    resume: Resume = True,
    ranks: Ranks = ALONE,
    peak: float = 0.0,
    events: Events = Events(),  # noqa: B008
) -> TrainResult:
    """Train a model by a recipe and write it to the directory `output`; continue an earlier run where it ended.

    `output` gets metrics.jsonl, recipe.json, checkpoints/ (every `save_every` steps or `save_minutes`, and when the run
    is stopped; the newest `keep` stay), best/ (the model with the lowest held-out loss) and at the end, or when
    stopped, the model. SIGINT, SIGTERM and SIGHUP stop the run (raising KeyboardInterrupt or SystemExit). A signal acts
    between two chunks, and the state of the last whole step is saved; with sharded weights or several groups of ranks,
    between two steps.

    `resume` is True (continue from the newest undamaged checkpoint in `output`, if any), False (refuse a folder that
    has one), or the path of a checkpoint or a run. A resumed run gives the numbers of an uninterrupted run, bit by bit
    on a CPU with as many processes.
    The tokenizer of the model `recipe.init` must be the recipe's, unless `tokenizer_differs`. The `ranks` of a group
    share each sequence, `train.chunk` tokens each, and the groups share the sequences of a step; rank 0 writes. `peak`,
    the `matmul_peak` of a rank, is for the MFU; 0 if it is unknown. Prints nothing: `events` are told of the begin,
    each step and each evaluation; they get a note about each damaged checkpoint, and those of `Recipe.notes` for a new
    run.

    Raises ConfigError for a model, tokenizer or checkpoint that does not fit the recipe, DataError for too little data,
    CheckpointError when all checkpoints are damaged, LongNetError when the loss is no longer finite or jumps, or when
    something cannot be written.
    """
    run = _TrainingRun(recipe, Path(output), torch.device(device), ranks, tokenizer_differs, events)
    run.log.peak = peak * ranks.world
    with locked_folder(run.output) if ranks.writes else nullcontext():
        run.resume(resume)
        for line in () if run.progress.step else recipe.notes():
            events.note(line)
        events.begin(run.progress.step, run.log.tokens)
        with noted_signals(ranks.largest) as signals:
            return run.go(signals)


class _TrainingRun:
    """A run: its recipe, its data, its model, and its state, which is that of the last whole step."""

    signals: Signals  # while it goes

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        device: torch.device,
        ranks: Ranks,
        tokenizer_differs: bool,
        events: Events,
    ) -> None:
        self.recipe = recipe
        self.output = output
        self.device = device
        self.ranks = ranks
        self.events = events
        # first, what refuses a recipe before data are read, and then before weights are made
        check_memory(recipe)
        check_kernel(device, recipe.train.dtype, recipe.model.head_dim)
        check_ranks(recipe, ranks)
        self.allocate: Callable[..., Tensor] = torch.empty
        if recipe.train.spill or device.type == "cpu":
            self.allocate = MappedMemory(
                stored_bytes(recipe, device, ranks), recipe.train.spill
            ).empty
        # a LongNet's weights are all in the checkpoint
        initial = (
            recipe.init if recipe.pretrained or not checkpoints_in(output / CHECKPOINTS) else None
        )
        self.data = build_data(recipe, ranks, initial, tokenizer_differs, events.note)
        self.held_out = self.data.held_out_digest(recipe.train.held_out_context)
        if line := costly_evaluation(recipe, self.data.held_out.lengths.tolist()):
            events.note(line)
        self.model = build_model(recipe, initial, events.note).to(device).train()
        self.frozen = frozen_digest(self.model)
        if recipe.parallel.shard == "full":
            fsdp.shard_weights(self.model, ranks)
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        change_layers(self.model, recipe.train)
        # the weights are the same on all ranks, dropout is not
        torch.manual_seed(recipe.train.seed + ranks.rank)
        self.progress = Progress()
        self.random = random_state(device)
        self.log = MetricsLog(output / "metrics.jsonl" if ranks.writes else None)
        self.checkpoints = Checkpoints(output / CHECKPOINTS, ranks, recipe.train.keep)
        self.saved_at = time.monotonic()

    def resume(self, resume: Resume) -> None:
        """Restore a checkpoint, if there is one and `resume` allows it. Open the run's folder and log."""
        checkpoint = find_checkpoint(self.output, resume, self.ranks, self.events.note)
        log: dict[str, Any] = {}
        if checkpoint:
            state = read_checkpoint(checkpoint)
            self._refuse_other(state, checkpoint)
            restore(checkpoint, self.model, self.optimizer, self.device, self.ranks)
            self.progress = Progress(**state["progress"])
            self._compare_held_out()
            log = state["log"]
            self.random = random_state(self.device)
            if checkpoint.parent == self.checkpoints.folder:
                self.checkpoints.saved = self.progress.step
            if self.progress.data:
                self.data.windows[self._stage_of(self.progress.step)].resume(self.progress.data)
        elif (self.output / RECIPE).exists():
            self.events.note(
                f"{self.output}: a run that has saved no checkpoint, so it starts again (train.save_every)"
            )
        if self.ranks.writes:
            write_file(
                self.output / RECIPE, (self.recipe.model_dump_json(indent=2) + "\n").encode()
            )
        self.log.resume(log, self.progress.reported)

    def _compare_held_out(self) -> None:
        """Forget the lowest held-out loss if it is one of other documents. Older runs do not know their documents."""
        progress = self.progress
        if progress.best is None or progress.held_out in (None, self.held_out):
            return
        progress.best = None
        self.events.note(
            "the held-out documents, or their windows, are not those of the steps before: the lowest held-out loss "
            "starts anew, and so does best/"
        )

    def _refuse_other(self, state: dict[str, Any], checkpoint: Path) -> None:
        """Raise ConfigError for a checkpoint of another run."""
        if changed := self.recipe.changed_since(state["recipe"]):
            raise ConfigError(
                f"{checkpoint} was made with another {', '.join(changed)}: go on with the recipe of its run, or "
                "start another run from its model with --init"
            )
        if state["tokenizer"] != self.data.tokenizer.sha256:
            raise ConfigError(
                f"{checkpoint} was made with another tokenizer than {self.recipe.data.tokenizer}: name the one of "
                "its run with --tokenizer"
            )
        if state["frozen"] != self.frozen:
            raise ConfigError(
                f"{checkpoint} was trained with other weights than those now in {self.recipe.init}"
            )

    def go(self, signals: Signals) -> TrainResult:
        """Train to the end, or until a signal or a failure."""
        self.signals = signals
        gc.freeze()  # a collection need not walk the documents, the model and what was imported
        try:
            line = self._report()  # the run may have stopped before that of its last step
            batches = self._batches()
            following = next(batches, None)
            while following:
                batch, position = following
                following = next(batches, None)
                tokens = self._step(batch, position, following and following[0])
                of_step = None
                try:
                    of_step = self._report()
                finally:  # also if a signal ends its evaluation: the step is done, and is saved
                    self.events.step(tokens, of_step)
                line = of_step or line
                signals.look()
                if self._save_is_due():
                    self.save()
        except (KeyboardInterrupt, SystemExit):
            self._end()
            raise
        except DataError as error:
            # the other ranks wait for this one in a collective
            if self.ranks.world > 1 or not self.progress.step:
                raise
            self.save()
            raise DataError(
                f"{error}; the {self.progress.step} steps before it are saved in {self.output}"
            ) from None
        finally:
            gc.unfreeze()
        self._end()
        loss = line.loss if line else math.nan
        done = self.progress
        return TrainResult(done.step, self.log.tokens, loss, self.output, done.best)

    def _batches(self) -> Iterator[tuple[Batch, dict[str, object]]]:
        """Yield (a batch of windows, the position after it) for each step that is left."""
        end = 0
        for stage, windows in zip(self.recipe.train.stages, self.data.windows, strict=True):
            end += stage.steps
            yield from islice(windows, min(stage.steps, max(0, end - self.progress.step)))

    def _step(self, batch: Batch, position: dict[str, Any], following: Batch | None) -> int:
        """Run one optimizer step; return the tokens that all ranks read. Nothing changes before the optimizer runs.

        Meanwhile, the first tokens of the `following` batch are read.
        """
        recipe = self.recipe
        train = self.recipe.train
        ranks = self.ranks
        eos_id = self.data.eos_id
        # the ids, what each of them predicts, how many targets all ranks have; then where documents start
        ids, targets, targets_of_all_ranks = inputs_and_targets(
            batch,
            recipe,
            self.device,
            ranks,
            eos_id=eos_id,
            seed=position["seed"],
        )
        rows, length = ids.shape
        starts = [
            [0] if train.across_documents else batch.document_starts(row, length)
            for row in range(rows)
        ]
        # the loss, and its gradients: at most train.chunk tokens have activations at a time
        nll = backward(
            self.model,
            ids,
            targets,
            chunk=train.chunk,
            scale=1 / targets_of_all_ranks,
            dtype=train.dtype,
            starts=starts,
            ranks=ranks,
            allocate=self.allocate,
            on_chunk=self._look_between_chunks,
        )
        fsdp.sum_gradients(self.model, ranks, nll)
        total_norm = fsdp.clip_gradients(self.model, recipe.optimizer.clip)
        # with --sp, a sequence's first chunk is shared: nothing is read ahead
        if following and ranks.sp == 1:
            with suppress(Exception):  # which is raised when its own step reads them
                following.fetch(train.chunk + 1)  # while the device computes
        # The only wait for the device
        loss, grad_norm = torch.stack((nll / targets_of_all_ranks, total_norm.double())).tolist()
        self._refuse_divergence(loss, grad_norm, position)
        self._update_weights()
        # the new state: a run that resumes goes on from here
        self.progress.step += 1
        self.progress.data = position
        self.random = random_state(self.device)
        documents = [stop - start for row in starts for start, stop in pairwise([*row, length])]
        flops = recipe.model.training_flops(documents, train.predicted)
        seen = rows * length * ranks.dp
        # other groups' documents are assumed to be alike
        self.log.add(seen, flops * ranks.dp, loss, grad_norm)
        return seen

    def _update_weights(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.progress.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _look_between_chunks(self) -> None:
        """Act on a signal, unless groups may have different numbers of chunks, or weights are gathered between them."""
        if self.ranks.dp == 1 and not fsdp.is_sharded(self.model):
            self.signals.look()

    def _refuse_divergence(self, loss: float, grad_norm: float, position: dict[str, Any]) -> None:
        """Save, and raise LongNetError, before a step that would spoil the weights."""
        limit = (
            math.inf if self.log.lowest is None else self.log.lowest + self.recipe.train.loss_jump
        )
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite and loss <= limit:
            return
        self._end()
        windows = self.data.windows[self._stage_of(self.progress.step + 1)]
        last = position["step"]
        first = last - windows.rows * windows.world
        places = windows.places(first, last)
        where = self.output if self.output.is_absolute() else f"./{self.output}"
        named = ", ".join(places[:3])
        if len(places) > 3:
            named += f" and {len(places) - 3} more"
        raise LongNetError(
            f"the loss {'jumps' if finite else 'is not finite'} at step {self.progress.step + 1} (loss {loss:.4g}, "
            f"gradient norm {grad_norm:.4g}), in windows {first} to {last - 1}, from {named}; "
            f"the state before that step is saved in {self.output}: lower optimizer.lr or lengthen "
            f"schedule.warmup_steps, and start another run with --init {where}"
        )

    def _stage_of(self, step: int) -> int:
        """Return the index of the stage that a step (1, 2, ...) belongs to."""
        return bisect_left(
            list(accumulate(stage.steps for stage in self.recipe.train.stages)), step
        )

    def _report(self) -> Metrics | None:
        """Evaluate and write a line of metrics for the last step, if they are due and not done yet."""
        train = self.recipe.train
        progress = self.progress
        if progress.reported == progress.step:
            return None
        stage = train.stages[self._stage_of(progress.step)]
        last = progress.step == train.steps
        held_out = None
        if self.data.held_out and (last or progress.step % train.evaluate_every == 0):
            with self.log.paused():
                held_out = self._evaluate(stage)
        line = None
        if held_out or last or progress.step % train.log_every == 0:
            rate = self.recipe.learning_rate(progress.step - 1)
            memory = peak_memory(self.device)
            line = self.log.write(
                progress.step,
                rate,
                stage.seq_len,
                memory=memory,
                held_out=held_out,
            )
        progress.reported = progress.step
        return line

    def _evaluate(self, stage: Stage) -> Score:
        """Return the score of the held-out documents. Write best/ if the loss is lower than ever."""
        read = 0
        total = int(self.data.held_out.lengths.sum())
        sharded = fsdp.is_sharded(self.model)

        def on_part(tokens: int) -> None:
            nonlocal read
            read += tokens
            self.events.evaluation(min(1.0, read / total))
            if not sharded:
                self.signals.look()

        with fsdp.whole_weights(self.model):
            try:
                score = evaluate(self.model, self.data, self.recipe, stage, self.ranks, on_part)
                loss = score.nll_sum / score.n_tokens
            except NotFiniteError:
                loss = math.nan
        if not math.isfinite(loss):
            raise LongNetError(
                f"the held-out loss is not finite after step {self.progress.step}: lower optimizer.lr or lengthen "
                "schedule.warmup_steps, and start another run"
            )
        if self.progress.best is None or loss < self.progress.best:
            self.progress.best = loss
            self.progress.held_out = self.held_out
            self._write_model(self.output / BEST)
        return score

    def _save_is_due(self) -> bool:
        minutes = self.recipe.train.save_minutes
        due = self.progress.step % self.recipe.train.save_every == 0
        if minutes is not None:
            due |= self.ranks.any(time.monotonic() - self.saved_at > 60 * minutes)
        return due

    def _end(self) -> None:
        self.save()
        self._write_model(self.output)

    def save(self) -> None:
        """Save a checkpoint of the last whole step."""
        versions = {
            "longnet": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        facts = {
            "progress": asdict(self.progress),
            "log": self.log.state(),
            "recipe": self.recipe.model_dump(mode="json"),
            "tokenizer": self.data.tokenizer.sha256,
            "frozen": self.frozen,
            "versions": versions,
        }
        tensors = run_tensors(self.model, self.optimizer, self.random, self.ranks)
        with self.log.paused():
            self.checkpoints.save(self.progress.step, tensors, facts)
        self.saved_at = time.monotonic()

    def _write_model(self, folder: Path) -> None:
        state = fsdp.whole_state(self.model, self.ranks)
        if self.ranks.writes:
            tokenizer = self.data.tokenizer
            eos_id = self.data.eos_id
            self.model.save(folder, tokenizer.to_json(), state, tokenizer.token_of(eos_id))
        self.ranks.barrier()  # otherwise another rank could end, and end this one while it writes
