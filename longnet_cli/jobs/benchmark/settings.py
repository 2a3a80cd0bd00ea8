"""What a benchmark measures: its settings, every option once with bounds and default; its cases, and their rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from longnet_cli.attention import Pattern
from longnet_cli.attention.notation import format_levels, format_pattern
from longnet_cli.basics.configuration import validate
from longnet_cli.basics.errors import ConfigError
from longnet_cli.running.chunk_size import BENCH_CHUNK, GPU_BENCH_CHUNK, chunk_of
from longnet_cli.running.device import PeakMemory, check_kernel, resolve_dtype, select_device

OPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # implementations and directions; defaults come first
    "attention": (("dilated", "dense", "kernels"), ("forward", "backward")),
    "model": (("dilated", "dense"), ("forward",)),
    "train": (("dilated", "dense"), ("backward",)),
}
LONG = 10**6  # tokens: from here on, a causal forward pass is streamed, and the defaults are for long sequences
LONGEST = 1 << 40  # tokens; with the most heads of the largest size, int64 still counts the numbers of a sequence

Size = Annotated[int, Field(ge=1, le=1 << 32)]
Tokens = Annotated[int, Field(ge=1, le=LONGEST)]
Seconds = Annotated[float, Field(ge=0)]


def _option(name: str) -> str:
    """Return the name of an option in errors: `head_dim` -> `--head-dim`."""
    return f"--{name.replace('_', '-')}"


class Settings(BaseModel):
    """Immutable settings; `Settings.of(seq=[4096], heads=4)` fills in the rest. Errors name options of `longnet bench`.

    Every combination of `seq` (tokens), `direction` and `impl` is a case, in that order of nesting.

    op: attention (of random queries, keys and values), model (from tokens to their loss) or train (from tokens to
        gradients).
    impl: dilated (ours), dense (torch's), kernels (the kernel calls of dilated, without the work between them).
    pattern: "paper", "geometric" (`base` times `ratio`), or levels; None is a saved model's own, or suits the length.
    chunk: tokens per chunk of longer causal sequences. A forward pass that is cut this way is streamed, see `streams`.
    model: a name or a folder; otherwise the model has `layers`, `vocab` and random weights.
    max_time: seconds for all rows. A streamed run ends then; another run does not start if it is expected to overrun.
    max_dense_time: seconds; a dense run that would take longer, by the rate of shorter ones, is skipped.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, alias_generator=_option)

    seq: tuple[Tokens, ...]
    op: Literal["attention", "model", "train"] = "attention"
    impl: tuple[str, ...]
    direction: tuple[str, ...]
    batch: Size = 1
    heads: Annotated[int, Field(ge=1, le=1024)]  # limited, as Python loops over heads and layers
    head_dim: Annotated[int, Field(ge=1, le=2048)]
    causal: bool = True
    pattern: Pattern | str | None = None
    base: Tokens
    ratio: Annotated[int, Field(ge=2, le=LONGEST)] = 2
    chunk: Annotated[int, Field(ge=1)] | None = None
    model: str | None = None
    layers: Annotated[int, Field(ge=1, le=256)] = 2
    vocab: Size = 256
    repeats: Annotated[int, Field(ge=1, le=10**6)] = 3
    max_time: Seconds | None = None
    max_dense_time: Seconds | None = None
    dtype: Literal["fp32", "bf16", "fp16"]
    device: torch.device

    @classmethod
    def of(cls, **options: Any) -> Settings:
        """Return the settings for these options; None stands for the default. Raises ConfigError.

        The defaults are the paper's 12 heads of 64 and its pattern. From LONG tokens on, the pattern is geometric, and
        a CPU gets 2 heads of 32 and a first segment of 256: two cores read a billion tokens in half an hour.
        """
        given = {name: value for name, value in options.items() if value is not None}
        device = select_device(given.get("device", "auto"))
        impls, directions = OPS.get(given.get("op", "attention"), OPS["attention"])
        small = device.type == "cpu" and max(given["seq"]) >= LONG
        shape = {"heads": 2, "head_dim": 32, "base": 256} if small else {"heads": 12, "head_dim": 64, "base": 2048}
        if given.keys() & {"base", "ratio"} and given.setdefault("pattern", "geometric") != "geometric":
            raise ConfigError("--base and --ratio are of a geometric pattern, not of another")
        own = [_option(name) for name in ("heads", "head_dim", "layers", "vocab") if name in given]
        if "model" in given and own:
            raise ConfigError(f"{', '.join(own)}: a saved model has its own, leave it out or leave out --model")
        given["dtype"] = resolve_dtype(given.get("dtype", "auto"), device)
        values = {"impl": impls[:2], "direction": directions[:1], **shape, **given, "device": device}
        return validate(cls, {_option(name): value for name, value in values.items()}, "longnet bench")

    @model_validator(mode="after")
    def _check(self) -> Settings:
        """Raise ValueError for settings that cannot be measured, or that the rows would not show."""
        impls, directions = OPS[self.op]
        for option, names, known in (("--impl", self.impl, impls), ("--direction", self.direction, directions)):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"{option} of --op {self.op} has no {unknown[0]!r}: choose from {', '.join(known)}")
        if self._named not in ("paper", "geometric", "given"):
            raise ValueError(
                f"--pattern: {self.pattern!r} is unknown: write paper, geometric, or another of `longnet pattern`"
            )
        net = self.op in ("model", "train")
        if self.model is not None and not net:
            raise ValueError(f"--op {self.op} has no model: --model is for --op model and train")
        if net and not self.causal:
            raise ValueError(f"--op {self.op} runs causal language models: --bidirectional is for --op attention")
        for level in (level for seq in self.seq for level in self.pattern_for(seq).levels):
            if max(level) >= 2 * LONGEST:
                raise ValueError(
                    f"a segment of {level[0]} tokens, dilated {level[1]} times, is longer than any sequence"
                )
        check_kernel(self.device, self.dtype, self.head_dim)
        return self

    def pattern_for(self, seq: int, own: Pattern | None = None) -> Pattern:
        """Return the requested pattern, otherwise the model's `own`, otherwise one that suits `seq` tokens."""
        if isinstance(self.pattern, Pattern):
            return Pattern((seq,), (1,)) if self.pattern == Pattern.dense() else self.pattern
        if self.pattern is None and own is not None:
            return own
        return Pattern.paper() if self._named == "paper" else Pattern.geometric(seq, self.base, self.ratio)

    @property
    def _named(self) -> str:
        """The name of the pattern: "paper" or "geometric"; "given" for levels."""
        if isinstance(self.pattern, Pattern):
            return "given"
        return self.pattern or ("geometric" if max(self.seq) >= LONG else "paper")

    def streams(self, seq: int) -> bool:
        """Return whether a causal forward pass is streamed: `seq` exceeds the chunk or, without one, reaches LONG."""
        return self.causal and (seq > self.chunk if self.chunk else seq >= LONG)

    def chunk_for(self, seq: int) -> int:
        """Return the tokens per chunk of a streamed run."""
        return min(seq, chunk_of(self.chunk, GPU_BENCH_CHUNK if self.device.type == "cuda" else BENCH_CHUNK))

    @property
    def streamed_tokens(self) -> int:
        """The tokens of all streamed runs."""
        if self.op not in ("attention", "model") or "dilated" not in self.impl or "forward" not in self.direction:
            return 0
        return sum(seq for seq in self.seq if self.streams(seq))

    def __str__(self) -> str:
        """Return the settings that all rows share: `1 x 12 heads x 64, causal, pattern paper`."""
        if self.model is not None:
            return f"{self.batch} x {self.model}"
        shape = f"{self.batch} x {self.heads} heads x {self.head_dim}, {'causal' if self.causal else 'bidirectional'}"
        layers = f", {self.layers} layers, vocabulary {self.vocab}" if self.op in ("model", "train") else ""
        growth = f", base {self.base}, ratio {self.ratio}" if self._named == "geometric" else ""
        pattern = format_pattern(self.pattern) if isinstance(self.pattern, Pattern) else self._named
        return f"{shape}, pattern {pattern}{growth}{layers}"


@dataclass(frozen=True)
class Measurement:
    """One row. Times are in seconds, sizes in bytes. A value that was not measured, or does not apply, is None.

    `status`: ok; oom (memory ran out); skipped (would not fit in memory, or in the time for dense); stopped (out of
    time). A streamed run, `chunk` tokens at a time, also gives a row for each decade of its positions, [start, stop).
    `cpu_seconds` is the CPU time of all threads: on a shared machine, it shows whether other processes slowed the run.
    `peak_rss_bytes` is the process's peak from making the inputs to the last run; on a GPU, the peak of torch's
    allocator. `model` is the name of a saved model, with its commit if it is on a hub.
    """

    op: str
    impl: str
    direction: str
    seq: int
    status: str = "stopped"
    seconds: float | None = None
    tokens_per_second: float | None = None
    flops_per_second: float | None = None
    peak_rss_bytes: int | None = None
    cache_bytes: int | None = None
    heads: int = 0
    head_dim: int = 0
    batch: int = 1
    causal: bool = True
    dtype: str = "fp32"
    device: str = "cpu"
    kernel: str | None = None
    pattern: str | None = None
    reason: str | None = None
    chunk: int | None = None
    start: int | None = None
    stop: int | None = None
    cpu_seconds: float | None = None
    model: str | None = None

    @classmethod
    def of(
        cls, s: Settings, impl: str, direction: str, seq: int, pattern: Pattern | None = None, **values: Any
    ) -> Measurement:
        """Return the row of a case before it is measured: the settings that all rows share, and its own `values`."""
        shared = {name: getattr(s, name) for name in ("heads", "head_dim", "batch", "causal", "dtype")}
        levels = format_levels(pattern) if pattern else None  # 2048/1,4096/2
        return cls(s.op, impl, direction, seq, **{**shared, "device": str(s.device), "pattern": levels, **values})


@dataclass(frozen=True)
class Case:
    """A row to be measured. `start` makes the inputs and returns the function whose calls are timed.

    A `streamed` case is one sequence that is run once, `row.chunk` tokens at a time. Its function takes the number of
    tokens to run next.
    """

    row: Measurement
    flops: Callable[[int], float]  # of the first n tokens
    memory_bytes: int  # estimated peak, beyond what the process has already
    start: Callable[[], Callable[..., object]]
    streamed: bool = False

    def measured(self, first: int, last: int, seconds: float, peak: PeakMemory, **values: Any) -> Measurement:
        """Return the row of positions [first, last), which took `seconds`."""
        flops = self.flops(last) - self.flops(first)
        numbers = {
            "status": "ok",
            "seconds": seconds,
            "tokens_per_second": self.row.batch * (last - first) / seconds,
            "flops_per_second": flops / seconds if flops else None,
            "peak_rss_bytes": peak.bytes,
        }
        return replace(self.row, **{**numbers, **values})
