"""The optimizers of a net's parameters, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets.net import Net
from longnet_cli.running.ranks.fsdp import is_sharded

from .recipe import OptimizerRecipe, ScheduleRecipe


def build_optimizers(model: Net, recipe: OptimizerRecipe) -> list[torch.optim.Optimizer]:
    """Return fused AdamW and, if the recipe asks for it, Muon for the matrices of the layers. Only matrices decay.

    If weights are to be sharded over ranks (`running.ranks.fsdp`), shard them first. Raises ConfigError for Muon on
    sharded weights.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    of_layers = {id(p) for block in model.blocks for p in block.parameters()}
    tables = [p for p in trained if p.dim() >= 2 and id(p) not in of_layers]
    matrices = [p for p in trained if p.dim() >= 2 and id(p) in of_layers]
    vectors = [p for p in trained if p.dim() < 2]
    muon = recipe.name == "muon"
    groups = [
        {"params": tables if muon else tables + matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if muon and is_sharded(model):
        raise ConfigError('optimizer.name = "muon" works on whole matrices: give --shard none, or take "adamw"')
    adamw = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)
    if not muon:
        return [adamw]
    # Muon's updates are scaled to the size of AdamW's, so one learning rate serves both
    return [
        _Muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        adamw,
    ]


class _Muon(torch.optim.Muon):
    """Muon as torch has it, but in fp32 on a CPU: torch's is in bf16, for which most CPUs have no instructions."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with _Fp32ForBf16() if self.param_groups[0]["params"][0].is_cpu else nullcontext():
            return super().step(closure)


class _Fp32ForBf16(TorchFunctionMode):
    """Makes `x.bfloat16()` a copy in fp32."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


def learning_rate(step: int, total: int, peak: float, schedule: ScheduleRecipe) -> float:
    """Return the learning rate of a step, 0 .. total - 1."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.decay == "constant":
        return peak
    done = (step - schedule.warmup_steps) / max(1, total - 1 - schedule.warmup_steps)
    share = (1 + math.cos(math.pi * done)) / 2 if schedule.decay == "cosine" else (1 - done) ** schedule.power
    return peak * (schedule.final + (1 - schedule.final) * share)
