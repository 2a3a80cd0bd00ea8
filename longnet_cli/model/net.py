"""The interface of nets for jobs: hidden states of a chunk, the loss of tokens, and a few facts.

`LongNet` and `integrations.transformers_net.TransformersNet` are such nets. B batch, N tokens, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longnet_cli.attention import FarKeys, Past, Pattern

# Called once per layer with (layer index, q, k, v): this shard's queries and keys, rotated, and values, (B, N, H, D)
# each, in the autograd graph. Returns the far keys that the shard attends to in that layer, and the past from which it
# chooses blocks. It may keep q, k and v for later shards.
FarProvider = Callable[[int, Tensor, Tensor, Tensor], Sequence[FarKeys | Past]]

LOGITS_LIMIT = 1 << 26  # elements of logits that `nll` holds at a time: 256 MiB in float32
IGNORED = -100  # a target without loss


class NetConfig(Protocol):
    """The facts of a net. `model_dump_json` holds all facts that, with the weights, decide what the net computes."""

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
        """The size of a token's keys in one layer, and of its values."""

    @property
    def frozen(self) -> bool:
        """True if LoRA weights are trained in place of the net's own."""

    @property
    def layer_weights(self) -> int:
        """The number of weights in the matrices of all layers."""

    @property
    def pattern(self) -> Pattern: ...

    @property
    def streams(self) -> bool:
        """True if a sequence can come in chunks; otherwise it takes one forward pass, whatever its length."""

    @property
    def max_tokens(self) -> int | None:
        """The tokens of the longest sequence that the net reads; None for no limit."""

    def num_parameters(self) -> int: ...
    def model_dump_json(self) -> str: ...


class Net(nn.Module):
    """A net: `net(tokens, start=..., lengths=..., far=...)` returns hidden states like LongNet. `nll` uses `logits`."""

    config: NetConfig
    note: str | None = None  # one line for users about how the net reads documents
    choices: str = ""  # options for users with too long a sequence, besides shorter ones
    has_cls: bool = False  # whether an extra row, CLS, comes before each sequence

    @property
    def row_size(self) -> int | None:
        """The size of the vectors that the net reads in place of token ids; None if it reads ids."""
        return None

    def head(self, pooled: Tensor) -> Tensor:
        """Return pooled hidden states (..., dim) after the net's own last step, if it has one."""
        return pooled

    def stream(self) -> Callable[..., Tensor] | None:
        """Return the net's own reader of a causal sequence in chunks, or None if a CausalStream can read it."""
        return None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers, first to last: each maps hidden states (B, N, dim) to hidden states (B, N, dim)."""
        raise NotImplementedError

    def check_trainable(self) -> None:
        """Raise ConfigError for a net that cannot pass on the gradient of a long sequence. Call it in eval mode."""

    def save(self, folder: Path, tokenizer_json: str, state: Mapping[str, Tensor], eos: str | None = None) -> None:
        """Write a model directory with the weights `state`, on the CPU; files get their names when they are complete.

        `eos` is the token of the tokenizer that ends documents, if it is not the one that the model came with.
        Raises CheckpointError for a directory that cannot be written.
        """
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., vocab_size) of hidden states (..., dim). Raises ConfigError for a net without logits."""
        raise NotImplementedError

    def nll(self, hidden: Tensor, targets: Tensor, *, limit: int = LOGITS_LIMIT) -> Tensor:
        """Return the negative log-likelihood, in nats, of shifted `targets` (B, N), given hidden states (B, N, dim).

        The result is (B, N) in float32, or in float64 for float64 hidden states; 0 where a target is -100. At most
        `limit` elements of logits exist at a time. The backward pass recomputes them chunk by chunk.
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
