"""The report of a run: metrics.jsonl, one line every few steps."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longnet_cli.basics.atomic import write_file, writing
from longnet_cli.basics.configuration import parse
from longnet_cli.jobs.scoring.measures import Score


@dataclass
class Metrics:
    """A line of metrics. `loss`, in nats per token, and `grad_norm`, before clipping, are means since the last line.

    `mfu` is the net's FLOP rate, forward and backward, with the true lengths of documents, divided by all ranks' rate
    of matrix products. It is None if that rate is unknown, or lower than the net's because other work slowed its
    measurement. `held_out_*` are None except at evaluations.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    seq_len: int
    peak_memory_bytes: int
    mfu: float | None = None
    held_out_loss: float | None = None
    held_out_ppl: float | None = None
    held_out_bpb: float | None = None


class MetricsLog:
    """A log that collects steps and appends a line to metrics.jsonl on request. Without a path it only collects."""

    peak = 0.0  # of all ranks, the FLOP/s of matrix products; 0 if that is unknown

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.tokens = 0
        self.lowest: float | None = None  # the lowest mean loss of a line so far
        self._reset()

    def _reset(self) -> None:
        self.began = time.perf_counter()
        self.steps = 0
        self.new_tokens = 0
        self.flops = 0.0
        self.loss = 0.0
        self.grad_norm = 0.0

    def add(
        self,
        tokens: int,
        flops: float,
        loss: float,
        grad_norm: float,
    ) -> None:
        """Add a step of all ranks."""
        self.steps += 1
        self.tokens += tokens
        self.new_tokens += tokens
        self.flops += flops
        self.loss += loss
        self.grad_norm += grad_norm

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock within the context, so that work other than training does not count in the speed."""
        paused = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - paused

    def write(
        self,
        step: int,
        lr: float,
        seq_len: int,
        *,
        memory: int,
        held_out: Score | None = None,
    ) -> Metrics:
        """Write and return a line for the steps since the last. `held_out` is the score of an evaluation."""
        seconds = time.perf_counter() - self.began
        line = Metrics(
            step=step,
            tokens=self.tokens,
            loss=self.loss / self.steps,
            lr=lr,
            grad_norm=self.grad_norm / self.steps,
            tokens_per_second=self.new_tokens / seconds,
            seq_len=seq_len,
            peak_memory_bytes=memory,
        )
        if self.peak and self.flops <= seconds * self.peak:
            line.mfu = self.flops / seconds / self.peak
        if held_out:
            line.held_out_loss = held_out.nll_sum / held_out.n_tokens
            line.held_out_ppl = held_out.ppl
            line.held_out_bpb = held_out.bpb
        if self.path:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(line), allow_nan=False) + "\n")
        self.lowest = line.loss if self.lowest is None else min(line.loss, self.lowest)
        self._reset()
        return line

    def state(self) -> dict[str, Any]:
        """Return a state from which a resumed run writes an uninterrupted run's lines (except for the rate)."""
        seconds = time.perf_counter() - self.began
        names = ("tokens", "lowest", "steps", "new_tokens", "flops", "loss", "grad_norm")
        return {"seconds": seconds, **{name: getattr(self, name) for name in names}}

    def resume(self, state: Mapping[str, Any], step: int) -> None:
        """Continue from a `state`, empty for a new run. Drop the lines after `step`, which were never saved."""
        known = dict(state)
        self.began = time.perf_counter() - known.pop("seconds", 0.0)
        vars(self).update(known)
        if self.path:
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            lines = [line for line in text.splitlines(keepends=True) if _step_of(line) <= step]
            write_file(self.path, "".join(lines).encode())


def _step_of(line: str) -> float:
    """Return the step of a line of metrics; infinity for a line that a kill cut short."""
    with suppress(ValueError, KeyError, TypeError):
        if isinstance(step := parse(line)["step"], int):
            return step
    return float("inf")
