"""The tensors of a run, by name, and their restoration: weights, optimizer state, random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from longnet_cli.model.integrity import tensor_digest
from longnet_cli.runtime.device import random_state, set_random_state
from longnet_cli.runtime.ranks import Ranks

from .checkpoint import load_tensors, tensor_names

Optimizers = Sequence[torch.optim.Optimizer]


def run_tensors(model: nn.Module, optimizers: Optimizers, random: Sequence[Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Return the tensors to save: `model.NAME` and `optimizer.NAME.KEY` of trained weights, `random.RANK.INDEX`."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    tensors = {f"model.{name}": p.detach() for name, p in trained}
    tensors |= {
        f"optimizer.{name}.{key}": value
        for name, p in trained
        for key, value in _state_of(p, optimizers).items()
        if isinstance(value, Tensor)
    }
    return tensors | {f"random.{ranks.rank}.{index}": state for index, state in enumerate(random)}


def frozen_digest(model: nn.Module) -> str | None:
    """Return a digest of the weights that are not trained, and so in no checkpoint; None if all are trained."""
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return tensor_digest(frozen) if frozen else None


def restore(checkpoint: Path, model: nn.Module, optimizers: Optimizers, device: torch.device, ranks: Ranks) -> None:
    """Load a checkpoint's tensors into a net, its fresh optimizers and the random number generators.

    A rank that the checkpoint does not have, because there were fewer, keeps its own random numbers. Raises
    CheckpointError for a checkpoint of another net.
    """
    names = tensor_names(checkpoint)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        for key in _keys(names, f"optimizer.{name}."):
            value = torch.zeros_like(p.detach()) if key != "step" else torch.zeros((), device=p.device)
            _state_of(p, optimizers)[key] = value
    random = random_state(device)
    wanted = run_tensors(model, optimizers, random, ranks)
    if not all(name in names for name in wanted if name.startswith("random.")):
        wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith("random.")}
    load_tensors(checkpoint, wanted)
    set_random_state(random, device)


def _state_of(p: Tensor, optimizers: Optimizers) -> dict[str, Tensor]:
    """Return the state of a parameter in its optimizer: the dict itself, empty before the first step."""
    owner = next(o for o in optimizers if any(p is mine for group in o.param_groups for mine in group["params"]))
    return owner.state[p]


def _keys(names: Iterable[str], prefix: str) -> list[str]:
    rest = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return [key for key in rest if "." not in key]
