"""The job `bench`: how fast an op runs on this machine. Each measurement is a row, given out as soon as it is known.

    Settings, every option once with bounds and default --CASES--> Case --measure, measure_stream--> Measurement, a row

The op `attention` is dilated attention of random q, k, v against dense attention, forward or backward. `model` and
`train` go from tokens to the loss of each, or to gradients, dilated or dense.

The `seconds` of a row are the median of `repeats` runs after one warm-up run. If time runs out before the second run,
they are those of the warm-up. Rates count executed FLOPs, with causal attention as half, and not the FLOPs that dense
attention would need. A case that would not fit in memory or time is not run: the `status` of its row says so, and its
`reason` says why.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from longnet_cli.attention import KVCache, Pattern, dilated_attention
from longnet_cli.attention.branches import BACKWARD_FLOPS, attention_flops, backward_flops, branches
from longnet_cli.attention.groups import past_bytes
from longnet_cli.attention.kernels import select_kernel
from longnet_cli.attention.notation import format_levels, format_pattern
from longnet_cli.attention.views import kernel_calls
from longnet_cli.basics.configuration import validate
from longnet_cli.basics.errors import ConfigError, is_out_of_memory
from longnet_cli.jobs.estimating.memory import (
    attention_memory,
    cache_bytes,
    forward_memory,
    gradient_memory,
    transient_memory,
)
from longnet_cli.jobs.training.objective import backward
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.config import NetConfig, parse_config
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import Net
from longnet_cli.running.causal_stream import open_stream
from longnet_cli.running.chunk_size import BENCH_CHUNK, GPU_BENCH_CHUNK, chunk_of
from longnet_cli.running.device import (
    DTYPES,
    check_kernel,
    free_memory,
    peak_from_now,
    precision,
    resolve_dtype,
    select_device,
    trim_memory,
    wait_for,
)

if TYPE_CHECKING:
    from longnet_cli.models.hf.pretrained_net import TransformersNet


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
    allocator. `model` is the name of a saved model, with its commit if it is on a hub; `machine`, that of the processor
    or GPU; `date`, the day in UTC.
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
    machine: str | None = None
    date: str | None = None


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

    def measured(
        self, begin: int, end: int, peak: Callable[[], int | None], *, seconds: float, status: str = "ok", **values: Any
    ) -> Measurement:
        """Return the row of positions [begin, end), which took `seconds`."""
        flops = self.flops(end) - self.flops(begin)
        values["tokens_per_second"] = self.row.batch * (end - begin) / seconds
        values["flops_per_second"] = flops / seconds if flops else None
        return replace(self.row, status=status, seconds=seconds, peak_rss_bytes=peak(), **values)


def attention(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """Return a case of attention over random q, k, v: forward without an autograd graph, or backward alone.

    A streamed case goes chunk by chunk through a KVCache, over every query and key. All chunks have the same numbers:
    drawing numbers for 1e9 tokens would take longer than the attention, and the time of attention does not depend on
    its numbers.
    """
    pattern, dtype = s.pattern_for(seq), DTYPES[s.dtype]
    dense, backward = impl == "dense", direction == "backward"
    streamed = impl == "dilated" and not backward and s.streams(seq)
    chunk = s.chunk_for(seq) if streamed else seq
    cache = None
    if streamed:
        rows = 2 * s.heads * s.head_dim * dtype.itemsize * pattern.cache_rows
        cache = s.batch * (rows + sum(past_bytes(pattern, s.heads, s.head_dim, seq, dtype.itemsize)))

    def flops(tokens: int) -> float:
        if dense:
            forward = 4 * s.head_dim * s.heads * s.batch * tokens**2 // (2 if s.causal else 1)
            return forward * (BACKWARD_FLOPS if backward else 1)
        count = backward_flops if backward else attention_flops
        return s.batch * count(pattern, s.heads, s.head_dim, tokens, s.causal)

    row = _row(s, impl, direction, seq, chunk=chunk if streamed else None, cache_bytes=cache)
    # each implementation gets the layout that it is made for
    shape = (s.batch, s.heads, chunk, s.head_dim) if dense else (s.batch, chunk, s.heads, s.head_dim)
    memory = attention_memory(shape, None if dense else pattern, s.causal, dtype, s.device, backward) + (cache or 0)
    if not dense:
        memory += transient_memory(pattern, s.heads, s.head_dim, seq, dtype.itemsize, s.device.type)
    return Case(row, flops, memory, partial(_attention, s, impl, pattern, shape, backward, streamed), streamed)


def _attention(
    s: Settings, impl: str, pattern: Pattern, shape: Sequence[int], backward: bool, streamed: bool
) -> Callable[..., object]:
    """Draw the inputs of attention, and return the run."""
    draw = torch.Generator(s.device).manual_seed(0)
    made: dict[str, Any] = {"generator": draw, "dtype": DTYPES[s.dtype], "device": s.device}
    q, k, v, *dout = (torch.randn(shape, requires_grad=backward, **made) for _ in range(3 + backward))
    if impl == "kernels":
        return _kernels_alone(s, pattern, q, k, v, *dout)
    if streamed:
        return _streamed(s, pattern, q, k, v)
    attend: Callable[[], Tensor] = partial(F.scaled_dot_product_attention, q, k, v, is_causal=s.causal)
    if impl == "dilated":
        attend = partial(dilated_attention, q, k, v, pattern, causal=s.causal)
    if not backward:
        return attend
    return partial(torch.autograd.grad, attend(), (q, k, v), dout[0].detach(), retain_graph=True)


def _streamed(s: Settings, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor) -> Callable[[int], None]:
    past = KVCache(pattern, s.batch, s.heads, s.head_dim, dtype=q.dtype, device=q.device)

    def run(tokens: int) -> None:
        q_, k_, v_ = (x[:, :tokens] for x in (q, k, v))
        dilated_attention(q_, k_, v_, pattern, start=past.position, far=past.far())
        past.append(k_, v_, q=q_)

    return run


@torch.no_grad()
def _kernels_alone(
    s: Settings, pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None = None
) -> Callable[[], object]:
    """Return a run of the kernel calls alone, forward or, given dout, backward, on the views of dilated attention."""
    kernel, scale = select_kernel(s.device, q.dtype, s.head_dim), s.head_dim**-0.5
    plan = [(slice(0, s.batch), slice(0, q.shape[1]), branches(pattern, s.heads, 0, q.shape[1], s.causal, "exact", ()))]
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:3], device=s.device)[..., None]
    calls = list(kernel_calls(plan, kernel, (q,) if dout is None else (q, out, lse, dout), (k, v)))

    def run() -> None:
        for branch, (q_, *others), (k_, v_) in calls:
            if others:
                out_, lse_, dout_ = others
                kernel.backward((dout_, q_, k_, v_, out_, lse_[..., 0]), branch.causal, scale)
            else:
                kernel.forward(q_, k_, v_, branch.causal, scale)

    return run


def model(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """Return a case of the forward pass, on random tokens, of a shipped or saved model (`s.model`) or a random one."""
    net, load = _net(s, impl, seq)
    config, itemsize = net.config, DTYPES[s.dtype].itemsize
    streamed = impl == "dilated" and config.streams and s.streams(seq)
    chunk = s.chunk_for(seq) if streamed else seq

    def start() -> Callable[..., object]:
        model, ids = load(), _tokens(s, config, chunk)
        read = open_stream(model) if streamed else model

        def run(tokens: int = chunk) -> Tensor:
            with torch.inference_mode(), precision(s.dtype, s.device):
                return model.nll(read(ids[:, :tokens]), ids[:, :tokens])

        return run

    cache = None
    if streamed and not net.stream():  # of a net with a cache of its own, nothing is known
        cache = s.batch * sum(cache_bytes(config, max(seq, *config.pattern.segment_lengths), itemsize))
    row = _row(s, impl, direction, seq, net, chunk=chunk if streamed else None, cache_bytes=cache)
    transient = transient_memory(config.pattern, config.num_heads, config.head_dim, seq, itemsize, s.device.type)
    memory = sum(forward_memory(net, s.batch * chunk, itemsize, s.batch * chunk, transient).values()) + (cache or 0)
    return Case(row, lambda tokens: s.batch * _forward_flops(config, tokens), memory, start, streamed)


def train(s: Settings, impl: str, direction: str, seq: int) -> Case:
    """Return a case of one sequence's loss and gradients, by `s.chunk` tokens if given: a step without its update."""
    net, load = _net(s, impl, seq)
    config, chunk = net.config, min(s.chunk or seq, seq)
    again = chunk < seq  # then the backward pass computes each chunk's forward pass again

    def start() -> Callable[[], object]:
        model, ids = load().train(), _tokens(s, config, seq)

        def run() -> Tensor:
            model.zero_grad()
            return backward(model, ids, ids, chunk=chunk, scale=1 / ids.numel(), dtype=s.dtype)

        return run

    def flops(tokens: int) -> float:
        forward = _forward_flops(config, tokens) - config.vote_flops(tokens)  # blocks are chosen once
        return s.batch * (config.training_flops([tokens]) + again * forward)

    row = _row(s, impl, direction, seq, net, chunk=chunk if again else None)
    memory = gradient_memory(config, s.batch, seq, chunk, DTYPES[s.dtype].itemsize, s.device.type)
    return Case(row, flops, memory, start)


def _net(s: Settings, impl: str, seq: int) -> tuple[Net, Callable[[], Net]]:
    """Return the net of a row, and a function that returns it with its weights.

    A LongNet is on the meta device until then. A Hugging Face model has its weights from the start.
    """
    folder = ModelFolder.find(s.model) if s.model is not None else None
    if folder and folder.of_transformers:
        net = _transformers(s, impl, seq, folder)
        return net, lambda: net
    if folder is None:
        dim = s.heads * s.head_dim
        shape = {"dim": dim, "num_layers": s.layers, "num_heads": s.heads, "ffn_dim": 4 * dim, "vocab_size": s.vocab}
        where, own, config = "a model with random weights", None, {**shape, "position": "rope"}
    else:
        saved = folder.net_config()
        where, own, config = str(s.model), saved.pattern, saved.model_dump()
        if not saved.causal or not saved.vocab_size:
            raise ConfigError(f"{where}: --op {s.op} runs causal language models")
    pattern = s.pattern_for(seq, own)
    if own:
        pattern = replace(pattern, head_offsets=own.head_offsets)  # the weights were trained with these
    measured = parse_config(config, where, pattern)  # raises if the pattern does not fit the model's positions
    if impl == "dense":  # one segment for the whole sequence
        measured = measured.model_copy(update=vars(Pattern((seq,), (1,))))
    with torch.device("meta"):
        empty = LongNet(measured)
    return empty, partial(_with_weights, s, empty)


def _transformers(s: Settings, impl: str, seq: int, folder: ModelFolder) -> TransformersNet:
    """Return a Hugging Face model with the requested pattern, otherwise its own; dense has transformers' attention."""
    own = "dilated_attention" in folder.config
    pattern = Pattern.dense() if impl == "dense" else None if own and s.pattern is None else s.pattern_for(seq)
    net = _loaded(folder.path, pattern, s.device, s.dtype)
    if impl == "dense":
        net = net.as_it_comes()
    if not net.config.causal or net.model.get_output_embeddings() is None:
        raise ConfigError(f"{s.model}: --op model runs causal language models")
    limit = net.config.max_tokens
    if limit is not None and seq > limit:
        raise ConfigError(f"{s.model}: --seq {seq}, and the model has {limit} positions")
    if s.op == "train":
        raise ConfigError(f"{s.model}: --op train measures LongNets; a Hugging Face model trains by itself")
    return net


@lru_cache(maxsize=1)  # only one: the next row needs another attention
def _loaded(path: Path, pattern: Pattern | None, device: torch.device, dtype: str) -> TransformersNet:
    return cast("TransformersNet", ModelFolder(path).net(pattern=pattern, device=device, dtype=DTYPES[dtype]))


def _with_weights(s: Settings, net: LongNet) -> LongNet:
    """Return the net with its weights, which are read or drawn."""
    if s.model is not None:
        net.load_state_dict(LongNet.from_pretrained(s.model, s.device).state_dict(), assign=True)
    else:
        torch.manual_seed(0)
        net.to_empty(device=s.device).init_weights()
    return net.eval()


def _tokens(s: Settings, config: NetConfig, count: int) -> Tensor:
    return torch.randint(config.vocab_size, (s.batch, count), device=s.device)


def _forward_flops(config: NetConfig, tokens: int) -> int:
    return tokens * (config.layer_flops() + config.vocabulary_flops()) + config.attention_flops(tokens)


def _row(s: Settings, impl: str, direction: str, seq: int, net: Net | None = None, **values: Any) -> Measurement:
    """Return the row of a case before it is measured, by the settings and the `net`, and its own `values`."""
    facts: dict[str, Any] = {name: getattr(s, name) for name in ("heads", "head_dim", "batch", "causal", "dtype")}
    dilated, pattern = impl != "dense", s.pattern_for(seq)
    if net:
        dilated, pattern = net.dilated, net.config.pattern
        facts |= {"heads": net.config.num_heads, "head_dim": net.config.head_dim}
        facts["model"] = None if s.model is None else ModelFolder.find(s.model).origin
    facts["kernel"] = select_kernel(s.device, DTYPES[s.dtype], facts["head_dim"]).name if dilated else "sdpa"
    facts["pattern"] = format_levels(pattern) if dilated else None  # 2048/1,4096/2
    facts |= {"device": str(s.device), "machine": device_name(s.device), "date": _today()}
    return Measurement(s.op, impl, direction, seq, **facts, **values)


CASES: dict[str, Callable[[Settings, str, str, int], Case]] = {  # (settings, impl, direction, seq) -> a case
    "attention": attention,
    "model": model,
    "train": train,
}
FIRST_DECADE = 10**6  # tokens: a streamed run reports each power of ten from here on
_PROBE_SEQ = 2048  # tokens of the run that estimates a long one
_LONG_FLOPS = 10**11  # a second or so on a slow CPU: a longer run is worth a probe
_SHORTEST_REACH = 4096  # fewest tokens of a dense run that is measured in place of a longer one


def bench(
    settings: Settings,
    *,
    on_start: Callable[[Case, float | None], None] = lambda case, seconds: None,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Measurement]:
    """Measure every case of the settings, row by row.

    A streamed case has a row for each decade of its positions, then one for the whole. If a dense case would take too
    long or too much memory, the longest power of two that the limits allow is measured in its place, once.

    on_start: called with each case before it runs, and with the estimated seconds of one run, None if unknown.
    on_tokens: called with the number of tokens of each chunk of a streamed run.
    """
    s, done = settings, list[Measurement]()  # the rows so far, whose rates tell how long the next cases take
    deadline = time.perf_counter() + (math.inf if s.max_time is None else s.max_time)

    def run(case: Case) -> Iterator[Measurement]:
        on_start(case, _expected_seconds(case, done))
        streamed = measure_stream(case, s, deadline, on_tokens) if case.streamed else None
        for row in streamed or [measure(case, s, deadline)]:
            done.append(row)
            yield row

    for seq, direction, impl in product(s.seq, s.direction, s.impl):
        make = partial(CASES[s.op], s, impl, direction)
        case = make(seq)
        if time.perf_counter() >= deadline:
            yield replace(case.row, reason="the time is over")
            continue
        if case.flops(seq) > _LONG_FLOPS and seq > _PROBE_SEQ and not _like(case, done):
            probe, free = make(case.row.chunk or _PROBE_SEQ), free_memory(s.device)
            if free is None or probe.memory_bytes <= free:
                done.append(measure(probe, s.model_copy(update={"repeats": 1}), deadline))
        share, refusal = _fit(case, s, deadline - time.perf_counter(), done)
        if refusal is None:
            yield from run(case)
            continue
        yield refusal
        if impl == "dense" and (like := _like(case, done)):  # then run a shorter one that fits
            reach = 1 << max(1, int(0.95 * seq / share)).bit_length() - 1
            if reach >= max(_SHORTEST_REACH, 2 * max(row.seq for row in like)):
                yield from run(make(reach))


def _fit(case: Case, s: Settings, left: float, done: Sequence[Measurement]) -> tuple[float, Measurement | None]:
    """Return by how much a dense sequence is too long, and the row that says why the case is not run, or None.

    `left` are the seconds until the deadline.
    """
    dense, free, seconds = case.row.impl == "dense", free_memory(s.device), _expected_seconds(case, done)
    allowed = left if s.max_dense_time is None or not dense else min(left, s.max_dense_time)
    over_memory = case.memory_bytes / max(1, free) if free is not None else 0.0
    over_time = seconds / max(1e-9, allowed) if seconds is not None and not case.streamed else 0.0
    share = max(1.0, over_memory, math.sqrt(over_time))
    if free is not None and over_memory > 1:
        reason = f"needs {_gib(case.memory_bytes)} of memory, {_gib(free)} are free"
        return share, replace(case.row, status="skipped", reason=reason)
    if over_time > 1:
        reason = f"would take about {seconds:.3g} s, and {allowed:.3g} s are allowed"
        return share, replace(case.row, status="skipped" if dense else "stopped", reason=reason)
    return share, None


def _like(case: Case, done: Sequence[Measurement]) -> list[Measurement]:
    """Return the rows so far of the same implementation and direction that have a rate."""
    like = (case.row.impl, case.row.direction)
    return [row for row in done if (row.impl, row.direction) == like and row.flops_per_second]


def _expected_seconds(case: Case, done: Sequence[Measurement]) -> float | None:
    """Estimate the seconds of one run from the best rate: short runs are mostly overhead. None if unknown."""
    best = max((row.flops_per_second or 0.0 for row in _like(case, done)), default=None)
    return case.flops(case.row.seq) / best if best else None


def measure(case: Case, s: Settings, deadline: float) -> Measurement:
    """Run the case: a warm-up, then `s.repeats` runs, or as many as end before the deadline. The median counts."""
    seconds: list[float] = []
    try:
        trim_memory(s.device)  # what earlier rows freed would count here
        peak = peak_from_now(s.device)
        run = case.start()
        while len(seconds) <= s.repeats and (not seconds or time.perf_counter() + seconds[0] <= deadline):
            seconds.append(_seconds(run, s.device))
        return case.measured(0, case.row.seq, peak, seconds=statistics.median(seconds[1:] or seconds))
    except (RuntimeError, MemoryError) as error:
        return replace(case.row, status="oom", reason=_out_of_memory(error))


def measure_stream(case: Case, s: Settings, deadline: float, on_tokens: Callable[[int], None]) -> Iterator[Measurement]:
    """Run the sequence to its end. Yield a row for each decade of positions as it is passed, then one for the whole.

    At the deadline and at Ctrl-C, the run ends as "stopped", with a row of what was measured so far. If memory runs
    out, it ends in the same way as "oom".
    """
    total, chunk = case.row.seq, case.row.chunk or case.row.seq
    position, decade, status, reason = 0, FIRST_DECADE, "ok", None
    interrupted: KeyboardInterrupt | None = None
    trim_memory(s.device)
    peak = peak_from_now(s.device)
    try:
        case.start()(chunk)  # warm-up
        run = case.start()
        whole = part = _Clock(0)
        while position < total and status == "ok":
            # a decade cuts a chunk in two, so that later chunks end where they would have ended
            size = min(chunk - position % chunk, min(decade, total) - position)
            run(size)
            wait_for(s.device)
            position += size
            on_tokens(size)
            if total > FIRST_DECADE and position in (decade, total):
                begin = part.position
                yield case.measured(begin, position, peak, start=begin, stop=position, **part.spent())
                part, decade = _Clock(position), decade * 10
            if position < total and time.perf_counter() >= deadline:
                status, reason = "stopped", f"the time is over after {position} tokens"
    except KeyboardInterrupt as error:
        status, reason, interrupted = "stopped", f"interrupted after {position} tokens", error
    except (RuntimeError, MemoryError) as error:
        status, reason = "oom", f"{_out_of_memory(error)} after {position} tokens"
    if position:
        reached: dict[str, Any] = {} if position == total else {"start": 0, "stop": position}
        yield case.measured(0, position, peak, status=status, reason=reason, **reached, **whole.spent())
    elif status == "oom":
        yield replace(case.row, status=status, reason=reason)
    if interrupted:
        raise interrupted


class _Clock:
    """A clock that starts at a position. It counts seconds, and the CPU seconds of all threads."""

    def __init__(self, position: int) -> None:
        self.position, self._began, self._threads = position, time.perf_counter(), time.process_time()

    def spent(self) -> dict[str, Any]:
        return {"seconds": time.perf_counter() - self._began, "cpu_seconds": time.process_time() - self._threads}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one run, without the time to free its results."""
    wait_for(device)
    begin = time.perf_counter()
    _ = run()  # kept
    wait_for(device)
    return time.perf_counter() - begin


def _out_of_memory(error: Exception) -> str:
    """Return that memory ran out, also of a tensor with more bytes than torch can count. Raises other errors again."""
    if is_out_of_memory(error) or "calculation overflowed" in str(error):
        return "memory ran out"
    raise error


def machine(s: Settings) -> str:
    """Describe the machine for a reader of the rows: its processor, cores, torch, kernel and the date (UTC)."""
    kernel = select_kernel(s.device, DTYPES[s.dtype], s.head_dim).name
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{device_name(s.device)}, {cores}, torch {torch.__version__}, {s.dtype}, kernel {kernel}, {_today()}"


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"
