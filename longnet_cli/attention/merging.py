"""How branches run and merge, and their exact gradients.

Each branch is one plain attention call on strided views. Branches merge by their log-sum-exp in fp32:

    LSE = log sum_i exp(lse_i)        out = sum_i exp(lse_i - LSE) out_i

The backward calls each branch's kernel with the merged out and LSE, and adds up dq, dk, dv. A bias on a branch's scores
is added to its lse_i, and taken from the LSE that its backward gets.

B batch, N tokens of the shard, H query heads, K key heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, log

import torch
from torch import Tensor

from .branches import Union, branches
from .kernels import Kernel
from .packing import Block, Pack, packed
from .pattern import Branch, Rows

Call = tuple[Branch, list[Tensor], list[Tensor]]  # query-like and key-like views
FarTensors = Callable[[int], Sequence[Tensor]]  # key-like tensors of the far keys with an index, when they are there


@dataclass(frozen=True, eq=False)
class Plan:
    """All calls: blocks of a batch as views, then packs of many.

    `covered`: first branches, all of them views, reach every row. `squares`: and their keys are their queries.
    """

    blocks: Sequence[Block]
    packs: Sequence[Pack] = ()
    covered: bool = False
    squares: bool = False

    @classmethod
    def of(cls, blocks: Sequence[Block], batch: int, tokens: int, heads: int, kv_heads: int, packs: bool) -> Plan:
        """`packs`: the kernel takes packed sequences."""
        views, gathered = packed(blocks, tokens, heads, kv_heads) if packs else (blocks, [])
        full = sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns, _ in blocks)
        covered = not gathered and full == batch * tokens and all(found and found[0].first for *_, found in blocks)
        even = all(branch.queries == branch.keys for *_, found in blocks for branch in found if branch.first)
        return cls(views, gathered, covered, covered and even and heads == kv_heads)


def merged_forward(
    plan: Plan, scale: float, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, far: FarTensors | None = None
) -> tuple[Tensor, Tensor]:
    """(out, LSE): (B, N, H, D) as q, and (B, N, H) in fp32 (fp64 for fp64). `far` gives k and v."""
    q, k, v = (unit_stride(x) for x in (q, k, v))
    dtype = accumulator(q.dtype)
    out = (torch.empty if plan.covered else torch.zeros)(q.shape, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):  # kernels choose their own precision
        for branch, qs, ks in kernel_calls(plan.blocks, kernel, (q, out, lse[..., None]), (k, v), far):
            (q_, out_, lse_), (k_, v_) = qs, ks
            part, part_lse = kernel.forward(q_, k_, v_, branch.causal, scale, *_bias(branch, q_))
            _merge(out_, lse_, part, part_lse[..., None], branch)
        for pack in plan.packs:
            queries, keys = pack.rows(q.device)
            q_, out_, lse_ = (_rows(x)[queries.places] for x in (q, out, lse[..., None]))
            k_, v_ = (_rows(x)[keys.places] for x in (k, v))
            part, part_lse = kernel.forward_packed(q_, k_, v_, queries, keys, pack.causal, scale)
            _merge(out_, lse_, part, part_lse[..., None], pack)
            _rows(out).index_copy_(0, queries.places, out_)
            _rows(lse[..., None]).index_copy_(0, queries.places, lse_)
    return out.to(q.dtype), lse


def merged_backward(
    plan: Plan,
    scale: float,
    kernel: Kernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    far: Sequence[Tensor],
    on_far: Callable[[Sequence[Tensor]], None] | None = None,
) -> list[Tensor]:
    """dq, dk, dv and the gradients of the far tensors (k, v, k, v, ...), all in fp32 or fp64.

    From the merged out and LSE. With `on_far`, far keys come first, and it is called once with their gradients, before
    those of near keys are computed.
    """
    dout, q, k, v = (unit_stride(x) for x in (dout, q, k, v))
    dtype = accumulator(q.dtype)
    far_first, shared_heads = on_far is not None, q.shape[2] != k.shape[2]
    of_keys = plan.squares and not far_first
    written = (plan.covered and not far_first, of_keys, of_keys, *(False for _ in far))
    grads = [
        (torch.empty if whole else torch.zeros)(x.shape, dtype=dtype, device=x.device)
        for x, whole in zip((q, k, v, *far), written, strict=True)
    ]
    dq, dk, dv, *dfar = grads
    tensors = (dout, q, out, lse[..., None], dq)

    def far_tensors(index: int) -> Sequence[Tensor]:
        return *far[2 * index : 2 * index + 2], *dfar[2 * index : 2 * index + 2]

    with torch.autocast(q.device.type, enabled=False):
        calls: Iterable[Call] = kernel_calls(plan.blocks, kernel, tensors, (k, v, dk, dv), far_tensors)
        for branch, qs, ks in sorted(calls, key=lambda call: call[0].far is None) if far_first else calls:
            if branch.far is None and on_far:
                on_far(dfar)
                on_far = None
            (dout_, q_, out_, lse_, dq_), (k_, v_, dk_, dv_) = qs, ks
            lse_ = lse_[..., 0] - branch.bias if branch.bias else lse_[..., 0]
            dq_part, *parts = kernel.backward(dout_, q_, k_, v_, out_, lse_, branch.causal, scale, *_bias(branch, q_))
            # what nothing was added to needs no sum
            fresh = branch.first and branch.queries == branch.keys and not shared_heads
            dq_.copy_(dq_part) if branch.first and not far_first else dq_.add_(dq_part)
            for total, part in zip((dk_, dv_), parts, strict=True):
                if fresh:
                    total.copy_(part)
                    continue
                for into, share in apart(total, part, branch.keys):
                    into.add_(share)
        if on_far:
            on_far(dfar)
        for pack in plan.packs:
            queries, keys = pack.rows(q.device)
            dout_, q_, out_, lse_ = (_rows(x)[queries.places] for x in (dout, q, out, lse[..., None]))
            k_, v_ = (_rows(x)[keys.places] for x in (k, v))
            of_pack = kernel.backward_packed(
                dout_, q_, k_, v_, out_, lse_[..., 0] - pack.bias, queries, keys, pack.causal, scale
            )
            for total, rows, part in zip(grads, (queries, keys, keys), of_pack, strict=False):
                _rows(total).index_add_(0, rows.places, part.to(dtype))
    return grads


def _rows(x: Tensor) -> Tensor:
    """(B, N, H, D) as (B N H, D), a view where it is contiguous."""
    return x.reshape(-1, x.shape[-1])


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, branch: Branch | Pack) -> None:
    """Fold one branch into the running out (.., rows, D) and lse (.., rows, 1), both views, in place."""
    if branch.bias:
        part_lse = part_lse + branch.bias
    if branch.zero_keys:  # n keys with score 0 and value 0: a branch with out 0 and lse log n, folded in first
        with_zeros = torch.logaddexp(part_lse, torch.full_like(part_lse, log(branch.zero_keys)))
        part, part_lse = part * (part_lse - with_zeros).exp(), with_zeros
    if branch.first:
        out.copy_(part)
        lse.copy_(part_lse)
        return
    total = torch.logaddexp(lse, part_lse)
    out.lerp_(part.to(out.dtype), (part_lse - total).exp_())
    lse.copy_(total)


def apart(total: Tensor, part: Tensor, keys: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """A view of keys (batch, heads, rows, D) and what to add to it, divided so that no two numbers are one place."""
    if keys.heads > 1 and keys.head_step == keys.skew == 0:  # all heads of the call read the same rows
        total, part = total[:, :1], part.sum(1, keepdim=True)
    rows = -(-keys.segment_step // keys.row_step)  # of one segment, at most
    if keys.segments > 1 and keys.rows > rows:  # segments look back over each other's rows: one segment's at a time
        yield from zip(total.split(rows, 2), part.split(rows, 2), strict=True)
    else:
        yield total, part


def kernel_calls(
    blocks: Sequence[Block],
    kernel: Kernel,
    query_like: Sequence[Tensor],
    key_like: Sequence[Tensor],
    far: FarTensors | None = None,
) -> Iterator[Call]:
    """Every kernel call of some blocks, as views (batch, heads, rows, last dim) of the tensors, in a fixed order.

    `far` gives as many tensors for each of the far keys as `key_like` has; it is called when the first call needs them.
    """
    for run, columns, found in blocks:
        queries = [x[run, columns] for x in query_like]
        for branch in found:
            if branch.far is None:
                sources = [x[run, columns] for x in key_like]
            else:
                assert far is not None
                sources = [x[run] for x in far(branch.far)]
            views = [strided_view(x, branch.queries) for x in queries]
            views += [strided_view(x, branch.keys) for x in sources]
            rows = max(branch.queries.rows, branch.keys.rows)
            limit = kernel.max_batch(branch.queries.heads, rows, query_like[0].shape[-1])
            for call in _batched(views, limit):
                yield branch, call[: len(queries)], call[len(queries) :]


def _bias(branch: Branch, q: Tensor) -> tuple[Tensor, ...]:
    """Return what a kernel adds to the scores (heads, rows, keys) of a branch that is a union, nothing for others."""
    if branch.union is None:
        return ()
    _, _, heads, first, step, rows, *_ = branch.queries
    return (log_counts(branch.union, accumulator(q.dtype), q.device)[first :: max(step, 1)][:heads, :rows, :rows],)


@lru_cache(maxsize=4)
def log_counts(union: Union, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(H, tokens, tokens): the log of how often the levels show each key to each query; -inf for never."""
    pattern, heads, kv_heads, causal, tokens = union
    with torch.inference_mode(False):  # it outlives the mode of the caller
        counts = torch.zeros(heads, tokens, tokens, dtype=dtype, device=device)
        for branch in branches(pattern, heads, 0, tokens, causal, "exact", (), 0, kv_heads):
            seen = counts.new_full((branch.queries.rows, branch.keys.rows), exp(branch.bias))
            seen = seen.tril_() if branch.causal else seen
            for segment in range(branch.queries.segments):
                for index in range(branch.queries.heads):
                    _, _, _, first, step, *_ = branch.queries
                    of_head = counts[first + index * step]
                    rows, keys = (_tokens(x, segment, index) for x in (branch.queries, branch.keys))
                    of_head[rows, keys] += seen
        return counts.log_()


def _tokens(rows: Rows, segment: int, index: int) -> slice:
    """The tokens of one segment and of the index-th head."""
    first = rows.first_token + segment * rows.segment_step + index * rows.skew
    return slice(first, first + (rows.rows - 1) * rows.row_step + 1, rows.row_step)


def strided_view(x: Tensor, rows: Rows) -> Tensor:
    """The rows as a zero-copy view (batch, segments, heads, rows, last dim) of x (batch, tokens, heads, last dim)."""
    batch, token, head, last = x.stride()
    size = (x.shape[0], rows.segments, rows.heads, rows.rows, x.shape[3])
    stride = (batch, rows.segment_step * token, rows.head_step * head + rows.skew * token, rows.row_step * token, last)
    return x.as_strided(size, stride, x.storage_offset() + rows.first_token * token + rows.first_head * head)


def _batched(views: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Make (batch, segments, ..) views (batch * segments, ..), at most `limit` at a time.

    Where batch and segments do not merge into one stride, the shorter of the two is walked.
    """
    batch, segments = views[0].shape[:2]
    if batch == 1:
        groups = [[x[0] for x in views]]
    elif segments == 1:
        groups = [[x[:, 0] for x in views]]
    elif all(x.stride(0) == segments * x.stride(1) for x in views):
        groups = [[x.flatten(0, 1) for x in views]]
    else:
        walked = 0 if batch <= segments else 1
        groups = [list(step) for step in zip(*(x.unbind(walked) for x in views), strict=True)]
    for group in groups:
        if len(group[0]) <= limit:
            yield group
        else:
            yield from (list(part) for part in zip(*(x.split(limit) for x in group), strict=True))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_stride(x: Tensor) -> Tensor:
    """Kernels read the last dimension as contiguous without asking; a size of 1 may carry any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()
