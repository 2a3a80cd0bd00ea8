"""`longnet bench`: the speed of dilated attention on this machine, beside dense attention and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from longnet_cli.basics.events import Events
from longnet_cli.basics.sizes import format_bytes, format_count, format_duration

from . import options as shared
from .options import COMPUTE, OUTPUT, PATTERN, HelpPanel, read_pattern
from .output import emit_jsonl, tell
from .progress import progress

if TYPE_CHECKING:
    from longnet_cli.jobs.benchmark import Measurement

# Markdown is for people: only as many columns as fit 80 characters. Values that all rows share go to stderr.
_MARKDOWN = "impl direction seq {} seconds tokens_per_second flops_per_second peak_rss_bytes"
_TITLES = {
    "tokens_per_second": "tokens/s",
    "flops_per_second": "FLOP/s",
    "peak_rss_bytes": "peak RSS",
}
_HUMAN: dict[str, Callable[[Any], str]] = {
    "stop": format_count,
    "seconds": format_duration,
    "tokens_per_second": format_count,
    "flops_per_second": format_count,
    "peak_rss_bytes": format_bytes,
}

MEASURE = HelpPanel("What to measure")
SHAPE = HelpPanel("Shape")


@dataclass(frozen=True)
class BenchCommand:
    """The options of `bench`."""

    seq: Sequence[int] | None = MEASURE.common(
        "--seq SIZE,...",
        "Measure sequences of these lengths. (default: 4Ki,8Ki,16Ki,32Ki)",
    )
    impl: Sequence[str] | None = MEASURE.common(
        "--impl NAME,...",
        "Measure dilated or dense alone. (default: both)",
    )
    direction: Sequence[str] | None = MEASURE.common(
        "--direction NAME,...",
        "Time the pass forward or backward, or both, each alone. (default: forward)",
    )
    repeats: int = MEASURE.option(
        "--repeats N",
        "Repeat each row N times; the median counts.",
        default=3,
    )
    max_time: float | None = MEASURE.common(
        "--max-time SECONDS",
        "Stop after this many seconds. (default: 60, or no limit with --seq)",
    )
    max_dense_time: float = MEASURE.option(
        "--max-dense-time SECONDS",
        "Skip dense runs that would take more seconds than this.",
        default=60.0,
    )
    heads: int | None = SHAPE.common(
        "--heads N", "Use N heads. (default: 12; on a CPU, 2 from 1e6 tokens)"
    )
    head_dim: int | None = SHAPE.common(
        "--head-dim N", "Set the size of each head. (default: 64; on a CPU, 32 from 1e6 tokens)"
    )
    batch: int = SHAPE.option("--batch N", "Run N sequences at a time.", default=1)
    causal: bool = SHAPE.option(
        "--causal/--bidirectional",
        "Look back only, or both ways. (default: causal)",
        default=True,
    )
    pattern: str | None = PATTERN.common(
        "--pattern PATTERN",
        "Measure dilated attention of this pattern: window:1Ki,sinks=4 or 1Ki/1,4Ki/4. (default: paper; from 1e6 "
        "tokens geometric, base=256, on a GPU base=2Ki)",
    )
    format: Literal["md", "jsonl"] = OUTPUT.common(
        "--format md|jsonl",
        "Print rows in this format.",
        default="md",
    )
    device: str = shared.device_option()
    dtype: str = shared.dtype_option()
    chunk: int | None = COMPUTE.size(
        "--chunk SIZE",
        "Compute this many tokens at a time. (default: all; from 1e6 causal tokens 64Ki, 1Mi on a GPU)",
        common=True,
    )
    quiet: bool = shared.quiet_flag()


def bench(options: BenchCommand) -> None:
    """Measure how fast dilated attention is beside dense attention, up to a billion tokens.

    Example: longnet bench --seq 2Ki,8Ki --repeats 1

    Each length is a row; --seq 1e9 is a billion tokens.
    Attention is measured alone, with random queries, keys and values. How fast a
    model is, `score` and `train` tell.

    Rows that would need too much memory or time are skipped and say so.
    Ctrl-C keeps the rows so far.
    """
    from longnet_cli.attention.notation import format_pattern
    from longnet_cli.jobs.benchmark import Settings, machine
    from longnet_cli.jobs.benchmark import bench as measure

    asked = vars(options) | {
        "pattern": read_pattern(options.pattern),
        "seq": options.seq or (4096, 8192, 16384, 32768),
    }
    del asked["quiet"], asked["format"]
    if options.seq is None and options.max_time is None:
        asked["max_time"] = 60
    settings = Settings.of(**asked)
    shape = f"{settings.batch} x {settings.heads} heads x {settings.head_dim}"
    pattern = format_pattern(settings.pattern_for(max(settings.seq)))
    directions = " and ".join(settings.direction)
    tell(f"{machine(settings)}, attention, {directions}, {shape}, pattern {pattern}")
    columns = _MARKDOWN.format("stop" if any(map(settings.streams, settings.seq)) else "").split()
    is_table = options.format == "md"
    write = _MarkdownTable(columns, max(settings.seq)).write if is_table else emit_jsonl
    rows: list[Measurement] = []
    totals = [0]  # of tokens; the last one is what is known now
    with progress("bench", total=lambda: totals[-1]) as advance:
        events = Events(progress=advance, total=totals.append)
        for row in measure(settings, events=events):
            rows.append(row)
            write(vars(row))
            if row.reason:
                tell(f"{_title(row)}: {row.status}, {row.reason}")
            advance(0, last=_title(row))
    if is_table:
        _tell_ratios(rows)


class _MarkdownTable:
    """A table on stdout, each row of which is written at once. It is not cut in a pipe, as rich's tables are.

    Each number has 8 characters, and `seq` as many as the longest sequence needs.
    """

    def __init__(self, columns: Sequence[str], longest: int) -> None:
        numbers = len(columns) - 2  # after the implementation and the direction
        self.columns = columns
        self.formats = ["<8", "<9", f">{max(8, len(str(longest)))}", *[">8"] * (numbers - 1)]
        self._print([_TITLES.get(column, column) for column in columns])
        self._print(["-" * 8, "-" * 9, *["-" * 7 + ":"] * numbers])

    def write(self, row: Mapping[str, Any]) -> None:
        self._print([_cell(row, column) for column in self.columns])

    def _print(self, cells: Sequence[str]) -> None:
        print(f"| {' | '.join(map(format, cells, self.formats))} |", flush=True)


def _cell(row: Mapping[str, Any], column: str) -> str:
    """Return a value with its unit; in the place of the seconds of a row that has none, its status."""
    value = row[column]
    if value is None:
        return row["status"] if column == "seconds" else ""
    return _HUMAN.get(column, str)(value)


def _title(row: Measurement) -> str:
    title = f"{row.impl} {row.direction} at {row.seq}"
    if row.stop:
        title += f", tokens {format_count(row.start or 0)} to {format_count(row.stop)}"
    return title


def _tell_ratios(rows: Sequence[Measurement]) -> None:
    """Tell the ratio of speeds for each measured pair: `dilated is 6.5x dense at 32768, forward`."""
    ours = {
        (row.seq, row.direction): row.seconds
        for row in rows
        if row.impl == "dilated" and row.stop is None
    }
    for row in rows:
        seconds = ours.get((row.seq, row.direction))
        if row.impl != "dilated" and row.seconds and seconds:
            ratio = f"{row.seconds / seconds:.3g}x {row.impl}"
            tell(f"dilated is {ratio} at {row.seq}, {row.direction}")
