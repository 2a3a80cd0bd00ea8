"""Rotary positions for any number of tokens: RoPE (arXiv 2104.09864), by level, and with xPos decay (arXiv 2212.10554).

A pair of features (2j, 2j+1) is one complex number, as in torchscale (`rotate_every_two`). A position turns it by
the phase pos * theta^(-2j/D). xPos also scales it: q by zeta_j^(pos/512), and k by the inverse. Both are one complex
product per tensor. Phases are float64, of int64 positions: a float32 phase is noise past 2^24 tokens, but float64
still resolves 1e-7 rad at 1e9.

xPos counts from the middle of the widest segment that holds the token. The keys of a softmax share a segment, and only
differences of positions enter a score, so this changes only the range of the exponents. For sequences of up to one such
segment, scores equal torchscale's, whose table is centred in the whole sequence and ends in NaN past 72,000 tokens.

By level, r tokens of a level with dilation rate r count as one position, beyond the distance at which the level
begins. So the keys of a level are as near to each other as those of a window, and a query meets few distances that are
rare in training. This is what Self-Extend (arXiv 2401.01325) does beyond a window.

N tokens, H heads, D head dim.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from longnet_cli.attention.sinks import Turn
from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets.config import LongNetConfig

XPOS_SCALE_BASE = 512
XPOS_GAMMA = 0.4
XPOS_MAX_SEGMENT_FP16 = 8192  # float16 ends at e^11: zeta^(4096 / 512) is e^10


class PositionTable(NamedTuple):
    """Complex factors (tokens, 1, D/2) of queries and of keys; for RoPE, both are the same tensor.

    By level, there are factors for each, (tokens, levels, 1, D/2).
    """

    q: Tensor
    k: Tensor


@torch.no_grad()
def position_table(
    config: LongNetConfig,
    positions: Tensor,
    dtype: torch.dtype,
) -> PositionTable | None:
    """Return the factors of int64 positions (tokens,) on their device; None for position="none".

    `dtype` is that of the queries to rotate: factors are complex128 for float64, otherwise complex64. Raises
    ConfigError for xPos in float16 with segments so long that exponents overflow.
    """
    if config.position == "none":
        return None
    if config.position == "xpos":
        return _xpos_table(config, positions, dtype)
    frequencies = _frequencies(config, positions.device)
    levels = _levels(config)
    if not levels:
        factors = _factors(positions.double()[:, None], frequencies, dtype)
        return PositionTable(factors, factors)
    rates, shifts = torch.tensor(levels, dtype=torch.float64, device=positions.device).T
    seen_at = (positions[:, None] / rates)[..., None]
    q = _factors(seen_at + shifts[:, None], frequencies, dtype)
    return PositionTable(q, _factors(seen_at, frequencies, dtype))


def _xpos_table(config: LongNetConfig, positions: Tensor, dtype: torch.dtype) -> PositionTable:
    longest = max(config.segment_lengths)
    if dtype is torch.float16 and longest > XPOS_MAX_SEGMENT_FP16:
        raise ConfigError(
            f'position="xpos" overflows float16 in segments longer than {XPOS_MAX_SEGMENT_FP16}, got {longest}; '
            "use bfloat16 or float32"
        )
    place = (positions % longest - longest // 2).double()[:, None]
    factors = _factors(place, _frequencies(config, positions.device), torch.float64)
    j = torch.arange(config.head_dim // 2, dtype=torch.float64, device=positions.device)
    decay = (2 * j + XPOS_GAMMA * config.head_dim) / ((1 + XPOS_GAMMA) * config.head_dim)
    exponent = place[:, None] / XPOS_SCALE_BASE * decay.log()  # (tokens, 1, D/2)
    kind = _kind(dtype)
    q = (factors * exponent.exp()).to(kind)
    return PositionTable(q, (factors * exponent.neg().exp()).to(kind))


def _levels(config: LongNetConfig) -> list[tuple[float, float]]:
    """Return the dilation rate of each level, and how much further away its keys are seen; [] if positions are plain.

    A query at p and a key at t are (p - t) / rate + shift apart. With overlap="once", a level begins where the one
    before has seen enough, its `look_back` segments away; with "repeat", each level begins at the query.
    """
    pattern = config.pattern
    if config.position != "rope_by_level" or len(pattern.levels) == 1:
        return []
    levels: list[tuple[float, float]] = []
    begin = 0  # of the level, in tokens before the query
    seen_at = 0.0  # the distance at which its first key is seen
    for (w, rate), look_back in zip(pattern.levels, pattern.look_backs, strict=True):
        levels.append((float(rate), seen_at - begin / rate))
        if pattern.overlap == "once":
            end = look_back * w
            seen_at += (end - begin) / rate
            begin = end
    return levels


def rotate(q: Tensor, k: Tensor, table: PositionTable | None) -> tuple[Tensor, Tensor]:
    """Turn queries and keys (batch, tokens, H, D), strided views allowed, by their positions; dtypes are kept.

    By level, return (batch, tokens, levels, H, D).
    The product is float32 (float64 for float64 inputs), also under autocast, and its backward saves only the table.
    """
    if table is None:
        return q, k
    if table.q.dim() == 4:
        q, k = q[:, :, None], k[:, :, None]
    return _turn(q, table.q), _turn(k, table.k)


def sink_turn(config: LongNetConfig) -> Turn | None:
    """Return a function that turns rotated keys (B, S, n, H, D) by S distances, for sinks and chosen blocks.

    None without rope. xPos would also scale keys, so it has neither (`LongNetConfig`).
    """
    if config.position not in ("rope", "rope_by_level"):
        return None
    return partial(_turn_by, config)


def _turn_by(config: LongNetConfig, k: Tensor, distances: Tensor) -> Tensor:
    frequencies = _frequencies(config, k.device)
    factors = _factors(distances.double()[:, None], frequencies, k.dtype)
    return _turn(k, factors[:, None])  # (S, 1, 1, D/2)


def _kind(dtype: torch.dtype) -> torch.dtype:
    """Return the type of factors for queries and keys of a type."""
    return torch.promote_types(dtype, torch.complex64)


def _factors(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the complex factors (..., 1, D/2), for queries and keys of a type, of positions (..., 1) in float64."""
    phase = (positions * frequencies).remainder_(2 * math.pi)[..., None, :]
    return torch.polar(torch.ones_like(phase), phase).to(_kind(dtype))


def _frequencies(config: LongNetConfig, device: torch.device | str) -> Tensor:
    """Return the phase of one position for each pair of features, (D/2,) float64."""
    half = config.head_dim // 2
    return config.rope_theta ** (-torch.arange(half, dtype=torch.float64, device=device) / half)


def _turn(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply the pairs of features of x (batch, ..., H, D) by factors, in float32 or float64; the dtype is kept."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = wide.unflatten(-1, (-1, 2))  # (batch, ..., H, D/2, 2)
    if torch.compiler.is_compiling():
        # a compiler makes one loop of these real products; in eager mode they take twice as long as a complex product
        real, imaginary = pairs.unbind(-1)
        cos, sin = torch.view_as_real(factors).unbind(-1)
        turned_real = real * cos - imaginary * sin
        turned_imaginary = real * sin + imaginary * cos
        turned = torch.stack((turned_real, turned_imaginary), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * factors)
    return turned.flatten(-2).to(x.dtype)
