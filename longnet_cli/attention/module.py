"""Dilated attention as a module: a `torch.nn.MultiheadAttention` with a pattern.

    layer = nn.TransformerEncoderLayer(768, 12, batch_first=True)
    attention = DilatedAttention(768, 12, Pattern.paper())
    attention.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = attention

B batch, N tokens, E embed_dim, H heads, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dilated import dilated_attention
from .pattern import Padding, Pattern


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
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if dropout:
            raise ValueError(f"dilated attention has no dropout of attention weights: dropout must be 0, got {dropout}")
        if not batch_first:
            raise ValueError("dilated attention takes (batch, tokens, embed_dim): batch_first must be True")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.pattern, self.padding, self.dropout = pattern, padding, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, device=device, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim, device=device, dtype=dtype)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
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
        q, k, v = (x.unflatten(-1, heads) for x in self._project(query, key, value))  # (B, N, H, D) views
        mixed = dilated_attention(q, k, v, self.pattern, causal=is_causal, lengths=lengths, padding=self.padding)
        return self.out_proj(mixed.flatten(-2)), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, {self.pattern}"


def true_lengths(tokens: Tensor) -> Tensor:
    """Return the lengths (B,) of the rows of a right-padded batch, from a boolean mask (B, N) that is True at tokens.

    Raises ValueError for a row with padding before a token.
    """
    lengths = tokens.sum(-1)
    right = (tokens == (torch.arange(tokens.shape[-1], device=tokens.device) < lengths[:, None])).all(-1)
    if not right.all():
        row = int(right.logical_not().nonzero()[0])
        raise ValueError(f"dilated attention takes padding on the right only, and row {row} has tokens after padding")
    return lengths


def _is_padding(mask: Tensor, shape: torch.Size) -> Tensor:
    """Return a key padding mask (batch, tokens) as booleans; torch's own layers pass it with 0 and -inf."""
    if mask.shape != shape:
        raise ValueError(f"key_padding_mask needs {tuple(shape)}, (batch, tokens), got {tuple(mask.shape)}")
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
        raise ValueError("dilated attention takes no attn_mask but the causal one: pass is_causal=True with it")
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).triu(1)
    expected = (
        later if mask.dtype is torch.bool else torch.zeros(tokens, tokens).to(mask).masked_fill(later, -torch.inf)
    )
    if mask.shape != later.shape or not torch.equal(mask, expected):
        raise ValueError(
            f"dilated attention takes no attn_mask but the causal one of {tokens} tokens, True or -inf above the "
            f"diagonal; got another of {tuple(mask.shape)}"
        )
