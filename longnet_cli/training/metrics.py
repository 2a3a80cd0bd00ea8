"""What a run reports: metrics.jsonl, one line every few steps."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Metrics:
    """Means over the steps since the last line: loss in nats a token, the gradient's norm before clipping."""

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    seq_len: int


class MetricsLog:
    """Collects steps and appends a line to metrics.jsonl when asked; without a path it only collects."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        self.tokens = 0
        self._reset()

    def _reset(self) -> None:
        self.began, self.steps, self.new_tokens, self.loss, self.grad_norm = time.perf_counter(), 0, 0, 0.0, 0.0

    def add(self, tokens: int, loss: float, grad_norm: float) -> None:
        self.steps += 1
        self.tokens += tokens
        self.new_tokens += tokens
        self.loss += loss
        self.grad_norm += grad_norm

    def write(self, step: int, lr: float, seq_len: int) -> Metrics:
        rate = self.new_tokens / (time.perf_counter() - self.began)
        line = Metrics(step, self.tokens, self.loss / self.steps, lr, self.grad_norm / self.steps, rate, seq_len)
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(line), allow_nan=False) + "\n")
        self._reset()
        return line
