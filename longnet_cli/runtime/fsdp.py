"""The weights of a net over all ranks of a job: whole on each, or each with its share (FSDP2).

    step          first forward          ...    last backward             optimizer
    each block    its weights gathered   held   gradients summed, shared  on this rank's share
                  (one all-gather)              out (one reduce-scatter)

Between steps a rank of P has 1/P of the weights, gradients and optimizer states. During a step it has the weights and
their gradients whole: with AdamW in fp32 that is 8 + 12/P bytes per parameter at the peak, not 16. So a step has
one gather and one sum of each block however many chunks and documents it has, and ranks whose batches are cut into
different numbers of forwards still meet in the same collectives.

Every function here is for both kinds, and for one process; all ranks call it together. The net does not know of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from longnet_cli.model.net import Net
from longnet_cli.runtime.ranks import Ranks

if TYPE_CHECKING:  # half a second to import, which one process need not wait for
    from torch.distributed.fsdp import FSDPModule


def shard_weights(model: Net, ranks: Ranks) -> None:
    """Leave this rank its share of each parameter, in place; alone, nothing is done.

    All ranks must have the same weights, on the device they train on. Make the optimizers after it: they hold states
    for the share. The mesh is all ranks in one row: those of a sequence and those of other sequences share alike, as
    their gradients add up alike.
    """
    if ranks.world == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.world,), mesh_dim_names=("ranks",))
    for module in (*model.blocks, model):  # what no block has, the root has: tables and the final norm
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
    for part in _parts(model):
        part.set_gradient_divide_factor(1.0)  # gradients add up over ranks: the loss is scaled by the tokens of all
        part.set_force_sum_reduction_for_comms(True)  # a sum by name: gloo has no scaled one


def is_sharded(module: nn.Module) -> bool:
    return hasattr(module, "set_requires_gradient_sync")


def final_backward(model: nn.Module, final: bool) -> None:
    """Say before a backward whether it is the step's last, which sums gradients and lets go of the whole weights."""
    if is_sharded(model):
        net = cast("FSDPModule", model)
        net.set_requires_gradient_sync(final)
        net.set_reshard_after_backward(final)
        net.set_is_last_backward(final)


def sum_gradients(model: nn.Module, ranks: Ranks, *more: Tensor) -> None:
    """Add up the gradients over all ranks, in place, with `more` tensors; sharded ones are summed already."""
    if ranks.world == 1:
        return
    ours = [] if is_sharded(model) else [p.grad for p in model.parameters() if p.grad is not None]
    ranks.sum(*more, *ours)


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scale all gradients so that their norm is at most `limit`; the norm before, of the whole gradient, ()."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # Whole before it divides: torch 2.9 adds the epsilon of `clip_grad_norm_` to each rank's part of a sharded norm.
    norm = whole_tensor(torch.nn.utils.get_total_norm(gradients))
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Within, every rank has all weights, and may run the net without gradients as often as it likes, or not at all.

    Outside of it, ranks that do not all run the net would wait for each other in the gather of the first forward.
    """
    for part in _parts(model):
        part.unshard()
    try:
        yield
    finally:
        for part in _parts(model):
            part.reshard()


def whole_state(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """The state dict with whole tensors, for `save_pretrained(..., state_dict=)`: on rank 0's CPU, empty elsewhere."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = whole_tensor(tensor)  # one at a time
        if ranks.first:
            state[name] = whole.cpu()
    return state


def whole_tensor(tensor: Tensor) -> Tensor:
    """A parameter, a gradient or a state of an optimizer, gathered where it is a share."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _parts(model: nn.Module) -> list[FSDPModule]:
    """Root first, then the blocks; none of a net that is not sharded."""
    return [cast("FSDPModule", part) for part in model.modules() if is_sharded(part)]
