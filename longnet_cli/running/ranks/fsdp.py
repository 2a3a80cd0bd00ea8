"""The weights of a net on all ranks of a job: whole on every rank, or sharded over them (FSDP2).

    step          first forward          ...    last backward             optimizer
    each layer    its weights gathered   held   gradients summed, shared  on this rank's share
                  (one all-gather)              out (one reduce-scatter)

Between steps a rank of P has 1/P of the weights, gradients and optimizer states. During a step it has the whole weights
and gradients: with AdamW in fp32 that is 8 + 12/P bytes per parameter at the peak, not 16. In exchange, a step has only
one all-gather and one reduce-scatter per layer, however many chunks and documents it has. Ranks whose batches are cut
into different numbers of forward passes still run the same collectives.

Every function here works with whole and with sharded weights, and with one process. All ranks must call it together.
The net's code knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from longnet_cli.nets.net import Net
from longnet_cli.running.ranks.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def shard_weights(model: Net, ranks: Ranks) -> None:
    """Shard the parameters over all ranks, in place. With one rank, do nothing.

    All ranks must have the same weights, on the device they train on. Make the optimizers after it: their states are
    sharded as well. The mesh is one row of all ranks, because gradients are summed over all of them, whether they share
    a sequence or not.
    """
    if ranks.world == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(
        next(model.parameters()).device.type,
        (ranks.world,),
        mesh_dim_names=("ranks",),
    )
    # the root takes what is in no layer: tables and the final norm
    for module in (*model.layer_modules, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
    for part in _parts(model):
        # no mean: the loss is scaled by the tokens of all ranks
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # a plain sum: gloo has no scaled one


def is_sharded(module: nn.Module) -> bool:
    return hasattr(module, "set_requires_gradient_sync")


def final_backward(model: nn.Module, final: bool) -> None:
    """Tell FSDP whether the next backward pass is the last of the step.

    The last one sums the gradients over the ranks and frees the gathered weights.
    """
    if is_sharded(model):
        net = cast("FSDPModule", model)
        net.set_requires_gradient_sync(final)
        net.set_reshard_after_backward(final)
        net.set_is_last_backward(final)


def sum_gradients(model: nn.Module, ranks: Ranks, *more: Tensor) -> None:
    """Sum the gradients and `more` tensors over all ranks, in place. Sharded gradients are summed already."""
    to_sum = [] if is_sharded(model) else _gradients(model)
    ranks.sum(*more, *to_sum)


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale all gradients to a norm of at most `limit`; return the norm of the whole gradient before that, ()."""
    # Gather the norm first: torch 2.9 adds the epsilon of `clip_grad_norm_` to each rank's part of a sharded norm.
    norm = whole_tensor(torch.nn.utils.get_total_norm(_gradients(model)))
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Hold all weights on every rank within the context. Then one rank may run the net, without gradients, while
    another does not.

    Outside the context, the first forward pass gathers the weights: ranks that run the net would wait for the others.
    """
    for part in _parts(model):
        part.unshard()
    try:
        yield
    finally:
        for part in _parts(model):
            part.reshard()


def whole_state(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """Return the state dict with whole tensors, for `save_pretrained(..., state_dict=)`.

    It is on the CPU of rank 0, and empty on the other ranks.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = whole_tensor(tensor)  # one at a time
        if ranks.writes:
            state[name] = whole.cpu()
    return state


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a parameter, a gradient or an optimizer's state as it is, or gathered if it is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _parts(model: nn.Module) -> list[FSDPModule]:
    """Return the sharded modules, root first, then the layers; none for a net that is not sharded."""
    return [cast("FSDPModule", part) for part in model.modules() if is_sharded(part)]
