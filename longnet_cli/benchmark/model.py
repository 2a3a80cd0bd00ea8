"""The op `model`: tokens in and the loss of each out, through a whole net, dilated or with dense attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.attention.kernels import select_kernel
from longnet_cli.benchmark.attention import attention_flops, pattern_name
from longnet_cli.benchmark.measurement import Case, Measurement, Stream
from longnet_cli.benchmark.settings import Settings
from longnet_cli.errors import ConfigError
from longnet_cli.model import LongNet, LongNetConfig
from longnet_cli.presets import find_model
from longnet_cli.runtime.chunks import CausalStream
from longnet_cli.runtime.device import DTYPES, precision


def model(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """A shipped or saved model (`settings.model`), or a random one of `layers` layers, on random tokens.

    Its dense twin has the same weights and one segment as long as the sequence.
    """
    config = _config(s, seq)
    pattern = config.pattern if impl == "dilated" else Pattern((seq,), (1,))
    config = config.model_copy(
        update={"segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates}
    )
    chunk = s.chunk_for(seq) if impl == "dilated" and s.streams(seq) else seq
    streamed = chunk < seq
    matrices = (
        config.num_layers * (4 * config.dim**2 + 2 * config.dim * config.ffn_dim) + config.dim * config.vocab_size
    )

    def flops_to(tokens: int) -> float:
        if not tokens:
            return 0
        attended = attention_flops(pattern, config.num_heads, config.head_dim, tokens, True, s.batch)
        return config.num_layers * attended + 2 * s.batch * tokens * matrices

    def start() -> Callable[..., object]:
        torch.manual_seed(0)
        net = LongNet.from_pretrained(s.model, s.device) if s.model else LongNet(config).to(s.device)
        net = _with_pattern(net, config)
        ids = torch.randint(config.vocab_size, (s.batch, chunk), device=s.device)
        read = CausalStream(net) if streamed else net

        def run(tokens: int = chunk) -> Tensor:
            with torch.inference_mode(), precision(s.dtype, s.device):
                return net.nll(read(ids[:, :tokens]), ids[:, :tokens])

        return run

    size = DTYPES[s.dtype].itemsize
    cache = 2 * s.batch * config.num_layers * config.dim * size * pattern.cache_rows if streamed else None
    logits = min(s.batch * chunk * config.vocab_size, 1 << 26)
    activations = s.batch * chunk * (10 * config.dim + 2 * config.ffn_dim)
    memory = 4 * (activations + 2 * logits + config.num_parameters()) + (cache or 0)
    row = Measurement(
        "model", impl, direction, seq,
        heads=config.num_heads, head_dim=config.head_dim, batch=s.batch, causal=True, dtype=s.dtype,
        device=str(s.device), kernel=select_kernel(s.device, DTYPES[s.dtype], config.head_dim).name,
        pattern=pattern_name(pattern), chunk=chunk if streamed else None, cache_bytes=cache,
    )  # fmt: skip
    if streamed:
        return Stream(row, s.batch * seq, flops_to(seq), 0, memory, start, flops_to)
    return Case(row, s.batch * seq, flops_to(seq), 0, memory, start)


def _config(s: Settings, seq: int) -> LongNetConfig:
    if s.model is None:
        pattern, dim = s.pattern_for(seq), s.heads * s.head_dim
        return LongNetConfig(
            vocab_size=s.vocab, dim=dim, num_layers=s.layers, num_heads=s.heads, ffn_dim=4 * dim, position="rope",
            segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates,
        )  # fmt: skip
    from longnet_cli.model.weights import load_config

    config = load_config(find_model(str(s.model)))
    if not config.causal or not config.vocab_size:
        raise ConfigError(f"{s.model}: --op model runs causal language models")
    return config


def _with_pattern(net: LongNet, config: LongNetConfig) -> LongNet:
    """The same weights with another pattern."""
    if net.config == config:
        return net
    with torch.device("meta"):
        other = LongNet(config)
    other.load_state_dict(net.state_dict(), assign=True)
    return other.eval()
