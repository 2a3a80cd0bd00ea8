"""The facts of a Hugging Face model, which a recipe keeps; transformers itself is not imported."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from longnet_cli.attention import Pattern


class TransformersConfig(BaseModel):
    """The facts of `NetConfig`; `source` is the model's own configuration, as JSON."""

    model_config = ConfigDict(frozen=True)

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    kv_heads: int  # of keys and values, a divisor of num_heads
    head_dim: int
    ffn_dim: int
    causal: bool
    memory: Literal["segments", "cache", "none"]  # what remembers a causal sequence between its chunks
    max_tokens: int | None  # positions, where they are a table; of a dense net as trained, what it was trained on
    as_trained: bool  # no pattern is given: dense, on sequences of the length that it was trained on
    pattern: Pattern
    parameters: int
    trained: int  # of the parameters, or of LoRA's beside them
    layer_weights: int  # those of the matrices in all layers
    source: str

    @property
    def streams(self) -> bool:
        return self.memory != "none"

    @property
    def frozen(self) -> bool:
        return self.trained != self.parameters

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim

    def num_parameters(self) -> int:
        """Numbers of the model, tied embeddings counted once."""
        return self.parameters
