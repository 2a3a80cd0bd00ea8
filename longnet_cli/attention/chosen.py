"""Chosen blocks: groups of queries that also see some blocks of the past, right before their window.

A group is `chosen_every` neighbouring queries. It sees blocks of `chosen_block` tokens from before its window. Their
numbers are given: integers that are known before any layer runs, so all layers, chunks and processes see the same ones.
Where the numbers come from is somebody else's business (`longnet_cli.nets.named_blocks`).

The m blocks of a group stand right before the position `near` at which its window starts, without gaps: block i of them
begins at near - (m - i) chosen_block. `turn` moves its keys there. The calls are full, never causal, and have no
gradient.

B batch, N tokens of the shard, H query heads, K key heads, D head_dim.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .pattern import Pattern
from .plain_call import Kernel, merge_into
from .sinks import Turn

# bytes of keys and values that are gathered at a time: caches of a CPU hold so many, and a GPU starts few calls
GATHERED = {"cpu": 4 << 20, "cuda": 1 << 28}


class Group(NamedTuple):
    """The queries of a group at positions [start, stop) of row `row`; their window starts at `near`."""

    row: int
    start: int
    stop: int
    near: int


def groups_of(pattern: Pattern, row: int, start: int, stop: int) -> Iterator[Group]:
    """Yield the groups of queries at positions [start, stop) that have a past before their window."""
    w = pattern.segment_lengths[0]
    look_back = pattern.look_backs[0]
    every = pattern.chosen_every
    first = max(start // every * every, (look_back + 1) * w)
    for group_start in range(first, stop, every):
        near = (group_start // w - look_back) * w
        yield Group(row, max(group_start, start), min(group_start + every, stop), near)


class ChosenCall(NamedTuple):
    """Groups of one row of a batch that have equally many queries and see equally many blocks.

    queries: tokens of the shard, (groups, n). blocks: (groups, m). distances: by how many positions the keys of each
    block move, (groups, m).
    """

    row: int
    queries: Tensor
    blocks: Tensor
    distances: Tensor


class Chosen(NamedTuple):
    """The chosen blocks of a shard, which is all that starts a document, unless `rows` has the tokens before it.

    rows: keys and values of all tokens up to the shard's end, (k and v, B, tokens, K, D).
    """

    calls: Sequence[ChosenCall]
    rows: Tensor | None = None


def chosen_calls(
    pattern: Pattern,
    start: int,
    blocks_by_group: Iterable[tuple[Group, Sequence[int]]],
    device: torch.device,
) -> list[ChosenCall]:
    """Return the calls of a shard that starts at `start`, whose groups see these blocks, in ascending order."""
    alike: dict[tuple[int, int, int], list[tuple[Group, Sequence[int]]]] = defaultdict(list)
    for group, blocks in blocks_by_group:
        alike[group.row, group.stop - group.start, len(blocks)].append((group, blocks))
    calls = []
    for (row, queries, number), members in alike.items():
        first_tokens = torch.tensor([group.start - start for group, _ in members])
        near = torch.tensor([group.near for group, _ in members])
        numbers = torch.tensor([blocks for _, blocks in members])
        places = near[:, None] + torch.arange(-number, 0) * pattern.chosen_block
        distances = places - numbers * pattern.chosen_block
        tokens = first_tokens[:, None] + torch.arange(queries)
        on_device = (x.to(device) for x in (tokens, numbers, distances))
        calls.append(ChosenCall(row, *on_device))
    return calls


def add_blocks(
    kernel: Kernel,
    scale: float,
    chosen: Chosen,
    size: int,
    turn: Turn | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Merge attention of q to the chosen blocks of `size` tokens of k and v into out (B, N, H, D) and LSE (B, N, H)."""
    k, v = (k, v) if chosen.rows is None else chosen.rows
    kv_heads = k.shape[2]
    heads, head_dim = q.shape[2:]
    whole = k.shape[1] // size * size
    for call in chosen.calls:
        key_blocks = k[call.row, :whole].unflatten(0, (-1, size))  # (blocks, size, K, D)
        value_blocks = v[call.row, :whole].unflatten(0, (-1, size))
        tokens = size * call.blocks.shape[1]
        rows = max(heads // kv_heads * call.queries.shape[1], tokens)
        gathered = GATHERED[q.device.type] // (2 * tokens * key_blocks[0, 0].nbytes)
        step = max(1, min(gathered, kernel.max_batch(kv_heads, rows, head_dim)))
        steps = (x.split(step) for x in (call.queries, call.blocks, call.distances))
        for queries, blocks, distances in zip(*steps, strict=True):
            keys = key_blocks.index_select(0, blocks.flatten())
            values = value_blocks.index_select(0, blocks.flatten())
            if turn:
                (keys,) = turn(keys[None], distances.flatten()).to(k.dtype)
            of_groups = (len(queries), tokens, kv_heads, head_dim)
            k_ = keys.view(of_groups).transpose(1, 2)
            v_ = values.view(of_groups).transpose(1, 2)
            q_ = q[call.row, queries].transpose(1, 2)  # (groups, H, n, D)
            folded = q_.reshape(len(queries), kv_heads, -1, head_dim)
            part, part_lse = kernel.forward(folded, k_, v_, False, scale)
            part = part.reshape(q_.shape).transpose(1, 2)
            part_lse = part_lse.reshape(q_.shape[:3]).transpose(1, 2)
            # copies, as an index gives them
            merged = out[call.row, queries].to(lse.dtype)
            merged_lse = lse[call.row, queries]
            merge_into(merged, merged_lse[..., None], part, part_lse[..., None])
            out[call.row, queries] = merged.to(out.dtype)
            lse[call.row, queries] = merged_lse


class PastRows:
    """The keys and values of a document's tokens so far, (k and v, B, tokens, K, D), in memory that doubles."""

    def __init__(self, rows: Tensor) -> None:
        self._memory = rows
        self._tokens = rows.shape[2]

    @property
    def rows(self) -> Tensor:
        return self._memory[:, :, : self._tokens]

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    @torch.no_grad()
    def put(self, start: int, k: Tensor, v: Tensor) -> None:
        """Store k and v (B, n, K, D) of the tokens from `start` on, in place of all rows from there on."""
        self._tokens = start + k.shape[1]
        earlier = self._memory[:, :, :start]
        if self._memory.shape[2] < self._tokens:
            _, batch, _, kv_heads, head_dim = earlier.shape
            room = max(self._tokens, 2 * start)
            self._memory = earlier.new_empty(2, batch, room, kv_heads, head_dim)
            self._memory[:, :, :start] = earlier
        self._memory[0, :, start : self._tokens] = k
        self._memory[1, :, start : self._tokens] = v
