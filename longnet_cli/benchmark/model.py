"""The ops `model` and `train`: tokens in and the loss of each out, or its gradients, dilated or dense."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from longnet_cli.attention import Pattern
from longnet_cli.attention.kernels import select_kernel
from longnet_cli.attention.pattern import attention_flops
from longnet_cli.benchmark.attention import pattern_name
from longnet_cli.benchmark.measurement import Case, Measurement, Stream
from longnet_cli.benchmark.settings import Settings
from longnet_cli.errors import ConfigError
from longnet_cli.integrations.loading import load_transformers
from longnet_cli.model import LongNet, LongNetConfig
from longnet_cli.model.config import parse_config
from longnet_cli.model.net import LOGITS_LIMIT, Net, NetConfig
from longnet_cli.model.weights import load_config
from longnet_cli.presets import find_model, is_of_transformers
from longnet_cli.runtime.chunks import open_stream
from longnet_cli.runtime.device import DTYPES, precision
from longnet_cli.training.gradients import backward

if TYPE_CHECKING:
    from longnet_cli.integrations.transformers_net import TransformersNet


def model(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """The forward of a shipped or saved model (`settings.model`), or of a random one, on random tokens."""
    net = _net(s, impl, seq)
    chunk = s.chunk_for(seq) if impl == "dilated" and net.config.streams and s.streams(seq) else seq

    def start() -> Callable[..., object]:
        model, ids = net.build(), net.tokens(chunk)
        read = open_stream(model) if chunk < seq else model

        def run(tokens: int = chunk) -> Tensor:
            with torch.inference_mode(), precision(s.dtype, s.device):
                return model.nll(read(ids[:, :tokens]), ids[:, :tokens])

        return run

    row = net.row("model", direction)
    if chunk == seq:
        return Case(row, s.batch * seq, net.flops(seq), 0, net.memory(chunk), start)
    cache = net.cache_bytes()
    row = replace(row, chunk=chunk, cache_bytes=cache)
    return Stream(row, s.batch * seq, net.flops(seq), 0, net.memory(chunk) + (cache or 0), start, net.flops)


def train(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """Loss and gradients of one sequence, by `settings.chunk` tokens if that is given: a step less its update."""
    net = longnet(s, impl, seq)
    chunk = min(s.chunk or seq, seq)

    def start() -> Callable[[], object]:
        model, ids = net.build().train(), net.tokens(seq)

        def run() -> Tensor:
            model.zero_grad()
            return backward(model, ids, ids, chunk=chunk, scale=1 / ids.numel(), dtype=s.dtype)

        return run

    passes = (3, 3.5) if chunk == seq else (4, 4.5)  # forwards that the step costs: of matrices, of attention
    row = replace(net.row("train", "backward"), chunk=chunk if chunk < seq else None)
    memory = net.memory(chunk) * 2 * net.config.num_layers
    return Case(row, s.batch * seq, net.flops(seq, *passes), 0, memory, start)


class _Net:
    """The net of a row: `matrices`, the numbers that every token is multiplied by, and `parameters`, all there are."""

    config: NetConfig
    matrices: int
    parameters: int

    def __init__(self, s: Settings, impl: str, seq: int) -> None:
        self.s, self.impl, self.seq = s, impl, seq

    def build(self) -> Net:
        raise NotImplementedError

    def tokens(self, count: int) -> Tensor:
        return torch.randint(self.config.vocab_size, (self.s.batch, count), device=self.s.device)

    def flops(self, tokens: int, of_matrices: float = 1, of_attention: float = 1) -> float:
        """Executed on the first so many tokens, in multiples of a forward's."""
        c = self.config
        if not tokens:
            return 0
        attended = attention_flops(c.pattern, c.num_heads, c.head_dim, tokens, True, self.s.batch)
        return of_attention * c.num_layers * attended + of_matrices * 2 * self.s.batch * tokens * self.matrices

    def memory(self, chunk: int) -> int:
        """Bytes of the weights, one layer's activations and the logits."""
        c, tokens = self.config, self.s.batch * chunk
        logits = min(tokens * c.vocab_size, LOGITS_LIMIT)
        return 4 * (tokens * (10 * c.dim + 2 * c.ffn_dim) + 2 * logits + self.parameters)

    def cache_bytes(self) -> int | None:
        """Of the rows of open segments, whatever the sequence; None where something else remembers."""
        s, c = self.s, self.config
        numbers = 2 * s.batch * c.num_layers * c.num_heads * c.head_dim * c.pattern.cache_rows
        return numbers * DTYPES[s.dtype].itemsize

    def row(self, op: str, direction: str) -> Measurement:
        s, c = self.s, self.config
        return Measurement(
            op, self.impl, direction, self.seq,
            heads=c.num_heads, head_dim=c.head_dim, batch=s.batch, causal=True, dtype=s.dtype, device=str(s.device),
            kernel=select_kernel(s.device, DTYPES[s.dtype], c.head_dim).name, pattern=pattern_name(c.pattern),
        )  # fmt: skip


class _LongNet(_Net):
    """A LongNet with the pattern that is asked for, else its own; its dense twin has one segment, the sequence."""

    def __init__(self, s: Settings, impl: str, seq: int) -> None:
        super().__init__(s, impl, seq)
        c = _config(s, seq)
        pattern = c.pattern if impl == "dilated" else Pattern((seq,), (1,))
        levels = {"segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates}
        self.config: LongNetConfig = c.model_copy(update=levels)
        self.matrices = c.num_layers * (4 * c.dim**2 + 2 * c.dim * c.ffn_dim) + c.dim * c.vocab_size
        self.parameters = c.num_parameters()

    def build(self) -> LongNet:
        torch.manual_seed(0)
        if self.s.model is None:
            return LongNet(self.config).to(self.s.device)
        saved = LongNet.from_pretrained(self.s.model, self.s.device)
        with torch.device("meta"):
            net = LongNet(self.config)
        net.load_state_dict(saved.state_dict(), assign=True)
        return net.eval()


class _OfTransformers(_Net):
    """A model of transformers, with the pattern that is asked for, else its own; its dense twin is as it comes."""

    def __init__(self, s: Settings, impl: str, seq: int, folder: Path) -> None:
        super().__init__(s, impl, seq)
        own = "dilated_attention" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
        pattern = s.pattern_for(seq) if s.asked or not own else None
        if impl == "dilated":
            self.net = _loaded(folder, "dilated", pattern, s.device)
        else:
            self.net = _loaded(folder, "dense", None, s.device)
        self.config = self.net.config
        output = self.net.model.get_output_embeddings()
        if not self.config.causal or output is None:
            raise ConfigError(f"{s.model}: --op model runs causal language models")
        limit = self.config.max_tokens
        if limit is not None and seq > limit:
            raise ConfigError(f"{s.model}: --seq {seq}, and the model has {limit} positions")
        self.parameters = sum(p.numel() for p in self.net.parameters())
        tables = {module.weight for module in self.net.modules() if isinstance(module, nn.Embedding)}
        self.matrices = sum(p.numel() for p in self.net.parameters() if p.dim() > 1 and p not in tables)
        if output.weight in tables:  # tied: read by rows, and multiplied too
            self.matrices += output.weight.numel()

    def build(self) -> Net:
        return self.net

    def cache_bytes(self) -> int | None:
        return super().cache_bytes() if self.net.config.memory == "segments" else None

    def row(self, op: str, direction: str) -> Measurement:
        row = super().row(op, direction)
        return row if self.impl == "dilated" else replace(row, kernel="sdpa", pattern=None)


@lru_cache(maxsize=1)  # the rows of one sequence length come as pairs, and each has its own attention
def _loaded(
    folder: Path, attention: Literal["dilated", "dense"], pattern: Pattern | None, device: torch.device
) -> TransformersNet:
    return load_transformers(folder, attention=attention, pattern=pattern, device=device)


def longnet(s: Settings, impl: str, seq: int) -> _LongNet:
    """The net of a row that trains one."""
    net = _net(s, impl, seq)
    if not isinstance(net, _LongNet):
        raise ConfigError(f"{s.model}: --op train and loop measure LongNets; a model of transformers trains by itself")
    return net


def _net(s: Settings, impl: str, seq: int) -> _Net:
    folder = find_model(str(s.model)) if s.model is not None else None
    if folder and is_of_transformers(folder):
        return _OfTransformers(s, impl, seq, folder)
    return _LongNet(s, impl, seq)


def _config(s: Settings, seq: int) -> LongNetConfig:
    if s.model is None:
        pattern, dim = s.pattern_for(seq), s.heads * s.head_dim
        shape = {"dim": dim, "num_layers": s.layers, "num_heads": s.heads, "ffn_dim": 4 * dim, "vocab_size": s.vocab}
        levels = {"segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates}
        return parse_config({**shape, **levels, "position": "rope"}, "a model with random weights")
    config = load_config(find_model(str(s.model)))
    if not config.causal or not config.vocab_size:
        raise ConfigError(f"{s.model}: --op model runs causal language models")
    if not s.asked:
        return config
    pattern = s.pattern_for(seq)
    levels = {"segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates}
    return parse_config({**config.model_dump(), **levels}, str(s.model))  # it may not fit the model's positions
