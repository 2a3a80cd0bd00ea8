"""A layer takes one collective, whatever the length: they are counted on real processes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from many_ranks import run_ranks, together
from pattern_nets import draw, net
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longnet_cli.attention import Pattern
from longnet_cli.running.causal_stream import CausalStream
from longnet_cli.running.chunked_backward import backward_in_chunks
from longnet_cli.running.ranks.exchange import Exchange
from longnet_cli.running.ranks.ranks import even_edges

PATTERN = Pattern((64, 512, 1 << 17), (1, 4, 512))  # the last level goes on over all shards
NAMES = [
    "all_to_all_single", "all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "send", "recv", "isend",
    "irecv", "batch_isend_irecv", "barrier",
]  # fmt: skip


class FakeDevice(TorchDispatchMode):
    """A device that is none: memory is on it if something is written there that is, or is computed of what is.

    With keys on a real GPU, what is made without them is on the host, and gloo would send it.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._there = set[int]()
        for x in known:
            self._take(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = any(self.has(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if there and isinstance(x, Tensor) and not self.has(x):
                self._take(x)
        return result

    def _take(self, x: Tensor) -> None:
        memory = x.untyped_storage()
        self._there.add(memory._cdata)
        weakref.finalize(memory, self._there.discard, memory._cdata)

    def has(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self._there


class Counted:
    """Counts what this process sends to others, by name, and how much of it was not on the fake device."""

    def __init__(self, device: FakeDevice | None = None) -> None:
        self.calls: Counter[str] = Counter()
        self.device, self.by_gloo = device, 0
        for name in NAMES:
            setattr(dist, name, self._counting(name, getattr(dist, name)))  # the process ends with the test

    def _counting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.calls[name] += 1
            *_, sent = (x for x in args if isinstance(x, Tensor))
            self.by_gloo += bool(self.device and sent.numel() and not self.device.has(sent))
            return original(*args, **options)

        return call

    def take(self) -> Counter[str]:
        taken, self.calls = self.calls, Counter()
        return taken


def collectives_of_layers(tokens: int) -> None:
    """One in each layer and direction. None of them would be gloo's if the keys were on a GPU."""
    rank, world, model = dist.get_rank(), dist.get_world_size(), net(PATTERN, layers=3)
    device = FakeDevice(model.parameters())
    counted = Counted(device)
    device.__enter__()  # the process ends with the test
    edges = even_edges(0, tokens, world)
    exchange = Exchange(model.config, edges)
    exchange._agree((1, edges[rank + 1] - edges[rank], 4, 8))  # once in a job, by gloo
    counted.take()
    counted.by_gloo = 0
    hidden = model(draw(1, tokens)[:, edges[rank] : edges[rank + 1]], start=exchange.start, far=exchange)
    assert counted.take() == {"all_to_all_single": 3}
    hidden.sum().backward()
    assert counted.take() == {"all_to_all_single": 3}
    assert counted.by_gloo == 0


@pytest.mark.parametrize("power", [11, pytest.param(16, marks=pytest.mark.slow)])
def test_a_layer_takes_one_collective(power: int, tmp_path: Path) -> None:
    run_ranks(4, tmp_path, collectives_of_layers, 1 << power)


def collectives_of_chunks() -> None:
    """A chunk of a stream takes those of its layers, and a chunk of a backward pass also sums gradients of far rows."""
    rank, counted, model = dist.get_rank(), Counted(), net(PATTERN, layers=3)
    stream, ids = CausalStream(model), draw(1, 4096)
    for start in (0, 2048):
        edges = even_edges(start, 2048, 2)
        exchange = Exchange(model.config, edges, cached=True)
        stream(ids[:, edges[rank] : edges[rank + 1]], exchange=exchange)
        compared = {"all_reduce": 1} if not start else {}  # of plans, once in a job
        assert counted.take() == {"all_to_all_single": 3} | compared
    backward_in_chunks(model, ids, ids, 2048, ranks=together())
    open_spans = 1  # of the widest level, at the edge between the chunks
    assert counted.take() == {"all_to_all_single": 3 * (1 + 2 * 2), "all_reduce": 3 * open_spans}


def test_a_chunk_takes_those_of_its_layers(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, collectives_of_chunks)
