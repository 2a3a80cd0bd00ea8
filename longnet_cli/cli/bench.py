"""`longnet bench`: the speed of dilated attention on this machine, compared with dense attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Annotated

from longnet_cli.basics.sizes import format_bytes, format_count, format_duration
from longnet_cli.cli import options as shared
from longnet_cli.cli.options import (
    COMPUTE,
    OUTPUT,
    PATTERN,
    names_option,
    option,
    read_pattern,
    size_option,
    sizes_option,
)
from longnet_cli.cli.output import RowFormat, RowWriter, tell
from longnet_cli.cli.progress import progress
from longnet_cli.cli.starting import launch

if TYPE_CHECKING:
    from longnet_cli.jobs.benchmark import Case, Measurement

# Markdown is for people: only as many columns as fit a terminal. Values that all rows share go to stderr.
_MARKDOWN = "op impl direction seq {} status seconds tokens_per_second flops_per_second peak_rss_bytes"
_HUMAN = {
    "stop": format_count,
    "seconds": format_duration,
    "tokens_per_second": format_count,
    "flops_per_second": format_count,
    "peak_rss_bytes": format_bytes,
    "bytes": format_bytes,
}
_LONG_SECONDS, _LONG_BYTES = 10.0, 2**30  # rows beyond these are announced


MEASURE, SHAPE, MODEL = "What to measure", "Shape", "Model (--op model, train)"


def bench(
    seq: Annotated[
        Sequence[int] | None, sizes_option(MEASURE, "--seq", "Measure sequences of these lengths.", "4Ki,8Ki,16Ki,32Ki")
    ] = None,
    op: Annotated[str, option(MEASURE, "--op", "OP", "Measure attention, model, train or exchange.")] = ("attention"),
    impl: Annotated[
        Sequence[str] | None,
        names_option(
            MEASURE,
            "--impl",
            "Run dilated, dense or kernels (dilated without its merge).",
            "dilated,dense",
        ),
    ] = None,
    direction: Annotated[
        Sequence[str] | None,
        names_option(
            MEASURE,
            "--direction",
            "Time the forward, or the backward alone.",
            "forward; of train, backward",
        ),
    ] = None,
    repeats: Annotated[int, option(MEASURE, "--repeats", "N", "Repeat each row N times.")] = 3,
    max_time: Annotated[
        float | None,
        option(MEASURE, "--max-time", "SECONDS", "Stop after this many seconds.", "60 without --seq"),
    ] = None,
    max_dense_time: Annotated[
        float, option(MEASURE, "--max-dense-time", "SECONDS", "Skip dense runs that would take more seconds than this.")
    ] = 60.0,
    heads: Annotated[int | None, option(SHAPE, "--heads", "N", "Use N heads.", "12, or 2 *")] = None,
    head_dim: Annotated[
        int | None, option(SHAPE, "--head-dim", "N", "Set the size of each head.", "64, or 32 *")
    ] = None,
    batch: Annotated[int, option(SHAPE, "--batch", "N", "Run N sequences at a time.")] = 1,
    causal: Annotated[
        bool, option(SHAPE, "--causal/--bidirectional", None, "Look back only, or both ways.", "causal")
    ] = True,
    pattern: Annotated[
        str | None,
        option(
            PATTERN,
            "--pattern",
            "PATTERN",
            "Use a pattern, as window:1Ki,sinks=4 or 1Ki/1,4Ki/4, or geometric: --base times powers of --ratio.",
            "paper; geometric from 1e6 tokens",
        ),
    ] = None,
    base: Annotated[
        int | None, size_option(PATTERN, "--base", "Set the first segment length.", "2048, or 256 *")
    ] = None,
    ratio: Annotated[int | None, option(PATTERN, "--ratio", "N", "Set the growth per level.", "2")] = None,
    model: Annotated[
        str | None, option(MODEL, "--model -m", "NAME|DIR", "Measure a saved model.", "random weights")
    ] = None,
    layers: Annotated[int | None, option(MODEL, "--layers", "N", "Use N layers, with random weights.", "2")] = None,
    vocab: Annotated[
        int | None, size_option(MODEL, "--vocab", "Use a vocabulary of this size, with random weights.", "256")
    ] = None,
    format: Annotated[RowFormat, option(OUTPUT, "--format", "md|json|jsonl|csv", "Print rows in this format.")] = "md",
    nproc: Annotated[
        int | None,
        size_option(COMPUTE, "--nproc", "Start N processes (ranks) on this machine.", "this process", metavar="N"),
    ] = None,
    device: shared.DeviceOption = "auto",
    dtype: shared.DtypeOption = "auto",
    chunk: Annotated[
        int | None,
        size_option(
            COMPUTE, "--chunk", "Compute this many tokens at a time.", "all; from 1e6 causal tokens 64Ki, 1Mi on a GPU"
        ),
    ] = None,
    quiet: shared.QuietOption = False,
) -> None:
    """Measure dilated attention against dense attention, row by row, up to a billion tokens: --seq 1e9.

    --op attention runs the operator alone; model, a model's forward pass; train,
    its loss and gradients; exchange, the traffic between --nproc ranks.

    Rows that would need too much memory or time are skipped and say so.
    Ctrl-C keeps the rows so far.

    * on a CPU, if a sequence has 1e6 tokens or more.
    """
    launch(nproc)
    from longnet_cli.jobs.benchmark import Measurement, Settings, machine
    from longnet_cli.jobs.benchmark import bench as measure
    from longnet_cli.running.ranks.ranks import join, leave

    # a bare geometric adapts to each length
    parsed = pattern if pattern in ("paper", "geometric") else read_pattern(pattern)
    ranks, where = join(device)
    quiet = quiet or not ranks.first
    settings = Settings.of(
        seq=seq or (4096, 8192, 16384, 32768), op=op, impl=impl, direction=direction, heads=heads, head_dim=head_dim,
        batch=batch, causal=causal, chunk=chunk, pattern=parsed, base=base, ratio=ratio, model=model, layers=layers,
        vocab=vocab, repeats=repeats, max_time=60 if max_time is None and seq is None else max_time,
        max_dense_time=max_dense_time, device=str(where), dtype=dtype, ranks=ranks,
    )  # fmt: skip

    print_note = partial(tell, quiet=quiet)

    def announce(case: Case, seconds: float | None) -> None:
        in_all = (seconds or 0.0) * (1 if case.streamed else 1 + repeats)
        if in_all >= _LONG_SECONDS or case.memory_bytes >= _LONG_BYTES:
            about = f"about {format_duration(in_all)} and " if seconds else "about "
            print_note(f"{_title(case.row)}: {about}{format_bytes(case.memory_bytes)} of memory")

    print_note(f"{machine(settings)}, {settings}")
    streamed = settings.streamed_tokens
    cases = len(settings.seq) * len(settings.direction) * len(settings.impl)
    columns = [field.name for field in dataclasses.fields(Measurement)]
    if format == "md":
        columns = _MARKDOWN.format("stop" if streamed else "bytes" if op == "exchange" else "").split()
    rows: list[Measurement] = []
    with ExitStack() as stack:
        total, unit = (streamed, "tok") if streamed else (cases, "rows")
        advance = stack.enter_context(progress("bench", total=total, unit=unit, quiet=quiet))
        out = stack.enter_context(RowWriter(format, columns, human=_HUMAN)) if ranks.first else None
        for row in measure(settings, on_start=announce, on_tokens=advance):
            rows.append(row)
            if out:
                out.write({column: getattr(row, column) for column in columns})
            if row.reason:
                print_note(f"{_title(row)}: {row.status}, {row.reason}")
            advance(0 if streamed else 1, last=_title(row))
    leave()
    if format == "md":
        _print_ratios(rows, print_note)


def _title(row: Measurement) -> str:
    part = f", tokens {format_count(row.start or 0)} to {format_count(row.stop)}" if row.stop else ""
    return f"{row.impl} {row.direction} at {row.seq}{part}"


def _print_ratios(rows: Sequence[Measurement], on_note: Callable[[str], None]) -> None:
    """Print the ratio of speeds for each measured pair: `dilated is 6.5x dense at 32768, forward`."""
    seconds = {(row.impl, row.seq, row.direction): row.seconds for row in rows if row.stop is None and row.seconds}
    for (impl, seq, direction), dilated in seconds.items():
        dense = seconds.get(("dense", seq, direction))
        if impl == "dilated" and dense:
            on_note(f"dilated is {dense / dilated:.3g}x dense at {seq}, {direction}")
