"""The optimizer of a run."""

import torch

from longnet_cli.nets.net import Net

from .recipe import OptimizerRecipe


def build_optimizer(model: Net, recipe: OptimizerRecipe) -> torch.optim.AdamW:
    """Return fused AdamW of what is trained. Matrices decay, embeddings too; biases and the weights of norms do not.

    If weights are to be sharded over ranks (`running.ranks.fsdp`), shard them first.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)
