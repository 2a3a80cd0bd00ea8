"""Measure torch's FlexAttention with the mask of a pattern, beside dilated and dense attention, as rows of `bench`.

    python docs/measurements/flex.py 8Ki 2Ki/1,4Ki/2,8Ki/4 dilated flex dense     # a C++ compiler is needed

FlexAttention is credited with the FLOPs of dilated attention.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.attention.notation import parse_pattern
from longnet_cli.basics.sizes import parse_size
from longnet_cli.jobs.benchmark import Measurement, Settings, bench, case_of, measure
from longnet_cli.running.device import DTYPES, peak_from_now, trim_memory


def flex_attention(
    pattern: Pattern,
    heads: int,
    tokens: int,
    causal: bool,
    device: torch.device,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return torch's FlexAttention with the mask of a pattern, compiled: q, k, v (B, H, N, D) -> the same shape.

    A key that several levels show to a query counts once. A query that sees no key gets zeros.
    """
    from torch.nn.attention import flex_attention as flex  # takes a second

    offsets = [
        torch.tensor(pattern.offsets(level, heads), device=device)
        for level in range(len(pattern.levels))
    ]

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = (query // pattern.segment_lengths[0] > pattern.look_backs[0]) & (
            key < pattern.sinks
        )
        before = torch.zeros_like(visible)
        for (w, r), back, offset in zip(pattern.levels, pattern.look_backs, offsets, strict=True):
            covers = (query // w - back <= key // w) & (key // w <= query // w + back)
            shown = (
                covers
                & (key % w % r == offset[head])
                & ((key >= pattern.sinks) | (w == pattern.segment_lengths[0]))
            )
            asks = (query % w % r == offset[head]) | (pattern.queries == "all")
            visible = visible | (shown & asks & ~before)
            before = covers if pattern.overlap == "once" else before
        return visible & (key <= query) if causal else visible

    of_heads = heads if max(pattern.dilation_rates) > 1 else None
    # not compiled, it would hold ten bytes for each score
    mask = torch.compile(flex.create_block_mask)(
        sees,
        None,
        of_heads,
        tokens,
        tokens,
        device=device,
    )
    return partial(torch.compile(flex.flex_attention, dynamic=False), block_mask=mask)


def rows(seq: int, pattern: Pattern, impl: str, repeats: int) -> Iterator[Measurement]:
    """Yield the row of an implementation: dilated, dense or flex."""
    is_flex = impl == "flex"
    settings = Settings.of(
        seq=[seq], pattern=pattern, impl=["dilated" if is_flex else impl], repeats=repeats
    )
    if not is_flex:
        yield from bench(settings)
        return

    def start() -> Callable[[], Tensor]:
        draw = torch.Generator(settings.device).manual_seed(0)
        shape = (1, settings.heads, seq, settings.head_dim)
        options = {"dtype": DTYPES[settings.dtype], "device": settings.device}
        inputs = [torch.randn(shape, generator=draw, **options) for _ in range(3)]
        attend = flex_attention(pattern, settings.heads, seq, settings.causal, settings.device)
        return partial(attend, *inputs)

    case = case_of(settings, "dilated", "forward", seq)
    row = replace(case.row, impl=impl, kernel=impl)
    trim_memory(settings.device)
    peak = peak_from_now(settings.device)
    yield from measure(
        replace(case, row=row, start=start), settings.device, peak, math.inf, repeats
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("seq", type=parse_size)
    parser.add_argument("pattern", type=parse_pattern)
    parser.add_argument("impl", nargs="+", choices=["dilated", "flex", "dense"])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for impl in args.impl:
        for row in rows(args.seq, args.pattern, impl, args.repeats):
            print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main()
