"""A layer takes a handful of collectives, whatever the length: they are counted on real processes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from many_ranks import run_ranks, together
from pattern_nets import draw, net
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longnet_cli.attention import Pattern
from longnet_cli.running.causal_stream import CausalStream
from longnet_cli.running.chunked_backward import backward_in_chunks
from longnet_cli.running.ranks.edges import even_edges
from longnet_cli.running.ranks.exchange import Exchange

# the first layer sees block 0, the third follows the second
PATTERN = Pattern.finding(64, chosen=8, chosen_layers=(1,))
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

    def take(self) -> int:
        number = self.calls.total()
        self.calls.clear()
        return number


def collectives_of_layers(tokens: int) -> None:
    """Of layers that see block 0, that choose and that follow: in a forward pass, and then in a step.

    None of them would be gloo's if the keys were on a GPU.
    """
    rank, world, model = dist.get_rank(), dist.get_world_size(), net(PATTERN, heads=2, layers=3)
    device = FakeDevice(model.parameters())
    counted = Counted(device)
    device.__enter__()  # the process ends with the test
    edges = even_edges(0, tokens, world, PATTERN.edge_size)
    exchange, by_layer = Exchange(model.config, edges), []
    exchange(0, *(torch.zeros(1, edges[rank + 1] - edges[rank], 2, 8) for _ in range(3)))  # ranks compare plans
    exchange = Exchange(model.config, edges)

    def far(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Any:
        by_layer.append(counted.take())
        return exchange(layer, q, k, v)

    counted.take()
    counted.by_gloo = 0
    hidden = model(draw(1, tokens)[:, edges[rank] : edges[rank + 1]], start=exchange.start, far=far)
    _, *forward = [*by_layer, counted.take()]
    assert forward == [4, 6, 2]  # one of them for a run of blocks
    hidden.sum().backward()
    step = sum(forward) + counted.take()
    assert step <= 3 * sum(forward)
    assert counted.by_gloo == 0
    found = torch.tensor([step])
    dist.all_reduce(found)
    assert found.item() == world * step


@pytest.mark.parametrize("power", [11, 13, *(pytest.param(n, marks=pytest.mark.slow) for n in (16, 17))])
def test_a_layer_takes_a_handful_of_collectives(power: int, tmp_path: Path) -> None:
    run_ranks(4, tmp_path, collectives_of_layers, 1 << power)


def collectives_of_chunks() -> None:
    """A chunk of a stream: those of its layers, and of ids and the last hidden state."""
    counted, model = Counted(), net(PATTERN, heads=2, layers=3)
    stream, ids = CausalStream(model, ranks=together()), draw(1, 4096)
    stream.read(ids[:, :2048])
    counted.take()
    stream.read(ids[:, 2048:])
    assert counted.take() == 3 + 5 + 1 + 3 + 3  # with a run of each layer, the ids, the last hidden state and token
    backward_in_chunks(model, ids, ids, 1024, ranks=together())
    assert counted.calls["all_to_all_single"] < 4 * 2 * 40


def test_a_chunk_takes_those_of_its_layers(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, collectives_of_chunks)
