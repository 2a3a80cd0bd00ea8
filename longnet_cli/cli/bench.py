"""`longnet bench`: how fast dilated attention is on this machine, against dense attention."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longnet_cli.cli.launch import launch
from longnet_cli.cli.options import (
    DeviceOption,
    DtypeOption,
    NprocOption,
    QuietOption,
    read_pattern,
    size_option,
    sizes_option,
)
from longnet_cli.cli.output import RowFormat, RowWriter, format_bytes, format_count, format_duration
from longnet_cli.cli.progress import progress

if TYPE_CHECKING:
    from longnet_cli.attention import Pattern
    from longnet_cli.benchmark import Case, Measurement, Settings

DEFAULT_SEQ = (4096, 8192, 16384, 32768)
DEFAULT_MAX_TIME = 60.0

# Markdown is for people: no more columns than a terminal has room for. What all rows share stands on stderr.
_MARKDOWN_COLUMNS = [
    *("op", "impl", "direction", "seq", "status"),
    *("seconds", "tokens_per_second", "flops_per_second", "peak_rss_bytes"),
]
_HUMAN = {
    "stop": format_count,
    "seconds": format_duration,
    "tokens_per_second": format_count,
    "flops_per_second": format_count,
    "peak_rss_bytes": format_bytes,
    "bytes": format_bytes,
}
_LONG_SECONDS, _LONG_BYTES = 10.0, 2**30  # rows beyond these are announced


def _names(value: str | Sequence[str]) -> list[str]:
    """`dilated,dense` -> ["dilated", "dense"]; which names there are is the job's to know."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)


def bench(
    seq: Annotated[
        Sequence[int] | None,
        sizes_option("--seq", help="Sequence lengths in tokens.", show_default="4Ki,8Ki,16Ki,32Ki"),
    ] = None,
    op: Annotated[
        str,
        typer.Option(
            "--op",
            metavar="attention|model|train|loop|exchange",
            help="The operator alone; a language model's forward; its loss and gradients; steps of training it; what "
            "--nproc ranks exchange.",
        ),
    ] = "attention",
    impl: Annotated[
        Sequence[str] | None,
        typer.Option(
            "--impl",
            parser=_names,
            metavar="dilated,dense,kernels",
            help="Ours; torch's dense attention; ours without its merge. Of --op loop: train, bare (steps by hand).",
            show_default="dilated,dense; train,bare",
        ),
    ] = None,
    direction: Annotated[
        Sequence[str] | None,
        typer.Option(
            "--direction",
            parser=_names,
            metavar="forward,backward",
            help="backward is timed alone, without its forward.",
            show_default="forward; of --op train and loop, backward",
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--pattern",
            metavar="paper|geometric",
            help="Levels: the paper's, or geometric: --base, times --ratio until one covers the sequence.",
            show_default="paper, geometric from 1e6 tokens on",
        ),
    ] = None,
    base: Annotated[
        int | None,
        size_option(
            "--base",
            help="First segment length of a geometric pattern.",
            show_default="2048; on a CPU, 256 from 1e6 tokens on",
        ),
    ] = None,
    ratio: Annotated[
        int | None,
        typer.Option("--ratio", min=2, metavar="N", help="Growth of a geometric pattern.", show_default="2"),
    ] = None,
    segment_lengths: Annotated[
        Sequence[int] | None, sizes_option("--segment-lengths", help="Levels of your own, with --dilation-rates.")
    ] = None,
    dilation_rates: Annotated[
        Sequence[int] | None, sizes_option("--dilation-rates", help="One for each segment length.")
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option("--heads", min=1, help="Attention heads.", show_default="12; on a CPU, 2 from 1e6 tokens on"),
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option("--head-dim", min=1, help="Size of a head.", show_default="64; on a CPU, 32 from 1e6 tokens on"),
    ] = None,
    chunk: Annotated[
        int | None,
        size_option(
            "--chunk",
            help="Go through longer causal sequences so many tokens at a time.",
            show_default="64Ki, from 1e6 tokens on",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="NAME|DIR", help="For --op model, train and loop.", show_default="random weights"
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Of a model with random weights.", show_default="2")
    ] = None,
    vocab: Annotated[
        int | None, size_option("--vocab", help="Of a model with random weights.", show_default="256")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at a time.")] = 1,
    causal: Annotated[bool, typer.Option("--causal/--bidirectional", help="Who sees whom.")] = True,
    nproc: NprocOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Runs of a row after its warm-up.")] = 3,
    max_time: Annotated[
        float | None,
        typer.Option(
            "--max-time",
            min=0,
            metavar="SECONDS",
            help="For all rows; those not reached are reported as stopped.",
            show_default="60 without --seq, else no limit",
        ),
    ] = None,
    max_dense_time: Annotated[
        float,
        typer.Option(
            "--max-dense-time", min=0, metavar="SECONDS", help="Skip dense runs that are expected to take longer."
        ),
    ] = 60.0,
    format: Annotated[RowFormat, typer.Option("--format", help="Rows on stdout.")] = "md",
    quiet: QuietOption = False,
) -> None:
    """Measure dilated attention against dense attention, row by row, up to a billion tokens: --seq 1e9.

    Rows that would not fit free memory or the time are skipped and say so. Ctrl-C keeps the rows so far.
    """
    launch(nproc)
    from longnet_cli.benchmark import Measurement, Settings, Stream, directions_of, impls_of, machine
    from longnet_cli.benchmark import bench as run
    from longnet_cli.runtime.ranks import join, leave

    ranks, where = join(device)
    device, quiet = str(where), quiet or not ranks.first

    def say(line: str) -> None:
        if not quiet and sys.stderr:  # else print would take stdout
            print(line, file=sys.stderr, flush=True)

    def announce(case: Case, seconds: float | None) -> None:
        in_all = (seconds or 0.0) * (1 if isinstance(case, Stream) else 1 + repeats)
        if in_all >= _LONG_SECONDS or case.memory_bytes >= _LONG_BYTES:
            about = f"about {format_duration(in_all)} and " if seconds else "about "
            say(f"{_title(case.row)}: {about}{format_bytes(case.memory_bytes)} of memory")

    seqs, impls = seq or DEFAULT_SEQ, impl if impl is not None else impls_of(op)[:2]
    directions = direction if direction is not None else directions_of(op)[:1]
    shape: dict[str, Any] = {
        "heads": heads,
        "head_dim": head_dim,
        "batch": batch,
        "causal": causal,
        "pattern": _pattern(pattern, segment_lengths, dilation_rates),
        "base": base,
        "ratio": ratio,
        "dtype": dtype,
        "device": device,
        "chunk": chunk,
        "layers": layers,
        "vocab": vocab,
        "model": model,
        "ranks": ranks,
    }
    measurements = run(
        seqs,
        op=op,
        impls=impls,
        directions=directions,
        repeats=repeats,
        max_time=DEFAULT_MAX_TIME if max_time is None and seq is None else max_time,
        max_dense_time=max_dense_time,
        on_start=announce,
        on_tokens=lambda tokens: advance(tokens),  # `advance` exists when the first row is measured
        **shape,
    )
    if not ranks.first:
        for _ in measurements:
            pass
        leave()
        return
    settings = Settings.resolve(seqs, **shape)
    if not quiet:
        say(", ".join([*machine(device, dtype, settings.head_dim).values(), _shape(op, settings)]))
    streamed = (
        sum(n for n in seqs if settings.streams(n))
        if op in ("attention", "model") and "dilated" in impls and "forward" in directions
        else 0
    )
    total, unit = (streamed, "tok") if streamed else (len(seqs) * len(impls) * len(directions), "rows")
    columns = [field.name for field in dataclasses.fields(Measurement)]
    if format == "md":
        more = ["stop"] if streamed else ["bytes"] if op == "exchange" else []
        columns = _MARKDOWN_COLUMNS[:4] + more + _MARKDOWN_COLUMNS[4:]
    rows: list[Measurement] = []
    with (
        progress("bench", total=total, unit=unit, quiet=quiet) as advance,
        RowWriter(format, columns, human=_HUMAN) as out,
    ):
        for row in measurements:
            values = dataclasses.asdict(row)
            out.write({column: values[column] for column in columns})
            if row.reason:
                say(f"{_title(row)}: {row.status}, {row.reason}")
            rows.append(row)
            advance(0 if streamed else 1, last=_title(row))
    leave()
    if format == "md":
        for line in _ratios(rows):
            say(line)


def _title(row: Measurement) -> str:
    part = f", tokens {format_count(row.start or 0)} to {format_count(row.stop)}" if row.stop else ""
    return f"{row.impl} {row.direction} at {row.seq}{part}"


def _shape(op: str, settings: Settings) -> str:
    """What all rows have in common: `1 x 12 heads x 64, causal, pattern paper`."""
    if op != "attention" and settings.model:
        return f"{settings.batch} x {settings.model}"
    pattern = settings.pattern if isinstance(settings.pattern, str) else "given"
    parts = [
        f"{settings.batch} x {settings.heads} heads x {settings.head_dim}",
        "causal" if settings.causal else "bidirectional",
        f"pattern {pattern}" + (f", base {settings.base}, ratio {settings.ratio}" if pattern == "geometric" else ""),
    ]
    return ", ".join(
        [*parts, f"{settings.layers} layers, vocabulary {settings.vocab}"]
        if op in ("model", "train", "loop")
        else parts
    )


def _ratios(rows: Sequence[Measurement]) -> list[str]:
    """`dilated is 6.5x dense at 32768, forward`, `train is 0.98x bare`: of speed, for each pair that was measured."""
    whole = [row for row in rows if row.stop is None and row.seconds]
    seconds = {(row.impl, row.seq, row.direction): row.seconds for row in whole}
    return [
        f"{impl} is {slow / mine:.3g}x {other} at {seq}, {direction}"
        for (impl, seq, direction), mine in seconds.items()
        if (other := {"dilated": "dense", "train": "bare"}.get(impl))
        and mine
        and (slow := seconds.get((other, seq, direction)))
    ]


def _pattern(
    name: str | None, segment_lengths: Sequence[int] | None, dilation_rates: Sequence[int] | None
) -> Pattern | str | None:
    levels = read_pattern(segment_lengths, dilation_rates)
    if levels and name is not None:
        raise typer.BadParameter("--pattern names levels, --segment-lengths and --dilation-rates list them: give one")
    return levels or name
