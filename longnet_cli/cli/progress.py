"""Progress of a long job, on stderr: a bar on a terminal, otherwise a plain line every half minute."""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from longnet_cli.basics.sizes import format_count, format_duration

from .output import may_tell, printable

RECENT = 60.0  # seconds
# columns
BAR = 24
SHORT_BAR = 8
Advance = Callable[..., None]


@contextmanager
def progress(
    description: str,
    total: int | Callable[[], int | None] | None,
    unit: str = "tok",
    *,
    start: int = 0,
    every: float = 30.0,
) -> Iterator[Advance]:
    """Show the progress of a job: `with progress("scoring", total=n) as advance: advance(512, loss="2.31")`.

    `total` is None if the end is unknown, a function if it is estimated while the job runs. `start` is the amount that
    an earlier run had done. The fields of the latest `advance` appear at the end of the line; where a terminal is too
    narrow, the last ones are left out. Without a terminal, a line comes every `every` seconds, so a quick job prints
    nothing.
    """
    meter = _Meter(total, unit, start)
    description = printable(description)
    if not may_tell():
        yield meter.advance
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bar(description, meter) as advance:
            yield advance
    else:
        yield _lines(description, meter, every)


class ExpectedTokens:
    """An estimate of the tokens of all documents, by the share of the inputs that those so far take."""

    def __init__(self, tokens: int = 0) -> None:
        """Begin with the `tokens` of the documents that an earlier run has read."""
        self._tokens = tokens
        self._share: float | None = None

    def count(self, tokens: int, share: float | None) -> None:
        """Count the tokens of the next document, after which this `share` of the inputs was read; None if unknown."""
        self._tokens = self._tokens + tokens
        self._share = share

    def total(self) -> int | None:
        """Return the expected number, None before the first document and where no size of a file is known."""
        return round(self._tokens / self._share) if self._share and self._tokens else None


# Not tqdm, nor the time and speed columns of rich: logs get plain lines, and the time left follows the last minute.
class _Meter:
    """A counter of the work done, with its status in words.

    The rate is the mean since this run started. The time left uses the rate of the last minute or so, because earlier
    work may have been different.
    """

    def __init__(self, total: int | Callable[[], int | None] | None, unit: str, start: int) -> None:
        self._total = total
        self.about = "~" if callable(total) else ""
        self.unit = unit
        self.start = start
        self.done = start
        self.began = time.monotonic()
        self.fields: dict[str, object] = {}
        # (time, done), one per second, of the last minute
        self.marks = deque([(self.began, start)])

    @property
    def total(self) -> int | None:
        """The whole amount, which is not less than what is done."""
        total = self._total() if callable(self._total) else self._total
        return None if total is None else max(total, self.done)

    def advance(self, amount: int, **fields: object) -> None:
        self.done += amount
        self.fields = fields
        now = time.monotonic()
        if now >= self.marks[-1][0] + 1:
            self.marks.append((now, self.done))
            while len(self.marks) > 2 and self.marks[0][0] < now - RECENT:
                self.marks.popleft()

    def _time_left(self, total: int) -> list[str]:
        """Return the time to the end at the recent rate, as a part of the status; no part if nothing was done."""
        since, done = self.marks[0]
        if self.done == done:
            return []
        left = (total - self.done) * (time.monotonic() - since) / (self.done - done)
        return [f"{format_duration(left)} left"]

    def status(self, width: float = math.inf) -> str:
        """Return the status: `12 %, 1.20M/10.0M tok, 34.1k tok/s, 4m18s left, loss 2.31`; ~10.0M is an estimate.

        If it is longer than `width`, the last fields are left out.
        """
        elapsed = time.monotonic() - self.began
        rate = (self.done - self.start) / elapsed if elapsed > 0 else 0.0
        of_total = ""
        percent = []
        end = [f"in {format_duration(elapsed)}"]
        total = self.total
        if total is not None:
            of_total = f"/{self.about}{format_count(total)}"
            if self.done < total:
                percent = [f"{100 * self.done / total:.0f} %"]
                end = self._time_left(total)
        amount = f"{format_count(self.done)}{of_total} {self.unit}"
        speed = f"{format_count(rate)} {self.unit}/s"
        parts = [*percent, amount, speed, *end]
        fewest = len(parts)
        parts += [f"{name} {value}" for name, value in self.fields.items() if value is not None]
        status = printable(", ".join(parts))
        while len(status) > width and len(parts) > fewest:
            parts.pop()
            status = printable(", ".join(parts))
        return status


def _lines(description: str, meter: _Meter, every: float) -> Advance:
    # now: a library's bar may take its place while it is silenced
    due = meter.began + every
    stream = sys.stderr

    def advance(amount: int, **fields: object) -> None:
        nonlocal due
        meter.advance(amount, **fields)
        if time.monotonic() >= due:
            due = time.monotonic() + every
            print(f"{description}: {meter.status()}", file=stream, flush=True)

    return advance


@contextmanager
def _bar(description: str, meter: _Meter) -> Iterator[Advance]:
    from rich.cells import cell_len
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    bar = BarColumn(bar_width=BAR)
    columns = (
        TextColumn("{task.description}", markup=False),
        bar,
        TextColumn("{task.fields[status]}", markup=False),
    )
    # Rich would redirect stdout to its own console, which is stderr. That is right only for a shared terminal, where
    # rows must appear above the bar.
    console = Console(file=sys.stderr)
    shared_terminal = bool(sys.stdout) and sys.stdout.isatty()
    with Progress(*columns, console=console, redirect_stdout=shared_terminal) as shown:
        task = shown.add_task(description, total=meter.total, completed=meter.done, status="")

        def advance(amount: int, **fields: object) -> None:
            meter.advance(amount, **fields)
            room = console.width - cell_len(description) - 2  # two spaces between columns
            status = meter.status(room - SHORT_BAR)
            bar.bar_width = max(SHORT_BAR, min(BAR, room - cell_len(status)))
            shown.update(task, completed=meter.done, total=meter.total, status=status)

        yield advance
