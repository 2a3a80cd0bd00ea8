"""The op `loop`: what the training loop costs beside its steps.

`train` is `training.loop.train`, which reads windows, writes metrics and looks for signals; `bare` is gradients,
clipping and the optimizer, on batches that are in memory.

Both train the same model on the same batches, one step of the one after one step of the other, so that whatever else
the machine does slows both alike. Neither saves or evaluates while the clock runs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import torch

from longnet_cli.benchmark.measurement import Case, Clocked, synchronize
from longnet_cli.benchmark.model import longnet
from longnet_cli.benchmark.model import train as train_op
from longnet_cli.benchmark.settings import Settings
from longnet_cli.data.sources import read_documents
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.data.windows import TokenStream, TokenWindows
from longnet_cli.model import LongNet
from longnet_cli.training.gradients import backward
from longnet_cli.training.loop import train
from longnet_cli.training.optimizer import build_optimizers, learning_rate
from longnet_cli.training.recipe import Recipe, load_recipe

STEPS = 20  # of a run: two lines of metrics
_PEAK = 1e12  # for the MFU in those lines: what it is matters to nobody


def loop(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """`STEPS` optimizer steps of `s.batch` sequences, by `settings.chunk` tokens if that is given."""
    step, net = train_op(s, "dilated", direction, seq), longnet(s, "dilated", seq)
    row = replace(step.row, op="loop", impl=impl)
    memory = 2 * step.memory_bytes + 2 * 16 * net.parameters  # two nets, and their gradients and moments
    return Clocked(row, STEPS * step.tokens, STEPS * step.flops, 0, memory, lambda: _pair(s, seq).run(impl))


def side_by_side(recipe: Recipe, folder: Path, device: torch.device) -> tuple[dict[str, float], LongNet]:
    """Seconds of all steps, by implementation, and the net of the bare loop; that of the other is in folder/run."""
    (stage,) = recipe.train.stages
    rows, tokenizer = recipe.train.windows(stage), Tokenizer.bytes()
    tokens = np.random.default_rng(0).integers(256, size=(stage.steps * rows + 1) * stage.seq_len)
    table = pa.table({"input_ids": pa.array([tokens], pa.large_list(pa.int64()))})
    with pa.ipc.new_file(folder / "tokens.arrow", table.schema) as file:
        file.write_table(table)
    recipe = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"train": [str(folder / "tokens.arrow")]})}
    )
    stream = TokenStream(list(read_documents(recipe.data.train or [], tokenizer, column=None)), 256)
    windows = TokenWindows([stream], stage.seq_len, rows, recipe.train.seed)
    taken = [batch for batch, _ in islice(windows, stage.steps)]
    batches = [torch.from_numpy(batch.read_all()).to(device) for batch in taken]

    torch.manual_seed(recipe.train.seed)
    model = LongNet(recipe.model).to(device).train()
    optimizers = build_optimizers(model, recipe.optimizer)
    seconds, began = {"train": 0.0, "bare": 0.0}, 0.0

    def bare_step(step: int) -> None:
        ids, targets = batches[step][:, :-1], batches[step][:, 1:]
        backward(
            model,
            ids,
            targets,
            chunk=recipe.train.chunk,
            scale=1 / targets.numel(),
            dtype=recipe.train.dtype,
            starts=[taken[step].document_starts(row, stage.seq_len) for row in range(rows)],
        )
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, stage.steps, recipe.optimizer.lr, recipe.schedule)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def clock() -> float:
        synchronize(device)
        return time.perf_counter()

    def begin(*_: object) -> None:
        nonlocal began
        began = clock()

    steps = iter(range(stage.steps))

    def take_turns(*_: object) -> None:
        between = clock()
        bare_step(next(steps))
        end = clock()
        seconds["train"] += between - began
        seconds["bare"] += end - between
        begin()

    train(recipe, folder / "run", device=device, peak=_PEAK, on_begin=begin, on_step=take_turns)
    return seconds, model


@lru_cache(maxsize=1)  # the rows of one sequence length come as pairs
def _pair(s: Settings, seq: int) -> _Pair:
    """Training by a recipe of `settings`, with the byte tokenizer, on random tokens."""
    config = longnet(s, "dilated", seq).config
    whole = s.batch * seq
    settings = {
        "model": config.model_dump(mode="json") | {"vocab_size": max(config.vocab_size, Tokenizer.bytes().vocab_size)},
        "train.stages": [{"seq_len": seq, "steps": STEPS}],
        "train.batch_tokens": whole,
        "train.chunk": s.chunk or whole,
        "train.dtype": s.dtype,
        "train.save_every": 2 * STEPS,
        "schedule.warmup_steps": 0,
    }
    return _Pair(load_recipe(None, settings), s.device)


class _Pair:
    """Runs of both, of which the row of each gets its part."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.waiting: dict[str, deque[float]] = {"train": deque(), "bare": deque()}

    def run(self, impl: str) -> Callable[[], float]:
        """A run that returns the seconds of its steps."""

        def seconds() -> float:
            if not self.waiting[impl]:
                with TemporaryDirectory() as folder:
                    for name, each in side_by_side(self.recipe, Path(folder), self.device)[0].items():
                        self.waiting[name].append(each)
            return self.waiting[impl].popleft()

        return seconds
