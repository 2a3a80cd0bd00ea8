"""The speed at which a net reads, measured by short reads of random tokens."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from longnet_cli.nets.net import Net
from longnet_cli.running import device as machines
from longnet_cli.running.causal_stream import open_stream
from longnet_cli.running.device import (
    precision,
)
from longnet_cli.running.reader import (
    Reader,
    Window,
)

from .reading_plan import ReadingPlan

if TYPE_CHECKING:
    pass

SECONDS = 0.25  # that the read takes whose rate counts
FIRST_TOKENS = 256  # of the first read; later ones grow until they take that long
NEW_TOKENS = 4


class _Noise:
    """Random ids, or vectors of zeros, as `net` reads them."""

    def __init__(self, net: Net) -> None:
        self.net = net

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.net.inputs_like((1, stop - start))[0].cpu().numpy()


@torch.inference_mode()
def read_noise(net: Net, lengths: Sequence[int], chunk: int, dtype: str, *, scores: bool) -> None:
    """Read windows of these lengths as a job would, with their logits if it `scores`."""
    device = next(net.parameters()).device
    for pieces in Reader(net, chunk=chunk, dtype=dtype).read(
        [Window(_Noise(net), 0, n, 0) for n in lengths]
    ):
        if scores:
            hidden = torch.cat([piece.hidden for piece in pieces if piece.hidden is not None])
            with precision(dtype, device):
                net.nll(hidden, torch.zeros(len(hidden), dtype=torch.int64, device=device))
    machines.wait_for(device)


def reading_rate(net: Net, plan: ReadingPlan, dtype: str, room: float, *, scores: bool) -> float:
    """Return the FLOP/s of reading windows of the plan's usual length, the best of two reads.

    They are as many as take `SECONDS`, or one that is shorter, or all there are. Fewer are read if a forward pass would
    need more than a quarter of the `room` in bytes.
    """
    tokens, config = FIRST_TOKENS, net.config

    def seconds_of(lengths: Sequence[int]) -> float:
        began = time.perf_counter()
        read_noise(net, lengths, plan.chunk, dtype, scores=scores)
        return time.perf_counter() - began

    while True:
        length = min(plan.usual or tokens, tokens)
        lengths = [length] * (tokens // length)
        seconds = min(seconds_of(lengths) for _ in range(2))
        together = min(tokens, plan.chunk) if config.streams else length
        if seconds >= SECONDS or tokens >= plan.read or 4 * config.forward_bytes(together) > room:
            break
        tokens *= 2 if seconds > SECONDS / 8 else 4
    timed = ReadingPlan(config, plan.chunk)
    timed.add((length, length) for length in lengths)
    return timed.flops(scores) / seconds


@torch.inference_mode()
def seconds_of_new_token(net: Net, dtype: str) -> float:
    """Return the seconds that a new token takes, at best of NEW_TOKENS, after a prompt of as many random tokens."""
    device, stream = next(net.parameters()).device, open_stream(net)
    seconds = []
    with precision(dtype, device):
        stream(torch.randint(net.config.vocab_size, (1, NEW_TOKENS), device=device))
        for _ in range(NEW_TOKENS):
            began = time.perf_counter()
            hidden = stream(torch.randint(net.config.vocab_size, (1, 1), device=device))
            int(net.logits(hidden[0, -1]).argmax(-1))
            seconds.append(time.perf_counter() - began)
    return min(seconds)
