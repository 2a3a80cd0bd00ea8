"""The gradient of a batch of windows, of any length and cut into documents, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_cli.model import LongNet
from longnet_cli.model.net import IGNORED
from longnet_cli.runtime.chunks import backward_in_chunks
from longnet_cli.runtime.device import precision
from longnet_cli.runtime.ranks import Exchange, even_edges
from longnet_cli.runtime.sharding import final_backward


def backward(
    model: LongNet,
    tokens: Tensor,
    targets: Tensor,
    *,
    chunk: int,
    scale: float = 1.0,
    dtype: str = "fp32",
    eos_id: int | None = None,
    group: dist.ProcessGroup | None = None,
    on_chunk: Callable[[], None] | None = None,
) -> Tensor:
    """Add the gradients of `scale * sum of nll` to the parameters' `.grad`; return the sum, in nats, float64.

    tokens, targets: (B, N) as for `LongNet.nll`. At most `chunk` tokens' activations exist at one time. With `eos_id`,
    which precedes every document, no token attends to another document, and positions count from the document's begin,
    or the window's where that is later.

    The ranks of a `group` get the same tokens and share every sequence, `chunk` tokens each: each adds and returns its
    part, and the whole is the sum over them. `on_chunk` is called after each chunk. Where weights are sharded
    (`runtime.sharding`), one call is one step: its last backward sums the gradients over all ranks.
    """
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    sparse = bool((targets == IGNORED).any())  # then only the logits of tokens with a target are computed
    chunk *= dist.get_world_size(group) if group else 1
    forwards = list(_forwards(tokens, targets, chunk, eos_id))
    for index, (ids, wanted, documents) in enumerate(forwards, 1):
        final = index == len(forwards)
        if ids.shape[1] > chunk:
            total += backward_in_chunks(
                model, ids, wanted, chunk, scale=scale, dtype=dtype, group=group, final=final, on_chunk=on_chunk
            )
            continue
        start, far = 0, None
        if group:
            cuts = list(accumulate(documents or ()))
            far = Exchange(
                model.config, even_edges(0, ids.shape[1], dist.get_world_size(group)), group=group, cuts=cuts
            )
            ids, wanted, start, documents = ids[:, far.shard], wanted[:, far.shard], far.start, far.documents
        with precision(dtype, tokens.device):
            hidden = model(ids, start=start, documents=documents, far=far)
            if sparse:
                hidden, wanted = hidden[wanted != IGNORED], wanted[wanted != IGNORED]
            nll = model.nll(hidden, wanted).sum(dtype=torch.float64)
        final_backward(model, final)
        (nll * scale).backward()
        total += nll.detach()
        if on_chunk:
            on_chunk()
    return total


def _forwards(
    tokens: Tensor, targets: Tensor, chunk: int, eos_id: int | None
) -> Iterator[tuple[Tensor, Tensor, Sequence[int] | None]]:
    """Yield (ids, targets, documents), (b, n) both, n at most `chunk` except where one document is longer.

    Windows that are one document go side by side, as rows; the documents of the others one after the other, in a row.
    """
    whole, mixed = [], []
    for row, window in enumerate(tokens):
        edges = [0] + ([] if eos_id is None else ((window[1:] == eos_id).nonzero().flatten() + 1).tolist())
        documents = [(row, start, stop) for start, stop in pairwise([*edges, len(window)])]
        whole.append(row) if len(documents) == 1 else mixed.extend(documents)
    side_by_side = max(1, chunk // tokens.shape[1])
    for first in range(0, len(whole), side_by_side):
        rows = whole[first : first + side_by_side]
        yield tokens[rows], targets[rows], None
    for group in _filled(mixed, chunk):
        ids, wanted = (torch.cat([x[row, start:stop] for row, start, stop in group])[None] for x in (tokens, targets))
        yield ids, wanted, [stop - start for _, start, stop in group]


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
