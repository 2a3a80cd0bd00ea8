"""What the training loop costs beside its steps: `pytest -s -m slow tests/jobs/test_loop_overhead.py` prints it.

`train` reads windows, writes metrics and looks for signals; the bare loop is gradients, clipping and the
optimizer, on batches that are in memory. Both train the same model, one step of the one after one step of the other,
so that whatever else the machine does slows both alike. Neither saves or evaluates while the clock runs.
"""

from __future__ import annotations

import statistics
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from longnet_cli.data.inputs import Inputs
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.jobs.training.gradients import backward
from longnet_cli.jobs.training.loop import train
from longnet_cli.jobs.training.optimizer import build_optimizers, learning_rate
from longnet_cli.jobs.training.recipe import Recipe, load_recipe
from longnet_cli.jobs.training.windows import TokenStream, TokenWindows
from longnet_cli.nets.longnet import LongNet

STEPS = 20  # of a run: two lines of metrics
SHAPES = {
    "seq 512, batch 2, 4 heads x 32": (512, 2, 32, 128, 1024),
    "seq 128, batch 8, 4 heads x 16": (128, 8, 16, 64, 257),
}


@pytest.mark.slow
@pytest.mark.parametrize(("seq", "batch", "head_dim", "base", "vocab"), SHAPES.values(), ids=SHAPES.keys())
def test_the_loop_takes_the_steps_of_a_bare_one(
    tmp_path: Path, seq: int, batch: int, head_dim: int, base: int, vocab: int
) -> None:
    """The same weights, bit by bit: so the two are the same work, and what differs in time is the loop."""
    levels = range((seq // base).bit_length())
    model = {
        "vocab_size": vocab, "dim": 4 * head_dim, "num_layers": 2, "num_heads": 4, "ffn_dim": 16 * head_dim,
        "position": "rope",
        "segment_lengths": [base << i for i in levels], "dilation_rates": [1 << i for i in levels],
    }  # fmt: skip
    settings = {
        "model": model, "train.stages": [{"seq_len": seq, "steps": STEPS}], "train.batch_tokens": batch * seq,
        "schedule.warmup_steps": 0,
    }  # fmt: skip
    shares, steps = [], []
    for run in range(5):
        folder = tmp_path / str(run)
        folder.mkdir()
        looped, bare, net = side_by_side(load_recipe(None, settings), folder)
        trained = LongNet.from_pretrained(folder / "run").state_dict()
        assert all(tensor.equal(trained[name]) for name, tensor in net.state_dict().items())
        shares.append(bare / looped)
        steps.append(looped / STEPS)
    print(
        f"\n{statistics.median(steps) * 1e3:.0f} ms a step, {statistics.median(shares):.1%} of the bare loop's tokens/s"
    )


def side_by_side(recipe: Recipe, folder: Path) -> tuple[float, float, LongNet]:
    """Seconds of all steps of `train`, those of the bare loop, and the net of the latter; the other's is folder/run."""
    (stage,) = recipe.train.stages
    rows, tokenizer = recipe.train.windows(stage), Tokenizer.bytes()
    tokens = np.random.default_rng(0).integers(256, size=(stage.steps * rows + 1) * stage.seq_len)
    table = pa.table({"input_ids": pa.array([tokens], pa.large_list(pa.int64()))})
    data = folder / "tokens.arrow"
    with pa.ipc.new_file(data, table.schema) as file:
        file.write_table(table)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": [str(data)]})})
    stream = TokenStream(list(Inputs([str(data)], tokenizer, column=None).documents()), 256)
    windows = TokenWindows([stream], stage.seq_len, rows, recipe.train.seed)
    taken = [batch for batch, _ in islice(windows, stage.steps)]
    batches = [torch.from_numpy(batch.read_all()) for batch in taken]

    torch.manual_seed(recipe.train.seed)
    model = LongNet(recipe.model).train()
    optimizers = build_optimizers(model, recipe.optimizer)
    looped = bare = began = 0.0

    def bare_step(step: int) -> None:
        ids, targets = batches[step][:, :-1], batches[step][:, 1:]
        scale, dtype = 1 / targets.numel(), recipe.train.dtype
        starts = [taken[step].document_starts(row, stage.seq_len) for row in range(rows)]
        backward(model, ids, targets, chunk=recipe.train.chunk, scale=scale, dtype=dtype, starts=starts)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, stage.steps, recipe.optimizer.lr, recipe.schedule)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def begin(*_: object) -> None:
        nonlocal began
        began = time.perf_counter()

    steps = iter(range(stage.steps))

    def take_turns(*_: object) -> None:
        nonlocal looped, bare
        between = time.perf_counter()
        bare_step(next(steps))
        looped += between - began
        bare += time.perf_counter() - between
        begin()

    train(recipe, folder / "run", on_begin=begin, on_step=take_turns)
    return looped, bare, model
