"""Weights with a share on each rank = weights whole on each = one process: losses, gradients, steps; over gloo.

A run of several ranks is that of one process, whole or sharded, and so is one that goes on from its checkpoint.
"""

from __future__ import annotations

import random
import signal
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assert_same_model, metrics_of, write_corpus
from builders import recipe_with_checkpoints as recipe
from many_ranks import TOLERANCE, in_both_types, mesh, off, random_pattern, run_ranks, together
from pattern_nets import EOS, draw, net
from strategies import document_starts
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from longnet_cli.basics.events import Events
from longnet_cli.jobs.training.checkpoint import checkpoints_in, read_checkpoint
from longnet_cli.jobs.training.loop import train
from longnet_cli.jobs.training.objective import backward
from longnet_cli.jobs.training.optimizer import build_optimizer
from longnet_cli.jobs.training.recipe import OptimizerRecipe
from longnet_cli.nets.longnet import LongNet
from longnet_cli.running.ranks.fsdp import (
    clip_gradients,
    shard_weights,
    sum_gradients,
    whole_state,
    whole_tensor,
    whole_weights,
)
from longnet_cli.running.ranks.ranks import Ranks

LONGEST = 10_000  # a chunk that holds everything


def batch_of_all(
    pick: random.Random, ranks: Ranks, ignored: str
) -> tuple[Tensor, Tensor, list[list[int]] | None]:
    """Windows of documents for all groups together, some with nothing to learn from."""
    rows, tokens, seed = (
        ranks.dp * pick.randint(1, 2),
        pick.choice([1, 40, pick.randint(1, 160)]),
        pick.randrange(1000),
    )
    ids, targets = draw(rows, tokens, seed).clamp_(max=EOS - 1), draw(rows, tokens, seed + 9)
    for _ in range(pick.choice([0, 2, 9])):
        # groups have other numbers of forwards
        ids[pick.randrange(rows), pick.randrange(tokens)] = EOS
    if ignored == "a group":
        targets[: rows // ranks.dp] = -100
    elif ignored == "a rank":
        targets[:, : tokens // ranks.sp + 1] = -100
    return ids, targets, document_starts(ids, EOS) if pick.choice([True, False]) else None


def check_gradients(model: LongNet, expected: LongNet, dtype: torch.dtype, what: str) -> None:
    floor = 0.1 * max(p.grad.double().norm().item() for p in expected.parameters())
    for (name, p), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        error = off(whole_tensor(p.grad), other.grad, floor)
        assert error <= TOLERANCE[dtype][1], f"{what}: {name} is off by {error:.2e}"


def steps(dtype: torch.dtype, dp: int) -> None:
    """Two optimizer steps each: the second one has weights that the first one changed."""
    ranks = mesh(dp)
    for seed, (sharded, chunked) in enumerate(product([False, True], repeat=2)):
        pick = random.Random(seed + 10 * dtype.itemsize)
        pattern = random_pattern(pick)
        alone, model = (net(pattern).to(dtype) for _ in range(2))
        if sharded:
            shard_weights(model, ranks)
            share = sum(p.to_local().numel() for p in model.parameters())
            assert share <= alone.config.num_parameters() / ranks.world * 1.2 + 50
        if sharded and chunked:
            for layer in model.layers:  # as `train.activation_checkpointing` does
                layer.forward = partial(activation_checkpoint, layer.forward, use_reentrant=False)
        # in fp32 AdamW makes steps of gradients that are rounding alone, as that of a bias of keys
        kinds = OptimizerRecipe(lr=1e-2), torch.optim.SGD
        optimizers = [
            build_optimizer(x, kinds[0])
            if dtype is torch.float64
            else kinds[1](x.parameters(), lr=0.1)
            for x in (alone, model)
        ]
        for step in range(2):
            what = f"problem {seed}, step {step}, rank {ranks.rank}, {'sharded' if sharded else 'whole'}"
            ids, targets, starts = batch_of_all(
                pick, ranks, ["a group", "a rank", "nothing"][(seed + step) % 3]
            )
            chunk = pick.randint(3, 90) if chunked else LONGEST
            loss = backward(
                alone, ids, targets, chunk=LONGEST, starts=starts, scale=1 / targets.numel()
            )
            mine = slice(ranks.dp_rank * len(ids) // dp, (ranks.dp_rank + 1) * len(ids) // dp)
            part = backward(
                model, ids[mine], targets[mine], chunk=chunk, starts=starts and starts[mine], scale=1 / targets.numel(),
                ranks=ranks,
            )  # fmt: skip
            sum_gradients(model, ranks, part)
            assert off(part, loss, 0) <= TOLERANCE[dtype][0] * 10, what
            check_gradients(model, alone, dtype, what)
            norms = [clip_gradients(x, 0.01).item() for x in (alone, model)]
            assert norms[1] == pytest.approx(norms[0], rel=10 * TOLERANCE[dtype][1])
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        state, expected = whole_state(model, ranks), alone.state_dict()
        assert list(state) == (list(expected) if ranks.writes else [])
        for name in state:
            assert off(state[name], expected[name], 1.0) <= max(TOLERANCE[dtype][1], 1e-9), name


@pytest.mark.parametrize(
    ("dp", "sp"),
    [(2, 1), pytest.param(1, 2, marks=pytest.mark.ci), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_steps_are_those_of_one_process(dp, sp, tmp_path):
    run_ranks(dp * sp, tmp_path, in_both_types, steps, dp)


def counted_collectives() -> None:
    """However many chunks and documents: one gather and one sum of each block, and of the root, a step."""
    calls: list[str] = []
    for name in ("foreach_all_gather", "foreach_reduce"):
        original = getattr(_fsdp_param_group, name)

        def counting(*args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            calls.append(name)
            return original(*args, **options)

        setattr(_fsdp_param_group, name, counting)
    model = net(random_pattern(random.Random(1)), layers=3)
    shard_weights(model, mesh(1))
    ids = draw(2, 200)
    # the first row is many documents, some longer than both chunks; the second is one
    ids[0, 50:] = EOS
    ids[0, 120::7] = 0
    for _ in range(2):
        calls.clear()
        backward(model, ids, ids, chunk=20, starts=document_starts(ids, EOS), ranks=together())
        assert Counter(calls) == {"foreach_all_gather": 4, "foreach_reduce": 4}
        model.zero_grad()


def test_a_step_gathers_and_sums_each_block_once(tmp_path):
    run_ranks(2, tmp_path, counted_collectives)


def uneven_work() -> None:
    """Ranks that run the net other numbers of times, or not at all, do not wait for each other."""
    ranks = mesh(2)
    model = net(random_pattern(random.Random(0)))
    expected = model(draw(1, 30)).detach()
    shard_weights(model, ranks)
    for _ in range(2):
        with whole_weights(model), torch.no_grad():
            for _ in range(ranks.rank):
                torch.testing.assert_close(model(draw(1, 30)), expected)
        ranks.sum(torch.zeros(1))
        backward(model, draw(1, 30), draw(1, 30, seed=1), chunk=LONGEST)
        model.zero_grad()


def test_ranks_may_evaluate_different_amounts(tmp_path):
    run_ranks(2, tmp_path, uneven_work)


# no dropout, which draws other numbers on each rank
SETTINGS: dict[str, Any] = {
    "model.dropout": 0.0,
    "train.stages": [{"seq_len": 32, "steps": 6}, {"seq_len": 128, "steps": 4}],
    "train.log_every": 1,
    "train.evaluate_every": 4,
    "train.save_every": 3,
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path, 400, 9)


def train_on(dp: int, corpus: Path, shard: str, *runs: tuple[Path, int]) -> None:
    """Runs of this process's ranks; all get SIGTERM when `stop` steps are done."""
    for output, stop in runs:
        train_once(dp, corpus, output, shard, stop)


def train_once(dp: int, corpus: Path, output: Path, shard: str, stop: int = 0) -> None:
    ranks = mesh(dp) if torch.distributed.is_initialized() else Ranks()

    def on_step(tokens: int, line: object) -> None:
        nonlocal stop
        stop -= 1
        if stop == 0 and ranks.rank == ranks.world - 1:
            signal.raise_signal(signal.SIGTERM)

    def run() -> None:
        train(
            recipe(corpus, **SETTINGS, **{"parallel.shard": shard}),
            output,
            ranks=ranks,
            events=Events(step=on_step),
        )

    if stop:
        with pytest.raises(SystemExit, match="143"):
            run()
    else:
        run()


def losses(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["held_out_loss"] or 0) for line in metrics_of(run)]


MESHES = [
    (1, 2, "none"),
    pytest.param(2, 2, "full", marks=pytest.mark.ci),
    *(
        pytest.param(*mesh, marks=pytest.mark.slow)
        for mesh in ((1, 2, "full"), (2, 1, "none"), (2, 1, "full"))
    ),
    pytest.param(2, 2, "none", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dp", "sp", "shard"), MESHES)
def test_stopped_and_resumed_over_ranks(dp, sp, shard, corpus, tmp_path):
    train_once(1, corpus, tmp_path / "alone", "none")
    run_ranks(
        dp * sp,
        tmp_path,
        train_on,
        dp,
        corpus,
        shard,
        (tmp_path / "many", 0),
        (tmp_path / "stopped", 5),
    )
    expected = losses(tmp_path / "alone")
    assert len(expected) == 10
    for found, wanted in zip(losses(tmp_path / "many"), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    assert_same_model(tmp_path / "many", tmp_path / "alone", 1e-3)
    assert_same_model(tmp_path / "many/best", tmp_path / "alone/best", 1e-3)

    newest = checkpoints_in(tmp_path / "stopped/checkpoints")[0]
    assert read_checkpoint(newest)["progress"]["step"] == 5
    # on one process
    train(recipe(corpus, **SETTINGS), tmp_path / "alone again", resume=str(newest))
    for found, wanted in zip(losses(tmp_path / "alone again"), expected[5:], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    run_ranks(dp * sp, tmp_path, train_on, dp, corpus, shard, (tmp_path / "stopped", 0))
    assert_same_model(tmp_path / "stopped", tmp_path / "many", 1e-6)
    for found, wanted in zip(losses(tmp_path / "stopped"), losses(tmp_path / "many"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)
