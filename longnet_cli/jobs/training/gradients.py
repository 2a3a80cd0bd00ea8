"""The gradient of a batch of windows, of any length and cut into documents, in bounded memory.

Token ids of a batch are read, and sent to the device, only when they are needed. Chunks of a sequence keep bytes for
each other: rows that later chunks see, and their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from longnet_cli.attention import Outside
from longnet_cli.attention.choosing import Names
from longnet_cli.attention.groups import past_bytes
from longnet_cli.attention.spans import SINKS, lanes, segment_rows
from longnet_cli.jobs.training.windows import Batch
from longnet_cli.nets.config import NetConfig
from longnet_cli.nets.named_blocks import NamedBlocks
from longnet_cli.nets.net import IGNORED, FarProvider, Net
from longnet_cli.running.chunked_backward import Tokens, backward_in_chunks, new_pasts
from longnet_cli.running.device import precision, resolve_dtype, to_device
from longnet_cli.running.mapped import aligned
from longnet_cli.running.ranks.exchange import Exchange, most_owned
from longnet_cli.running.ranks.fsdp import final_backward
from longnet_cli.running.ranks.ranks import ALONE, Ranks
from longnet_cli.running.reader import batches_by_length

if TYPE_CHECKING:
    from longnet_cli.jobs.training.recipe import Recipe


class _ReadTokens:
    """`running.chunked_backward.Tokens` that are read when they are indexed."""

    shape: tuple[int, int]
    device: torch.device

    def __getitem__(self, index: tuple[int | slice, slice], /) -> Tensor:
        row, columns = index
        start, stop, _ = columns.indices(self.shape[1])
        if isinstance(row, int):
            return self.read(row, start, stop)
        return torch.stack([self.read(each, start, stop) for each in range(*row.indices(self.shape[0]))])

    def read(self, row: int, start: int, stop: int) -> Tensor:
        """Return the ids [start, stop) of a row, (stop - start,) int64."""
        raise NotImplementedError


class StoredTokens(_ReadTokens):
    """The ids of a batch's windows: `tokens` of each window, from its token `first` on."""

    def __init__(self, batch: Batch, first: int, tokens: int, device: torch.device) -> None:
        self.batch, self.first, self.device = batch, first, device
        self.shape = (batch.shape[0], tokens)

    def read(self, row: int, start: int, stop: int) -> Tensor:
        return to_device(torch.from_numpy(self.batch.read(row, self.first + start, self.first + stop)), self.device)


class RegroupedTokens(_ReadTokens):
    """Ids (B, N) grouped into new rows (b, n): each row is a list of runs (row, start, stop) in order."""

    def __init__(self, tokens: Tokens, rows: list[list[tuple[int, int, int]]]) -> None:
        self.tokens, self.rows, self.device = tokens, rows, tokens.device
        self.shape = (len(rows), sum(stop - start for _, start, stop in rows[0]))

    def read(self, row: int, start: int, stop: int) -> Tensor:
        parts: list[Tensor] = []
        offset = 0
        for source, first, last in self.rows[row]:
            begin, end = max(first, first + start - offset), min(last, first + stop - offset)
            if begin < end:
                parts.append(self.tokens[source, begin:end])
            offset += last - first
        return torch.cat(parts) if parts else self.tokens[0, 0:0]


class FarBytes(NamedTuple):
    """Bytes that chunks of one sequence keep for each other. `stored` can be spilled to a disk, `passing` cannot.

    `stored`: keys and values that later chunks see, until the backward pass is past them, and the sums of their
    gradients. `passing`: temporaries of one chunk and layer for its far rows and, on a GPU, copies of these rows; what
    chooses blocks, and the choices. `gradients`: of `stored`, the sums for blocks that later chunks may choose.
    """

    stored: int
    passing: int
    gradients: int = 0


def far_bytes(config: NetConfig, seq_len: int, chunk: int, itemsize: int, sp: int = 1) -> FarBytes:
    """Return the bytes for one sequence of `seq_len` tokens, with `itemsize` bytes per number of a key.

    `sp` ranks share every chunk.
    """
    pattern, size = config.pattern, config.pattern.chosen_block
    if seq_len <= chunk:
        if sp == 1 or not pattern.chosen:
            return FarBytes(0, 0)
        tokens = most_owned(size, seq_len, seq_len, sp) * size
        sums, _ = past_bytes(pattern, config.kv_heads, config.head_dim, tokens, max(4, itemsize), "follows")
        return FarBytes(0, sum(config.past_bytes(tokens, itemsize)) + config.num_layers * sums)
    backs = dict(enumerate(pattern.look_backs))
    stored = passing = 0
    for level in (SINKS, *backs) if pattern.sinks else backs:
        held = len(lanes(pattern, level, config.num_heads, config.kv_heads).offsets)
        numbers = 2 * segment_rows(pattern, level, seq_len) * held * config.head_dim
        seen = at_once = 1
        if level != SINKS:
            w = pattern.segment_lengths[level]
            seen = seen_segments(w, backs[level], chunk, seq_len)
            at_once = min(seen, backs[level] + bool(chunk % w))
        sums = aligned(max(4, itemsize) * numbers)
        stored += config.num_layers * (aligned(itemsize * numbers) * seen + sums * at_once)
        passing += (itemsize + 4) * numbers * at_once
    gradients = 0
    if pattern.chosen:
        last = seq_len - 1 - (seq_len - 1) % chunk
        whole, earlier = (n // size * size for n in (seq_len, last + size - 1))
        if sp > 1:
            whole = earlier = most_owned(size, seq_len, chunk, sp) * size
        kinds, of_layer = pattern.kinds(config.num_layers), (pattern, config.kv_heads, config.head_dim)
        for kind, layers in kinds.items():
            kept, means = past_bytes(*of_layer, whole, itemsize, kind)
            sums, _ = past_bytes(*of_layer, earlier, max(4, itemsize), kind)
            gradients += layers * aligned(sums)
            stored += layers * (aligned(kept) + aligned(sums))
            passing += layers * means
        passing += kinds["chooses"] * 4 * pattern.chosen * -(-seq_len // pattern.chosen_every)
    return FarBytes(stored, passing, gradients)


def seen_segments(w: int, back: int, chunk: int, seq_len: int) -> int:
    """Return how many segments of w tokens later chunks see, in a sequence of `seq_len` tokens in chunks of `chunk`.

    A chunk sees the segment inside which it starts, if any, and the `back` segments before its own.
    """
    ends = -(-seq_len // chunk) - 1
    if chunk >= (1 + back) * w:  # no segment is seen from two ends; an end on a segment's edge sees one fewer
        return ends * (1 + back) - ends // (w // math.gcd(w, chunk))
    # all segments, from the first one that the first end sees up to the last end
    return -(-ends * chunk // w) - max(0, chunk // w - back) if ends else 0


def stored_bytes(recipe: Recipe, device: torch.device, ranks: Ranks) -> int:
    """Return the bytes of far rows and their gradients that one rank stores, in memory or in `train.spill`'s file."""
    itemsize = 4 if resolve_dtype(recipe.train.dtype, device) == "fp32" else 2
    chunk = recipe.train.chunk * ranks.sp
    return max(
        far_bytes(recipe.model, stage.seq_len, chunk, itemsize, ranks.sp).stored for stage in recipe.train.stages
    )


def backward(
    model: Net,
    tokens: Tokens,
    targets: Tokens,
    *,
    chunk: int,
    scale: float = 1.0,
    dtype: str = "fp32",
    starts: Sequence[Sequence[int]] | None = None,
    ranks: Ranks = ALONE,
    allocate: Callable[..., Tensor] = torch.empty,
    on_chunk: Callable[[], None] | None = None,
) -> Tensor:
    """Add the gradients of `scale * sum of nll` to the parameters' `.grad`; return the sum, in nats, float64.

    tokens, targets: (B, N) as for `Net.nll`, tensors or `StoredTokens`; targets may be on the host. Activations of
    at most `chunk` tokens exist at one time. `starts` has the positions at which documents start in each row, 0 first
    (`Batch.document_starts`). No token attends to another document, and positions count from the start of the document,
    or of the window where that is later. Without `starts`, a row is one document.

    The `ranks` of a group get the same tokens and share every sequence, `chunk` tokens each. Each rank reads its slice,
    and adds and returns its part; the whole is the sum over the ranks. `allocate` is as in `backward_in_chunks`.
    `on_chunk` is called after each chunk. With sharded weights (`running.ranks.fsdp`), one call is one step: its last
    backward pass sums the gradients over all ranks.
    """
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    chunk *= ranks.sp
    forwards = list(plan_forwards(starts or [[0]] * tokens.shape[0], tokens.shape[1], chunk))
    for index, forward in enumerate(forwards, 1):
        final = index == len(forwards)
        ids, wanted = RegroupedTokens(tokens, forward.rows), RegroupedTokens(targets, forward.rows)
        if ids.shape[1] > chunk:
            total += backward_in_chunks(
                model,
                ids,
                wanted,
                chunk,
                scale=scale,
                dtype=dtype,
                ranks=ranks,
                final=final,
                allocate=allocate,
                on_chunk=on_chunk,
            )
            continue
        shard, start, documents, far, named = slice(None), 0, forward.documents, None, None
        if ranks.sp > 1:
            cuts = list(accumulate(documents or ()))
            edges = ranks.edges(0, ids.shape[1], model.config.pattern.edge_size, cuts)
            far = Exchange(model.config, edges, group=ranks.group, cuts=cuts)
            shard, start, documents = far.shard, far.start, far.documents
            if model.config.pattern.chosen:
                earlier = ids[:, shard.start - start : shard.start]
                named = NamedBlocks.of_shard(model.config.pattern, earlier, ids[:, shard])
        loss = _nll(model, ids[:, shard], wanted[:, shard], start, documents, far, named, dtype)
        final_backward(model, final)
        (loss * scale).backward()
        total += loss.detach()
        del loss, far
        if on_chunk:
            on_chunk()
    return total


def _nll(
    model: Net,
    ids: Tensor,
    targets: Tensor,
    start: int,
    documents: Sequence[int] | None,
    far: FarProvider | None,
    named: Names | None,
    dtype: str,
) -> Tensor:
    """Return the sum of nll of one forward pass. In a bidirectional net, only tokens with a target get logits."""
    if far is None and (pasts := new_pasts(model.config)):

        def far(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Outside:
            # if activation checkpointing computes a layer again, it sees the same blocks
            return Outside(past=pasts[layer])

    with precision(dtype, ids.device):
        # before the forward pass: for targets on a GPU, this waits for all queued work. A causal net predicts all.
        chosen = None if model.config.causal else (targets != IGNORED).nonzero(as_tuple=True)
        hidden = model(ids, start=start, documents=documents, far=far, named=named)
        if chosen:
            hidden, targets = hidden[tuple(to_device(index, ids.device) for index in chosen)], targets[chosen]
        return model.nll(hidden, to_device(targets, ids.device)).sum(dtype=torch.float64)


class _Forward(NamedTuple):
    """The tokens of one forward pass: runs (row, start, stop) of the batch, as `RegroupedTokens` takes them.

    `documents` has the lengths of the documents where a row has several.
    """

    rows: list[list[tuple[int, int, int]]]
    documents: list[int] | None


def plan_forwards(starts: Sequence[Sequence[int]], length: int, chunk: int) -> Iterator[_Forward]:
    """Cut windows of `length` tokens into forward passes of at most `chunk` tokens, unless one document is longer.

    Windows of one document go side by side, as rows, by the rule of reading. The documents of other windows go one
    after the other, in a row.
    """
    whole = [row for row, of_row in enumerate(starts) if len(of_row) == 1]
    for batch in batches_by_length([length] * len(whole), chunk):
        yield _Forward([[(whole[index], 0, length)] for index in batch], None)
    # the rule of reading sorts by length and pads: here, neighbours stay one run of ids, and nothing is padded
    mixed = [
        (row, *edges) for row, begins in enumerate(starts) if len(begins) > 1 for edges in pairwise([*begins, length])
    ]
    for group in _filled(mixed, chunk):
        yield _Forward([_joined(group)], [stop - start for _, start, stop in group])


def _joined(pieces: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Return the same tokens in as few runs as possible: adjacent documents of one window become one run."""
    runs = [pieces[0]]
    for row, start, stop in pieces[1:]:
        if (row, start) == (runs[-1][0], runs[-1][2]):
            runs[-1] = (row, runs[-1][1], stop)
        else:
            runs.append((row, start, stop))
    return runs


def _filled(pieces: list[tuple[int, int, int]], chunk: int) -> Iterator[list[tuple[int, int, int]]]:
    """Group (row, start, stop) in order so that each group has at most `chunk` tokens, or is one longer piece."""
    group: list[tuple[int, int, int]] = []
    size = 0
    for piece in pieces:
        length = piece[2] - piece[1]
        if group and size + length > chunk:
            yield group
            group, size = [], 0
        group.append(piece)
        size += length
    if group:
        yield group
