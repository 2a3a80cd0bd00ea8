"""The output of `--dry-run`: the estimate of a job, as a table to read or one JSON value, and the refusal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longnet_cli.basics.errors import ConfigError, MemoryLimitError
from longnet_cli.basics.sizes import count_of, format_bytes, format_count, format_duration
from longnet_cli.cli.options import Format
from longnet_cli.cli.output import emit_json
from longnet_cli.cli.progress import progress

if TYPE_CHECKING:
    from longnet_cli.cli.starting import Opened
    from longnet_cli.data.inputs import Inputs
    from longnet_cli.jobs.estimating.estimate import Estimate
    from longnet_cli.jobs.row_jobs import RowJob
    from longnet_cli.running.reader import Reader

Row = tuple[str, str, str]  # a name, its value, what it means
BAR = 30  # characters of a full bar
YEAR = 365.25 * 86400  # seconds


def show_training(estimate: Estimate, format: Format) -> None:
    """Print the estimate to stdout. Raises MemoryLimitError if training does not fit."""
    facts = estimate.facts
    peak = f"{facts['efficiency']:.0%} (assumed) of {format_count(facts['matmul_peak'])} FLOP/s"
    after = [
        ("FLOPs per token", format_count(facts["flops_per_token"]), "forward and backward"),
        ("tokens", format_count(facts["tokens"]), f"{format_count(facts['flops'])} FLOPs in all"),
        ("time", _duration(facts["seconds"]), f"at {peak} (measured, {facts['dtype']})"),
    ]
    _show(estimate, format, "training", [], after)


def show_reading(estimate: Estimate, format: Format, job: str) -> None:
    """Print the estimate of a `job` to stdout. Raises MemoryLimitError if the job does not fit."""
    facts, (rows, length) = estimate.facts, estimate.measured or (0, 0)
    longest = f"the longest has {count_of(facts['longest'], 'token')}"
    if estimate.too_long:
        longest += f", and the model reads {estimate.too_long:,}"
    if facts["left_out"]:
        longest += f"; left out: {facts['left_out']:,}"
    counted, tokens = "counted", facts["tokens"]
    if facts["sampled"] is not None:
        most = (facts["tokens_interval"] or [0, math.inf])[1]
        counted = f"+- {most / (tokens or 1) - 1:.1%} (95 %), estimated from {facts['sampled']:,} texts"
    before = [
        ("documents", f"{facts['documents']:,}", longest),
        ("tokens", format_count(tokens), counted),
        ("read", format_count(facts["tokens_read"]), "tokens in all forwards, with contexts and padding"),
    ]
    rate = f"at {format_count(facts['flops_per_second'])} FLOP/s (measured, a forward of {rows:,} x {length:,} tokens)"
    after = [
        ("FLOPs per token", format_count(facts["flops_per_token"]), "forward"),
        ("FLOPs", format_count(facts["flops"]), ""),
        ("time", _duration(facts["seconds"]), rate),
        *([("dtype", facts["dtype"], estimate.hint)] if estimate.hint else []),
        ("output", "", facts["output"]),
    ]
    _show(estimate, format, job, before, after)


def dry_run(
    opened: Opened,
    inputs: Inputs,
    make_job: Callable[[Reader], RowJob],
    doing: str,
    options: Any,
    shard_size: int | None,
) -> None:
    """Print the estimate of a job that would read `inputs`, and write as the `options` say, or print."""
    from longnet_cli.jobs.estimating.estimate import estimate_reading
    from longnet_cli.jobs.estimating.reading import count_documents
    from longnet_cli.running.ranks.ranks import leave
    from longnet_cli.running.reader import Reader

    assert opened.room  # of every dry run
    computing, sample = options.computing, options.running.sample
    fate, done, earlier = _fate(options.output, options.running.resume)
    chunk, how = computing.chunk or earlier, {"dtype": computing.dtype, "spill": computing.spill}
    job = make_job(Reader(opened.loaded.net, chunk=chunk, ranks=opened.ranks, **how))
    with progress("counting", total=None, quiet=opened.quiet) as advance:
        plan = count_documents(
            job,
            inputs.untokenized() if sample else inputs.documents(),
            tokenizer=inputs.tokenizer,
            sample=sample,
            done=done,
            skip_bad=inputs.skip_bad,
            on_progress=advance,
        )
        estimate = estimate_reading(
            job.reader,
            plan,
            room=opened.room,
            scores=job.scores,
            kept=job.kept_bytes(plan.longest_document),
            output=fate,
            ranks=opened.ranks,
        )
    leave()
    if opened.ranks.writes:
        shard = min(shard_size or job.shard_size, plan.shard_units)
        lost = f"{shard:,} {job.shard_unit}, {_duration(estimate.costs['seconds'] * shard / (plan.shard_units or 1))}"
        if "folder" in fate or done:
            estimate.costs["output"] += f"; a kill loses at most a shard and a document: {lost}"
        show_reading(estimate, "json" if options.format == "json" else "text", doing)


def _fate(output: str | None, resume: bool) -> tuple[str, int, int | None]:
    """Return what would happen to an output, in words, the documents that an earlier run has done, and its chunk."""
    from longnet_cli.data.outputs import is_folder
    from longnet_cli.data.shards import run_to_resume

    if output is None:
        return "printed", 0, None
    if output == "-":
        return "an Arrow stream on stdout", 0, None
    if not is_folder(output):
        return f"{output}, which {'is replaced' if Path(output).exists() else 'is new'}", 0, None
    try:
        earlier = run_to_resume(output, resume=resume)
    except ConfigError as error:
        return f"refused: {error}", 0, None
    if earlier is None:
        return f"{output}, a new folder of shards", 0, None
    done = earlier.totals["documents"]
    return f"{output}, after document {done:,} of an earlier run", done, earlier.settings.get("chunk")


def _show(estimate: Estimate, format: Format, job: str, before: Sequence[Row], after: Sequence[Row]) -> None:
    if format == "json":
        emit_json(estimate.facts)
    else:
        parameters = estimate.facts["parameters"]
        rows = [("parameters", format_count(parameters), f"{parameters:,}"), *before]
        print(_block(rows), _block(_memory(estimate)), _block(after), sep="\n\n")
    check_fits(estimate, job)


def check_fits(estimate: Estimate, job: str) -> None:
    """Raise MemoryLimitError if a job does not fit into the free memory."""
    if estimate.free is not None and not estimate.fits:
        from longnet_cli.jobs.estimating.estimate import largest

        raise MemoryLimitError(
            f"{job} needs {format_bytes(estimate.beyond)}, the largest part for {largest(estimate.memory)}, and "
            f"{format_bytes(estimate.free)} are free; {estimate.advice}"
        )


def _memory(estimate: Estimate) -> list[Row]:
    facts = estimate.facts
    rows = [
        (kind, format_bytes(size), "#" * round(BAR * size / estimate.peak)) for kind, size in estimate.memory.items()
    ]
    about = f"a process, {facts['dtype']}, chunks of {facts['chunk']:,} tokens"
    rows.append(("peak memory", format_bytes(estimate.peak), about))
    if facts["spill_bytes"]:
        rows.append(("spill file", format_bytes(facts["spill_bytes"]), "on a disk"))
    if estimate.free is not None:
        fits = "besides the program" if estimate.fits else "it does not fit"
        rows.append(("free", format_bytes(estimate.free), fits))
    return rows


def _block(rows: Sequence[Row]) -> str:
    return "\n".join(f"{name:<15} {value:>12}  {more}".rstrip() for name, value, more in rows)


def _duration(seconds: float) -> str:
    years = seconds / YEAR
    return f"{years:,.0f} years" if years >= 2 else format_duration(seconds)
