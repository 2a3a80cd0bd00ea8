"""Hypothesis strategies for attention problems: patterns, shapes, starts and ragged lengths of every awkward kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from longnet_cli.attention import Pattern

PAPER_64TH = Pattern((32, 64, 128, 256, 512), (1, 2, 4, 6, 12))  # r = 6 and 12 do not divide w, as in the paper


@dataclass(frozen=True)
class Problem:
    """One call of dilated attention, its inputs drawn in fp64 from a seed."""

    pattern: Pattern
    batch: int
    tokens: int
    heads: int
    head_dim: int
    start: int
    causal: bool
    lengths: tuple[int, ...] | None
    seed: int

    def tensors(self, count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        draw = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.tokens, self.heads, self.head_dim)
        return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for _ in range(count)]

    @property
    def options(self) -> dict:
        return {"causal": self.causal, "start": self.start, "lengths": self.lengths}


@st.composite
def patterns(draw: st.DrawFn) -> Pattern:
    """The paper's pattern at 1/64 scale, geometric ones, and arbitrary ones: r not dividing w, no r = 1, r > w."""
    kind = draw(st.sampled_from(["paper", "geometric", "any", "any"]))
    offsets = draw(st.sampled_from(["modulo", "grouped"]))
    if kind == "paper":
        return Pattern(PAPER_64TH.segment_lengths, PAPER_64TH.dilation_rates, offsets)
    if kind == "geometric":
        base = draw(st.integers(1, 32))
        found = Pattern.geometric(draw(st.integers(1, 200)), base, draw(st.integers(2, 4)))
        return Pattern(found.segment_lengths, found.dilation_rates, offsets)
    levels = draw(st.lists(st.tuples(st.integers(1, 230), st.integers(1, 13)), min_size=1, max_size=4))
    return Pattern(tuple(w for w, _ in levels), tuple(r for _, r in levels), offsets)


@st.composite
def problems(draw: st.DrawFn, lengths: bool = True) -> Problem:
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 200))
    ragged = st.tuples(*[st.integers(0, tokens)] * batch)
    return Problem(
        pattern=draw(patterns()),
        batch=batch,
        tokens=tokens,
        heads=draw(st.integers(1, 12)),
        head_dim=draw(st.sampled_from([1, 4, 8, 16])),
        start=draw(st.integers(0, 100)),
        causal=draw(st.booleans()),
        lengths=draw(st.none() | ragged) if lengths else None,
        seed=draw(st.integers(0, 2**31)),
    )


def cuts() -> st.SearchStrategy[list[int]]:
    """Sizes of the chunks of a sequence, taken in turn: single tokens, primes, one chunk, and mixtures."""
    return st.sampled_from([[1], [2], [7], [13], [64], [10**6]]) | st.lists(st.integers(1, 90), min_size=1, max_size=5)


def split(tokens: int, sizes: list[int]) -> list[int]:
    """`sizes` in turn, over and over, until they make `tokens`."""
    found: list[int] = []
    while sum(found) < tokens:
        found.append(min(sizes[len(found) % len(sizes)], tokens - sum(found)))
    return found


def document_starts(tokens: Tensor, eos: int) -> list[list[int]]:
    """Where documents start in each row of (rows, n) ids, if `eos` precedes each."""
    return [[0, *(i for i in range(1, tokens.shape[1]) if tokens[row, i] == eos)] for row in range(tokens.shape[0])]
