"""Chosen blocks over ranks: the same blocks as in one process, fetched from the ranks that have them, and no others."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from many_ranks import run_ranks, together
from pattern_nets import draw, net
from strategies import turn
from torch import Tensor

from longnet_cli.attention import Pattern, choosing, dilated_attention, groups
from longnet_cli.attention.outside import Outside
from longnet_cli.attention.past import Past, Seen
from longnet_cli.running.causal_stream import CausalStream
from longnet_cli.running.ranks import fetching
from longnet_cli.running.ranks.edges import Directory, even_edges
from longnet_cli.running.ranks.exchange import Exchange

PATTERN = Pattern((16,), (1,), look_back=1, chosen=4, chosen_block=8, chosen_every=4)
FUNNEL = ((groups.RUNS, 96), (1, 40), (2, 12))  # so that short documents are scanned in all stages
Blocks = dict[tuple[int, int], tuple[int, ...]]  # (row, token) -> what it sees


def watching(past: Past, into: Blocks, first: int) -> Past:
    """A past that tells what the tokens of a shard see, the first of which is token `first` of the sequence."""

    def tell(seen: Seen) -> None:
        part, (group, _, queries, _) = seen.part, seen.part.groups
        begin = first + part.columns.start + group - part.start
        for row, of_row in enumerate(seen.blocks, part.rows.start):
            for index, of_group in enumerate(of_row.tolist()):
                for token in range(begin + index * queries, begin + (index + 1) * queries):
                    into[row, token] = tuple(of_group)

    past.on_choice = tell
    return past


def at_blocks(edges: list[int], cuts: list[int]) -> list[int]:
    """The edges, but between shards at the last block of the document that ends before."""
    starts = [max(cut for cut in cuts if cut <= edge) for edge in edges]
    return [start + (edge - start) // 8 * 8 for edge, start in zip(edges[:-1], starts, strict=False)] + edges[-1:]


def in_shards(problems: range) -> None:
    """Blocks, outputs and gradients, with documents, empty shards, batches, exact votes, many runs, limits of a GPU."""
    groups.FUNNEL = FUNNEL  # this process ends with the test
    of_cpu = groups.CPU
    rank, world = dist.get_rank(), dist.get_world_size()
    scanned = False
    for seed in problems:
        pick = random.Random(seed)
        groups.CPU, fetching.RUN_BYTES = pick.choice([of_cpu, groups.GPU]), pick.choice([1 << 28, 1 << 15])
        pattern = replace(PATTERN, chosen_exact=pick.choice([0, 0, 6]), chosen_every=pick.choice([2, 4, 8]))
        kv_heads, batch, tokens = pick.randint(1, 2), pick.choice([1, 1, 2]), pick.choice([90, 500, 1300])
        heads, rotary = kv_heads * pick.randint(1, 2), {"turn": turn} if pick.random() < 0.5 else {}
        uneven = pick.random() < 0.7  # some of them empty
        edges = [0, *sorted(pick.randint(0, tokens) for _ in range(world - 1)), tokens]
        cuts = sorted({pick.randint(0, tokens - 1) for _ in range(pick.choice([0, 0, 1, 3]))} | {0})
        edges = at_blocks(edges, cuts) if uneven else even_edges(0, tokens, world, 8, cuts)
        documents = [b - a for a, b in zip(cuts, [*cuts[1:], tokens], strict=True)]
        generator = torch.Generator().manual_seed(seed)
        q, k, v, dout = torch.randn(4, batch, tokens, heads, 8, generator=generator, dtype=torch.float64)
        k, v = k[:, :, :kv_heads], v[:, :, :kv_heads]
        wanted, found = Blocks(), Blocks()
        whole = [x.clone().requires_grad_() for x in (q, k, v)]
        alone = Outside(past=watching(Past(pattern), wanted, 0))
        out = dilated_attention(*whole, pattern, documents=documents, far=alone, **rotary)
        expected = [out.detach(), *torch.autograd.grad(out, whole, dout)]

        first, last = edges[rank], edges[rank + 1]
        mine = [x[:, first:last].clone().requires_grad_() for x in (q, k, v)]
        exchange = Exchange(net(pattern, heads=heads, layers=1).config, edges, cuts=cuts)
        far = exchange(0, *mine)
        watching(far.past, found, first)
        out = dilated_attention(*mine, pattern, start=exchange.start, documents=exchange.documents, far=far, **rotary)
        assert found == {(row, token): seen for (row, token), seen in wanted.items() if first <= token < last}, seed
        got = [out.detach(), *torch.autograd.grad(out, mine, dout[:, first:last])]
        for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
            torch.testing.assert_close(a, b[:, first:last], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        scanned |= any(stage.means == groups.RUNS for stage in groups.stages(pattern, max(documents) // 8 - 3))
    assert scanned


@pytest.mark.parametrize(
    ("world", "problems"), [(3, range(10)), *(pytest.param(n, range(200), marks=pytest.mark.slow) for n in (2, 4))]
)
def test_the_blocks_of_one_process_are_chosen(world: int, problems: range, tmp_path: Path) -> None:
    run_ranks(world, tmp_path, in_shards, problems)


def one_for_all(group: int, near: int) -> list[int]:
    return [0, 1, 2, 3]


def each_another(group: int, near: int) -> list[int]:
    return sorted({0, *random.Random(group).sample(range(1, near // 8), 3)})


def the_last(group: int, near: int) -> list[int]:
    return [0, *range(near // 8 - 3, near // 8)]


def forced(past: Past, start: int, stop: int, choice: Callable[[int, int], list[int]]) -> list[list[list[int]]]:
    """Let the shard see the blocks that `choice` gives for a group and its near keys; return those of each part."""
    parts = []
    for first, number, queries, near in groups.groups_of(past.pattern, start, stop):
        of_group = range(first, first + number * queries, queries)
        sees_all = near <= past.pattern.chosen_keys
        parts.append([[*range(near // 8)] if sees_all else choice(at // 4, near) for at in of_group])
    past.choices[start] = choosing.GroupBlocks([torch.tensor(part, dtype=torch.int32)] for part in parts)
    return parts


def adversarial_choices() -> None:
    """The numbers are those of one process, and every owner sends what was chosen of its blocks, and nothing else.

    In runs of two blocks or more, the gradient of a block that all runs have comes back once.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    fetched, given_back = list[list[int]](), list[list[int]]()  # blocks from each rank, or for it
    original = dist.all_to_all_single

    def counting(got: Tensor, sent: Tensor, *sizes: Any, **options: Any) -> Any:
        if got.dim() == 5:
            (fetched if options.get("async_op") else given_back).append(sizes[0])
        return original(got, sent, *sizes, **options)

    dist.all_to_all_single = counting  # this process ends with the test
    tokens = 600
    config = net(PATTERN, heads=2, layers=1).config
    for choice, fetching.RUN_BYTES in product((one_for_all, each_another, the_last), (1 << 28, 1 << 12)):
        for edges in (even_edges(0, tokens, world, 8), [0, 232, 232, *even_edges(232, 368, world - 2, 8)[1:]]):
            generator = torch.Generator().manual_seed(1)
            q, k, v, dout = torch.randn(4, 1, tokens, 2, 8, generator=generator, dtype=torch.float64)
            whole, alone = [x.clone().requires_grad_() for x in (q, k, v)], Past(PATTERN, keep=1)
            forced(alone, 0, tokens, choice)
            out = dilated_attention(*whole, PATTERN, far=Outside(past=alone))
            expected = [out.detach(), *torch.autograd.grad(out, whole, dout)]

            first, last = edges[rank : rank + 2]
            mine = [x[:, first:last].clone().requires_grad_() for x in (q, k, v)]
            exchange = Exchange(config, edges)
            far = exchange(0, *mine)
            parts = forced(far.past, first, last, choice) if first < last else []
            fetched.clear()
            given_back.clear()
            out = dilated_attention(*mine, PATTERN, start=first, far=far)
            got = [out.detach(), *torch.autograd.grad(out, mine, dout[:, first:last])]
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b[:, first:last], rtol=1e-12, atol=1e-12)
            seen = {block for part in parts for group in part for block in group if block < first // 8}
            owners = [next(r for r in range(world) if (block + 1) * 8 <= edges[r + 1]) for block in seen]
            wanted = torch.tensor(owners, dtype=torch.int64).bincount(minlength=world)
            given = torch.zeros(world, world, dtype=torch.int64)  # by owner (row) and the rank that chose
            given[:, rank] = wanted
            dist.all_reduce(given)
            runs = len(given_back)
            if fetching.RUN_BYTES == 1 << 28:
                assert [*fetched, *given_back] == [wanted.tolist(), wanted.tolist(), given[rank].tolist()]
            elif choice == one_for_all:
                assert len(fetched) == 2 * runs > 10
                assert torch.equal(torch.tensor(given_back).sum(0), given[rank])


def test_owners_send_what_was_chosen_and_nothing_else(tmp_path: Path) -> None:
    run_ranks(4, tmp_path, adversarial_choices)


def states_of_shards(folder: Path) -> None:
    """One process goes on after what several have read, as if it had read that itself."""
    groups.FUNNEL = FUNNEL  # this process ends with the test
    for seed, pattern in enumerate([replace(PATTERN, chosen_layers=(1,)), Pattern.window(24, sinks=2)]):
        model = net(pattern, layers=3).double()
        ids, ends = draw(2, 1320, seed), [35, 36, 700, 1290]
        stream, alone, start = CausalStream(model, ranks=together()), CausalStream(model), 0
        for stop in ends:
            alone(ids[:, start:stop])
            last = stream.read(ids[:, start:stop])
            torch.testing.assert_close(last, alone.last_hidden, rtol=1e-11, atol=1e-11)
            start = stop
        place = folder / f"{seed}"
        size = stream.save(place)
        assert bool(size) == (dist.get_rank() == 0)
        dist.barrier()
        loaded = CausalStream.load(model, place)
        assert loaded.position == 1290
        assert torch.equal(loaded.last_tokens, ids[:, 1289])
        if pattern.chosen:
            assert torch.equal(torch.cat(loaded.ids, 1), ids[:, :1290])
            assert torch.equal(loaded.caches[1].past.counts.sum(1), alone.caches[1].past.counts.sum(1))
        torch.testing.assert_close(loaded(ids[:, 1290:]), alone(ids[:, 1290:]), rtol=1e-11, atol=1e-11)
        dist.barrier()


def test_one_process_goes_on_after_what_several_have_read(tmp_path: Path) -> None:
    run_ranks(3, tmp_path, states_of_shards, tmp_path / "states")


def test_a_directory_knows_owners_and_places() -> None:
    directory = Directory(10, 3)
    for _ in range(2):  # as two layers do
        directory.add([0, 20, 20, 61])
    directory.add([61, 70, 90, 99])  # the block of tokens 60 to 69 ends in the first shard
    owners, places = directory.find(torch.arange(9))
    assert owners.tolist() == [0, 0, 2, 2, 2, 2, 0, 1, 1]
    assert places.tolist() == [0, 1, 0, 1, 2, 3, 2, 0, 1]
    assert (directory.held, directory.blocks) == ([3, 2, 4], 9)


def test_edges_are_those_of_blocks() -> None:
    assert even_edges(0, 100, 3, 8) == [0, 32, 64, 100]
    assert even_edges(5, 1, 4, 8) == [5, 6, 6, 6, 6]
    assert even_edges(10, 1, 4, 8) == [10, 10, 10, 10, 11]
    assert even_edges(0, 100, 4, 8, cuts=[3, 40]) == [0, 27, 48, 72, 100]  # the last two, of the document at 40
    assert even_edges(0, 42, 2, 8, cuts=[22]) == [0, 22, 42]  # not behind the document's end
    with pytest.raises(ValueError, match=r"the edge 20 cuts a block of 8 tokens"):
        Exchange(net(PATTERN).config, [0, 20, 40], rank=0)
