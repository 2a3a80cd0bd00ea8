"""How branches run and merge, and their exact gradients.

Each branch is one plain attention call on strided views. Branches merge by their log-sum-exp in fp32:

    LSE = log sum_i exp(lse_i)        out = sum_i exp(lse_i - LSE) out_i

The backward calls each branch's kernel with the merged out and LSE, and adds up dq, dk, dv. A bias on a branch's scores
is added to its lse_i, and taken from the LSE that its backward gets.

B batch, N tokens of the shard, H query heads, K key heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import log

import torch
from torch import Tensor

from .kernels import Kernel
from .pattern import Branch, Rows

# A block of a batch, rows and tokens, and the branches of the sequence that each of its rows is
Plan = list[tuple[slice, slice, tuple[Branch, ...]]]
Call = tuple[Branch, list[Tensor], list[Tensor]]  # query-like and key-like views
FarTensors = Callable[[int], Sequence[Tensor]]  # key-like tensors of the far keys with an index, when they are there


def merged_forward(
    plan: Plan, scale: float, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, far: FarTensors | None = None
) -> tuple[Tensor, Tensor]:
    """(out, LSE): (B, N, H, D) as q, and (B, N, H) in fp32 (fp64 for fp64). `far` gives k and v."""
    q, k, v = (unit_stride(x) for x in (q, k, v))
    dtype = accumulator(q.dtype)
    full = sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns, _ in plan)
    # no row needs a zero of ours
    written = full == q.shape[0] * q.shape[1] and all(found and found[0].first for *_, found in plan)
    out = (torch.empty if written else torch.zeros)(q.shape, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):  # kernels choose their own precision
        for branch, qs, ks in kernel_calls(plan, kernel, (q, out, lse[..., None]), (k, v), far):
            (q_, out_, lse_), (k_, v_) = qs, ks
            part, part_lse = kernel.forward(q_, k_, v_, branch.causal, scale)
            _merge(out_, lse_, part, part_lse[..., None], branch)
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
    grads = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v, *far)]
    dq, dk, dv, *dfar = grads
    tensors = (dout, q, out, lse[..., None], dq)
    far_first, shared_heads = on_far is not None, q.shape[2] != k.shape[2]

    def far_tensors(index: int) -> Sequence[Tensor]:
        return *far[2 * index : 2 * index + 2], *dfar[2 * index : 2 * index + 2]

    with torch.autocast(q.device.type, enabled=False):
        calls: Iterable[Call] = kernel_calls(plan, kernel, tensors, (k, v, dk, dv), far_tensors)
        for branch, qs, ks in sorted(calls, key=lambda call: call[0].far is None) if far_first else calls:
            if branch.far is None and on_far:
                on_far(dfar)
                on_far = None
            (dout_, q_, out_, lse_, dq_), (k_, v_, dk_, dv_) = qs, ks
            lse_ = lse_[..., 0] - branch.bias if branch.bias else lse_[..., 0]
            dq_part, *parts = kernel.backward(dout_, q_, k_, v_, out_, lse_, branch.causal, scale)
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
    return grads


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, branch: Branch) -> None:
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
    plan: Plan,
    kernel: Kernel,
    query_like: Sequence[Tensor],
    key_like: Sequence[Tensor],
    far: FarTensors | None = None,
) -> Iterator[Call]:
    """Every kernel call of a plan, as views (batch, heads, rows, last dim) of the tensors, in a fixed order.

    `far` gives as many tensors for each of the far keys as `key_like` has; it is called when the first call needs them.
    """
    for run, columns, found in plan:
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
