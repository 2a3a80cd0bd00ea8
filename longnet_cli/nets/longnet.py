"""The net: MAGNETO layers (arXiv 2210.06423) around dilated attention (arXiv 2307.02486). It knows of no ranks.

    x + out(LN(attention(LN x)))        x + fc2(LN(gelu(fc1(LN x))))        inner LNs only for norm="subln"

With ffn="swiglu", silu(gate(LN x)) * fc1(LN x) stands in place of the gelu. With norm="rmsnorm", LN is an RMS norm.

In training, dropout applies to the second term of both sums (`dropout`, 0 by default), and drop path does, too, in a
slide encoder.

A net runs on one device. If it sees one shard of a sequence, it gets keys from outside through `far`, a callable (see
`FarProvider`), and its place through `start`. `longnet_cli.running` builds chunks and ranks from these two.

B batch, N tokens, H heads, K heads of keys and values, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longnet_cli.attention import Outside, Pattern, dilated_attention
from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.named_blocks import whole_text
from longnet_cli.nets.net import FarProvider, Net, positions_of, product_dtype
from longnet_cli.nets.positions import PositionTable, position_table, rotate, sink_turn
from longnet_cli.nets.weights import load_pretrained, save_pretrained

LayerProvider = Callable[[Tensor, Tensor, Tensor], Outside]  # a FarProvider of one layer


class Placement(NamedTuple):
    """The places of tokens; `LongNet.forward` and `dilated_attention` describe these arguments."""

    start: int = 0
    lengths: Sequence[int] | Tensor | None = None
    documents: Sequence[int] | None = None
    total: int | None = None


def _for_products(normalize: Callable[..., Tensor], x: Tensor, *weights: Tensor) -> Tensor:
    """Return `normalize(x, *weights)`: under autocast, in the dtype of the matrix products after it, one cast for all.

    Autocast by itself would widen the norm's input and return float32, which each product would cast again.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return normalize(x, *weights)
    dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        return normalize(x, *(weight.to(x.dtype) for weight in weights)).to(dtype)


class Norm(nn.LayerNorm):
    """A layer norm whose output, under autocast, has the dtype of the matrix products after it."""

    def forward(self, x: Tensor) -> Tensor:
        def normalize(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

        return _for_products(normalize, x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """A norm by the root mean square (arXiv 1910.07467), whose output under autocast has the dtype of `Norm`'s."""

    def forward(self, x: Tensor) -> Tensor:
        def normalize(x: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)

        return _for_products(normalize, x, self.weight)


def outer_norm(config: LongNetConfig) -> nn.Module:
    """Return a norm of hidden states, before a block of a layer."""
    kind = RMSNorm if config.norm == "rmsnorm" else Norm
    return kind(config.dim, config.norm_eps)


def final_norm(config: LongNetConfig) -> nn.Module:
    """Return the norm after the last layer. Its output keeps the dtype of the hidden states, also under autocast."""
    if not config.final_norm:
        return nn.Identity()
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.dim, config.norm_eps)


def inner_norm(config: LongNetConfig, size: int) -> nn.Module:
    """Return the norm inside a block of this width, which only norm="subln" has."""
    return Norm(size, config.norm_eps) if config.norm == "subln" else nn.Identity()


class Attention(nn.Module):
    """The projections to queries, keys and values, dilated attention, and the output projection."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.config = config
        self.pattern = config.pattern
        self.turn = sink_turn(config)
        # three matrices, not one: v as a view of a fused product would keep the unrotated q and k alive till backward
        self.q = nn.Linear(config.dim, config.dim, config.bias)
        self.k, self.v = (nn.Linear(config.dim, config.kv_dim, config.bias) for _ in range(2))
        self.inner_norm = inner_norm(config, config.dim)
        self.out = nn.Linear(config.dim, config.dim, config.bias)

    def project(self, x: Tensor, table: PositionTable | None) -> tuple[Tensor, Tensor, Tensor]:
        """Project normed hidden states (B, N, dim) to rotated q (B, N, H, D) and k, and v, each (B, N, K, D).

        With positions by level, q is (B, N, levels, H, D), and so are the others; that of v is a view.
        """
        heads = (-1, self.config.head_dim)
        q, k, v = (linear(x).unflatten(-1, heads) for linear in (self.q, self.k, self.v))
        q, k = rotate(q, k, table)
        return q, k, v if k.dim() == 4 else v[:, :, None].expand_as(k)

    def forward(
        self,
        x: Tensor,
        table: PositionTable | None,
        place: Placement,
        far: LayerProvider | None,
    ) -> Tensor:
        q, k, v = self.project(x, table)
        attend = self.attend
        if far and torch.compiler.is_compiling():
            # a provider keeps state and sends messages: no graph can hold that
            attend = torch.compiler.disable(attend)
        mixed = attend(q, k, v, place, far)
        return self.out(self.inner_norm(mixed.flatten(-2)))  # (B, N, H, D) -> (B, N, dim)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        place: Placement,
        far: LayerProvider | None,
    ) -> Tensor:
        return dilated_attention(
            q,
            k,
            v,
            self.pattern,
            causal=self.config.causal,
            far=far(q, k, v) if far else None,
            padding=self.config.padding,
            turn=self.turn,
            **place._asdict(),
        )


class FeedForward(nn.Module):
    """Two linear layers with an exact (erf) gelu between them, or with a product with a third one (SwiGLU)."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.ffn_dim, config.bias)
        self.gate = None
        if config.ffn == "swiglu":
            self.gate = nn.Linear(config.dim, config.ffn_dim, config.bias)
        self.inner_norm = inner_norm(config, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.fc1(x)
        wide = F.gelu(wide) if self.gate is None else F.silu(self.gate(x)) * wide
        return self.fc2(self.inner_norm(wide))


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, a sequence of x is 0 with probability `p`, else x / (1 - p)."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        return x * F.dropout(x.new_ones(len(x), 1, 1), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


class Layer(nn.Module):
    """One layer: hidden (B, N, dim) -> hidden (B, N, dim)."""

    # `models.official_slide` has others
    attention_kind = Attention
    ffn_kind = FeedForward

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.attention_norm = outer_norm(config)
        self.attention = self.attention_kind(config)
        self.ffn_norm = outer_norm(config)
        self.ffn = self.ffn_kind(config)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath()

    def forward(
        self,
        x: Tensor,
        table: PositionTable | None,
        place: Placement = Placement(),  # noqa: B008 (immutable)
        far: LayerProvider | None = None,
    ) -> Tensor:
        x = x + self.drop_path(
            self.dropout(self.attention(self.attention_norm(x), table, place, far))
        )
        return x + self.drop_path(self.dropout(self.ffn(self.ffn_norm(x))))


class LongNet(Net):
    """A LongNet language model (causal) or encoder (bidirectional), initialised at random, float32.

    `forward` is `embed`, then each of `layers` with one `positions` table, then `final_norm`. Code that must go layer
    by layer (a bidirectional net over more tokens than memory holds) calls these itself.
    """

    layer_by_layer = True
    layer_kind = Layer

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.config: LongNetConfig = config
        self.embedding = None
        if config.vocab_size:
            # an empty table: `init_weights` draws it, and nn.Embedding would draw it before
            table = torch.empty(config.vocab_size, config.dim)
            self.embedding = nn.Embedding(config.vocab_size, config.dim, _weight=table)
        else:
            self.row_size = config.dim
        self.layers = nn.ModuleList(self.layer_kind(config) for _ in range(config.num_layers))
        self.final_norm = final_norm(config)
        untied = config.vocab_size and not config.tie_embeddings
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False) if untied else None
        # on the meta device, drawing would import half of torch
        if not next(self.parameters()).is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights anew (MAGNETO section 2: gain sqrt(ln 2L) on v, out and the ffn; q, k, v share 1/sqrt 2).

        For a net built on the meta device, call `to_empty(device=...)` first.
        """
        gain = (
            math.sqrt(math.log(2 * self.config.num_layers)) if self.config.norm == "subln" else 1.0
        )
        share = 1 / math.sqrt(2)
        gains = {"q": share, "k": share, "v": share * gain, "out": gain}
        gains |= dict.fromkeys(("fc1", "gate", "fc2"), gain)
        for name, module in self.named_modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif (scale := gains.get(name.rpartition(".")[2])) and isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=scale)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.embedding, self.output):
            if table is not None:
                nn.init.normal_(table.weight, std=self.config.dim**-0.5)

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        start: int = 0,
        lengths: Sequence[int] | Tensor | None = None,
        documents: Sequence[int] | None = None,
        far: FarProvider | None = None,
        total: int | None = None,
    ) -> Tensor:
        """Return hidden states (B, N, dim) after the final norm, of token ids (B, N) or of vectors (B, N, dim).

        `start` is the position of the first token. `lengths` gives the true length of each right-padded row: real
        tokens come out as they would alone, outputs at padding have no meaning. `documents` gives the lengths of the
        documents that follow each other in every row: each comes out as it would alone, the first from `start` on.
        `far` makes the input one shard of a longer sequence, see FarProvider; for zero keys, give the length of that
        sequence as `total`. Raises ConfigError for tokens given to a net without embedding, and for vectors given to
        one with chosen blocks, which the text names.
        """
        x = self.embed(tokens, embeddings)
        if isinstance(lengths, Tensor):
            lengths = lengths.tolist()  # waits for a GPU: once, not in every layer
        table = self.positions(x, start, documents)
        place = Placement(start, lengths, documents, total)
        if self.config.pattern.chosen and not far:
            far = whole_text(self.config.pattern, tokens)
        for index, layer in enumerate(self.layers):
            x = layer(x, table, place, partial(far, index) if far else None)
        return self.final_norm(x)

    def embed(self, tokens: Tensor | None = None, embeddings: Tensor | None = None) -> Tensor:
        """Return the input of the first layer, (B, N, dim), from exactly one of the two inputs of `forward`."""
        if (tokens is None) == (embeddings is None):
            raise ValueError("give either tokens or embeddings")
        if embeddings is not None:
            return embeddings
        assert tokens is not None
        if self.embedding is not None:
            return self.embedding(tokens)
        if not tokens.is_floating_point():
            raise ConfigError(
                "this model has no token embedding (vocab_size 0): it reads embeddings, not tokens"
            )
        # vectors, from a caller that passes any rows as tokens
        return tokens.to(next(self.parameters()).dtype)

    def positions(
        self,
        x: Tensor,
        start: int,
        documents: Sequence[int] | None = None,
    ) -> PositionTable | None:
        """Return the table for hidden states (B, N, dim) that start at position `start`; all layers share it.

        All `documents` but the first start at position 0.
        """
        places = positions_of(documents or [x.shape[1]], start, x.device)
        return position_table(self.config, places, product_dtype(x))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., vocab_size) of hidden states (..., dim), in the dtype of the matrix product."""
        if self.output is not None:
            return self.output(hidden)  # not its weight alone: others hook or replace the module
        if self.embedding is None:
            raise ConfigError("this model has no vocabulary (vocab_size 0): it cannot score tokens")
        weight = self.embedding.weight
        if weight.is_meta and not hidden.is_meta:  # torch would multiply with arbitrary memory
            raise ConfigError("the embedding, which logits need, is offloaded: keep it in memory")
        return F.linear(hidden, weight)

    @property
    def layer_modules(self) -> Sequence[nn.Module]:
        return [*self.layers]

    def save(
        self,
        folder: Path,
        tokenizer_json: str,
        state: Mapping[str, Tensor],
        eos: str = "",
    ) -> None:
        save_pretrained(self, folder, tokenizer_json, state, eos)

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | PathLike[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = torch.float32,
        *,
        pattern: Pattern | None = None,
        verify: bool = True,
    ) -> LongNet:
        """Load a saved model, from its directory or by the name of one that ships; see weights.load_pretrained."""
        return load_pretrained(cls, name_or_dir, device, dtype, pattern=pattern, verify=verify)

    def save_pretrained(
        self,
        directory: str | PathLike[str],
        tokenizer_json: str | None = None,
        eos: str = "",
    ) -> None:
        """Write config.json, model.safetensors and tokenizer.json; `eos` is the token that ends documents.

        See weights.save_pretrained.
        """
        save_pretrained(self, directory, tokenizer_json, eos=eos)
