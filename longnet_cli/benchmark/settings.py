"""What all rows of a benchmark have in common, and what it is where nobody says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from longnet_cli.attention import Pattern
from longnet_cli.errors import ConfigError
from longnet_cli.runtime.device import DTYPES, check_kernel, resolve_dtype, select_device
from longnet_cli.runtime.ranks import Ranks

LONG = 10**6  # tokens from which on a causal forward is streamed and the defaults are those of long sequences
CHUNK = 1 << 16  # tokens of a streamed run


@dataclass(frozen=True)
class Settings:
    """`pattern`: a Pattern, "paper", or "geometric" with its base and ratio; `asked`, whether somebody said so."""

    heads: int
    head_dim: int
    batch: int
    causal: bool
    pattern: Pattern | str
    asked: bool
    base: int
    ratio: int
    dtype: str
    device: torch.device
    chunk: int | None
    layers: int
    vocab: int
    model: str | Path | None
    ranks: Ranks = field(default_factory=Ranks)

    @classmethod
    def resolve(
        cls,
        seqs: Sequence[int],
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        batch: int = 1,
        causal: bool = True,
        pattern: Pattern | str | None = None,
        base: int | None = None,
        ratio: int | None = None,
        dtype: str = "auto",
        device: str = "auto",
        chunk: int | None = None,
        layers: int | None = None,
        vocab: int | None = None,
        model: str | Path | None = None,
        ranks: Ranks | None = None,
    ) -> Settings:
        """Fill in what is None: the paper's 12 heads of 64 and its pattern, or what suits long sequences.

        From a sequence of LONG tokens on the pattern is geometric, and on a CPU the shape is 2 heads of 32 from a
        segment of 256, with which a billion tokens take two cores less than half an hour. A `base` or `ratio` asks for
        a geometric pattern. Raises ConfigError.
        """
        if isinstance(pattern, str) and pattern not in ("paper", "geometric"):
            raise ConfigError(f"unknown pattern {pattern!r}: choose from paper, geometric")
        if dtype not in ("auto", *DTYPES):
            raise ConfigError(f"unknown dtype {dtype!r}: choose from auto, {', '.join(DTYPES)}")
        where = select_device(device)
        long = max(seqs) >= LONG
        small = long and where.type == "cpu"
        heads = heads if heads is not None else 2 if small else 12
        head_dim = head_dim if head_dim is not None else 32 if small else 64
        if base is not None or ratio is not None:
            pattern = pattern or "geometric"
            if pattern != "geometric":
                raise ConfigError("base and ratio are of a geometric pattern, not of another")
        base = base if base is not None else 256 if small else 2048
        ratio = ratio if ratio is not None else 2
        layers = layers if layers is not None else 2
        vocab = vocab if vocab is not None else 256
        asked = pattern is not None
        pattern = pattern or ("geometric" if long else "paper")
        if min(*seqs, heads, head_dim, batch, base, layers, vocab, 1 if chunk is None else chunk) < 1 or ratio < 2:
            raise ConfigError(
                "seq, heads, head_dim, batch, base, chunk, layers and vocab must be at least 1, ratio at least 2"
            )
        check_kernel(where, dtype, head_dim)
        dtype = resolve_dtype(dtype, where)
        return cls(
            heads,
            head_dim,
            batch,
            causal,
            pattern,
            asked,
            base,
            ratio,
            dtype,
            where,
            chunk,
            layers,
            vocab,
            model,
            ranks or Ranks(),
        )

    def pattern_for(self, seq: int) -> Pattern:
        if isinstance(self.pattern, Pattern):
            return self.pattern
        return Pattern.paper() if self.pattern == "paper" else Pattern.geometric(seq, self.base, self.ratio)

    def streams(self, seq: int) -> bool:
        """Whether a causal forward of `seq` tokens runs chunk by chunk: where a chunk is asked for, or it is long."""
        return self.causal and (seq > self.chunk if self.chunk else seq >= LONG)

    def chunk_for(self, seq: int) -> int:
        return min(seq, self.chunk or CHUNK)
