"""Progress of a long job, on stderr: a bar on a terminal, otherwise a plain line every half minute."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from longnet_cli.basics.sizes import format_count, format_duration
from longnet_cli.cli.output import printable

RECENT = 60.0  # seconds
Advance = Callable[..., None]


@contextmanager
def progress(
    description: str,
    total: int | None,
    unit: str = "tok",
    *,
    start: int = 0,
    quiet: bool = False,
    every: float = 30.0,
) -> Iterator[Advance]:
    """Show the progress of a job: `with progress("scoring", total=n) as advance: advance(512, loss="2.31")`.

    `total` is None if the end is unknown; `start` is the amount that an earlier run had done. The fields of the latest
    `advance` appear at the end of the line. Without a terminal, a line comes every `every` seconds, so a quick job
    prints nothing.
    """
    meter, description = _Meter(total, unit, start), printable(description)
    if quiet or not sys.stderr:
        yield meter.advance
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bar(description, meter) as advance:
            yield advance
    else:
        yield _lines(description, meter, every)


# Not tqdm, nor the time and speed columns of rich: logs get plain lines, and the time left follows the last minute.
class _Meter:
    """A counter of the work done, with its status in words.

    The rate is the mean since this run started. The time left uses the rate of the last minute or so, because earlier
    work may have been different.
    """

    def __init__(self, total: int | None, unit: str, start: int) -> None:
        self.total, self.unit, self.start = total, unit, start
        self.done = start
        self.began = time.monotonic()
        self.fields: dict[str, object] = {}
        self.marks = deque([(self.began, start)])  # (time, done), one per second, of the last minute

    def advance(self, amount: int, **fields: object) -> None:
        self.done += amount
        self.fields = fields
        now = time.monotonic()
        if now >= self.marks[-1][0] + 1:
            self.marks.append((now, self.done))
            while len(self.marks) > 2 and self.marks[0][0] < now - RECENT:
                self.marks.popleft()

    def _left(self, total: int) -> float | None:
        """Return the seconds to the end at the recent rate, None if nothing was done."""
        since, done = self.marks[0]
        if self.done == done:
            return None
        return (total - self.done) * (time.monotonic() - since) / (self.done - done)

    def status(self) -> str:
        """Return the status: `1.20M/10.0M tok, 34.1k tok/s, 4m18s left, loss 2.31`."""
        elapsed = time.monotonic() - self.began
        rate = (self.done - self.start) / elapsed if elapsed > 0 else 0.0
        of_total = f"/{format_count(self.total)}" if self.total is not None else ""
        parts = [f"{format_count(self.done)}{of_total} {self.unit}", f"{format_count(rate)} {self.unit}/s"]
        if self.total is None or self.done >= self.total:
            parts.append(f"in {format_duration(elapsed)}")
        elif (left := self._left(self.total)) is not None:
            parts.append(f"{format_duration(left)} left")
        return printable(", ".join(parts + [f"{name} {value}" for name, value in self.fields.items()]))


def _lines(description: str, meter: _Meter, every: float) -> Advance:
    due = meter.began + every

    def advance(amount: int, **fields: object) -> None:
        nonlocal due
        meter.advance(amount, **fields)
        if time.monotonic() >= due:
            due = time.monotonic() + every
            print(f"{description}: {meter.status()}", file=sys.stderr, flush=True)

    return advance


@contextmanager
def _bar(description: str, meter: _Meter) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[status]}", markup=False),
    )
    # Rich would redirect stdout to its own console, which is stderr. That is right only for a shared terminal, where
    # rows must appear above the bar.
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=_stdout_is_terminal()) as bar:
        task = bar.add_task(description, total=meter.total, completed=meter.done, status="")

        def advance(amount: int, **fields: object) -> None:
            meter.advance(amount, **fields)
            bar.update(task, completed=meter.done, status=meter.status())

        yield advance


def _stdout_is_terminal() -> bool:
    return bool(sys.stdout) and sys.stdout.isatty()
