"""Trackers that get a run's metrics besides metrics.jsonl: TensorBoard, Weights & Biases. Each is an optional extra."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from longnet_cli.errors import ConfigError


class Tracker(Protocol):
    """The interface of every tracker."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the metrics of a step; leave out values that are not numbers."""

    def close(self) -> None:
        """Write what is buffered, and close the tracker."""


class TensorBoard:
    """Event files in `output`/tensorboard, for `tensorboard --logdir`."""

    def __init__(self, output: Path, settings: Mapping[str, Any], step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard") from None
        self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in _numbers(values).items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A Weights & Biases run, as WANDB_PROJECT, WANDB_MODE and others set it, with the recipe as its config."""

    def __init__(self, output: Path, settings: Mapping[str, Any], step: int) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing("wandb") from None
        output.mkdir(parents=True, exist_ok=True)  # otherwise wandb takes a temporary folder
        self.run = wandb.init(dir=str(output), name=output.name, config=dict(settings))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self.run.log(_numbers(values), step=step)

    def close(self) -> None:
        self.run.finish()


_KINDS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def open_trackers(
    names: Sequence[str], output: str | Path, settings: Mapping[str, Any], *, step: int = 0
) -> list[Tracker]:
    """Return the trackers of `train.track`, for a run in the folder `output` with the recipe `settings`.

    A run that continues from `step` repeats the steps after it, so TensorBoard drops its values for them.

    Raises ConfigError, of one line, for a tracker that is not installed.
    """
    return [_KINDS[name](Path(output), settings, step) for name in dict.fromkeys(names)]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }


def _missing(name: str) -> ConfigError:
    return ConfigError(f"train.track: {name} is not installed: pip install 'longnet-cli[{name}]'")
