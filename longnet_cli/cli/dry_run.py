"""The output of `--dry-run`: the estimate of a job, as a table to read or one JSON value, and the refusal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from longnet_cli.basics.errors import ConfigError, MemoryLimitError
from longnet_cli.basics.sizes import count_of, format_bytes, format_count, format_duration
from longnet_cli.cli.options import Format
from longnet_cli.cli.output import emit_json
from longnet_cli.cli.progress import progress
from longnet_cli.jobs.options import UNITS

if TYPE_CHECKING:
    from longnet_cli.cli.starting import Opened
    from longnet_cli.data.inputs import Inputs
    from longnet_cli.jobs.estimating.estimate import Estimate
    from longnet_cli.jobs.row_jobs import Output, RowJob

Row = tuple[str, str, str]  # a name, its value, what it means
BAR = 30  # characters of a full bar
YEAR = 365.25 * 86400  # seconds


def show_training(estimate: Estimate, format: Format) -> None:
    """Print the estimate to stdout. Raises MemoryLimitError if training does not fit."""
    facts = estimate.facts
    peak = f"{facts['efficiency']:.0%} (assumed) of {format_count(facts['matmul_peak'])} FLOP/s"
    after = [
        ("FLOPs per token", format_count(facts["flops_per_token"]), "forward and backward"),
        ("tokens", format_count(facts["tokens"]), facts["steps"]),
        ("FLOPs", format_count(facts["flops"]), ""),
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
    counted = "counted" if facts["sampled"] is None else f"estimated from {facts['sampled']:,} texts"
    before = [
        ("documents", f"{facts['documents']:,}", longest),
        ("tokens", format_count(facts["tokens"]), counted),
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


def plan(
    opened: Opened, job: RowJob, inputs: Inputs, output: Output, sample: int | None, format: Literal["text", "json"]
) -> None:
    """Print the estimate of a job that would read `inputs` and write to `output`, of a `sample` of texts if given."""
    from longnet_cli.jobs.estimating.estimate import count_documents, estimate_reading
    from longnet_cli.running.ranks.ranks import leave

    assert opened.room  # of every dry run
    done = opened.earlier.totals["documents"] if opened.earlier else 0
    fate = _fate(output, done, opened.refusal)
    with progress("counting", total=None, quiet=opened.quiet) as advance:
        counted = count_documents(
            job,
            inputs.untokenized() if sample else inputs.documents(),
            tokenizer=inputs.tokenizer,
            sample=sample,
            done=done,
            skip_bad=inputs.skip_bad,
            on_progress=advance,
        )
        kept = job.kept_bytes(counted.longest_document)
        estimate = estimate_reading(job.reader, counted, room=opened.room, scores=job.scores, kept=kept, output=fate)
    leave()
    if opened.ranks.writes:
        shard = min(output.shard_size or job.shard_size, counted.shard_units)
        guess = f" (guessed: {UNITS[inputs.unit]} tokens to a {inputs.unit})" if inputs.unit else ""
        seconds = _duration(estimate.costs["seconds"] * shard / (counted.shard_units or 1))
        lost = f"{shard:,} {job.shard_unit}{guess}, {seconds}"
        if "folder" in fate or done:
            estimate.costs["output"] += f"; a kill loses at most a shard and a document: {lost}"
        show_reading(estimate, format, job.doing)


def _fate(output: Output, done: int, refusal: ConfigError | None) -> str:
    """Return what would happen to an output that holds `done` documents of an earlier run."""
    from longnet_cli.data.outputs import is_folder

    if output.path == "-":
        return "printed" if output.sink else "an Arrow stream on stdout"
    if not is_folder(output.path):
        return f"{output.path}, which {'is replaced' if Path(output.path).exists() else 'is new'}"
    if refusal:
        return f"refused: {refusal}"
    return f"{output.path}, {f'after document {done:,} of an earlier run' if done else 'a new folder of shards'}"


def _show(estimate: Estimate, format: Format, job: str, before: Sequence[Row], after: Sequence[Row]) -> None:
    if format == "json":
        emit_json(estimate.facts)
    else:
        parameters, trained = estimate.facts["parameters"], estimate.facts.get("trained")
        of_lora = f", frozen; LoRA trains {trained:,}" if trained not in (parameters, None) else ""
        rows = [("parameters", format_count(parameters), f"{parameters:,}{of_lora}"), *before]
        print(_block(rows), _block(_memory(estimate)), _block(after), sep="\n\n")
    check_fits(estimate, job)


def check_fits(estimate: Estimate, job: str) -> None:
    """Raise MemoryLimitError if a job does not fit into the free memory."""
    if estimate.free is not None and not estimate.fits:
        from longnet_cli.jobs.estimating.estimate import largest

        raise MemoryLimitError(
            f"{job} needs {format_bytes(estimate.beyond)} besides the program, the largest part for "
            f"{largest(estimate.memory)}, and {format_bytes(estimate.free)} are free; {estimate.advice}"
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
        needed = "" if estimate.fits else f", and {format_bytes(estimate.beyond)} are needed: it does not fit"
        rows.append(("free", format_bytes(estimate.free), f"besides the program{needed}"))
    return rows


def _block(rows: Sequence[Row]) -> str:
    return "\n".join(f"{name:<15} {value:>12}  {more}".rstrip() for name, value, more in rows)


def _duration(seconds: float) -> str:
    years = seconds / YEAR
    return f"{years:,.0f} years" if years >= 2 else format_duration(seconds)
