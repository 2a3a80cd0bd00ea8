"""The optimizers of a run: AdamW and, for the matrices of the layers, Muon."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets.net import Net
from longnet_cli.running.ranks.fsdp import is_sharded

from .recipe import OptimizerRecipe


def build_optimizers(model: Net, recipe: OptimizerRecipe) -> list[Optimizer]:
    """Return fused AdamW and, if the recipe asks for it, Muon for the matrices of the layers.

    All matrices decay, embeddings too; biases and the weights of norms do not.

    If weights are to be sharded over ranks (`running.ranks.fsdp`), shard them first. Raises ConfigError for Muon on
    sharded weights.
    """
    in_layers = {*map(id, nn.ModuleList(model.layer_modules).parameters())}
    tables = list[Tensor]()
    matrices = list[Tensor]()
    vectors = list[Tensor]()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif id(parameter) in in_layers:
            matrices.append(parameter)
        else:
            tables.append(parameter)
    if recipe.name == "adamw":
        return [_adamw(tables + matrices, vectors, recipe)]
    if any(matrix.dim() > 2 for matrix in matrices):
        raise ConfigError(
            'optimizer.name = "muon" works on matrices, and layers of this model have weights of more '
            'dimensions: take "adamw"'
        )
    if is_sharded(model):
        raise ConfigError(
            'optimizer.name = "muon" works on whole matrices: give --shard none, or take "adamw"'
        )
    muon = _Muon(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return [muon, _adamw(tables, vectors, recipe)]


def _adamw(decaying: list[Tensor], others: list[Tensor], recipe: OptimizerRecipe) -> Optimizer:
    groups = [
        {"params": decaying, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)


class _Muon(torch.optim.Muon):
    """Muon with torch's settings and state, but in fp32 on a CPU: most CPUs have no instructions for torch's bf16."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                mean = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = _orthogonal(p.grad.lerp(mean, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # of the size of AdamW's updates, so one learning rate serves both
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def _orthogonal(x: Tensor) -> Tensor:
    """Return a matrix with the singular vectors of `x`, and singular values near 1, by Newton-Schulz (Jordan 2024)."""
    is_tall = len(x) > x.shape[1]
    wide = x.T if is_tall else x
    wide = wide.to(torch.float32 if x.is_cpu else torch.bfloat16)
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        square = wide @ wide.T
        powers = torch.addmm(square, square, square, beta=-4.775, alpha=2.0315)
        wide = torch.addmm(wide, powers, wide, beta=3.4445)
    return wide.T if is_tall else wide
