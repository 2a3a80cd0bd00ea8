"""`longnet pattern`: the description of a pattern, to read before you train with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from longnet_cli.basics.sizes import format_count

from .options import OUTPUT, Format, HelpPanel, argument
from .output import emit_json, printable

if TYPE_CHECKING:
    from longnet_cli.jobs.describing import Description, LevelCosts, PatternCosts

MEASURE = HelpPanel("What to describe")


@dataclass(frozen=True)
class PatternCommand:
    """The options of `pattern`."""

    patterns: list[str] = argument(
        "PATTERN",
        "Patterns: paper, geometric:1e9,base=2Ki,ratio=2, window:1Ki,look_back=1,sinks=4, "
        "pretrained, finding, dense, or levels (segment length / rate) as 1Ki/1,4Ki/4. All take look_back=, "
        "overlap=once, queries=all, sinks=, head_offsets=; a window takes chosen=32x32, chosen_every=. "
        "Or a recipe (.toml) or a model, by name or path.",
    )
    seq: int | None = MEASURE.size(
        "--seq SIZE", "Describe a sequence of this length. (default: the longest segment, or 32Ki)"
    )
    heads: int | None = MEASURE.option(
        "--heads N",
        "Count N heads. (default: the model's, or 12)",
        min=1,
        max=1024,
    )
    causal: bool | None = MEASURE.option(
        "--causal/--bidirectional",
        "Look back only, or both ways. (default: the model's, or causal)",
    )
    format: Format = OUTPUT.option(
        "--format text|json",
        "Print tables, or a list in JSON.",
        default="text",
    )


def pattern(options: PatternCommand) -> None:
    """Describe patterns: their levels and costs, and what a query sees.

    Example: longnet pattern paper window:1Ki,sinks=4
    """
    from longnet_cli.basics.configuration import without_none
    from longnet_cli.jobs.describing import default_length, describe, draw_text, find_subject

    changes: dict[str, Any] = without_none({"heads": options.heads, "causal": options.causal})
    subjects = [replace(find_subject(text), **changes) for text in options.patterns]
    length = options.seq or max(default_length(subject.pattern) for subject in subjects)
    rows = []
    for index, subject in enumerate(subjects):
        description = describe(subject, length)
        rows.append(asdict(description))
        if options.format == "text":
            if index:
                print()
            _print(description)
            print("", *draw_text(subject, length), sep="\n")
    if options.format == "json":
        emit_json(rows)


def _print(shown: Description) -> None:
    from longnet_cli.attention.notation import parse_pattern

    direction = "causal" if shown.causal else "bidirectional"
    print(printable(f"{shown.name}: {direction}, {shown.seq:,} tokens, {shown.heads} heads"))
    print()
    print(
        f"{'level':<5}{'segment':>13}{'rate':>8}{'look-back':>11}{'keys per query':>16}{'FLOPs':>7}{'cache rows':>15}"
    )
    for index, level in enumerate(shown.levels):
        shape = (
            f"{index:<5}{level.segment_length:>13,}{level.dilation_rate:>8,}{level.look_back:>11,}"
        )
        print(shape + _costs(level, f"{level.flops_share:.0%}"))
    if shown.apart.keys_per_query:
        share = shown.apart.flops / max(shown.total.flops, 1)
        name = parse_pattern(shown.pattern).apart
        print(f"{name:<37}" + _costs(shown.apart, f"{share:.0%}"))
    for name, costs in (("total", shown.total), ("dense", shown.dense)):
        print(f"{name:<37}" + _costs(costs, format_count(costs.flops)))


def _costs(costs: PatternCosts | LevelCosts, flops: str) -> str:
    rows = "-" if costs.cache_rows is None else f"{costs.cache_rows:,}"
    keys = f"{costs.keys_per_query:{',.0f' if costs.keys_per_query >= 10 else '.3g'}}"
    return f"{keys:>16}{flops:>7}{rows:>15}"
