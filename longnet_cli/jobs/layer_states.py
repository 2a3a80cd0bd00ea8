"""Vectors of each layer, for `encode --all-layers`: the hidden states of a net's layers, averaged over positions."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from longnet_cli.nets.longnet import LongNet, Placement


class LayerStates:
    """A context manager that pools the output of each layer, while the net reads one sequence at a time.

        with LayerStates(net) as states:
            states.begin(1, 300)        # then the net reads a sequence, in any chunks
            vectors = states.mean()     # (num_layers + 1, dim)

    The first vector is pooled from the first layer's input, the others from each layer's output, before the final norm.
    """

    def __init__(self, net: LongNet) -> None:
        self.net, self._hooks = net, ExitStack()
        self.begin(0, 1)

    def __enter__(self) -> LayerStates:
        for index, layer in enumerate(self.net.layers):
            if index == 0:
                handle = layer.register_forward_pre_hook(lambda layer, inputs: self._add(0, inputs[0], inputs))
                self._hooks.callback(handle.remove)

            def after(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor, index: int = index) -> None:
                self._add(index + 1, output, inputs)

            self._hooks.callback(layer.register_forward_hook(after).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def begin(self, start: int, stop: int) -> None:
        """Reset the sums. From now on, take the mean over the positions [start, stop) of the next sequence."""
        weight = next(self.net.parameters())
        self.start, self.stop = start, stop
        self._sums = torch.zeros(
            len(self.net.layers) + 1, self.net.config.dim, dtype=torch.float64, device=weight.device
        )

    def mean(self) -> Tensor:
        """Return the mean (num_layers + 1, dim), float64. Of several ranks, each has a part; their sum is the mean."""
        return self._sums / (self.stop - self.start)

    def _add(self, state: int, x: Tensor, inputs: tuple[Any, ...]) -> None:
        """Add hidden states (1, n, dim) of a layer that was called with `inputs`; the third input is its placement."""
        place: Placement = inputs[2]
        first, last = max(0, self.start - place.start), min(x.shape[1], self.stop - place.start)
        if first < last:
            self._sums[state] += x[0, first:last].sum(0, dtype=torch.float64)
