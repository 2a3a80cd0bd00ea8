"""Dilated attention: one softmax over the union of every level's keys (arXiv 2307.02486, Eq. 3-15).

The union is a multiset, and it may be divided in any way: by levels, by chunks of a long sequence, by ranks, by
cache and new tokens. Each part is a branch, one plain attention call on strided views (`branches`), and branches merge
by their log-sum-exp (`merging`).

`DilatedAttention` is a module, a `torch.nn.MultiheadAttention` with a pattern:

    layer = nn.TransformerEncoderLayer(768, 12, batch_first=True)
    attention = DilatedAttention(768, 12, Pattern.paper())
    attention.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = attention

B batch, N tokens of the shard, H query heads, K key heads (a divisor of H), D head_dim, w segment length, r dilation
rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import FarKeys, FarSource, Outside
from .chosen import add_blocks
from .kernels import select_kernel
from .pattern import Padding, Pattern
from .planning import (
    AttentionPlan,
    Shard,
    merged_backward,
    merged_forward,
    plan_calls,
    refuse_capture,
)
from .sinks import SinkRows, Turn, sink_rows
from .spans import SINKS, FarSpan
from .views import autocasts, unit_stride

_sink_rows = lru_cache(maxsize=4)(sink_rows)  # all layers of a step ask for the same


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
) -> Tensor:
    """Attend from q (B, N, H, D) to k, v (B, N, K, D) by `pattern`; return (B, N, H, D) like q. Differentiable.

    Each level may have its own queries, keys and values, as rotary positions by level need (`nets.positions`): then q,
    k and v are (B, N, levels, heads, D), and the pattern has no sinks and no chosen blocks. The softmax is one.

    Query head h reads key head h // (H / K). The shard is positions [start, start + tokens) of its sequence, any
    start, any length. A query that takes part in no level gets zeros. Under autocast, tensors of several types are cast
    to its type, as `scaled_dot_product_attention` casts them; tensors of one type stay as they are. There is no second
    derivative: asking for it raises RuntimeError.

    far: keys from outside the shard; in causal attention, they lie before it. If the shard is a single token, its own
        row may be the last of some levels' far keys; then k and v are not read there. For chosen blocks, an `Outside`
        that also says which ones, as a `KVCache` gives it.
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

    Chosen blocks are moved by `turn` in the same way (`chosen`). They have no gradient: a backward pass through them
    raises ValueError. torch.compile compiles what is around attention: its graph breaks here.

    Sinks are the document's own first rows if the shard has them, otherwise far keys of level `SINKS`.

    Raises ValueError for shapes, patterns, far keys, sinks, lengths or kernels that do not fit, and RuntimeError while
    a CUDA graph captures.
    """
    outside = far if isinstance(far, Outside) else Outside(far or ())
    shard = Shard(start, lengths, documents, total, padding, causal)
    # a graph cannot trace the integers of a plan, nor data that decide
    attend = torch.compiler.disable(_attend) if torch.compiler.is_compiling() else _attend
    return attend(q, k, v, pattern, shard, outside, scale, kernel, turn)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    shard: Shard,
    outside: Outside,
    scale: float | None,
    kernel: str | None,
    turn: Turn | None,
) -> Tensor:
    refuse_capture(q)
    if not q.shape[-1]:
        raise ValueError(f"q, k and v need a head_dim of at least 1, got q of {tuple(q.shape)}")
    if autocasts(q.device) and not q.dtype == k.dtype == v.dtype:
        # Rotated q and k come in float32, and v in the type of its projection. Autocast leaves float64 alone.
        autocast_dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(autocast_dtype) for x in (q, k, v))
    far_keys, chosen = outside
    sinks = _sinks(pattern, shard, q.shape[1], far_keys, turn)
    selected = select_kernel(q.device, q.dtype, q.shape[-1], kernel)
    plan = plan_calls(selected, q, k, v, pattern, shard, far_keys, sinks.rows.rows if sinks else {})
    if pattern.chosen and (
        chosen is None or shard.documents or (shard.start and chosen.rows is None)
    ):
        raise ValueError(
            f"chosen={pattern.chosen}: which blocks a document's queries see is not given: far keys of a KVCache say so"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    add = None
    if chosen and chosen.calls:
        add = partial(add_blocks, selected, scale, chosen, pattern.chosen_block, turn)
    sources = [
        (index, keys.span, keys.source) for index, keys in enumerate(far_keys) if keys.source
    ]
    call = _ShardCall(plan, scale, sources, sinks, add)
    far_rows = [x for keys in far_keys for x in (keys.k, keys.v)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *far_rows)):
        inputs = [unit_stride(x) for x in (q, k, v, *far_rows)]
        return _MergedBranches.apply(call, *inputs)
    return call.forward(q, k, v, far_rows)[0]


class _Sinks(NamedTuple):
    """The sinks of one call, and the function that turns them."""

    rows: SinkRows
    turn: Turn
    number: int
    kept: dict[tuple[int, ...], tuple[Tensor, ...]] | None  # by distances

    def collect(self, k: Tensor, v: Tensor, far_rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        of_k = self.rows.collect(k, far_rows[::2], self.number)
        of_v = self.rows.collect(v, far_rows[1::2], self.number)
        return of_k, of_v

    def turned(self, k: Tensor, v: Tensor, far_rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return k and v of the sinks as every segment sees them, packed."""
        distances = self.rows.distances
        kept = {} if self.kept is None else self.kept  # otherwise for this call alone
        if distances not in kept:
            of_k, of_v = self.collect(k, v, far_rows)
            kept.clear()
            kept[distances] = tuple(map(unit_stride, self.rows.spread(of_k, of_v, self.turn)))
        return kept[distances]

    def add_gradients(
        self,
        k: Tensor,
        v: Tensor,
        far_rows: Sequence[Tensor],
        sums: Sequence[Tensor],
    ) -> None:
        """Add the gradients of turned sinks, the last two of `sums`, to those of the rows that were turned.

        `sums` are the gradients of q, k, v, and of far k and v in turn. The sinks are rows of k and v, or of far ones.
        """
        of_k, of_v = self.collect(k, v, far_rows)
        of_sinks = self.rows.gradients(of_k, of_v, self.turn, *sums[-2:])
        for which, gradient in enumerate(of_sinks):
            self.rows.give_own(gradient, sums[1 + which])
            self.rows.give_far(gradient, sums[3 + which :: 2])


def _sinks(
    pattern: Pattern,
    shard: Shard,
    tokens: int,
    far_keys: Sequence[FarKeys],
    turn: Turn | None,
) -> _Sinks | None:
    """Return the sinks that a shard of `tokens` has to turn, or None."""
    if not pattern.sinks or not turn:
        return None
    documents = None if shard.documents is None else tuple(shard.documents)
    rows = _sink_rows(
        pattern,
        shard.start,
        tokens,
        documents,
        tuple(keys.span for keys in far_keys),
    )
    if rows is None:
        return None
    # turned sinks may be kept where one span holds them all, and no other document of the shard has sinks
    holders = [keys for keys in far_keys if keys.level == SINKS]
    kept = holders[0].turned if len(holders) == 1 and rows.starts == (0,) else None
    return _Sinks(rows, turn, pattern.sinks, kept)


class _ShardCall(NamedTuple):
    """All that a call of a shard has besides its tensors. `add` merges chosen blocks.

    `sources` are those of the far keys that have one, with their indices and spans. It holds no far keys: autograd
    saves their tensors.
    """

    plan: AttentionPlan
    scale: float
    sources: Sequence[tuple[int, FarSpan, FarSource]]
    sinks: _Sinks | None
    add: Callable[..., None] | None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        far_rows: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return out and LSE of all branches, as `merged_forward` does."""
        waiting = [source for _, _, source in self.sources]
        rows = [unit_stride(x) for x in far_rows]

        def wait() -> None:
            while waiting:
                waiting.pop().arrive()

        def arrived(index: int) -> list[Tensor]:
            wait()
            if self.sinks and 2 * index == len(rows):
                rows.extend(self.sinks.turned(k, v, far_rows))
            return rows[2 * index : 2 * index + 2]

        out, lse = merged_forward(self.plan, self.scale, q, k, v, arrived)
        wait()  # buffers must not be freed in flight, also those of keys that no query needed
        if self.add:
            self.add(q, k, v, out, lse)
        return out, lse

    def gradients(self, tensors: Sequence[Tensor], far_rows: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of q, k, v and of the far rows, as `merged_backward` does, from its `tensors`.

        The sources of far keys get theirs as soon as they are there.
        """
        _, _, k, v, _, _ = tensors

        def on_far(sums: Sequence[Tensor]) -> None:
            if self.sinks:
                self.sinks.add_gradients(k, v, far_rows, sums)
            of_far = sums[3:]
            for index, span, source in self.sources:
                source.take_gradients(span, of_far[2 * index], of_far[2 * index + 1])

        there = [*far_rows]
        if self.sinks:
            there += self.sinks.turned(k, v, far_rows)
        return merged_backward(self.plan, self.scale, tensors, there, on_far)


class _MergedBranches(torch.autograd.Function):
    """All branches of a shard, merged. It saves only q, k, v, far keys, out and LSE; the backward turns sinks again.

    All inputs have a last stride of 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: _ShardCall,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *far_rows: Tensor,
    ) -> Tensor:
        out, lse = call.forward(q, k, v, far_rows)
        ctx.save_for_backward(q, k, v, out, lse, *far_rows)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *far_rows = ctx.saved_tensors
        refuse_capture(q)
        if ctx.call.add:
            raise ValueError(
                "chosen blocks have no gradient: train with a window (--pattern window:1Ki)"
            )
        inputs = (q, k, v, *far_rows)
        with torch.no_grad():
            sums = ctx.call.gradients((dout, q, k, v, out, lse), far_rows)
            # The gradients of turned sinks, which come last, are a part of the others by now.
            grads = [d.to(x.dtype) for d, x in zip(sums, inputs, strict=False)]
        if torch.is_grad_enabled():  # the caller asks for a graph of the gradients
            grads = _NoSecondDerivative.apply(grads, dout, *inputs)
        return None, *grads


class _NoSecondDerivative(torch.autograd.Function):
    """Gradients whose own derivative is refused, on every way back from them to what they were computed from.

    torch's `once_differentiable` refuses it only to a call that follows the graph to its end.
    """

    @staticmethod
    def forward(ctx: Any, grads: Sequence[Tensor], *causes: Tensor) -> tuple[Tensor, ...]:
        return tuple(grads)

    @staticmethod
    def backward(ctx: Any, *of_grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("dilated attention has no second derivative")


class DilatedAttention(nn.Module):
    """Self-attention with the parameters, names and initial values of `torch.nn.MultiheadAttention(batch_first=True)`.

    padding: "zero_key" adds torchscale's zero keys to ragged segments of a bidirectional call.

    There is no dropout of attention weights, and no `add_bias_kv`, `add_zero_attn`, `kdim`, `vdim`: an operator that
    never holds the weights cannot have them. Raises ValueError for a dropout that is not 0, for batch_first=False and
    for an embed_dim that num_heads does not divide.
    """

    # torch's TransformerEncoderLayer and TransformerEncoder read this of their `self_attn`: unless it is False, they
    # may call a fused dense kernel with our weights, in eval mode, in place of `forward`
    _qkv_same_embed_dim = False
    batch_first = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: Pattern,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        padding: Padding = "exact",
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
            )
        if dropout:
            raise ValueError(
                f"dilated attention has no dropout of attention weights: dropout must be 0, got {dropout}"
            )
        if not batch_first:
            raise ValueError(
                "dilated attention takes (batch, tokens, embed_dim): batch_first must be True"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.pattern = pattern
        self.padding = padding
        self.dropout = dropout
        weight = torch.empty(3 * embed_dim, embed_dim, device=device, dtype=dtype)
        self.in_proj_weight = nn.Parameter(weight)
        self.in_proj_bias: nn.Parameter | None = None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            self.in_proj_bias = nn.Parameter(weight.new_zeros(3 * embed_dim))
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend from query to key and value, each (B, N, E), usually one tensor. Return (output (B, N, E), None).

        key_padding_mask: (B, N), True or -inf at padding, False or 0 elsewhere; padding lies on the right. Real tokens
            come out as they would alone; outputs at padding have no meaning.
        is_causal: masks later keys; no mask is needed for it. With it, `attn_mask` (N, N) may be given, but must be the
            causal mask.
        average_attn_weights: without effect, as there are no weights.

        Raises ValueError for cross-attention, nested tensors, need_weights=True, any other attn_mask, and padding that
        is not on the right.
        """
        if need_weights:
            raise ValueError("dilated attention never holds its weights: pass need_weights=False")
        if query.is_nested:
            raise ValueError(
                "dilated attention takes padded batches, no nested tensors: nn.TransformerEncoder makes none with "
                "enable_nested_tensor=False"
            )
        if query.dim() != 3 or query.shape != key.shape or query.shape != value.shape:
            raise ValueError(
                "dilated attention is self-attention, cross-attention is not supported: query, key and value need one "
                f"shape (batch, tokens, embed_dim), got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
            )
        if attn_mask is not None:
            _check_causal(attn_mask, query.shape[1], is_causal)
        lengths = None
        if key_padding_mask is not None:
            lengths = true_lengths(_is_padding(key_padding_mask, query.shape[:2]).logical_not())
        heads = (self.num_heads, self.head_dim)
        projected = self._project(query, key, value)
        q, k, v = (x.unflatten(-1, heads) for x in projected)  # (B, N, H, D) views
        mixed = dilated_attention(
            q,
            k,
            v,
            self.pattern,
            causal=is_causal,
            lengths=lengths,
            padding=self.padding,
        )
        return self.out_proj(mixed.flatten(-2)), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        parts = zip((query, key, value), weights, biases, strict=True)
        return tuple(F.linear(x, weight, bias) for x, weight, bias in parts)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, {self.pattern}"


def true_lengths(tokens: Tensor) -> Tensor:
    """Return the lengths (B,) of the rows of a right-padded batch, from a boolean mask (B, N) that is True at tokens.

    Raises ValueError for a row with padding before a token.
    """
    lengths = tokens.sum(-1)
    columns = torch.arange(tokens.shape[-1], device=tokens.device)
    wrong = (tokens != (columns < lengths[:, None])).any(-1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"dilated attention takes padding on the right only, and row {row} has tokens after padding"
        )
    return lengths


def _is_padding(mask: Tensor, shape: torch.Size) -> Tensor:
    """Return a key padding mask (batch, tokens) as booleans; torch's own layers pass it with 0 and -inf."""
    if mask.shape != shape:
        raise ValueError(
            f"key_padding_mask needs {tuple(shape)}, (batch, tokens), got {tuple(mask.shape)}"
        )
    if mask.dtype is torch.bool:
        return mask
    padding = mask == float("-inf")
    if not ((mask == 0) | padding).all():
        raise ValueError(
            "key_padding_mask may hold 0 and -inf, or be boolean: dilated attention adds nothing to scores"
        )
    return padding


def _check_causal(mask: Tensor, tokens: int, is_causal: bool) -> None:
    if not is_causal:
        raise ValueError(
            "dilated attention takes no attn_mask but the causal one: pass is_causal=True with it"
        )
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).triu(1)
    expected = later
    if mask.dtype is not torch.bool:
        expected = torch.zeros(tokens, tokens).to(mask).masked_fill(later, -torch.inf)
    if mask.shape != later.shape or not torch.equal(mask, expected):
        raise ValueError(
            f"dilated attention takes no attn_mask but the causal one of {tokens} tokens, True or -inf above the "
            f"diagonal; got another of {tuple(mask.shape)}"
        )
