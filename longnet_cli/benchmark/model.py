"""The ops `model` and `train`: tokens in and the loss of each out, or its gradients, dilated or dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.attention.kernels import select_kernel
from longnet_cli.benchmark.attention import attention_flops, pattern_name
from longnet_cli.benchmark.measurement import Case, Measurement, Stream
from longnet_cli.benchmark.settings import Settings
from longnet_cli.errors import ConfigError
from longnet_cli.model import LongNet, LongNetConfig
from longnet_cli.model.net import LOGITS_LIMIT
from longnet_cli.model.weights import load_config
from longnet_cli.presets import find_model
from longnet_cli.runtime.chunks import CausalStream
from longnet_cli.runtime.device import DTYPES, precision
from longnet_cli.training.gradients import backward


def model(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """The forward of a shipped or saved model (`settings.model`), or of a random one, on random tokens."""
    net = _Net(s, impl, seq)
    chunk = s.chunk_for(seq) if impl == "dilated" and s.streams(seq) else seq

    def start() -> Callable[..., object]:
        model, ids = net.build(), net.tokens(chunk)
        read = CausalStream(model) if chunk < seq else model

        def run(tokens: int = chunk) -> Tensor:
            with torch.inference_mode(), precision(s.dtype, s.device):
                return model.nll(read(ids[:, :tokens]), ids[:, :tokens])

        return run

    row = net.row("model", direction)
    if chunk == seq:
        return Case(row, s.batch * seq, net.flops(seq), 0, net.memory(chunk), start)
    cache = (
        2 * s.batch * net.config.num_layers * net.config.dim * DTYPES[s.dtype].itemsize * net.config.pattern.cache_rows
    )
    row = replace(row, chunk=chunk, cache_bytes=cache)
    return Stream(row, s.batch * seq, net.flops(seq), 0, net.memory(chunk) + cache, start, net.flops)


def train(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """Loss and gradients of one sequence, by `settings.chunk` tokens if that is given: a step less its update."""
    net = _Net(s, impl, seq)
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
    """The net of a row. Its dense twin has the same weights, and one segment as long as the sequence."""

    def __init__(self, s: Settings, impl: str, seq: int) -> None:
        config = _config(s, seq)
        pattern = config.pattern if impl == "dilated" else Pattern((seq,), (1,))
        levels = {"segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates}
        self.s, self.impl, self.seq, self.config = s, impl, seq, config.model_copy(update=levels)

    def build(self) -> LongNet:
        torch.manual_seed(0)
        if self.s.model is None:
            return LongNet(self.config).to(self.s.device)
        saved = LongNet.from_pretrained(self.s.model, self.s.device)
        with torch.device("meta"):
            net = LongNet(self.config)
        net.load_state_dict(saved.state_dict(), assign=True)
        return net.eval()

    def tokens(self, count: int) -> Tensor:
        return torch.randint(self.config.vocab_size, (self.s.batch, count), device=self.s.device)

    def flops(self, tokens: int, of_matrices: float = 1, of_attention: float = 1) -> float:
        """Executed on the first so many tokens, in multiples of a forward's."""
        c = self.config
        if not tokens:
            return 0
        attended = attention_flops(c.pattern, c.num_heads, c.head_dim, tokens, True, self.s.batch)
        matrices = c.num_layers * (4 * c.dim**2 + 2 * c.dim * c.ffn_dim) + c.dim * c.vocab_size
        return of_attention * c.num_layers * attended + of_matrices * 2 * self.s.batch * tokens * matrices

    def memory(self, chunk: int) -> int:
        """Bytes of the weights, one layer's activations and the logits."""
        c, tokens = self.config, self.s.batch * chunk
        logits = min(tokens * c.vocab_size, LOGITS_LIMIT)
        return 4 * (tokens * (10 * c.dim + 2 * c.ffn_dim) + 2 * logits + c.num_parameters())

    def row(self, op: str, direction: str) -> Measurement:
        s, c = self.s, self.config
        return Measurement(
            op, self.impl, direction, self.seq,
            heads=c.num_heads, head_dim=c.head_dim, batch=s.batch, causal=True, dtype=s.dtype, device=str(s.device),
            kernel=select_kernel(s.device, DTYPES[s.dtype], c.head_dim).name, pattern=pattern_name(c.pattern),
        )  # fmt: skip


def _config(s: Settings, seq: int) -> LongNetConfig:
    if s.model is None:
        pattern, dim = s.pattern_for(seq), s.heads * s.head_dim
        return LongNetConfig(
            vocab_size=s.vocab, dim=dim, num_layers=s.layers, num_heads=s.heads, ffn_dim=4 * dim, position="rope",
            segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates,
        )  # fmt: skip
    config = load_config(find_model(str(s.model)))
    if not config.causal or not config.vocab_size:
        raise ConfigError(f"{s.model}: --op model runs causal language models")
    return config
