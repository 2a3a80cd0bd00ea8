"""The facts of a Hugging Face model that a recipe stores. This file does not import transformers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from longnet_cli.attention import Pattern
from longnet_cli.nets.config import NetConfig


class TransformersConfig(NetConfig, BaseModel):
    """The facts of a Hugging Face model; `source` is the model's own configuration, as JSON."""

    model_config = ConfigDict(frozen=True)

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    kv_heads: int  # heads of keys and values, a divisor of num_heads
    head_dim: int
    ffn_dim: int
    causal: bool
    memory: Literal["segments", "cache", "none"]  # the memory of a causal sequence between its chunks
    max_tokens: int | None  # the size of a table of positions; for a dense net as trained, its training length
    as_trained: bool  # no pattern is given: dense, on sequences of at most its training length
    pattern: Pattern
    parameters: int
    trained: int  # number of trained parameters: all of the model's, or LoRA's
    layer_weights: int  # parameters in the matrices of all layers
    source: str

    @property
    def streams(self) -> bool:
        return self.memory != "none"

    def num_parameters(self) -> int:
        """Return the number of parameters, with tied embeddings counted once."""
        return self.parameters
