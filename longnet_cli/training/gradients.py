"""The gradient of a batch of windows, of any length and cut into documents, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.attention import Past
from longnet_cli.model.net import IGNORED, FarProvider, Net
from longnet_cli.runtime.chunks import Tokens, backward_in_chunks, new_pasts
from longnet_cli.runtime.device import precision, to_device
from longnet_cli.runtime.exchange import Exchange, even_edges
from longnet_cli.runtime.fsdp import final_backward
from longnet_cli.runtime.reader import batches_by_length

from .tokens import RegroupedTokens


def backward(
    model: Net,
    tokens: Tokens,
    targets: Tokens,
    *,
    chunk: int,
    scale: float = 1.0,
    dtype: str = "fp32",
    starts: Sequence[Sequence[int]] | None = None,
    group: dist.ProcessGroup | None = None,
    allocate: Callable[..., Tensor] = torch.empty,
    on_chunk: Callable[[], None] | None = None,
) -> Tensor:
    """Add the gradients of `scale * sum of nll` to the parameters' `.grad`; return the sum, in nats, float64.

    tokens, targets: (B, N) as for `Net.nll`, tensors or `training.tokens`; targets may be on the host. Activations of
    at most `chunk` tokens exist at one time. `starts` has the positions at which documents start in each row, 0 first
    (`Batch.document_starts`). No token attends to another document, and positions count from the start of the document,
    or of the window where that is later. Without `starts`, a row is one document.

    The ranks of a `group` get the same tokens and share every sequence, `chunk` tokens each. Each rank reads its slice,
    and adds and returns its part; the whole is the sum over the ranks. `allocate` is as in `backward_in_chunks`.
    `on_chunk` is called after each chunk.
    With sharded weights (`runtime.fsdp`), one call is one step: its last backward pass sums the gradients over all
    ranks.
    """
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    chunk *= dist.get_world_size(group) if group else 1
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
                group=group,
                final=final,
                allocate=allocate,
                on_chunk=on_chunk,
            )
            continue
        shard, start, documents, far = slice(None), 0, forward.documents, None
        if group:
            cuts = list(accumulate(documents or ()))
            far = Exchange(
                model.config, even_edges(0, ids.shape[1], dist.get_world_size(group)), group=group, cuts=cuts
            )
            shard, start, documents = far.shard, far.start, far.documents
        found = _nll(model, ids[:, shard], wanted[:, shard], start, documents, far, dtype)
        final_backward(model, final)
        (found * scale).backward()
        total += found.detach()
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
    dtype: str,
) -> Tensor:
    """Return the sum of nll of one forward pass. In a bidirectional net, only tokens with a target get logits."""
    if far is None and (pasts := new_pasts(model.config)):

        def far(layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Past]:
            return [pasts[layer]]  # if activation checkpointing computes a layer again, it sees the same blocks

    with precision(dtype, ids.device):
        # before the forward pass: for targets on a GPU, this waits for all queued work. A causal net predicts all.
        chosen = None if model.config.causal else (targets != IGNORED).nonzero(as_tuple=True)
        hidden = model(ids, start=start, documents=documents, far=far)
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
    whole = [row for row, found in enumerate(starts) if len(found) == 1]
    for batch in batches_by_length([length] * len(whole), chunk):
        yield _Forward([[(whole[index], 0, length)] for index in batch], None)
    # the rule of reading sorts by length and pads: here, neighbours stay one run of ids, and nothing is padded
    mixed = [
        (row, *edges) for row, found in enumerate(starts) if len(found) > 1 for edges in pairwise([*found, length])
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
