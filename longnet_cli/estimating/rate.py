"""The measured rate of a net on this machine: the FLOP/s of a short forward pass, as a job would run it."""

from __future__ import annotations

import time

import torch

from longnet_cli.estimating.forwards import Forwards, Shape
from longnet_cli.model.net import Net
from longnet_cli.runtime.device import precision

SECONDS = 0.5  # that the forward pass takes, or its repetitions
FIRST_SHAPE = Shape(1, 256)  # of the first forward pass; later ones grow until they take that long


def measured_rate(net: Net, usual: Shape, scores: bool, dtype: str) -> tuple[float, Shape]:
    """Return the FLOP/s and the shape of a forward pass: the `usual` shape, or fewer tokens that take half a second."""
    most, tokens = usual.rows * usual.tokens, FIRST_SHAPE.tokens
    while True:
        tokens = min(tokens, most)
        shape = Shape(max(1, tokens // usual.tokens), min(tokens, usual.tokens))
        begin, times = time.perf_counter(), 0
        while not times or (tokens == most and time.perf_counter() < begin + SECONDS):
            forward(net, shape, scores, dtype)
            times += 1
        seconds = (time.perf_counter() - begin) / times
        if tokens == most or seconds >= SECONDS:
            work = Forwards(net.config, shape.tokens)
            for _ in range(shape.rows):
                work.add(shape.tokens, shape.tokens)
            return work.flops(scores) / seconds, shape
        tokens *= 2 if seconds > SECONDS / 8 else 4


@torch.inference_mode()
def forward(net: Net, shape: Shape, scores: bool, dtype: str) -> None:
    """Run and await one forward pass over random ids or zero vectors, with logits if `scores`."""
    ids = net.inputs_like(shape)
    with precision(dtype, ids.device):
        hidden = net(ids)
        if scores:
            net.nll(hidden, ids)
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
