"""The net as jobs see it, whoever made it: hidden states of a chunk, the loss of tokens, and a few facts.

`LongNet` is one, `integrations.transformers_net.TransformersNet` the other. B batch, N tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longnet_cli.attention import FarKeys, Pattern

# Called once per layer with (layer index, k, v): this shard's keys, rotated, and values, (B, N, H, D) both, in the
# autograd graph. Returns the far keys that the shard attends to in that layer. It may keep k and v for later shards.
FarProvider = Callable[[int, Tensor, Tensor], Sequence[FarKeys]]

LOGITS_LIMIT = 1 << 26  # elements of logits that `nll` holds at one time: 256 MiB in float32
IGNORED = -100  # a target without loss


class NetConfig(Protocol):
    """The facts. `model_dump_json` tells all that decides what the net computes, besides its weights."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    causal: bool

    @property
    def head_dim(self) -> int: ...

    @property
    def kv_dim(self) -> int:
        """Numbers of a token's keys, and of its values, in a layer."""

    @property
    def frozen(self) -> bool:
        """Return whether its own weights are not trained, but LoRA's beside them."""

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of all layers."""

    @property
    def pattern(self) -> Pattern: ...

    @property
    def streams(self) -> bool:
        """Return whether a sequence can go through in chunks; if not, it is one forward, however long."""

    @property
    def max_tokens(self) -> int | None:
        """Tokens of the longest sequence that it reads; None for no limit."""

    def num_parameters(self) -> int: ...
    def model_dump_json(self) -> str: ...


class Net(nn.Module):
    """`net(tokens, start=..., lengths=..., far=...)` gives hidden states as LongNet does; `nll` needs `logits`."""

    config: NetConfig
    note: str | None = None  # what a user should know of how it reads documents, in one line
    choices: str = ""  # what there is to choose where a sequence is too long, besides shorter ones
    has_cls: bool = False  # whether a row of its own, CLS, comes before each sequence

    @property
    def row_size(self) -> int | None:
        """Numbers of each vector that it reads in the place of a token id; None where it reads ids."""
        return None

    def head(self, pooled: Tensor) -> Tensor:
        """Return pooled hidden states (..., dim) as they are handed out, after the net's own last step."""
        return pooled

    def stream(self) -> Callable[..., Tensor] | None:
        """Return what reads a causal sequence chunk by chunk, as a CausalStream; None where that is what does."""
        return None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers, first to last: each gets hidden (B, N, dim) and returns it."""
        raise NotImplementedError

    def check_trainable(self) -> None:
        """Raise ConfigError for a net through which the gradient of a long sequence cannot go; in eval mode."""

    def save(self, folder: Path, tokenizer_json: str, state: Mapping[str, Tensor], eos: str | None = None) -> None:
        """Write a model directory with the weights `state`, on the CPU; files get their names when they are whole.

        `eos` is the token of the tokenizer that ends documents, where it is not the one that the model came with.
        Raises CheckpointError where it cannot be written.
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden (..., dim) -> logits (..., vocab_size). Raises ConfigError for a net that has none."""
        raise NotImplementedError

    def nll(self, hidden: Tensor, targets: Tensor, *, limit: int = LOGITS_LIMIT) -> Tensor:
        """Negative log-likelihood in nats of `targets` (B, N), already shifted, given hidden (B, N, dim).

        (B, N) float32, float64 for float64 hidden; 0 where a target is -100. At most `limit` elements of logits exist
        at one time, also in the backward, which computes each chunk of them again.
        """
        rows, wanted = hidden.flatten(0, -2), targets.flatten()  # (B N, dim), (B N,)
        size = max(1, limit // max(1, self.config.vocab_size))
        if len(rows) <= size:
            return self._nll(rows, wanted).view(targets.shape)
        again = torch.is_grad_enabled()
        chunks = [
            checkpoint(self._nll, r, t, use_reentrant=False, preserve_rng_state=False) if again else self._nll(r, t)
            for r, t in zip(rows.split(size), wanted.split(size), strict=True)
        ]
        return torch.cat(chunks).view(targets.shape)

    def _nll(self, rows: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(rows)
        wide = logits if logits.dtype is torch.float64 else logits.float()
        return F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="none")
