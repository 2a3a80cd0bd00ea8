"""The ops `model` and `train`: from tokens to the loss of each, or to gradients, dilated or dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.attention.kernels import select_kernel
from longnet_cli.errors import ConfigError
from longnet_cli.estimating.training_job import logits_bytes
from longnet_cli.model import LongNet
from longnet_cli.model.config import parse_config
from longnet_cli.model.net import LOGITS_LIMIT, Net, NetConfig
from longnet_cli.model_folder import ModelFolder
from longnet_cli.runtime.chunks import open_stream
from longnet_cli.runtime.device import DTYPES, precision
from longnet_cli.training.far_bytes import far_bytes
from longnet_cli.training.gradients import backward

from .measurement import Case, Measurement
from .settings import Settings

if TYPE_CHECKING:
    from longnet_cli.integrations.transformers_net import TransformersNet


def model(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """Return a case of the forward pass, on random tokens, of a shipped or saved model (`s.model`) or a random one."""
    net, load = _net(s, impl, seq)
    streamed = impl == "dilated" and net.config.streams and s.streams(seq)
    chunk = s.chunk_for(seq) if streamed else seq

    def start() -> Callable[..., object]:
        model, ids = load(), _tokens(s, net, chunk)
        read = open_stream(model) if streamed else model

        def run(tokens: int = chunk) -> Tensor:
            with torch.inference_mode(), precision(s.dtype, s.device):
                return model.nll(read(ids[:, :tokens]), ids[:, :tokens])

        return run

    cache = None
    if streamed and not net.stream():  # of a net with a cache of its own, nothing is known
        longest = max(seq, *net.config.pattern.segment_lengths)
        cache = s.batch * net.config.cache_bytes(longest, DTYPES[s.dtype].itemsize)
    row = _row(s, net, impl, direction, seq, chunk=chunk if streamed else None, cache_bytes=cache)
    return Case(row, _flops(s, net.config, 1, 1), _memory(s, net, chunk) + (cache or 0), start, streamed)


def train(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """Return a case of one sequence's loss and gradients, by `s.chunk` tokens if given: a step without its update."""
    net, load = _net(s, impl, seq)
    chunk = min(s.chunk or seq, seq)

    def start() -> Callable[[], object]:
        model, ids = load().train(), _tokens(s, net, seq)

        def run() -> Tensor:
            model.zero_grad()
            return backward(model, ids, ids, chunk=chunk, scale=1 / ids.numel(), dtype=s.dtype)

        return run

    again = chunk < seq  # then the backward pass computes each chunk's forward pass again
    row = _row(s, net, impl, direction, seq, chunk=chunk if again else None)
    return Case(row, _flops(s, net.config, 3 + again, 3.5 + again), _training_memory(s, net.config, seq, chunk), start)


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
    found = parse_config(config, where, pattern)  # raises if the pattern does not fit the model's positions
    if impl == "dense":  # one segment for the whole sequence
        found = found.model_copy(update=vars(Pattern((seq,), (1,))))
    with torch.device("meta"):
        empty = LongNet(found)
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


def _tokens(s: Settings, net: Net, count: int) -> Tensor:
    return torch.randint(net.config.vocab_size, (s.batch, count), device=s.device)


def _flops(s: Settings, c: NetConfig, of_matrices: float, of_attention: float) -> Callable[[int], float]:
    """Return a function for the FLOPs of the first n tokens. `of_matrices` and `of_attention` count forward passes."""
    matrices = c.layer_flops() + c.vocabulary_flops()
    return lambda n: s.batch * (of_attention * c.attention_flops(n) + of_matrices * n * matrices)


def _memory(s: Settings, net: Net, chunk: int) -> int:
    """Return the bytes of the weights, one layer's activations and the logits."""
    tokens = s.batch * chunk
    logits = 8 * min(tokens * net.config.vocab_size, LOGITS_LIMIT)
    return net.config.forward_bytes(tokens) + logits + sum(p.numel() * p.element_size() for p in net.parameters())


def _training_memory(s: Settings, c: NetConfig, seq: int, chunk: int) -> int:
    """Return the bytes of weights and gradients, logits, a chunk's activations, and rows that chunks keep."""
    tokens, itemsize = s.batch * chunk, DTYPES[s.dtype].itemsize
    numbers = c.num_parameters() * (8 if itemsize == 4 else 8 + itemsize)  # autocast copies the weights
    kept = s.batch * sum(far_bytes(c, seq, chunk, itemsize))
    return numbers + tokens * c.activation_bytes(itemsize, s.device.type) + kept + logits_bytes(c, tokens)


def _row(s: Settings, net: Net, impl: str, direction: str, seq: int, **values: int | None) -> Measurement:
    c = net.config
    kernel = select_kernel(s.device, DTYPES[s.dtype], c.head_dim).name if net.dilated else "sdpa"
    name = None if s.model is None else ModelFolder.find(s.model).origin
    facts = {"heads": c.num_heads, "head_dim": c.head_dim, "kernel": kernel, "model": name}
    return Measurement.of(s, impl, direction, seq, c.pattern if net.dilated else None, **facts, **values)
