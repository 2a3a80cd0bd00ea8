"""FLOPs and bytes of a net, from its configuration. A multiply and an add count as two FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from longnet_cli.attention import branches
from longnet_cli.attention.branches import BACKWARD_FLOPS
from longnet_cli.attention.cache import cached_rows
from longnet_cli.attention.groups import past_bytes

if TYPE_CHECKING:
    from longnet_cli.model.net import NetConfig

_attention_flops = lru_cache(maxsize=1 << 16)(branches.attention_flops)  # many documents have the same length


class Costs:
    """The methods of every `NetConfig` that tell what its net costs.

    The configurations are pydantic models and inherit this class. So it has no annotated attributes: they would become
    fields.
    """

    @property
    def frozen(self: NetConfig) -> bool:
        """True if LoRA weights are trained in place of the net's own."""
        return self.trained != self.num_parameters()

    def layer_flops(self: NetConfig) -> int:
        """Return the FLOPs of the matrices of all layers, per token."""
        return 2 * self.layer_weights

    def vocabulary_flops(self: NetConfig) -> int:
        """Return the FLOPs of the logits, per token."""
        return 2 * self.dim * self.vocab_size

    def attention_flops(self: NetConfig, tokens: int) -> int:
        """Return the FLOPs of the attention of all layers, over one document of `tokens` tokens."""
        return self.num_layers * _attention_flops(self.pattern, self.num_heads, self.head_dim, tokens, self.causal)

    def training_flops(self: NetConfig, documents: Sequence[int], predicted: float = 1.0) -> float:
        """Return the FLOPs of a forward and a backward pass over documents of these lengths.

        The share `predicted` of the tokens has logits.
        """
        attention = sum(map(self.attention_flops, documents))
        matrices = self.layer_flops() + predicted * self.vocabulary_flops()
        passes = 2 if self.frozen else 3  # forward, gradients of activations, gradients of weights
        return passes * matrices * sum(documents) + (1 + BACKWARD_FLOPS) * attention

    def forward_bytes(self: NetConfig, tokens: int) -> int:
        """Return the bytes of one layer's activations at their peak, without gradients, in float32."""
        return 4 * tokens * (10 * self.dim + 2 * self.ffn_dim)

    def moved_bytes(self: NetConfig, itemsize: int) -> tuple[float, int]:
        """Return the bytes per token that a forward pass's elementwise operations move: of all layers, of the logits.

        They read and write norms, rotations, gelu, residuals, the merge of levels, and the logarithms of logits.
        `itemsize` is the bytes per number of matrix products; the residual stream, merges and logarithms are float32.
        """
        merged = sum(1 / rate for rate in self.pattern.dilation_rates) * (8 + itemsize)
        layer = self.dim * (24 + 10 * itemsize + merged) + 4 * itemsize * self.ffn_dim
        return self.num_layers * layer, 12 * self.vocab_size

    def cache_bytes(self: NetConfig, tokens: int, itemsize: int) -> int:
        """Return the bytes of keys and values that a causal stream holds after `tokens`, `itemsize` bytes per number.

        `spilled_bytes` of them may be in a file instead. Training in chunks keeps more (`training.far_bytes`): the rows
        of all segments, until the backward pass, and the sums of their gradients.
        """
        rows = cached_rows(self.pattern, self.num_heads, self.kv_heads, tokens)
        past = sum(past_bytes(self.pattern, self.kv_heads, self.head_dim, tokens, itemsize))
        return self.num_layers * (2 * self.head_dim * rows * itemsize + past)

    def spilled_bytes(self: NetConfig, tokens: int, itemsize: int) -> int:
        """Return the bytes that a causal stream writes to the file of `--spill`: all blocks, for chosen ones."""
        return self.num_layers * past_bytes(self.pattern, self.kv_heads, self.head_dim, tokens, itemsize)[0]

    def activation_bytes(
        self: NetConfig, itemsize: int, device: str, again: bool = False, lora: dict | None = None
    ) -> int:
        """Return the bytes per token that all layers save for the backward pass, and that one layer's backward adds.

        With `again` (`train.activation_checkpointing`), all layers but one save only their input. The other arguments
        go to `saved_bytes`.
        """
        layer, others = self.saved_bytes(itemsize, device, lora)
        layers = layer + (self.num_layers - 1) * (4 * self.dim if again else layer)
        return layers + others + itemsize * (self.ffn_dim + 2 * self.dim)
