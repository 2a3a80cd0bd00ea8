"""The speed of a net on this machine: a short step is timed, from whose rate the time of a job follows."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from longnet_cli.jobs.estimating.reading import Extent, ReadingPlan, Shape
from longnet_cli.nets.net import Net
from longnet_cli.running.causal_stream import open_stream
from longnet_cli.running.device import precision
from longnet_cli.running.reader import Reader, Window

SECONDS = 0.5  # that a forward pass takes, or repetitions of a read
FIRST_TOKENS = 256  # of the first forward pass; later ones grow until they take that long
STEPS = 3  # forward passes of a read
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
    for pieces in Reader(net, chunk=chunk, dtype=dtype).read([Window(_Noise(net), 0, n, 0) for n in lengths]):
        if scores:
            hidden = torch.cat([piece.hidden for piece in pieces if piece.hidden is not None])
            with precision(dtype, device):
                net.nll(hidden, torch.zeros(len(hidden), dtype=torch.int64, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reading_rate(net: Net, plan: ReadingPlan, dtype: str, room: float, *, scores: bool) -> tuple[float, Shape]:
    """Return the FLOP/s of reading, and the shape of the forward passes that were timed.

    They are as most tokens' of the plan or, where these are slow or would need more than a quarter of the `room` in
    bytes, shorter. A read has `STEPS` of them: in a row if the plan's longest window is read in chunks.
    """
    usual = plan.usual if plan.read else Shape(1, FIRST_TOKENS)
    most, tokens = usual.rows * usual.tokens, FIRST_TOKENS

    def seconds(lengths: Sequence[int], least: float, scores: bool) -> float:
        begin, times = time.perf_counter(), 0
        while not times or time.perf_counter() < begin + least:
            read_noise(net, lengths, tokens, dtype, scores=scores)
            times += 1
        return (time.perf_counter() - begin) / times

    while True:
        tokens = min(tokens, most)
        shape = Shape(max(1, tokens // usual.tokens), min(tokens, usual.tokens))
        one = seconds([shape.tokens] * shape.rows, 0.0, False)
        if tokens == most or one >= SECONDS or 4 * net.config.forward_bytes(tokens) > room:
            break
        tokens *= 2 if one > SECONDS / 8 else 4
    steps = STEPS if one < 4 * SECONDS else 1
    in_chunks = plan.in_chunks(plan.chunk) and usual == Shape(1, plan.chunk)
    lengths = [min(plan.longest, steps * tokens)] if in_chunks else [shape.tokens] * steps * shape.rows
    timed = ReadingPlan(net, tokens)
    timed.add(Extent(length, length) for length in lengths)
    return timed.flops(scores) / seconds(lengths, SECONDS, scores), shape


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
