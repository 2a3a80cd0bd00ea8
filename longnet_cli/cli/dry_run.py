"""The output of `--dry-run`: the estimate of a job, as a table to read or one JSON value, and the refusal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longnet_cli.basics.errors import MemoryLimitError
from longnet_cli.basics.events import Events, LeftOut
from longnet_cli.basics.sizes import count_of, format_bytes, format_count, format_duration
from longnet_cli.cli.output import emit_json, note_without_rows
from longnet_cli.cli.progress import progress

if TYPE_CHECKING:
    from longnet_cli.cli.starting import Opened
    from longnet_cli.data.documents.input_documents import Inputs
    from longnet_cli.jobs.estimating import Estimate
    from longnet_cli.jobs.row_jobs import RowJob

Row = tuple[str, str, str]  # a name, its value, what it means
BAR = 30  # characters of a full bar


def show_training(estimate: Estimate, format: str) -> None:
    """Print the estimate to stdout. Raises MemoryLimitError if training does not fit."""
    facts = estimate.facts
    tokens = "tokens", format_count(facts["tokens"]), facts["steps"]
    _show(estimate, format, "training", [tokens], "forward and backward")


def show_reading(estimate: Estimate, format: str, job: str, *more: Row) -> None:
    """Print the estimate of a `job` to stdout, with `more` rows. Raises MemoryLimitError if the job does not fit."""
    facts = estimate.facts
    longest = f"the longest has {count_of(facts['longest'], 'token')}"
    if facts["left_out"]:
        longest += f"; left out: {facts['left_out']:,}"
    before = [
        ("documents", f"{facts['documents']:,}", longest),
        ("tokens", format_count(facts["tokens"]), "counted"),
        (
            "read",
            format_count(facts["tokens_read"]),
            "tokens in all forwards, with contexts and padding",
        ),
    ]
    _show(estimate, format, job, before, "of those that are read", more)


def show_job(
    opened: Opened,
    job: RowJob,
    inputs: Inputs,
    format: str,
) -> None:
    """Print the estimate of a job that would read `inputs`."""
    from longnet_cli.jobs.estimating import estimate_reading
    from longnet_cli.jobs.reading_plan import Task, count_documents
    from longnet_cli.running.ranks.ranks import leave

    assert opened.room  # of every dry run
    with progress("counting", total=None) as advance:
        left_out = LeftOut.of(inputs.skip_bad)
        job.reader.events = Events(progress=advance, left_out=left_out)
        counted = count_documents(
            job,
            inputs.documents(),
            done=opened.found.done["documents"],
        )
    task = Task(job.read, job.window_sizes)
    with progress("trying the first chunks", total=None) as advance:
        job.reader.events = Events(progress=advance)
        estimate = estimate_reading(job.reader, counted, task, room=opened.room)
    leave()
    note_without_rows(left_out)
    if opened.ranks.writes:
        show_reading(estimate, format, job.doing)


def _show(
    estimate: Estimate,
    format: str,
    job: str,
    before: Sequence[Row],
    counted: str,
    more: Sequence[Row] = (),
) -> None:
    """Print the rows `before` the memory, then FLOPs and time, and `more`. `counted` says which tokens have FLOPs."""
    facts = estimate.facts
    if format == "json":
        emit_json(facts)
    else:
        parameters = facts["parameters"]
        trained = facts.get("trained", parameters)
        of_lora = f", frozen; LoRA trains {trained:,}" if trained != parameters else ""
        rows = [("parameters", format_count(parameters), f"{parameters:,}{of_lora}"), *before]
        rate = f"at {format_count(facts['flops_per_second'])} FLOP/s (measured)"
        work = [
            ("FLOPs per token", format_count(facts["flops_per_token"]), counted),
            ("FLOPs", format_count(facts["flops"]), ""),
            ("time", format_duration(facts["seconds"]), rate),
            ("speed", format_count(facts["tokens_per_second"]), "tokens/s"),
            *more,
        ]
        if estimate.hint:
            work.append(("advice", "", estimate.hint))
        print(_block(rows), _block(_memory(estimate)), _block(work), sep="\n\n")
    check_fits(estimate, job)


def check_fits(estimate: Estimate, job: str) -> None:
    """Raise MemoryLimitError if a job does not fit into the free memory."""
    if not estimate.fits:
        raise MemoryLimitError(
            f"{job} needs {format_bytes(estimate.beyond)} besides the program, the largest part for "
            f"{estimate.largest}, and {format_bytes(estimate.free)} are free; {estimate.advice}"
        )


def _memory(estimate: Estimate) -> list[Row]:
    facts = estimate.facts
    rows = [
        (kind, format_bytes(size), "#" * round(BAR * size / estimate.peak))
        for kind, size in estimate.memory.items()
    ]
    about = f"a process, {facts['dtype']}, chunks of {facts['chunk']:,} tokens"
    rows.append(("peak memory", format_bytes(estimate.peak), about))
    if facts["spill_bytes"]:
        rows.append(("spill file", format_bytes(facts["spill_bytes"]), "on a disk"))
    if math.isfinite(estimate.free):
        about = "besides the program"
        if not estimate.fits:
            about += f", and {format_bytes(estimate.beyond)} are needed: it does not fit"
        rows.append(("free", format_bytes(estimate.free), about))
    return rows


def _block(rows: Sequence[Row]) -> str:
    return "\n".join(f"{name:<15} {value:>12}  {more}".rstrip() for name, value, more in rows)
