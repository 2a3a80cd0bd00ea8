"""The output of `longnet train --dry-run`: the estimate, as a table to read or one JSON value, and the refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from longnet_cli.cli.output import emit_json, format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from longnet_cli.training.estimate import Estimate

Format = Literal["text", "json"]
BAR = 30  # characters of the whole
YEAR = 365.25 * 86400  # seconds


def show(found: Estimate, format: Format) -> None:
    """Print the estimate to stdout; raises MemoryLimitError where training does not fit."""
    if format == "json":
        emit_json(found.as_dict())
    else:
        _print(found)
    if found.free is not None and not found.fits:
        from longnet_cli.errors import MemoryLimitError

        beyond = found.peak - found.memory["program"]
        largest = max(found.memory, key=found.memory.__getitem__)
        raise MemoryLimitError(
            f"training needs {format_bytes(beyond)}, the largest part for {largest}, and {format_bytes(found.free)} "
            f"are free; {found.advice}"
        )


def _print(found: Estimate) -> None:
    from longnet_cli.training.estimate import EFFICIENCY

    def row(name: str, value: str, more: str = "") -> None:
        print(f"{name:<14} {value:>12}  {more}".rstrip())

    row("parameters", format_count(found.parameters), f"{found.parameters:,}")
    print()
    for kind, size in found.memory.items():
        row(kind, format_bytes(size), "#" * round(BAR * size / found.peak))
    row("peak memory", format_bytes(found.peak), f"a process, {found.dtype}, chunks of {found.chunk:,} tokens")
    if found.spilled:
        row("spill file", format_bytes(found.spilled), "on a disk")
    if found.free is not None:
        row("free", format_bytes(found.free), "besides the program" if found.fits else "it does not fit")
    print()
    row("FLOPs per token", format_count(found.flops_per_token), "forward and backward")
    row("tokens", format_count(found.tokens), f"{format_count(found.flops)} FLOPs in all")
    peak = f"{EFFICIENCY:.0%} (assumed) of {format_count(found.matmul_peak)} FLOP/s (measured, {found.dtype})"
    years = found.seconds / YEAR
    row("time", f"{years:,.0f} years" if years >= 2 else format_duration(found.seconds), f"at {peak}")
