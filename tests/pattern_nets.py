"""Small nets of any pattern, ours and of transformers; what they read and generate; how far two results are apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from strategies import patterns, patterns_with_options
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.jobs.generating import Step, generate
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import Net

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
CAUSAL = patterns() | patterns_with_options(causal=True)
EOS = 49  # of `net`, whose vocabulary is 50
WINDOW = Pattern.window(16, sinks=3)
WORDS = Tokenizer.bytes()


def llama_body(heads: int) -> dict[str, Any]:
    """The settings of layers like Llama's, whose query heads share key heads if their number is even."""
    kv_heads = heads // 2 if heads % 2 == 0 else heads
    return {"kv_heads": kv_heads, "norm": "rmsnorm", "ffn": "swiglu", "bias": False}


def net(
    pattern: Pattern,
    position: str = "rope",
    *,
    layers: int = 2,
    heads: int = 4,
    llama: bool = False,
    **more,
) -> LongNet:
    """Random weights, always the same. "rope_by_level" takes sinks away, and is "rope" in a net that is not causal."""
    torch.manual_seed(0)
    if llama:
        more |= llama_body(heads)
    if position == "rope_by_level":
        pattern = replace(pattern, sinks=0)
        position = position if more.get("causal", True) else "rope"
    return LongNet(
        LongNetConfig(
            vocab_size=50,
            dim=8 * heads,
            num_layers=layers,
            num_heads=heads,
            ffn_dim=48,
            position=position,
            **vars(pattern),
            **more,
        )
    )


def draw(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Ids of `net`."""
    return torch.randint(50, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the norm."""
    return ((found - expected).double().norm() / expected.double().norm().clamp(min=1e-30)).item()


def gradients(model: LongNet) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def native(pattern: Pattern = WINDOW, **more: Any) -> LongNet:
    """For bytes, with a choice of tokens that is not always the same one."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 257,
        "dim": 32,
        "num_layers": 2,
        "num_heads": 4,
        "ffn_dim": 48,
        "position": "rope",
    }
    model = LongNet(LongNetConfig(**sizes | vars(pattern) | more))
    # initial weights are so small that the same token would come again and again
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    return model.eval()


def foreign(pattern: Pattern, kind: str = "llama") -> Net:
    """Of transformers: `kind` is a function of hf_models.py."""
    import hf_models

    from longnet_cli.integrations.transformers import use_dilated_attention
    from longnet_cli.models.hf.pretrained_net import TransformersNet

    model = hf_models.built(getattr(hf_models, kind))
    return TransformersNet(use_dilated_attention(model, pattern))


def prompt(length: int) -> Document:
    tokens = np.random.default_rng(length).integers(1, 97, length, dtype=np.int32)
    return Document("prompt", tokens, None, "prompt.txt")


def generated(model: Net, length: int = 50, **options: Any) -> list[Step]:
    return list(
        generate(
            model, prompt(length), **{"bos": None, "tokenizer": WORDS, "max_tokens": 40} | options
        )
    )
