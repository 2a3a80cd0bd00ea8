"""The output of `--dry-run`: the estimate of a job, as a table to read or one JSON value, and the refusal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from longnet_cli.basics.errors import ConfigError, MemoryLimitError
from longnet_cli.basics.sizes import format_bytes, format_count, format_duration
from longnet_cli.cli.options import Computing, Running
from longnet_cli.cli.output import emit_json
from longnet_cli.cli.progress import progress

if TYPE_CHECKING:
    import torch

    from longnet_cli.cli.model_and_inputs import Opened
    from longnet_cli.jobs.estimating.estimate import Estimate
    from longnet_cli.jobs.estimating.reading_job import Job, ReadingEstimate, Room
    from longnet_cli.jobs.estimating.training_job import TrainingEstimate
    from longnet_cli.models.folder import ModelFolder

Format = Literal["text", "json"]
Row = tuple[str, str, str]  # a name, its value, what it means
BAR = 30  # characters of a full bar
YEAR = 365.25 * 86400  # seconds


def show_training(found: TrainingEstimate, format: Format) -> None:
    """Print the estimate to stdout. Raises MemoryLimitError if training does not fit."""
    from longnet_cli.jobs.estimating.training_job import EFFICIENCY

    peak = f"{EFFICIENCY:.0%} (assumed) of {format_count(found.matmul_peak)} FLOP/s (measured, {found.dtype})"
    after = [
        ("FLOPs per token", format_count(found.flops_per_token), "forward and backward"),
        ("tokens", format_count(found.tokens), f"{format_count(found.flops)} FLOPs in all"),
        ("time", _duration(found.seconds), f"at {peak}"),
    ]
    _show(found, format, "training", [], after)


def show_reading(found: ReadingEstimate, format: Format, job: str) -> None:
    """Print the estimate of a `job` to stdout. Raises MemoryLimitError if the job does not fit."""
    longest = f"the longest has {found.longest:,} tokens"
    if found.too_long:
        longest += f", and the model reads {found.too_long:,}"
    if found.left_out:
        longest += f"; left out: {found.left_out:,}"
    counted = "counted"
    if found.sampled is not None:
        share = found.tokens_error / (found.tokens or 1)
        counted = f"+- {share:.1%} (95 %), estimated from {found.sampled:,} texts"
    before = [
        ("documents", f"{found.documents:,}", longest),
        ("tokens", format_count(found.tokens), counted),
        ("read", format_count(found.tokens_read), "tokens in all forwards, with contexts and padding"),
    ]
    measured = f"{found.measured.rows:,} x {found.measured.tokens:,}"
    rate = f"at {format_count(found.rate)} FLOP/s (measured, a forward of {measured} tokens)"
    after = [
        ("FLOPs per token", format_count(found.flops_per_token), "forward"),
        ("FLOPs", format_count(found.flops), ""),
        ("time", _duration(found.seconds), rate),
        ("output", "", found.output),
    ]
    _show(found, format, job, before, after)


def _bar(size: float, whole: float) -> str:
    return "#" * round(BAR * size / whole)


def check_sample(sample: int | None) -> None:
    """Raise ConfigError for fewer texts than an interval needs."""
    if sample is not None and sample < 2:
        raise ConfigError("--sample needs 2 texts or more: one says nothing of how they differ")


def room(folder: ModelFolder, dtype: str, device: torch.device) -> Room:
    """Return the memory before the model is loaded. Raises MemoryLimitError if its weights do not fit."""
    from longnet_cli.jobs.estimating.reading_job import Room

    found = Room.now(device)
    folder.check_weights_fit(dtype, device, found.free)
    return found


def estimate_reading(
    opened: Opened,
    job: Job,
    doing: str,
    output: str | None,
    format: Format,
    running: Running,
    computing: Computing,
) -> None:
    """Print the estimate of a job that would write to `output`, or print."""
    from longnet_cli.jobs.estimating.reading_job import estimate_documents
    from longnet_cli.running.ranks.ranks import leave

    assert opened.room  # of every dry run
    fate, done, chunk = _fate(output, running.resume)
    inputs = opened.inputs
    with progress("counting", total=None, quiet=opened.quiet) as advance:
        estimate = estimate_documents(
            opened.loaded.net,
            job,
            inputs.untokenized() if running.sample else inputs.documents(),
            output=fate,
            on_progress=advance,
            chunk=computing.chunk or chunk,
            dtype=computing.dtype,
            spill=computing.spill,
            room=opened.room,
            ranks=opened.ranks,
            sample=running.sample,
            done=done,
            tokenizer=inputs.tokenizer,
            skip_bad=inputs.skip_bad,
        )
    leave()
    if opened.ranks.first:
        show_reading(estimate, format, doing)


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


def _show(found: Estimate, format: Format, job: str, before: Sequence[Row], after: Sequence[Row]) -> None:
    if format == "json":
        emit_json(found.as_dict())
    else:
        rows = [("parameters", format_count(found.parameters), f"{found.parameters:,}"), *before]
        _print([rows, _memory(found), after])
    if found.free is not None and not found.fits:
        raise MemoryLimitError(
            f"{job} needs {format_bytes(found.beyond)}, the largest part for {found.largest}, and "
            f"{format_bytes(found.free)} are free; {found.advice}"
        )


def _memory(found: Estimate) -> list[Row]:
    rows = [(kind, format_bytes(size), _bar(size, found.peak)) for kind, size in found.memory.items()]
    rows.append(
        ("peak memory", format_bytes(found.peak), f"a process, {found.dtype}, chunks of {found.chunk:,} tokens")
    )
    if found.spilled:
        rows.append(("spill file", format_bytes(found.spilled), "on a disk"))
    if found.free is not None:
        rows.append(("free", format_bytes(found.free), "besides the program" if found.fits else "it does not fit"))
    return rows


def _print(blocks: Sequence[Sequence[Row]]) -> None:
    lines = (
        f"{name:<15} {value:>12}  {more}".rstrip() for block in blocks if block for name, value, more in [*block, EMPTY]
    )
    print("\n".join(lines).rstrip())


EMPTY: Row = ("", "", "")


def _duration(seconds: float) -> str:
    years = seconds / YEAR
    return f"{years:,.0f} years" if years >= 2 else format_duration(seconds)
