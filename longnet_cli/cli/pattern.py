"""`longnet pattern`: the description of a pattern, to read before you train with it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from longnet_cli.basics.sizes import format_bytes, format_count
from longnet_cli.cli.options import OUTPUT, option, size_option
from longnet_cli.cli.output import can_print, emit_json, printable, shows_color

if TYPE_CHECKING:
    from longnet_cli.jobs.describing import Description, LevelCosts, PatternCosts

Format = Literal["text", "json"]
MEASURE = "What to describe"


def pattern(
    patterns: Annotated[
        list[str],
        typer.Argument(
            metavar="PATTERN",
            help="Patterns: paper, geometric:1e9,base=2Ki,ratio=2, window:1Ki,look_back=1,sinks=4, "
            "nested:1Mi,base=1Ki,ratio=4, pretrained, finding, dense, or levels (segment length / rate) as "
            "1Ki/1,4Ki/4. All take look_back=, overlap=once, queries=all, sinks=, level_bias=, head_offsets=; "
            "a window takes chosen=32x32, chosen_every=. Or a recipe (.toml) or a model, by name or path.",
            show_default=False,
        ),
    ],
    seq: Annotated[
        int | None, size_option(MEASURE, "--seq", "Describe a sequence of this length.", "the longest segment, or 32Ki")
    ] = None,
    heads: Annotated[
        int | None, option(MEASURE, "--heads", "N", "Count N heads.", "the model's, or 12", min=1, max=1024)
    ] = None,
    layers: Annotated[
        int | None,
        option(MEASURE, "--layers", "N", "Follow links through N layers.", "the model's, or 4", min=1, max=256),
    ] = None,
    causal: Annotated[
        bool | None,
        option(MEASURE, "--causal/--bidirectional", None, "Look back only, or both ways.", "the model's, or causal"),
    ] = None,
    format: Annotated[Format, option(OUTPUT, "--format", "text|json", "Print tables, or a list in JSON.")] = "text",
    output: Annotated[
        str | None,
        option(
            OUTPUT,
            "--output -o",
            "FILE",
            "Draw a picture (.png, .svg, .pdf; needs the extra `plot`). An existing file is replaced.",
        ),
    ] = None,
) -> None:
    """Describe patterns: their levels and costs, what a query sees, and how far links reach."""
    from dataclasses import replace

    from longnet_cli.jobs.describing import default_length, describe, draw_picture, draw_text, find_subject, legend

    if output:
        from longnet_cli.data.overwriting import refuse_overwriting

        refuse_overwriting("-o", [output], also=[name for name in patterns if os.path.isfile(name)])
    found = [find_subject(text) for text in patterns]
    found = [replace(subject, heads=heads or subject.heads) for subject in found]
    length = seq or max(default_length(subject.pattern) for subject in found)
    color = shows_color()
    if output:
        draw_picture(found, length, output, causal=causal)
    rows = []
    for index, subject in enumerate(found):
        looks_back = subject.causal is not False if causal is None else causal
        description = describe(
            subject.pattern,
            name=subject.name,
            seq=length,
            heads=subject.heads,
            head_dim=subject.head_dim,
            layers=sorted({1, 2, 4, layers or subject.layers or 4}),
            causal=looks_back,
        )
        rows.append(description.as_dict())
        if format == "text":
            if index:
                print()
            _print(description)
            marks = {"color": color, "blocks": can_print("\u2580")}
            print(f"\n{draw_text(subject, length, causal=looks_back, **marks)}\n{legend(subject, **marks)}")
    if format == "json":
        emit_json(rows)


def _print(found: Description) -> None:
    direction = "causal" if found.causal else "bidirectional"
    print(printable(f"{found.name}: {direction}, {found.seq:,} tokens, {found.heads} heads"))
    print()
    print(
        f"{'level':<5}{'segment':>13}{'rate':>8}{'look-back':>11}{'keys per query':>16}{'FLOPs':>7}{'cache rows':>15}"
    )
    for index, level in enumerate(found.levels):
        shape = f"{index:<5}{level.segment_length:>13,}{level.dilation_rate:>8,}{level.look_back:>11,}"
        print(shape + _costs(level, f"{level.flops_share:.0%}"))
    if found.sinks.keys_per_query:
        print(f"{'sinks':<37}" + _costs(found.sinks, f"{found.sinks.flops / (found.total.flops or 1):.0%}"))
    if found.chosen.keys_per_query:
        print(f"{'chosen':<37}" + _costs(found.chosen, f"{found.chosen.flops / (found.total.flops or 1):.0%}"))
    print(f"{'total':<37}" + _costs(found.total, format_count(found.total.flops)))
    print(f"{'dense':<37}" + _costs(found.dense, format_count(found.dense.flops)))
    print()
    print(f"of the nearest 64 tokens, a query sees {found.nearest_mean:.1f} on average, {found.nearest_least} at least")
    if found.chosen.keys_per_query:
        print(f"blocks are chosen from the whole past: at the end, a voter is compared with {found.compared:,} means")
        print(
            f"for it, and for the blocks, a query reads {format_bytes(found.read_bytes)} per layer and key head (fp32)"
        )
    if found.reach is not None:
        what = "the past" if found.causal else "the sequence"
        reached = ", ".join(f"{_percent(share)} in {number}" for number, share in found.reach.items())
        print(f"of {what}, it is linked to {reached} layers")


def _costs(costs: PatternCosts | LevelCosts, flops: str) -> str:
    rows = "-" if costs.cache_rows is None else f"{costs.cache_rows:,}"
    keys = f"{costs.keys_per_query:,.0f}" if costs.keys_per_query >= 10 else f"{costs.keys_per_query:.3g}"
    return f"{keys:>16}{flops:>7}{rows:>15}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.095 else f"{share:.1%}"
