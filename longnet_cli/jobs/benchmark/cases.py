"""The cases of a benchmark: the ops `attention`, `model` and `train`.

`attention` is dilated attention of random q, k, v against dense attention, forward or backward. `model` and `train` go
from tokens to the loss of each, or to gradients, dilated or dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from longnet_cli.attention import KVCache, Pattern, dilated_attention
from longnet_cli.attention.branches import BACKWARD_FLOPS, attention_flops, backward_flops, branches
from longnet_cli.attention.groups import past_bytes
from longnet_cli.attention.kernels import select_kernel
from longnet_cli.attention.merging import kernel_calls
from longnet_cli.basics.errors import ConfigError
from longnet_cli.jobs.estimating.memory import attention_memory, cache_bytes, forward_memory, gradient_memory
from longnet_cli.jobs.training.gradients import backward
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.config import NetConfig, parse_config
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import Net
from longnet_cli.running.causal_stream import open_stream
from longnet_cli.running.device import DTYPES, precision

from .settings import Case, Measurement, Settings

if TYPE_CHECKING:
    from longnet_cli.models.hf.pretrained_net import TransformersNet


def attention(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """Return a case of attention over random q, k, v: forward without an autograd graph, or backward alone.

    A streamed case goes chunk by chunk through a KVCache, over every query and key. All chunks have the same numbers:
    drawing numbers for 1e9 tokens would take longer than the attention, and the time of attention does not depend on
    its numbers.
    """
    pattern, dtype = s.pattern_for(seq), DTYPES[s.dtype]
    dense, backward = impl == "dense", direction == "backward"
    streamed = impl == "dilated" and not backward and s.streams(seq)
    chunk = s.chunk_for(seq) if streamed else seq
    cache = None
    if streamed:
        rows = 2 * s.heads * s.head_dim * dtype.itemsize * pattern.cache_rows
        cache = s.batch * (rows + sum(past_bytes(pattern, s.heads, s.head_dim, seq, dtype.itemsize)))

    def flops(tokens: int) -> float:
        if dense:
            forward = 4 * s.head_dim * s.heads * s.batch * tokens**2 // (2 if s.causal else 1)
            return forward * (BACKWARD_FLOPS if backward else 1)
        count = backward_flops if backward else attention_flops
        return count(pattern, s.heads, s.head_dim, tokens, s.causal, s.batch)

    row = Measurement.of(
        s, impl, direction, seq, None if dense else pattern, chunk=chunk if streamed else None, cache_bytes=cache,
        kernel="sdpa" if dense else select_kernel(s.device, dtype, s.head_dim).name,
    )  # fmt: skip
    # each implementation gets the layout that it is made for
    shape = (s.batch, s.heads, chunk, s.head_dim) if dense else (s.batch, chunk, s.heads, s.head_dim)
    memory = attention_memory(shape, None if dense else pattern, s.causal, dtype, s.device, backward) + (cache or 0)
    return Case(row, flops, memory, partial(_attention, s, impl, pattern, shape, backward, streamed), streamed)


def _attention(
    s: Settings, impl: str, pattern: Pattern, shape: Sequence[int], backward: bool, streamed: bool
) -> Callable[..., object]:
    """Draw the inputs of attention, and return the run."""
    draw = torch.Generator(s.device).manual_seed(0)
    made: dict[str, Any] = {"generator": draw, "dtype": DTYPES[s.dtype], "device": s.device}
    q, k, v, *dout = (torch.randn(shape, requires_grad=backward, **made) for _ in range(3 + backward))
    if impl == "kernels":
        return _kernels_alone(s, pattern, q, k, v, *dout)
    if streamed:
        return _streamed(s, pattern, q, k, v)
    attend: Callable[[], Tensor] = partial(F.scaled_dot_product_attention, q, k, v, is_causal=s.causal)
    if impl == "dilated":
        attend = partial(dilated_attention, q, k, v, pattern, causal=s.causal)
    if not backward:
        return attend
    return partial(torch.autograd.grad, attend(), (q, k, v), dout[0].detach(), retain_graph=True)


def _streamed(s: Settings, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> Callable[[int], None]:
    past = KVCache(pattern, s.batch, s.heads, s.head_dim, dtype=q.dtype, device=q.device)

    def run(tokens: int) -> None:
        q_, k_, v_ = (x[:, :tokens] for x in (q, k, v))
        dilated_attention(q_, k_, v_, pattern, start=past.position, far=past.far())
        past.append(k_, v_, q=q_)

    return run


@torch.no_grad()
def _kernels_alone(
    s: Settings, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None = None
) -> Callable[[], object]:
    """Return a run of the kernel calls alone, forward or, given dout, backward, on the views of dilated attention."""
    kernel, scale = select_kernel(s.device, q.dtype, s.head_dim), s.head_dim**-0.5
    plan = [(slice(0, s.batch), slice(0, q.shape[1]), branches(pattern, s.heads, 0, q.shape[1], s.causal, "exact", ()))]
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:3], device=s.device)[..., None]
    calls = list(kernel_calls(plan, kernel, (q,) if dout is None else (q, out, lse, dout), (k, v)))

    def run() -> None:
        for branch, (q_, *others), (k_, v_) in calls:
            if others:
                out_, lse_, dout_ = others
                kernel.backward(dout_, q_, k_, v_, out_, lse_[..., 0], branch.causal, scale)
            else:
                kernel.forward(q_, k_, v_, branch.causal, scale)

    return run


def model(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """Return a case of the forward pass, on random tokens, of a shipped or saved model (`s.model`) or a random one."""
    net, load = _net(s, impl, seq)
    config, itemsize = net.config, DTYPES[s.dtype].itemsize
    streamed = impl == "dilated" and config.streams and s.streams(seq)
    chunk = s.chunk_for(seq) if streamed else seq

    def start() -> Callable[..., object]:
        model, ids = load(), _tokens(s, config, chunk)
        read = open_stream(model) if streamed else model

        def run(tokens: int = chunk) -> Tensor:
            with torch.inference_mode(), precision(s.dtype, s.device):
                return model.nll(read(ids[:, :tokens]), ids[:, :tokens])

        return run

    cache = None
    if streamed and not net.stream():  # of a net with a cache of its own, nothing is known
        cache = s.batch * sum(cache_bytes(config, max(seq, *config.pattern.segment_lengths), itemsize))
    row = _row(s, net, impl, direction, seq, chunk=chunk if streamed else None, cache_bytes=cache)
    memory = sum(forward_memory(net, s.batch * chunk, itemsize, s.batch * chunk).values()) + (cache or 0)
    return Case(row, lambda tokens: s.batch * _forward_flops(config, tokens), memory, start, streamed)


def train(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """Return a case of one sequence's loss and gradients, by `s.chunk` tokens if given: a step without its update."""
    net, load = _net(s, impl, seq)
    config, chunk = net.config, min(s.chunk or seq, seq)
    again = chunk < seq  # then the backward pass computes each chunk's forward pass again

    def start() -> Callable[[], object]:
        model, ids = load().train(), _tokens(s, config, seq)

        def run() -> Tensor:
            model.zero_grad()
            return backward(model, ids, ids, chunk=chunk, scale=1 / ids.numel(), dtype=s.dtype)

        return run

    def flops(tokens: int) -> float:
        forward = _forward_flops(config, tokens) - config.vote_flops(tokens)  # blocks are chosen once
        return s.batch * (config.training_flops([tokens]) + again * forward)

    row = _row(s, net, impl, direction, seq, chunk=chunk if again else None)
    memory = gradient_memory(config, s.batch, seq, chunk, DTYPES[s.dtype].itemsize, s.device.type)
    return Case(row, flops, memory, start)


def _net(s: Settings, impl: str, seq: int) -> tuple[Net, Callable[[], Net]]:
    """Return the net of a row, and a function that returns it with its weights.

    A LongNet is on the meta device until then. A Hugging Face model has its weights from the start.
    """
    folder = ModelFolder.find(s.model) if s.model is not None else None
    if folder and folder.of_transformers:
        net = _transformers(s, impl, seq, folder)
        return net, lambda: net
    if folder is None:
        dim = s.heads * s.head_dim
        shape = {"dim": dim, "num_layers": s.layers, "num_heads": s.heads, "ffn_dim": 4 * dim, "vocab_size": s.vocab}
        where, own, config = "a model with random weights", None, {**shape, "position": "rope"}
    else:
        saved = folder.net_config()
        where, own, config = str(s.model), saved.pattern, saved.model_dump()
        if not saved.causal or not saved.vocab_size:
            raise ConfigError(f"{where}: --op {s.op} runs causal language models")
    pattern = s.pattern_for(seq, own)
    if own:
        pattern = replace(pattern, head_offsets=own.head_offsets)  # the weights were trained with these
    measured = parse_config(config, where, pattern)  # raises if the pattern does not fit the model's positions
    if impl == "dense":  # one segment for the whole sequence
        measured = measured.model_copy(update=vars(Pattern((seq,), (1,))))
    with torch.device("meta"):
        empty = LongNet(measured)
    return empty, partial(_with_weights, s, empty)


def _transformers(s: Settings, impl: str, seq: int, folder: ModelFolder) -> TransformersNet:
    """Return a Hugging Face model with the requested pattern, otherwise its own; dense has transformers' attention."""
    own = "dilated_attention" in folder.config
    pattern = Pattern.dense() if impl == "dense" else None if own and s.pattern is None else s.pattern_for(seq)
    net = _loaded(folder.path, pattern, s.device, s.dtype)
    if impl == "dense":
        net = net.as_it_comes()
    if not net.config.causal or net.model.get_output_embeddings() is None:
        raise ConfigError(f"{s.model}: --op model runs causal language models")
    limit = net.config.max_tokens
    if limit is not None and seq > limit:
        raise ConfigError(f"{s.model}: --seq {seq}, and the model has {limit} positions")
    if s.op == "train":
        raise ConfigError(f"{s.model}: --op train measures LongNets; a Hugging Face model trains by itself")
    return net


@lru_cache(maxsize=1)  # only one: the next row needs another attention
def _loaded(path: Path, pattern: Pattern | None, device: torch.device, dtype: str) -> TransformersNet:
    return cast("TransformersNet", ModelFolder(path).net(pattern=pattern, device=device, dtype=DTYPES[dtype]))


def _with_weights(s: Settings, net: LongNet) -> LongNet:
    """Return the net with its weights, which are read or drawn."""
    if s.model is not None:
        net.load_state_dict(LongNet.from_pretrained(s.model, s.device).state_dict(), assign=True)
    else:
        torch.manual_seed(0)
        net.to_empty(device=s.device).init_weights()
    return net.eval()


def _tokens(s: Settings, config: NetConfig, count: int) -> Tensor:
    return torch.randint(config.vocab_size, (s.batch, count), device=s.device)


def _forward_flops(config: NetConfig, tokens: int) -> int:
    return tokens * (config.layer_flops() + config.vocabulary_flops()) + config.attention_flops(tokens)


def _row(s: Settings, net: Net, impl: str, direction: str, seq: int, **values: int | None) -> Measurement:
    c = net.config
    kernel = select_kernel(s.device, DTYPES[s.dtype], c.head_dim).name if net.dilated else "sdpa"
    name = None if s.model is None else ModelFolder.find(s.model).origin
    facts = {"heads": c.num_heads, "head_dim": c.head_dim, "kernel": kernel, "model": name}
    return Measurement.of(s, impl, direction, seq, c.pattern if net.dilated else None, **facts, **values)
