"""The bytes that a net holds for each token, measured: a few tokens go through a few layers of it.

The layers' weights are memory that is never written to, so even those of a large net take next to none.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from longnet_cli.attention import Pattern
from longnet_cli.attention.notation import PATTERN_FIELDS
from longnet_cli.nets.config import LongNetConfig, NetConfig, TransformersConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import Net
from longnet_cli.running.device import precision

TOKENS = 16  # of a measured pass, and half of those of another one


class _BytesInUse(TorchDispatchMode):
    """The bytes of all tensors that were made in this context and are still in use: `moments`, after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[int] = []
        self._sizes: dict[int, int] = {}  # by the address of a storage

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler, which takes a second, to leave this out of compiled code."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in self._sizes:
                self._sizes[key] = x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self._sizes.pop, key)
        self.moments.append(sum(self._sizes.values()))
        return out


def bytes_per_token(run: Callable[[int], object], tokens: int = TOKENS) -> int:
    """Return the bytes that one more token of `run(tokens)` takes, at the moment at which it takes the most.

    What does not grow with the tokens (gradients of weights, their casts) is not counted.
    """
    moments = []
    for number in (tokens, 2 * tokens):
        with _BytesInUse() as held:
            run(number)
        moments.append(held.moments)
    few, many = moments
    if len(few) != len(many):  # more tokens may take other operations
        return (max(many) - max(few)) // tokens
    return max(more - less for less, more in zip(few, many, strict=True)) // tokens


@contextmanager
def _any_kernel() -> Iterator[None]:
    """Let a CPU choose its attention kernel, though LONGNET_KERNEL may name a GPU's, on which the job will run."""
    name = os.environ.pop("LONGNET_KERNEL", None)
    try:
        yield
    finally:
        os.environ.update({"LONGNET_KERNEL": name} if name else {})


@lru_cache(maxsize=1)  # asked for every chunk that might fit
@_any_kernel()
def reading_bytes(net: Net, dtype: str) -> int:
    """Return the bytes that a token takes in a forward pass without gradients; `dtype` as in `running.device`."""
    if next(net.parameters()).is_meta:
        net = _unwritten(cast(LongNetConfig, net.config), 1).eval()

    @torch.inference_mode()
    def read(tokens: int) -> None:
        ids = net.inputs_like((1, tokens))
        with precision(dtype, ids.device):
            net(ids)

    most = max(2, net.config.max_tokens or 2 * TOKENS)
    read(2)  # the first pass loads libraries, and tries attention kernels
    return bytes_per_token(read, min(TOKENS, most // 2))


@lru_cache
@_any_kernel()
def training_bytes(config: NetConfig, dtype: str, lora: str, again: bool) -> tuple[int, int]:
    """Return the bytes that a token takes in a forward and backward pass without logits: (of each layer, others).

    `lora` has the arguments of `models.hf.training.add_lora` as JSON, or null. With `again`, layers compute their
    activations again (`train.activation_checkpointing`). Raises ConfigError for wrong arguments of LoRA.
    """
    one, two = (bytes_per_token(_step(config, layers, dtype, json.loads(lora), again)) for layers in (1, 2))
    return two - one, 2 * one - two


def _step(config: NetConfig, layers: int, dtype: str, lora: dict | None, again: bool) -> Callable[[int], None]:
    forward: Callable[[Tensor], Tensor]
    if isinstance(config, TransformersConfig):
        from longnet_cli.models.hf.training import unwritten  # imports transformers
        from longnet_cli.models.hf.trying import hidden_states

        net, blocks = unwritten(config.source, layers, lora)
        forward = partial(hidden_states, net)
    else:
        net = forward = _unwritten(cast(LongNetConfig, config), layers)
        blocks = net.layers
    for module in net.modules():
        if isinstance(module, nn.Embedding):  # its gradient is as large as the table; what follows has one all the same
            module.requires_grad_(False)
            module.register_forward_hook(lambda module, args, embedded: embedded.requires_grad_())
    for block in blocks if again else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for p in net.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step(tokens: int) -> None:
        with precision(dtype, torch.device("cpu")):
            hidden = forward(torch.zeros(1, tokens, dtype=torch.int64))
        hidden.backward(hidden.detach())

    step(TOKENS)  # as in `reading_bytes`
    return step


def _unwritten(config: LongNetConfig, layers: int) -> LongNet:
    """Return a net of so many layers and one token on the CPU. It chooses no blocks: what that takes is counted."""
    plain = {"num_layers": layers, "vocab_size": min(1, config.vocab_size)}
    plain |= {name: getattr(Pattern, name) for name in PATTERN_FIELDS if name.startswith("chosen")}
    with torch.device("meta"):
        net = LongNet(config.model_copy(update=plain))
    unwritten = {name: torch.empty(x.shape) for name, x in net.state_dict().items()}
    net.load_state_dict(unwritten, assign=True)  # `to_empty` would import half of torch
    return net
