"""The bytes that a step of training takes: those of a token are measured, those that chunks keep are counted.

To measure, a few tokens go through a few layers of a net. The layers' weights are memory that is never written to, so
even those of a large net take next to none.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from longnet_cli.attention.pattern import ceil_div
from longnet_cli.attention.spans import SINKS, Lanes, rows_per_lane
from longnet_cli.nets.config import LongNetConfig, NetConfig, TransformersConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import LOGITS_LIMIT
from longnet_cli.running.device import DTYPES, precision, resolve_dtype
from longnet_cli.running.memory_maps import aligned

TRIED_TOKENS = 16  # of the shorter one of two measured passes; the other has twice as many


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

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, key)
        self.moments.append(sum(self._sizes.values()))
        return out


def bytes_per_token(run: Callable[[int], object], tokens: int = TRIED_TOKENS) -> int:
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


@lru_cache
@_any_kernel()
def activation_bytes(config: NetConfig, dtype: str, lora: str, again: bool) -> int:
    """Return the bytes that a token takes in a forward and backward pass of all layers, without logits.

    `lora` has the arguments of `models.hf.training.add_lora` as JSON, or null. With `again`, layers compute their
    activations again (`train.activation_checkpointing`). Raises ConfigError for wrong arguments of LoRA.
    """
    cpu = torch.device("cpu")
    one, two = (
        bytes_per_token(step_of_layers(config, layers, dtype, json.loads(lora), again, cpu))
        for layers in (1, 2)
    )
    return one + (config.num_layers - 1) * (two - one)


def step_of_layers(
    config: NetConfig,
    layers: int,
    dtype: str,
    lora: dict | None,
    again: bool,
    device: torch.device,
) -> Callable[[int], None]:
    """Return a function that runs the first layers of a net forward and backward, with so many tokens, without logits.

    For the arguments, see `activation_bytes`.
    """
    forward: Callable[[Tensor], Tensor]
    if isinstance(config, TransformersConfig):
        from longnet_cli.models.hf.training import unwritten  # imports transformers
        from longnet_cli.models.hf.trying import hidden_states

        net, modules = unwritten(config.source, layers, lora)
        forward = partial(hidden_states, net)
    else:
        net = forward = unwritten_longnet(cast(LongNetConfig, config), layers)
        modules = net.layers
    net.to(device)
    for module in net.modules():
        # its gradient is as large as the table; what follows has one all the same
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
            module.register_forward_hook(lambda module, args, embedded: embedded.requires_grad_())
    for layer in modules if again else ():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    for p in net.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step(tokens: int) -> None:
        with precision(dtype, device):
            hidden = forward(torch.zeros(1, tokens, dtype=torch.int64, device=device))
        hidden.backward(hidden.detach())

    step(TRIED_TOKENS)  # the first pass loads libraries, and tries attention kernels
    return step


def unwritten_longnet(config: LongNetConfig, layers: int) -> LongNet:
    """Return a net of so many layers and one token on the CPU."""
    plain = {"num_layers": layers, "vocab_size": min(1, config.vocab_size)}
    with torch.device("meta"):
        net = LongNet(config.model_copy(update=plain))
    unwritten = {name: torch.empty(x.shape) for name, x in net.state_dict().items()}
    net.load_state_dict(unwritten, assign=True)  # `to_empty` would import half of torch
    return net


def itemsize_of(dtype: str, device: torch.device) -> int:
    """Return the bytes per number of matrix products."""
    return DTYPES[resolve_dtype(dtype, device)].itemsize


def logits_bytes(config: NetConfig, tokens: int) -> int:
    """Return the bytes of three float32 numbers for each logit: the log-softmax, its gradient and the logits' gradient.

    Without gradients, they are the logits, the log-softmax, and gaps in the heap.
    """
    return 4 * 3 * min(tokens * config.vocab_size, LOGITS_LIMIT)


class FarBytes(NamedTuple):
    """Bytes that chunks of one sequence keep for each other. `stored` can be spilled to a disk, `passing` cannot.

    `stored`: keys and values that later chunks see, until the backward pass is past them, and the sums of their
    gradients. `passing`: temporaries of one chunk and layer for its far rows and, on a GPU, copies of these rows.
    """

    stored: int
    passing: int


def far_bytes(config: NetConfig, seq_len: int, chunk: int, itemsize: int) -> FarBytes:
    """Return the bytes for one sequence of `seq_len` tokens, with `itemsize` bytes per number of a key."""
    stored = passing = 0
    if seq_len <= chunk:
        return FarBytes(stored, passing)
    pattern = config.pattern
    lanes = Lanes(pattern, config.num_heads, config.kv_heads)
    for level in (*range(len(pattern.levels)), SINKS):
        held = lanes.number(level)
        numbers = 2 * rows_per_lane(pattern, level, seq_len) * held * config.head_dim
        seen = at_once = 1
        if level != SINKS:
            w = pattern.segment_lengths[level]
            back = pattern.look_backs[level]
            seen = seen_segments(w, back, chunk, seq_len)
            at_once = min(seen, back + bool(chunk % w))
        sums = aligned(max(4, itemsize) * numbers)
        stored += config.num_layers * (aligned(itemsize * numbers) * seen + sums * at_once)
        passing += (itemsize + 4) * numbers * at_once
    return FarBytes(stored, passing)


def seen_segments(w: int, back: int, chunk: int, seq_len: int) -> int:
    """Return how many segments of w tokens later chunks see, in a sequence of `seq_len` tokens in chunks of `chunk`.

    A chunk sees the segment inside which it starts, if any, and the `back` segments before its own.
    """
    ends = ceil_div(seq_len, chunk) - 1
    # no segment is seen from two ends; an end on a segment's edge sees one fewer
    if chunk >= (1 + back) * w:
        return ends * (1 + back) - ends // (w // math.gcd(w, chunk))
    # all segments up to the last end: the first end sees back to the start of the sequence
    return ceil_div(ends * chunk, w)
