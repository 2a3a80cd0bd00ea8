"""AdamW over a net's parameters, and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from .recipe import OptimizerRecipe, ScheduleRecipe


def build_optimizer(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.AdamW:
    """Fused AdamW; only matrices decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)


def learning_rate(step: int, total: int, peak: float, schedule: ScheduleRecipe) -> float:
    """The rate of step 0 .. total - 1."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.decay == "constant":
        return peak
    done = (step - schedule.warmup_steps) / max(1, total - 1 - schedule.warmup_steps)
    share = (1 + math.cos(math.pi * done)) / 2 if schedule.decay == "cosine" else 1 - done
    return peak * (schedule.final + (1 - schedule.final) * share)
