"""Trackers get the numbers of each line, and one that is not installed is one line.

The test with real event files needs the extra `tensorboard`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from longnet_cli.basics.errors import ConfigError
from longnet_cli.jobs.training.metrics import open_trackers
from longnet_cli.jobs.training.recipe import load_recipe


def test_none_is_the_default(tmp_path: Path) -> None:
    recipe = load_recipe("longnet-125m", {})
    assert recipe.train.track == []
    assert open_trackers(recipe.train.track, tmp_path, {}) == []
    with pytest.raises(ConfigError, match=r"train\.track\.0: Input should be 'tensorboard' or 'wandb'"):
        load_recipe("longnet-125m", {"train.track": ["tensorbord"]})


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_one_that_is_missing_says_how_to_get_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=rf"{name} is not installed: pip install 'longnet-cli\[{name}\]'"):
        open_trackers([name], tmp_path, {})


def test_tensorboard_has_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = open_trackers(["tensorboard", "tensorboard"], tmp_path, {})
    for step in (10, 20):
        tracker.log(step, {"step": step, "loss": 30 / step, "held_out_loss": None, "name": "x"})
    tracker.close()
    (tracker,) = open_trackers(["tensorboard"], tmp_path, {}, step=10)  # resumed
    tracker.log(20, {"loss": 2.0})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 3.0), (20, 2.0)]
