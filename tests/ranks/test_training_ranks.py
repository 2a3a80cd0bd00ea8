"""A run of several ranks is that of one process, whole or sharded, and so is one that goes on from its checkpoint."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assert_same_model, metrics_of, write_corpus
from builders import recipe_with_checkpoints as recipe
from many_ranks import mesh, run_ranks

from longnet_cli.jobs.training.checkpoint import checkpoints_in, read_checkpoint
from longnet_cli.jobs.training.loop import train
from longnet_cli.running.ranks.ranks import Ranks

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
        train(recipe(corpus, **SETTINGS, **{"parallel.shard": shard}), output, ranks=ranks, on_step=on_step)

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
    *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in ((1, 2, "full"), (2, 1, "none"), (2, 1, "full"))),
    pytest.param(2, 2, "none", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dp", "sp", "shard"), MESHES)
def test_stopped_and_resumed_over_ranks(dp: int, sp: int, shard: str, corpus: Path, tmp_path: Path) -> None:
    train_once(1, corpus, tmp_path / "alone", "none")
    run_ranks(dp * sp, tmp_path, train_on, dp, corpus, shard, (tmp_path / "many", 0), (tmp_path / "stopped", 5))
    expected = losses(tmp_path / "alone")
    assert len(expected) == 10
    for found, wanted in zip(losses(tmp_path / "many"), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    assert_same_model(tmp_path / "many", tmp_path / "alone", 1e-3)
    assert_same_model(tmp_path / "many/best", tmp_path / "alone/best", 1e-3)

    newest = checkpoints_in(tmp_path / "stopped/checkpoints")[0]
    assert read_checkpoint(newest)["progress"]["step"] == 5
    train(recipe(corpus, **SETTINGS), tmp_path / "alone again", resume=str(newest))  # on one process
    for found, wanted in zip(losses(tmp_path / "alone again"), expected[5:], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    run_ranks(dp * sp, tmp_path, train_on, dp, corpus, shard, (tmp_path / "stopped", 0))
    assert_same_model(tmp_path / "stopped", tmp_path / "many", 1e-6)
    for found, wanted in zip(losses(tmp_path / "stopped"), losses(tmp_path / "many"), strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)
