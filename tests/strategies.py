"""Attention problems: hypothesis strategies for patterns, shapes, starts and ragged lengths of every awkward kind; how
a problem is run, and how close two results are.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from reference import dilated_attention_reference
from torch import Tensor

from longnet_cli.attention import KVCache, Pattern, dilated_attention
from longnet_cli.attention.chosen import ChosenCall, Group, chosen_calls, groups_of

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
SeenBlocks = tuple[Group, list[int]]
# r = 6 and 12 do not divide w, as in the paper
PAPER_64TH = Pattern((32, 64, 128, 256, 512), (1, 2, 4, 6, 12))

CHOSEN = Pattern((16,), (1,), look_back=1, chosen=4, chosen_block=8, chosen_every=4)


@dataclass(frozen=True)
class Choice:
    """One call of dilated attention, its inputs drawn in fp64 from a seed, with rotary positions or without."""

    pattern: Pattern
    batch: int
    tokens: int
    heads: int
    head_dim: int
    start: int
    causal: bool
    lengths: tuple[int, ...] | None
    seed: int
    kv_heads: int = 1
    rotary: bool = False
    by_level: bool = False  # whether each level has its own queries, keys and values

    @property
    def options(self) -> dict:
        return {"causal": self.causal, "start": self.start, "lengths": self.lengths}

    def qkv(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """q, k, v, dout; q and k rotated, if they are, for positions from `start` on."""
        levels = len(self.pattern.levels) if self.by_level else 1
        draw = torch.Generator().manual_seed(self.seed)
        shape = (1 + 3 * levels, self.batch, self.tokens, self.heads, self.head_dim)
        dout, *of_levels = torch.randn(shape, generator=draw, dtype=torch.float64)
        q, k, v = (
            torch.stack(of_levels[i::3], 2) if self.by_level else of_levels[i] for i in range(3)
        )
        k, v = k[..., : self.kv_heads, :], v[..., : self.kv_heads, :]
        if self.rotary:
            q, k = (turn(x[:, None], torch.tensor([0]), self.start)[:, 0] for x in (q, k))
        return [x.to(dtype) for x in (q, k, v, dout)]


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
    levels = draw(
        st.lists(st.tuples(st.integers(1, 230), st.integers(1, 13)), min_size=1, max_size=4)
    )
    return Pattern(tuple(w for w, _ in levels), tuple(r for _, r in levels), offsets)


def turn(x: Tensor, distances: Tensor, start: int | None = None) -> Tensor:
    """Rotate x (batch, segments, rows, heads, head_dim) by distances (segments,), and by its own places from `start`.

    Pairs of features are complex numbers; scores depend on distances alone.
    """
    half = x.shape[-1] // 2
    speed = 0.3 ** torch.arange(half, dtype=torch.float64)
    places = distances[:, None].double().cpu() + (
        0 if start is None else torch.arange(start, start + x.shape[2])
    )
    phase = (places[:, :, None, None] * speed).to(x.device)  # (segments, rows or 1, 1, half)
    cos, sin = (
        each.to(x.dtype if x.dtype.itemsize > 2 else torch.float32)
        for each in (phase.cos(), phase.sin())
    )
    a, b = x.unflatten(-1, (half, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def pattern_with_options(pick: random.Random, causal: bool) -> Pattern:
    """Every option of a pattern, alone and together with the others."""
    levels, overlap = pick.randint(1, 4), pick.choice(["repeat", "once"])
    widths, rates, backs = [pick.randint(1, 30)], [1], [pick.randint(0, 3)]
    for _ in range(levels - 1):
        widths.append(
            int(widths[-1] * (pick.randint(1, 4) if overlap == "once" else pick.uniform(1, 4)))
        )
        rates.append(pick.randint(1, 9))
        least = -(-backs[-1] * widths[-2] // widths[-1]) if overlap == "once" else 0
        backs.append(pick.randint(least, least + 2))
    plain = overlap == "repeat" and pick.randint(0, 3) == 0  # in any order, at any first rate
    if plain:
        rates[0] = pick.randint(1, 5)
        order = pick.sample(range(levels), levels)
        widths, rates, backs = ([x[i] for i in order] for x in (widths, rates, backs))
    free = (overlap == "once" or not causal) and not plain
    queries = pick.choice(["dilated", "all"]) if free else "dilated"
    sinks = 0 if plain else pick.randint(0, min(widths[0], 6))
    offsets = pick.choice(["modulo", "grouped"])
    return Pattern(tuple(widths), tuple(rates), offsets, tuple(backs), overlap, queries, sinks)


def patterns_with_options(causal: bool) -> st.SearchStrategy[Pattern]:
    return st.builds(pattern_with_options, st.randoms(use_true_random=False), st.just(causal))


def drawn(draw: st.DrawFn, batch: int, tokens: int, kv_heads: int, groups: int) -> dict:
    """What every choice has: the sizes given, lengths and a seed; `groups` query heads a key head at most."""
    return {
        "batch": batch,
        "tokens": tokens,
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.integers(1, groups)),
        "lengths": draw(st.none() | st.tuples(*[st.integers(0, tokens)] * batch)),
        "seed": draw(st.integers(0, 2**31)),
    }


@st.composite
def choices(draw: st.DrawFn, causal: bool | None = None) -> Choice:
    """Every option of a pattern, or none, with any numbers of heads."""
    causal = draw(st.booleans()) if causal is None else causal
    pattern = draw(patterns_with_options(causal) | patterns())
    moved = draw(st.sampled_from(["by level", "by turn", "by level", "nothing"]))
    if moved == "by level":
        pattern = replace(pattern, sinks=0)
    batch, tokens, kv_heads = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 150)),
        draw(st.integers(1, 4)),
    )
    return Choice(
        pattern=pattern,
        **drawn(draw, batch, tokens, kv_heads, groups=4),
        head_dim=draw(st.sampled_from([2, 8] if moved == "by turn" else [1, 4, 16])),
        start=0 if pattern.sinks else draw(st.integers(0, 100)),
        causal=causal,
        rotary=moved == "by turn",
        by_level=moved == "by level",
    )


@st.composite
def chosen_patterns(draw: st.DrawFn) -> Pattern:
    """Windows with chosen blocks."""
    block = draw(st.integers(1, 12))
    every = draw(st.sampled_from([n for n in range(1, block + 1) if block % n == 0]))
    width, back, number = (
        block * draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 5)),
    )
    sizes = {"chosen": number, "chosen_block": block, "chosen_every": every}
    return Pattern((width,), (1,), look_back=back, **sizes)


@st.composite
def chosen_choices(draw: st.DrawFn) -> Choice:
    """Calls with chosen blocks, long enough that some are left out."""
    pattern = draw(chosen_patterns())
    batch, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    tokens = draw(st.integers(1, 4 * pattern.segment_lengths[0] + 2 * pattern.chosen_keys))
    return Choice(
        pattern=pattern,
        **drawn(draw, batch, tokens, kv_heads, groups=3),
        head_dim=draw(st.sampled_from([2, 8])),
        start=0,
        causal=True,
        rotary=draw(st.booleans()),
    )


def cuts() -> st.SearchStrategy[list[int]]:
    """Sizes of the chunks of a sequence, taken in turn: single tokens, primes, one chunk, and mixtures."""
    return st.sampled_from([[1], [2], [7], [13], [64], [10**6]]) | st.lists(
        st.integers(1, 90), min_size=1, max_size=5
    )


def split(tokens: int, sizes: list[int]) -> list[int]:
    """`sizes` in turn, over and over, until they make `tokens`."""
    found: list[int] = []
    while sum(found) < tokens:
        found.append(min(sizes[len(found) % len(sizes)], tokens - sum(found)))
    return found


def document_starts(tokens: Tensor, eos: int) -> list[list[int]]:
    """Where documents start in each row of (rows, n) ids, if `eos` precedes each."""
    return [
        [0, *(i for i in range(1, tokens.shape[1]) if tokens[row, i] == eos)]
        for row in range(tokens.shape[0])
    ]


def turning(choice: Choice) -> dict:
    return {"turn": turn} if choice.rotary else {}


def run(function, inputs: list[Tensor], pattern: Pattern, **options) -> list[Tensor]:
    """out, dq, dk, dv of sum(out * dout); inputs are q, k, v, dout."""
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs[:3])
    out = function(q, k, v, pattern, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3], materialize_grads=True)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Relative in the norm of each tensor.

    With one visible key dq and dk are exactly 0, the difference of two equal numbers: hence a floor of a tenth of the
    largest tensor's norm, which larger problems never touch.
    """
    floor = max(x.double().norm().item() for x in expected) * 0.1
    names = ("out", "dq", "dk", "dv")[: len(expected)]
    for name, a, b in zip(names, found, expected, strict=True):
        error = (a.double() - b.double()).norm().item() / max(
            b.double().norm().item(), floor, 1e-30
        )
        assert error <= tolerance, f"{name} is off by {error:.2e}"


def compare_with_reference(
    choice: Choice, dtype: torch.dtype = torch.float64, kernel: str | None = None, **options
) -> None:
    """Outputs and gradients are those of the dense reference in fp64."""
    inputs, options = choice.qkv(dtype), choice.options | turning(choice) | options
    found = run(dilated_attention, inputs, choice.pattern, kernel=kernel, **options)
    wide = [x.double() for x in inputs]
    expected = run(dilated_attention_reference, wide, choice.pattern, **options)
    assert_close(found, expected, TOLERANCE[dtype])


def cache_of(choice: Choice, keep: int = 0) -> KVCache:
    """An empty cache for the keys of a choice, in fp64."""
    sizes = choice.batch, choice.heads, choice.head_dim
    kinds = {"kv_heads": choice.kv_heads, "dtype": torch.float64}
    return KVCache(choice.pattern, *sizes, **kinds, keep=keep)


def some_blocks(pattern: Pattern, batch: int, tokens: int, seed: int) -> list[SeenBlocks]:
    """The groups of `batch` rows, and random blocks before their windows, block 0 among them."""
    chance, seen = random.Random(seed), list[SeenBlocks]()
    for row in range(batch):
        for group in groups_of(pattern, row, 0, tokens):
            others = range(1, group.near // pattern.chosen_block)
            number = min(chance.randrange(pattern.chosen), len(others))
            seen.append((group, [0, *sorted(chance.sample(others, number))]))
    return seen


def blocks_of_shard(
    pattern: Pattern, seen: list[SeenBlocks], start: int = 0, stop: int = sys.maxsize
) -> list[ChosenCall]:
    """The calls of the part [start, stop) of these groups."""
    parts = [
        (group._replace(start=max(start, group.start), stop=min(stop, group.stop)), blocks)
        for group, blocks in seen
        if group.start < stop and group.stop > start
    ]
    return chosen_calls(pattern, start, parts, torch.device("cpu"))
