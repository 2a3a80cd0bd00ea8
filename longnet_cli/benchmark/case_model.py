"""The ops `model` and `train`: from tokens to the loss of each, or to gradients, dilated or dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from longnet_cli.attention import Pattern
from longnet_cli.attention.branches import attention_flops
from longnet_cli.attention.groups import past_bytes
from longnet_cli.attention.kernels import select_kernel
from longnet_cli.attention.spans import cached_rows
from longnet_cli.errors import ConfigError
from longnet_cli.estimating.training_job import activation_bytes
from longnet_cli.model import LongNet, LongNetConfig
from longnet_cli.model.config import parse_config
from longnet_cli.model.net import LOGITS_LIMIT, Net
from longnet_cli.model_folder import ModelFolder
from longnet_cli.runtime.chunks import open_stream
from longnet_cli.runtime.device import DTYPES, precision
from longnet_cli.training.far_bytes import far_bytes
from longnet_cli.training.gradients import backward

from .measurement import Case, Measurement
from .settings import Settings

if TYPE_CHECKING:
    from longnet_cli.integrations.transformers_net import TransformersNet

NetT = TypeVar("NetT", bound=Net)


def model(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """Return a case of the forward pass, on random tokens, of a shipped or saved model (`s.model`) or a random one."""
    net = _net(s, impl, seq)
    streamed = impl == "dilated" and net.config.streams and s.streams(seq)
    chunk = s.chunk_for(seq) if streamed else seq

    def start() -> Callable[..., object]:
        model, ids = _with_weights(s, net), _tokens(s, net, chunk)
        read = open_stream(model) if streamed else model

        def run(tokens: int = chunk) -> Tensor:
            with torch.inference_mode(), precision(s.dtype, s.device):
                return model.nll(read(ids[:, :tokens]), ids[:, :tokens])

        return run

    cache = _cache_bytes(s, net, seq) if streamed else None
    row = _row(s, net, impl, direction, seq, chunk=chunk if streamed else None, cache_bytes=cache)
    return Case(row, _flops(s, net, 1, 1), _memory(s, net, chunk) + (cache or 0), start, streamed)


def train(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """Return a case of one sequence's loss and gradients, by `s.chunk` tokens if given: a step without its update."""
    net = _net(s, impl, seq)
    if not isinstance(net, LongNet):
        raise ConfigError(f"{s.model}: --op train measures LongNets; a Hugging Face model trains by itself")
    chunk = min(s.chunk or seq, seq)

    def start() -> Callable[[], object]:
        model, ids = _with_weights(s, net).train(), _tokens(s, net, seq)

        def run() -> Tensor:
            model.zero_grad()
            return backward(model, ids, ids, chunk=chunk, scale=1 / ids.numel(), dtype=s.dtype)

        return run

    again = chunk < seq  # then the backward pass computes each chunk's forward pass again
    row = _row(s, net, impl, direction, seq, chunk=chunk if again else None)
    return Case(row, _flops(s, net, 3 + again, 3.5 + again), _training_memory(s, net.config, seq, chunk), start)


def _net(s: Settings, impl: str, seq: int) -> LongNet | TransformersNet:
    """Return the net of a row: a LongNet on the meta device, or a Hugging Face model with its weights."""
    folder = ModelFolder.find(s.model) if s.model is not None else None
    if folder and folder.of_transformers:
        return _transformers(s, impl, seq, folder)
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
        return LongNet(found)


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
    return net


@lru_cache(maxsize=1)  # only one: the next row needs another attention
def _loaded(path: Path, pattern: Pattern | None, device: torch.device, dtype: str) -> TransformersNet:
    return ModelFolder(path).net(pattern=pattern, device=device, dtype=DTYPES[dtype])


def _with_weights(s: Settings, net: NetT) -> NetT:
    """Return the net with its weights. A LongNet's are read, or drawn, only when its row is measured."""
    if not isinstance(net, LongNet):
        return net
    if s.model is not None:
        net.load_state_dict(LongNet.from_pretrained(s.model, s.device).state_dict(), assign=True)
    else:
        torch.manual_seed(0)
        net.to_empty(device=s.device).init_weights()
    return net.eval()


def _tokens(s: Settings, net: Net, count: int) -> Tensor:
    return torch.randint(net.config.vocab_size, (s.batch, count), device=s.device)


def _flops(
    s: Settings, net: LongNet | TransformersNet, of_matrices: float, of_attention: float
) -> Callable[[int], float]:
    """Return a function for the FLOPs of the first n tokens. `of_matrices` and `of_attention` count forward passes."""
    c, tables = net.config, {module.weight for module in net.modules() if isinstance(module, nn.Embedding)}
    output = net.output or net.embedding if isinstance(net, LongNet) else net.model.get_output_embeddings()
    assert output is not None
    # the matrices that multiply every token; a table is read by rows, and counts only if it is tied to the output
    matrices = {p for p in net.parameters() if p.dim() > 1} - tables | {output.weight}
    numbers = sum(p.numel() for p in matrices)

    def flops(tokens: int) -> float:
        attended = attention_flops(c.pattern, c.num_heads, c.head_dim, tokens, True, s.batch)
        return of_attention * c.num_layers * attended + of_matrices * 2 * s.batch * tokens * numbers

    return flops


def _memory(s: Settings, net: Net, chunk: int) -> int:
    """Return the bytes of the weights, one layer's activations and the logits."""
    c, tokens = net.config, s.batch * chunk
    logits = min(tokens * c.vocab_size, LOGITS_LIMIT)
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    return 4 * (tokens * (10 * c.dim + 2 * c.ffn_dim) + 2 * logits) + weights


def _training_memory(s: Settings, c: LongNetConfig, seq: int, chunk: int) -> int:
    """Return the bytes of weights and gradients, logits, a chunk's activations, and rows that chunks keep for others.

    They are counted as in `estimating.training_job`.
    """
    tokens, itemsize = s.batch * chunk, DTYPES[s.dtype].itemsize
    numbers = c.num_parameters() * (8 if itemsize == 4 else 8 + itemsize)  # autocast copies the weights
    kept = s.batch * sum(far_bytes(c, seq, chunk, itemsize))
    logits = 12 * min(tokens * c.vocab_size, LOGITS_LIMIT)
    return numbers + tokens * activation_bytes(c, itemsize, s.device.type) + kept + logits


def _cache_bytes(s: Settings, net: Net, seq: int) -> int | None:
    """Return the bytes of the rows of open segments, and of the past of chosen blocks; None for another cache."""
    if getattr(net.config, "memory", "segments") != "segments":
        return None
    c = net.config
    kv_heads, itemsize = getattr(c, "kv_heads", c.num_heads), DTYPES[s.dtype].itemsize
    rows = 2 * c.head_dim * itemsize * cached_rows(c.pattern, c.num_heads, kv_heads)
    return s.batch * c.num_layers * (rows + past_bytes(c.pattern, kv_heads, c.head_dim, seq, itemsize))


def _row(s: Settings, net: Net, impl: str, direction: str, seq: int, **values: int | None) -> Measurement:
    c = net.config
    as_it_comes = impl == "dense" and not isinstance(net, LongNet)
    kernel = "sdpa" if as_it_comes else select_kernel(s.device, DTYPES[s.dtype], c.head_dim).name
    shape = {"heads": c.num_heads, "head_dim": c.head_dim, "kernel": kernel}
    return Measurement.of(s, impl, direction, seq, None if as_it_comes else c.pattern, **shape, **values)
