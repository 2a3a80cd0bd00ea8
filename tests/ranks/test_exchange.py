"""N ranks = 1 rank: outputs and every gradient, over real processes and gloo; what travels, and how often, is counted.

Each test starts P processes once, which then go through many problems.
"""

from __future__ import annotations

import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from builders import NotedDocument as Document
from builders import ids_of
from many_ranks import TOLERANCE, in_both_types, off, random_pattern, run_ranks, together
from pattern_nets import EOS, draw, net
from strategies import PAPER_64TH, document_starts, turn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from longnet_cli.attention import Pattern, dilated_attention
from longnet_cli.basics.errors import LongNetError
from longnet_cli.jobs.training.objective import backward, stored_tokens
from longnet_cli.jobs.training.step_bytes import far_bytes
from longnet_cli.jobs.training.windows import TokenStream, TokenWindows
from longnet_cli.nets.longnet import LongNet
from longnet_cli.running.causal_stream import CausalStream
from longnet_cli.running.chunked_backward import backward_in_chunks
from longnet_cli.running.layerwise import hidden_in_chunks
from longnet_cli.running.memory_maps import MappedMemory
from longnet_cli.running.ranks import exchange as exchange_module
from longnet_cli.running.ranks.exchange import Exchange
from longnet_cli.running.ranks.ranks import Ranks, even_edges

# those that every number of ranks goes through; beyond them, anything
GRID = list(product([True, False], ["paper", "geometric", "tiled"], ["modulo", "grouped"]))


def attention_in_shards(dtype: torch.dtype, problems: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for seed in range(problems):
        pick = random.Random(seed)  # the same on every rank
        causal, kind, offsets = (
            GRID[seed] if seed < len(GRID) else (pick.random() < 0.5, None, None)
        )
        pattern, kv_heads = random_pattern(pick, kind, offsets, causal), pick.randint(1, 4)
        heads, rotary = (
            kv_heads * pick.choice([1, 1, 2, 3]),
            {"turn": turn} if pick.random() < 0.5 else {},
        )
        batch, tokens = pick.randint(1, 2), pick.randint(1, 400)
        edges = even_edges(0, tokens, world)
        if pick.random() < 0.5:  # uneven, some of them empty
            edges = [0, *sorted(pick.randint(0, tokens) for _ in range(world - 1)), tokens]
        cuts = sorted(
            {pick.randint(0, tokens - 1) for _ in range(pick.choice([0, 0, 1, 3]) if causal else 0)}
            | {0}
        )
        documents = [b - a for a, b in zip(cuts, [*cuts[1:], tokens], strict=True)]
        generator = torch.Generator().manual_seed(seed)
        by_level = not rotary and not pattern.sinks and pick.random() < 0.5
        levels = [len(pattern.levels)] if by_level else []
        shape = (4, batch, tokens, *levels, heads, 8)
        q, k, v, dout = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        k, v, dout = k[..., :kv_heads, :], v[..., :kv_heads, :], dout[:, :, 0] if by_level else dout
        whole = [x.clone().requires_grad_() for x in (q, k, v)]
        out = dilated_attention(*whole, pattern, causal=causal, documents=documents, **rotary)
        expected = [out.detach(), *torch.autograd.grad(out, whole, dout)]

        first, last = edges[rank], edges[rank + 1]
        mine = [x[:, first:last].clone().requires_grad_() for x in (q, k, v)]
        config = net(pattern, heads=heads, layers=1, causal=causal).config
        exchange = Exchange(config, edges, cuts=cuts)
        out = dilated_attention(
            *mine, pattern, causal=causal, start=exchange.start, documents=exchange.documents,
            far=exchange(0, *mine), **rotary,
        )  # fmt: skip
        found = [out.detach(), *torch.autograd.grad(out, mine, dout[:, first:last])]
        floor = 0.1 * max(x.double().norm().item() for x in expected)
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            error = off(a, b[:, first:last], floor)
            allowed = TOLERANCE[dtype][name != "out"]
            assert error <= allowed, f"problem {seed}, rank {rank}: {name} is off by {error:.2e}"


@pytest.mark.parametrize(
    "world",
    [
        3,
        pytest.param(8, marks=pytest.mark.ci),
        *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4)),
    ],
)
def test_attention_in_shards_is_that_of_the_whole(world, tmp_path):
    run_ranks(world, tmp_path, in_both_types, attention_in_shards, 24 if world < 8 else 12)


def plans_that_part_later() -> None:
    """Agree on a first chunk; then one rank cuts the next otherwise, or is a chunk ahead with as many rows."""
    rank = dist.get_rank()
    config = net(PAPER_64TH).config
    keys = torch.zeros(1, 100, 4, 8)

    def send(edges: list[int]) -> None:
        sent = Exchange(config, edges, cached=True).send(keys, keys)
        sent[0].source.arrive()

    for differing in ([300, 390, 500, 600], [600, 700, 800, 900]):
        send([0, 100, 200, 300])
        with pytest.raises(LongNetError, match=r"rank \d of a group is at the tokens"):
            send(differing if rank == 2 else [300, 400, 500, 600])


def test_ranks_that_part_do_not_wait_for_each_other(tmp_path):
    """All of them end, also those whose plans fit."""
    run_ranks(3, tmp_path, plans_that_part_later)


def counted_traffic() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    calls: list[int] = []
    original = dist.all_to_all_single

    def counting(output: Tensor, input: Tensor, *args: Any, **options: Any) -> Any:
        calls.append(input.numel() * input.element_size())
        return original(output, input, *args, **options)

    def come_back(self: Any) -> list[Tensor]:
        assert self.message  # it left before the near keys' gradients were computed
        return original_come_back(self)

    def sent(model: LongNet, ids: Tensor, exchange: Exchange) -> list[int]:
        """Bytes of all ranks, forward and backward, of one exchange a layer each."""
        calls.clear()
        model(ids, start=exchange.start, far=exchange).sum().backward()
        assert len(calls) == 2 * layers
        total = torch.tensor([sum(calls[:layers]), sum(calls[layers:])])
        dist.all_reduce(total)
        return total.tolist()

    trip = exchange_module._RoundTrip
    original_come_back, trip.come_back = trip.come_back, come_back
    dist.all_to_all_single = counting  # this process ends with the test
    base, layers = 16, 3
    traffic = []
    for shard in (64, 256):
        tokens = shard * world
        pattern = Pattern.geometric(tokens, base)
        model = net(pattern, layers=layers)
        ids = draw(1, tokens)[:, rank * shard : (rank + 1) * shard]
        exchange = Exchange(model.config, even_edges(0, tokens, world))
        forward, way_back = sent(model, ids, exchange)
        rows = sum(parcel.rows for parcels in exchange.sent for parcel in parcels)
        assert set(calls[:layers]) == {2 * rows * model.config.dim * 4}  # keys and values, fp32
        assert forward == way_back
        # research/parallel.md 3, on all ranks together: causal ranks receive half of what they would otherwise
        wider = [(w, r) for w, r in pattern.levels if w > shard]
        # rows that other ranks read
        everything = sum(w // r * (w // shard - 1) * (tokens // w) for w, r in wider)
        each = 2 * model.config.dim * 4
        assert forward == layers * each * everything // 2
        traffic.append(forward)
    assert traffic[0] == traffic[1]  # four times the tokens, the same bytes

    for looking_back, rows in (
        (Pattern.window(16, look_back=2, sinks=4), 2 * 16 + 4),
        (Pattern((16, 64), (1, 4), look_back=1, overlap="once", queries="all"), 16 + 64 // 4),
    ):
        model = net(looking_back, layers=layers)
        for shard in (64, 256):  # of any length, in a sequence of any length
            exchange = Exchange(model.config, even_edges(0, shard * world, world))
            assert sent(model, draw(1, shard), exchange) == [layers * each * rows * (world - 1)] * 2

    narrow = net(Pattern((16, 64), (1, 4)), layers=layers)
    calls.clear()
    exchange = Exchange(narrow.config, even_edges(0, 64 * world, world))
    narrow(draw(1, 64), start=exchange.start, far=exchange).sum().backward()
    assert calls == []  # no level is wider than a shard
    dist.all_to_all_single = original


@pytest.mark.parametrize("world", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))])
def test_one_exchange_a_layer_and_its_bytes_are_the_formulas(world, tmp_path):
    run_ranks(world, tmp_path, counted_traffic)


class Copies(TorchDispatchMode):
    """Counts the operators that move rows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in {getattr(torch.ops.aten, name) for name in MOVING}:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


MOVING = (
    "index_select",
    "index",
    "copy_",
    "clone",
    "cat",
    "gather",
    "index_add_",
    "_to_copy",
    "as_strided_copy",
)


def counted_copies() -> None:
    """16 levels, of which each reader gets rows of several makers: one gather each way, of k and of v."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = net(Pattern.geometric(1 << 12, 2), layers=1)
    exchange = Exchange(model.config, even_edges(0, 64 * world, world))
    k, v = torch.randn(2, 1, 64, 4, 8)
    exchange.maps(k)
    exchange._agree(k)  # once in an exchange
    with Copies() as copies:
        attended = exchange.send(k, v)
        attended[0].source.arrive()
    attended = [keys for keys in attended if keys.start < keys.stop]
    assert len(copies.found) <= 4, copies.found
    assert (
        rank == 0
        or len(attended) == len({(keys.level, keys.start) for keys in attended}) < 7 * rank
    )


@pytest.mark.ci
def test_packing_takes_four_copies_a_layer(tmp_path):
    run_ranks(3, tmp_path, counted_copies)


def test_a_mistaken_rank_is_noticed():
    """Geometry needs no process: rows go to later ranks only, and every row that is needed is sent once."""
    model: LongNet = net(PAPER_64TH)
    exchange = Exchange(model.config, even_edges(0, 1000, 4), rank=2)
    each = [Exchange(model.config, even_edges(0, 1000, 4), rank=rank) for rank in range(4)]
    assert all(not each[maker].sent[reader] for maker in range(4) for reader in range(maker + 1))
    assert exchange.received == [maker.sent[2] for maker in each]
    # two query heads on each key head, which are neighbours: of level 0 a half travels, of others what they share
    shapes = [(1, 250, kv_heads, 8) for kv_heads in (4, 2)]
    window = Exchange(net(Pattern.window(300, sinks=4)).config, even_edges(0, 1000, 4), rank=1)
    whole, shared = (sum(window.sizes(window.sent, shape)) for shape in shapes)
    assert whole == 2 * shared > 0
    assert exchange.sizes(exchange.sent, shapes[0]) == [
        0,
        0,
        0,
        2 * 4 * 8 * sum(p.rows for p in exchange.sent[3]),
    ]
    with pytest.raises(ValueError, match="causal"):
        Exchange(net(PAPER_64TH, causal=False).config, [0, 10, 20], rank=0, cuts=[5])


def training_in_shards(dtype: torch.dtype) -> None:
    """Packed documents, windows longer than all ranks' chunks, several rows: gradients are those of one process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for seed in range(8):
        pick = random.Random(seed)
        pattern, batch = random_pattern(pick), pick.randint(1, 3)
        tokens, chunk = pick.randint(world, 300), pick.randint(8, 120)
        if seed == 0:  # chunks begin between the rows of some heads
            pattern, batch, tokens, chunk = Pattern((30, 90, 270), (1, 3, 9)), 1, 117, 19
        causal = seed not in (4, 5)
        if not causal:  # whose windows are read at once
            pattern, chunk = random_pattern(pick, causal=False), tokens
        model = net(pattern, "rope_by_level", causal=causal).to(dtype)
        for layer in model.layers if seed % 2 else ():  # as `train.activation_checkpointing` does
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        ids, targets = draw(batch, tokens, seed).clamp_(max=EOS - 1), draw(batch, tokens, seed + 9)
        for _ in range(pick.choice([0, 2, 9])):
            ids[pick.randrange(batch), pick.randrange(tokens)] = EOS
        if not causal:
            # The first rank has nothing to lose: no hang, no NaN
            targets[:, : tokens // world] = -100
        cut = causal and seed > 0 and pick.choice([True, False])
        loss = backward(
            model, ids, targets, chunk=10_000, starts=document_starts(ids, EOS) if cut else None
        )
        expected = [p.grad for p in model.parameters()]
        model.zero_grad()
        starts = document_starts(ids, EOS) if cut else None
        stored = far_bytes(model.config, tokens, chunk * world, dtype.itemsize).stored
        room = MappedMemory(batch * stored)  # as a job has
        part = backward(
            model, ids, targets, chunk=chunk, starts=starts, ranks=together(), allocate=room.empty
        )
        dist.all_reduce(part)
        floor = 0.1 * max(g.double().norm().item() for g in expected)
        assert off(part, loss, 0) <= TOLERANCE[dtype][0] * 10
        for (name, p), wanted in zip(model.named_parameters(), expected, strict=True):
            dist.all_reduce(p.grad)
            error = off(p.grad, wanted, floor)
            assert error <= TOLERANCE[dtype][1], (
                f"problem {seed}, rank {rank}: {name} is off by {error:.2e}"
            )


@pytest.mark.parametrize("world", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_chunked_and_packed_training_over_ranks(world, tmp_path):
    run_ranks(world, tmp_path, in_both_types, training_in_shards)


def slices_of_stored_windows(chunk: int) -> None:
    """Windows that lie in files: a rank reads its slices and the target after each, and the gradients are the same."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = net(PAPER_64TH).double()
    document = Document(draw(1, 2 * 300).clamp_(max=EOS - 1)[0].numpy())
    batch, _ = next(
        iter(
            TokenWindows([TokenStream([document], np.array([len(document)]), EOS)], 240, 2, seed=0)
        )
    )
    whole = torch.from_numpy(ids_of(batch))
    loss = backward(
        model, whole[:, :-1], whole[:, 1:], chunk=10_000, starts=document_starts(whole[:, :-1], EOS)
    )
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    document.reads.clear()
    stored = [stored_tokens(batch, offset, 240, torch.device("cpu")) for offset in (0, 1)]
    starts = [batch.document_starts(row, 240) for row in range(2)]
    part = backward(model, *stored, chunk=chunk, starts=starts, ranks=together())
    dist.all_reduce(part)
    assert off(part, loss, 0) <= 1e-12
    for p, wanted in zip(model.parameters(), expected, strict=True):
        dist.all_reduce(p.grad)
        assert off(p.grad, wanted, 0.1) <= 1e-12
    mine = np.zeros(len(document), bool)
    for _, start in batch.starts:
        for a in range(0, 240, chunk * world):
            edges = even_edges(a, min(chunk * world, 240 - a), world)
            first = start + edges[rank] - 1  # the stream has one eos before the document
            mine[max(0, first) : start + edges[rank + 1]] = True
    found = np.zeros(len(document), bool)
    for first, last in document.reads:
        found[first:last] = True
    assert np.array_equal(found, mine)


@pytest.mark.parametrize("chunk", [240, 30])
def test_a_rank_reads_its_slices_of_windows_in_files(chunk, tmp_path):
    run_ranks(2, tmp_path, slices_of_stored_windows, chunk)


def streaming_in_shards() -> None:
    """Chunks of any sizes over ranks, the cache on all of them: hidden states, and the next token's decoding."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for seed in range(9):
        pick = random.Random(seed)
        pattern = random_pattern(pick)
        # the last chunk has fewer tokens than there are ranks, and starts inside a segment
        few = seed == 8
        model = net(pattern, llama=seed % 2 == 1).double()
        tokens = 26 if few else pick.randint(1, 500)
        ids = draw(1, tokens + 1, seed)
        with torch.no_grad():
            whole = model(ids)
        stream, start = CausalStream(model), 0
        while start < tokens:
            number = min(25 if few else pick.randint(1, 200), tokens - start)
            edges = even_edges(start, number, world)
            mine, exchange = (
                slice(edges[rank], edges[rank + 1]),
                Exchange(model.config, edges, cached=True),
            )
            found = stream(ids[:, mine], exchange=exchange)
            torch.testing.assert_close(found, whole[:, mine], rtol=1e-11, atol=1e-11)
            start = edges[-1]
        # every rank can go on alone
        torch.testing.assert_close(
            stream(ids[:, tokens:]), whole[:, tokens:], rtol=1e-11, atol=1e-11
        )


def layer_by_layer_in_shards() -> None:
    """A bidirectional net over more chunks than there are ranks, some ranks without one in the last turn."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for seed in range(6):
        pick = random.Random(seed)
        model, chunk = (
            net(random_pattern(pick, causal=False), causal=False, llama=seed % 2 == 1).double(),
            pick.randint(20, 80),
        )
        tokens = chunk * world + pick.randint(1, 200)
        ids = draw(1, tokens, seed)
        with torch.no_grad():
            whole = model(ids).split(chunk, 1)[rank::world]
        done: list[int] = []
        found = list(
            hidden_in_chunks(
                model, lambda a, b, ids=ids: ids[:, a:b], tokens, chunk,
                ranks=Ranks(rank, world, world, dist.group.WORLD), on_chunk=done.append,
            )
        )  # fmt: skip
        torch.testing.assert_close(found, list(whole), rtol=1e-11, atol=1e-11)
        if rank == 0:
            assert sum(done) == tokens * model.config.num_layers


@pytest.mark.parametrize("world", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_layer_by_layer_over_ranks(world, tmp_path):
    run_ranks(world, tmp_path, layer_by_layer_in_shards)


@pytest.mark.parametrize("world", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_streaming_over_ranks(world, tmp_path):
    run_ranks(world, tmp_path, streaming_in_shards)


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
            # the process ends with the test
            setattr(dist, name, self._counting(name, getattr(dist, name)))

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
    exchange._agree(torch.zeros(1, edges[rank + 1] - edges[rank], 4, 8))  # once, by gloo
    counted.take()
    counted.by_gloo = 0
    hidden = model(
        draw(1, tokens)[:, edges[rank] : edges[rank + 1]], start=exchange.start, far=exchange
    )
    assert counted.take() == {"all_to_all_single": 3}
    hidden.sum().backward()
    assert counted.take() == {"all_to_all_single": 3}
    assert counted.by_gloo == 0


@pytest.mark.parametrize("power", [11, pytest.param(16, marks=pytest.mark.slow)])
def test_a_layer_takes_one_collective(power, tmp_path):
    run_ranks(4, tmp_path, collectives_of_layers, 1 << power)


def collectives_of_chunks() -> None:
    """A chunk of a stream takes those of its layers, and a chunk of a backward pass also sums gradients of far rows."""
    rank, counted, model = dist.get_rank(), Counted(), net(PATTERN, layers=3)
    stream, ids = CausalStream(model), draw(1, 4096)
    for start in (0, 2048):
        edges = even_edges(start, 2048, 2)
        exchange = Exchange(model.config, edges, cached=True)
        stream(ids[:, edges[rank] : edges[rank + 1]], exchange=exchange)
        # the ranks compare their plans once in a chunk
        assert counted.take() == {"all_to_all_single": 3, "all_reduce": 1}
    backward_in_chunks(model, ids, ids, 2048, ranks=together())
    open_spans = 1  # of the widest level, at the edge between the chunks
    assert counted.take() == {
        "all_to_all_single": 3 * (1 + 2 * 2),
        "all_reduce": 3 * open_spans + 2,
    }


def test_a_chunk_takes_those_of_its_layers(tmp_path):
    run_ranks(2, tmp_path, collectives_of_chunks)
