"""Dilated attention: one softmax over the union of every level's keys (arXiv 2307.02486, Eq. 3-15).

The union is a multiset, and it may be divided in any way: by levels, by chunks of a long sequence, by ranks, by
cache and new tokens. Each part is a branch, one plain attention call on strided views (`branches`), and branches merge
by their log-sum-exp (`merging`).

B batch, N tokens of the shard, H query heads, K key heads (a divisor of H), D head_dim, w segment length, r dilation
rate.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .branches import Turned, branches, united
from .choosing import Chosen, LayerFinds
from .groups import GroupedPart, groups_of
from .kernels import select_kernel
from .merging import Plan, merged_backward, merged_forward, unit_stride
from .outside import FarKeys, Outside
from .pattern import Padding, Pattern
from .plain_call import Kernel
from .sinks import SinkRows, Turn, sink_rows
from .spans import SINKS, Span, span_rows

Place = tuple[int, int, int, int]  # rows [first, last) of a batch, tokens [begin, stop)

_sink_rows = lru_cache(maxsize=4)(sink_rows)  # all layers of a step ask for the same
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    causal: bool = True,
    start: int = 0,
    far: Outside | Sequence[FarKeys] | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    documents: Sequence[int] | None = None,
    padding: Padding = "exact",
    total: int | None = None,
    scale: float | None = None,
    kernel: str | None = None,
    turn: Turn | None = None,
    finds: LayerFinds | None = None,
) -> Tensor:
    """Attend from q (B, N, H, D) to k, v (B, N, K, D) by `pattern`; return (B, N, H, D) like q. Differentiable.

    Query head h reads key head h // (H / K). The shard is positions [start, start + tokens) of its sequence, any
    start, any length. A query that takes part in no level gets zeros.

    far: keys from outside the shard; in causal attention, they lie before it. If the shard is a single token, its own
        row may be the last of some levels' far keys; then k and v are not read there. For chosen blocks, an `Outside`
        that also has the past before the shard, as a `KVCache` gives it.
    lengths: true length of each row of a right-padded batch, 0 to tokens. Each row gets what it would get alone, and
        zeros beyond its length.
    documents: lengths of the documents that follow each other in every row, `tokens` in all. Each document attends only
        to itself, from position 0, and gets what it would get alone. `start` and `far` belong to the first document.
    padding: "zero_key" adds torchscale's zero keys to ragged segments of a bidirectional call.
    total: length of the whole sequence, needed for zero keys if the shard is only a part of it.
    scale: factor of the scores, by default head_dim^-0.5.
    kernel: forces one of `kernels.KERNELS`, as LONGNET_KERNEL does.
    turn: function that moves sinks to the place where a segment sees them, for k that is rotated by position:
        (keys (B, S, n, K, D), distances (S,) int64) -> the same keys, that many positions further on. Linear and
        differentiable. Without it, every segment sees the sinks as they are.
    finds: what the layer before has found, and where this layer leaves what it finds. Without them, a layer chooses for
        itself.

    Chosen blocks are moved by `turn` in the same way, and un-rotated by minus their positions (`choosing`). The choice
    of blocks has no gradient. A compiled graph breaks at them.

    Sinks are the document's own first rows if the shard has them, otherwise far keys of level `SINKS`.

    Raises ValueError for shapes, patterns, far keys, sinks, lengths or kernels that do not fit.
    """
    if pattern.chosen and torch.compiler.is_compiling():  # a choice is data, and `turn` cannot be called in a graph
        return torch.compiler.disable(dilated_attention)(
            q, k, v, pattern, causal=causal, start=start, far=far, lengths=lengths, documents=documents,
            padding=padding, total=total, scale=scale, kernel=kernel, turn=turn, finds=finds,
        )  # fmt: skip
    far, past = far if isinstance(far, Outside) else Outside(far or ())
    if pattern.chosen and start != (before := past.position if past else 0):
        raise ValueError(
            f"chosen={pattern.chosen}: the shard starts at {start}, and far keys hold the past of {before} tokens: "
            "give that of a KVCache"
        )
    far_tensors = [x for keys in far for x in (keys.k, keys.v)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    found = None
    if pattern.sinks and turn:
        of_documents = None if documents is None else tuple(documents)
        look_up = sink_rows if torch.compiler.is_compiling() else _sink_rows
        found = look_up(pattern, start, q.shape[1], of_documents, tuple(keys.span for keys in far))
    sinks = _Sinks(found, turn, pattern.sinks, _kept(found, far)) if found and turn else None
    if torch.compiler.is_compiling():  # one opaque operator (`compiled`): a graph cannot trace the integers of a plan
        for keys in far:
            if keys.ready:
                keys.ready()
        if sinks:  # nor can it call `turn`: it gets turned sinks, after the far keys
            far_tensors += sinks.turned(k, v, far_tensors)
        numbers = [number for keys in far for number in keys.span]
        levels = (list(pattern.segment_lengths), list(pattern.dilation_rates), pattern.head_offsets)
        seen = {
            "look_back": list(pattern.look_backs),
            "overlap": pattern.overlap,
            "queries": pattern.queries,
            "sinks": pattern.sinks,
            "level_bias": list(pattern.biases),
        }
        true_lengths = None if lengths is None else torch.as_tensor(lengths)
        options = (numbers, documents, *levels, causal, start, padding, total, scale, kernel)
        return torch.ops.longnet.dilated_attention(q, k, v, far_tensors, true_lengths, *options, **seen)[0]
    kernel_ = select_kernel(q.device, q.dtype, q.shape[-1], kernel)
    plan = plan_calls(kernel_, q, k, v, pattern, causal, start, far, lengths, documents, padding, total, found)
    chosen = Chosen(pattern, plan.chosen, turn, past, finds) if plan.chosen else None
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *far_tensors))):
        return _merged(plan, scale, kernel_, far, sinks, chosen, q, k, v, far_tensors)[0]
    return _MergedBranches.apply(plan, scale, kernel_, far, sinks, chosen, q, k, v, *far_tensors)


def plan_calls(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    causal: bool,
    start: int,
    far: Sequence[FarKeys],
    lengths: Sequence[int] | Tensor | None,
    documents: Sequence[int] | None,
    padding: Padding,
    total: int | None,
    sinks: SinkRows | None = None,
) -> Plan:
    """Check the arguments of `dilated_attention` and plan its calls for a kernel.

    Turned `sinks` come after the far keys. Raises ValueError as `dilated_attention` does.
    """
    tensors = tuple([(x.shape, x.dtype, x.device) for x in (q, k, v, *[y for x in far for y in (x.k, x.v)])])
    spans = tuple([x.span for x in far])
    known = None if lengths is None else _whole_numbers("lengths", lengths)
    ends = None if documents is None else _whole_numbers("documents", documents)
    turned = tuple(sinks.rows.items()) if sinks else ()
    unions = kernel.biased and padding == "exact"
    options = (known, ends, padding, total, turned, unions, kernel.packs)
    return _plan(pattern, tensors, spans, causal, start, *options)


class _Facts(NamedTuple):
    """The facts of a tensor on which a plan depends."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@lru_cache(maxsize=4)  # all layers of a step share one plan, and a plan of a thousand documents is large
def _plan(
    pattern: Pattern,
    tensors: tuple[tuple[torch.Size, torch.dtype, torch.device], ...],
    spans: tuple[Span, ...],
    causal: bool,
    start: int,
    lengths: tuple[int, ...] | None,
    documents: tuple[int, ...] | None,
    padding: Padding,
    total: int | None,
    turned: tuple[tuple[int, int], ...],
    unions: bool,
    packs: bool,
) -> Plan:
    """Check everything, and plan the calls of all blocks.

    `tensors` are the facts of q, k, v, and of k and v of each of the far keys, whose `spans` are given. `unions`: unite
    levels where that is less work; `packs`: pack similar calls.
    """
    q, k, v, *of_far = (_Facts(*x) for x in tensors)
    _check(q, k, v, start, padding)
    if refusal := pattern.refusal(causal, padding):
        raise ValueError(refusal)
    for i, span in enumerate(spans):
        _check_far(span, of_far[2 * i : 2 * i + 2], q, k, pattern)
    (batch, tokens, heads, _), kv_heads = q.shape, k.shape[2]
    if padding == "zero_key" and total is None and (start or spans):
        raise ValueError('padding="zero_key" depends on the length of the whole sequence: give total')
    if documents is not None and (total is not None or lengths is not None):
        raise ValueError("documents have their own lengths: no total or lengths beside them")
    if total is not None and (total < start + tokens or lengths is not None):
        raise ValueError(f"total={total} must hold the shard [{start}, {start + tokens}), and excludes lengths")
    if lengths is not None and any(span.start >= start + tokens for span in spans):
        raise ValueError("far keys after the shard cannot be combined with lengths")
    plan, sinks, chosen, whole = [], dict(turned), [], total or 0
    for first, last, begin, stop in _blocks(lengths, documents, batch, tokens):
        # only the first document may have started before the shard
        position, outside = (start, spans) if begin == 0 else (0, ())
        seen = Turned(len(spans), sinks[begin]) if begin in sinks else None
        found = None
        if unions and position == 0 and not outside and not seen:
            found = united(pattern, heads, stop - begin, causal, kv_heads)
        if found is None:
            found = branches(pattern, heads, position, stop - begin, causal, padding, outside, whole, kv_heads, seen)
        place = slice(first, last), slice(begin, stop)
        plan.append((*place, found))
        if pattern.chosen:
            groups = groups_of(pattern, position, position + stop - begin)
            chosen += [GroupedPart(*place, position, each) for each in groups]
    return Plan.of(plan, batch, tokens, heads, kv_heads, packs, chosen)


class _Sinks(NamedTuple):
    """The sinks of one call, and the function that turns them."""

    rows: SinkRows
    turn: Turn
    number: int
    kept: dict[tuple[int, ...], tuple[Tensor, ...]] | None  # by distances

    def collect(self, k: Tensor, v: Tensor, far: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.rows.collect(k, far[::2], self.number), self.rows.collect(v, far[1::2], self.number)

    def turned(self, k: Tensor, v: Tensor, far: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return k and v of the sinks as every segment sees them, packed."""
        if self.kept is not None and self.rows.distances in self.kept:
            return self.kept[self.rows.distances]
        found = tuple(unit_stride(x) for x in self.rows.spread(*self.collect(k, v, far), self.turn))
        if self.kept is not None:
            self.kept.clear()
            self.kept[self.rows.distances] = found
        return found


def _kept(sinks: SinkRows, far: Sequence[FarKeys]) -> dict[tuple[int, ...], tuple[Tensor, ...]] | None:
    """Return the cache of turned sinks, `turned` of the one span of sinks; None if another document has sinks too."""
    holders = [keys for keys in far if keys.level == SINKS]
    return holders[0].turned if len(holders) == 1 and sinks.firsts == (0,) else None


def _merged(
    plan: Plan,
    scale: float,
    kernel: Kernel,
    far_keys: Sequence[FarKeys],
    sinks: _Sinks | None,
    chosen: Chosen | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Return out and LSE of all branches, as `merged_forward` does."""
    waiting = [keys.ready for keys in far_keys if keys.ready]
    there = [unit_stride(x) for x in far]

    def arrived(index: int) -> list[Tensor]:
        while waiting:
            waiting.pop()()
        if sinks and 2 * index == len(there):
            there.extend(sinks.turned(k, v, far))
        return there[2 * index : 2 * index + 2]

    found = merged_forward(plan, scale, kernel, q, k, v, arrived, chosen)
    while waiting:  # also for keys that no query needed: their buffers must not be freed in flight
        waiting.pop()()
    return found


class _MergedBranches(torch.autograd.Function):
    """All branches of a shard, merged. The backward turns sinks again.

    It saves only q, k, v, far keys, out and LSE.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        scale: float,
        kernel: Kernel,
        far_keys: Sequence[FarKeys],
        sinks: _Sinks | None,
        chosen: Chosen | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *far: Tensor,
    ) -> Tensor:
        q, k, v, *far_tensors = (unit_stride(x) for x in (q, k, v, *far))
        out, lse = _merged(plan, scale, kernel, far_keys, sinks, chosen, q, k, v, far_tensors)
        ctx.save_for_backward(q, k, v, out, lse, *far_tensors)
        ctx.plan, ctx.scale, ctx.kernel, ctx.sinks, ctx.chosen = plan, scale, kernel, sinks, chosen
        ctx.back = [keys.back for keys in far_keys]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *far = ctx.saved_tensors
        sinks: _Sinks | None = ctx.sinks
        back: list[Callable[[Tensor, Tensor], object] | None] = ctx.back
        of_sinks: tuple[Tensor, ...] = ()  # gradients of each document's sinks

        def on_far(dfar: Sequence[Tensor]) -> None:
            nonlocal of_sinks
            if sinks:
                of_sinks = sinks.rows.gradients(*sinks.collect(k, v, far), sinks.turn, *dfar[-2:])
                for i, d in enumerate(of_sinks):
                    sinks.rows.give_far(d, dfar[i::2])
            for i, tell in enumerate(back):
                if tell:
                    tell(dfar[2 * i], dfar[2 * i + 1])

        there = [*far, *(sinks.turned(k, v, far) if sinks else ())]
        far_first = on_far if any(back) else None
        saved = (dout, q, k, v, out, lse, there)
        grads = merged_backward(ctx.plan, ctx.scale, ctx.kernel, *saved, far_first, ctx.chosen)
        if not far_first:
            on_far(grads[3:])
        for d, dx in zip(of_sinks, grads[1:3], strict=False):  # there may be no sinks
            assert sinks is not None
            sinks.rows.give_own(d, dx)
        inputs = zip(grads, (q, k, v, *far), strict=False)  # turned sinks, at the end, have given theirs
        return (None,) * 6 + tuple(d.to(x.dtype) for d, x in inputs)


def _blocks(lengths: Sequence[int] | None, documents: Sequence[int] | None, batch: int, tokens: int) -> Iterator[Place]:
    """Yield the batch as blocks: in each, every row is one sequence, and one set of calls serves all rows."""
    if documents is not None:
        if min(documents, default=0) < 1 or sum(documents) != tokens:
            raise ValueError(f"documents need lengths of at least 1 that make {tokens} tokens, got {[*documents]}")
        stop = 0
        for length in documents:
            start, stop = stop, stop + length
            yield 0, batch, start, stop
        return
    if lengths is None:
        yield 0, batch, 0, tokens
        return
    if len(lengths) != batch or not all(0 <= n <= tokens for n in lengths):
        why = ": -1 is a row with tokens after padding, which has to be on the right" if -1 in lengths else ""
        raise ValueError(f"lengths needs {batch} numbers from 0 to {tokens}, got {[*lengths]}{why}")
    for length, rows in groupby(range(batch), key=lengths.__getitem__):  # neighbours of equal length go together
        members = list(rows)
        if length:
            yield members[0], members[-1] + 1, 0, length


def _whole_numbers(name: str, numbers: Sequence[int] | Tensor) -> tuple[int, ...]:
    try:
        return tuple(operator.index(n) for n in (numbers.tolist() if isinstance(numbers, Tensor) else numbers))
    except TypeError:
        raise ValueError(f"{name} needs whole numbers, in one dimension, got {numbers}") from None


def _check(q: _Facts, k: _Facts, v: _Facts, start: int, padding: str) -> None:
    fits = (
        len(q.shape) == len(k.shape) == 4
        and k.shape == v.shape
        and (*q.shape[:2], q.shape[3]) == (*k.shape[:2], k.shape[3])
    )
    if not fits or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            "q, k and v need one shape (batch, tokens, heads, head_dim), where the heads of k and v may be a divisor, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(f"q, k and v need one dtype and device, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.dtype not in _DTYPES:
        raise ValueError(f"q, k and v need one of {', '.join(map(str, _DTYPES))}, got {q.dtype}")
    if start < 0:
        raise ValueError(f"start must be a position, got {start}")
    if padding not in ("exact", "zero_key"):
        raise ValueError(f'padding must be "exact" or "zero_key", got {padding!r}')


def _check_far(span: Span, of_span: Sequence[_Facts], q: _Facts, k: _Facts, pattern: Pattern) -> None:
    level, start, stop = span
    if level != SINKS and not 0 <= level < len(pattern.levels):
        raise ValueError(f"far keys name level {level} of {len(pattern.levels)}")
    rows = span_rows(pattern, span, q.shape[2], k.shape[2])
    needed = (len(rows), q.shape[3])
    for shape, dtype, device in of_span:
        fits = len(shape) == 4 and (shape[0], *shape[2:]) == (q.shape[0], *needed) and shape[1] >= max(rows)
        if not fits or dtype != q.dtype or device != q.device:
            raise ValueError(
                f"far keys [{start}, {stop}) of level {level} need {(q.shape[0], max(rows), *needed)} "
                f"in {q.dtype} on {q.device}, got {tuple(shape)} in {dtype} on {device}"
            )
