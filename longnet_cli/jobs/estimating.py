"""The needs of a job: its memory by kind, FLOPs and time. `--dry-run` says it before a long job starts.

    documents --lengths--> windows --the Reader's steps--> ReadingPlan: tokens, FLOPs, the longest window
    texts --Sample.add--> bytes of each, and tokens of some --Sample.lengths--> tokens of each
    the first chunks of the longest document --try_reading--> Trial: peak memory, FLOP/s

A reading job is tried: its first chunks say what all of them take, except for what chunks of a longer document keep for
each other, which is counted. Nothing is written. With a sample, every text is read, which is fast, and its UTF-8 bytes
are counted. Only a uniform sample of the texts is tokenized. The estimate is the bytes of the other texts, times the
tokens per byte of the sample. This ratio estimate is close where documents differ in length but are alike in tokens per
byte.

Of a training, what a token takes in a step is measured, and all else is counted (`jobs/training/costs.py`). To measure,
a few tokens go through a few layers of a net. The layers' weights are memory that is never written to, so even those of
a large net take next to none. A job's peak is the sum of its kinds, as if everything were held at one time.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from longnet_cli.attention.cache import cached_rows
from longnet_cli.attention.spans import SINKS, Layout, segment_rows
from longnet_cli.jobs.reading_plan import ReadingPlan
from longnet_cli.jobs.trial import Task, try_reading
from longnet_cli.nets.config import LongNetConfig, NetConfig, TransformersConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import LOGITS_LIMIT, Net
from longnet_cli.running import device as machines
from longnet_cli.running.device import (
    DTYPES,
    free_memory,
    precision,
    resident_memory,
    resolve_dtype,
)
from longnet_cli.running.layerwise import fits_beside, kept_bytes
from longnet_cli.running.memory_maps import aligned
from longnet_cli.running.ranks.ranks import Ranks
from longnet_cli.running.reader import (
    Reader,
    fitting_chunk,
)

# of a CPU's memory in one run and in another: whether a large tensor fits a gap is chance
HEAP_GAPS = 1.2
TOKENS = 16  # of a measured pass, and half of those of another one


class _BytesInUse(TorchDispatchMode):
    """The bytes of all tensors that were made in this context and are still in use: `moments`, after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[int] = []
        self._sizes: dict[int, int] = {}  # by the address of a storage

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler, which takes a second, to leave this out of compiled code."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, key)
        self.moments.append(sum(self._sizes.values()))
        return out


def bytes_per_token(run: Callable[[int], object], tokens: int = TOKENS) -> int:
    """Return the bytes that one more token of `run(tokens)` takes, at the moment at which it takes the most.

    What does not grow with the tokens (gradients of weights, their casts) is not counted.
    """
    moments = []
    for number in (tokens, 2 * tokens):
        with _BytesInUse() as held:
            run(number)
        moments.append(held.moments)
    few, many = moments
    if len(few) != len(many):  # more tokens may take other operations
        return (max(many) - max(few)) // tokens
    return max(more - less for less, more in zip(few, many, strict=True)) // tokens


@contextmanager
def _any_kernel() -> Iterator[None]:
    """Let a CPU choose its attention kernel, though LONGNET_KERNEL may name a GPU's, on which the job will run."""
    name = os.environ.pop("LONGNET_KERNEL", None)
    try:
        yield
    finally:
        os.environ.update({"LONGNET_KERNEL": name} if name else {})


@lru_cache
@_any_kernel()
def activation_bytes(config: NetConfig, dtype: str, lora: str, again: bool) -> int:
    """Return the bytes that a token takes in a forward and backward pass of all layers, without logits.

    `lora` has the arguments of `models.hf.training.add_lora` as JSON, or null. With `again`, layers compute their
    activations again (`train.activation_checkpointing`). Raises ConfigError for wrong arguments of LoRA.
    """
    cpu = torch.device("cpu")
    one, two = (
        bytes_per_token(step_of_layers(config, layers, dtype, json.loads(lora), again, cpu))
        for layers in (1, 2)
    )
    return one + (config.num_layers - 1) * (two - one)


def step_of_layers(
    config: NetConfig,
    layers: int,
    dtype: str,
    lora: dict | None,
    again: bool,
    device: torch.device,
) -> Callable[[int], None]:
    """Return a function that runs the first layers of a net forward and backward, with so many tokens, without logits.

    For the arguments, see `activation_bytes`.
    """
    forward: Callable[[Tensor], Tensor]
    if isinstance(config, TransformersConfig):
        from longnet_cli.models.hf.training import unwritten  # imports transformers
        from longnet_cli.models.hf.trying import hidden_states

        net, modules = unwritten(config.source, layers, lora)
        forward = partial(hidden_states, net)
    else:
        net = forward = unwritten_longnet(cast(LongNetConfig, config), layers)
        modules = net.layers
    net.to(device)
    for module in net.modules():
        # its gradient is as large as the table; what follows has one all the same
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
            module.register_forward_hook(lambda module, args, embedded: embedded.requires_grad_())
    for layer in modules if again else ():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    for p in net.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step(tokens: int) -> None:
        with precision(dtype, device):
            hidden = forward(torch.zeros(1, tokens, dtype=torch.int64, device=device))
        hidden.backward(hidden.detach())

    step(TOKENS)  # the first pass loads libraries, and tries attention kernels
    return step


def unwritten_longnet(config: LongNetConfig, layers: int) -> LongNet:
    """Return a net of so many layers and one token on the CPU."""
    plain = {"num_layers": layers, "vocab_size": min(1, config.vocab_size)}
    with torch.device("meta"):
        net = LongNet(config.model_copy(update=plain))
    unwritten = {name: torch.empty(x.shape) for name, x in net.state_dict().items()}
    net.load_state_dict(unwritten, assign=True)  # `to_empty` would import half of torch
    return net


def itemsize_of(dtype: str, device: torch.device) -> int:
    """Return the bytes per number of matrix products."""
    return DTYPES[resolve_dtype(dtype, device)].itemsize


def cache_bytes(config: NetConfig, tokens: int, itemsize: int, *, written: bool = False) -> int:
    """Return what a stream has allocated after `tokens`, or has `written`. Training keeps more (`far_bytes`)."""
    number = 2 * config.head_dim * itemsize
    if isinstance(config, TransformersConfig) and config.memory != "segments":
        # one layer is being copied
        return (config.num_layers + 1) * config.kv_heads * tokens * number
    layout = Layout(config.pattern, config.num_heads, config.kv_heads)
    return config.num_layers * number * cached_rows(layout, tokens, written=written)


def logits_bytes(config: NetConfig, tokens: int) -> int:
    """Return the bytes of three float32 numbers for each logit: the log-softmax, its gradient and the logits' gradient.

    Without gradients, they are the logits, the log-softmax, and gaps in the heap.
    """
    return 4 * 3 * min(tokens * config.vocab_size, LOGITS_LIMIT)


class FarBytes(NamedTuple):
    """Bytes that chunks of one sequence keep for each other. `stored` can be spilled to a disk, `passing` cannot.

    `stored`: keys and values that later chunks see, until the backward pass is past them, and the sums of their
    gradients. `passing`: temporaries of one chunk and layer for its far rows and, on a GPU, copies of these rows.
    """

    stored: int
    passing: int


def far_bytes(config: NetConfig, seq_len: int, chunk: int, itemsize: int) -> FarBytes:
    """Return the bytes for one sequence of `seq_len` tokens, with `itemsize` bytes per number of a key."""
    pattern = config.pattern
    cut = seq_len > chunk
    layout = Layout(pattern, config.num_heads, config.kv_heads)
    stored = passing = 0
    backs = dict(enumerate(pattern.look_backs)) if cut else {}
    for level in (SINKS, *backs) if pattern.sinks and cut else backs:
        held = len(layout.lanes(level).offsets)
        numbers = 2 * segment_rows(pattern, level, seq_len) * held * config.head_dim
        seen = at_once = 1
        if level != SINKS:
            w = pattern.segment_lengths[level]
            seen = seen_segments(w, backs[level], chunk, seq_len)
            at_once = min(seen, backs[level] + bool(chunk % w))
        sums = aligned(max(4, itemsize) * numbers)
        stored += config.num_layers * (aligned(itemsize * numbers) * seen + sums * at_once)
        passing += (itemsize + 4) * numbers * at_once
    return FarBytes(stored, passing)


def seen_segments(w: int, back: int, chunk: int, seq_len: int) -> int:
    """Return how many segments of w tokens later chunks see, in a sequence of `seq_len` tokens in chunks of `chunk`.

    A chunk sees the segment inside which it starts, if any, and the `back` segments before its own.
    """
    ends = -(-seq_len // chunk) - 1
    # no segment is seen from two ends; an end on a segment's edge sees one fewer
    if chunk >= (1 + back) * w:
        return ends * (1 + back) - ends // (w // math.gcd(w, chunk))
    # all segments, from the first one that the first end sees up to the last end
    return -(-ends * chunk // w) - max(0, chunk // w - back) if ends else 0


def kept_by_chunks(reader: Reader, plan: ReadingPlan, chunk: int) -> dict[str, int]:
    """Return the bytes that chunks of the longest window keep for each other in memory, by kind.

    cache: keys and values, in a causal net. hidden: hidden states, in a bidirectional net, and the keys of a layer,
    unless they are on a disk or, because a GPU has no room, in the host's memory.
    """
    net = reader.model
    config = reader.model.config
    device = reader.device
    if config.causal and plan.in_chunks(chunk):
        itemsize = itemsize_of(reader.dtype, device)
        written = device.type == "cpu"
        return {"cache": cache_bytes(config, plan.longest, itemsize, written=written)}
    size = spilled_bytes(net, plan, chunk, reader.ranks)
    fits = device.type == "cpu" or fits_beside(config.forward_bytes(chunk), size, device)
    return {"hidden": size} if fits and not reader.spill else {}


def spilled_bytes(net: Net, plan: ReadingPlan, chunk: int, ranks: Ranks) -> int:
    """Return the bytes of hidden states that one rank keeps between layers; 0 if no window is read so."""
    if net.config.causal or not net.layer_by_layer or not plan.in_chunks(chunk):
        return 0
    return kept_bytes(cast(LongNet, net), plan.longest, chunk, ranks)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The memory of a job, in bytes of one rank by kind, and other facts about it, named as in the machine format.

    `free` is the memory that is free besides the `program`, which is one of the kinds; None where the system does not
    say. `others` are counts of what is read, and FLOPs and seconds of the whole job on all ranks. `chunk_that_fits` is
    a shorter chunk that fits where the job's own does not, `spillable` the kinds that --spill would keep on a disk, and
    `hint` says what may make the job faster.
    """

    memory: dict[str, int]
    free: int | None
    others: dict[str, Any]
    chunk_that_fits: int | None
    spillable: Sequence[str] = ()
    hint: str = ""

    # in use when `free` is measured, or free again later
    HELD: ClassVar[tuple[str, ...]] = ("program", "loading")

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def beyond(self) -> int:
        """Bytes that the job needs besides the kinds in `HELD`."""
        return sum(size for kind, size in self.memory.items() if kind not in self.HELD)

    @property
    def fits(self) -> bool:
        return self.free is None or self.beyond <= self.free

    @property
    def largest(self) -> str:
        """The largest kind of memory that is not held already."""
        return max((size, kind) for kind, size in self.memory.items() if kind not in self.HELD)[1]

    @property
    def advice(self) -> str:
        """The changes that make a job fit that does not."""
        if self.chunk_that_fits:
            return f"--chunk {self.chunk_that_fits} fits"
        if self.largest in self.spillable:
            return "--spill DIR keeps the largest part on a disk"
        return "no chunk fits: choose shorter windows, a smaller model or a larger device"

    @property
    def facts(self) -> dict[str, Any]:
        """The keys and values of the machine format."""
        sizes = {
            "memory_bytes": self.memory,
            "peak_bytes": self.peak,
            "free_bytes": self.free,
            "fits": self.fits,
        }
        return self.others | sizes


class Room(NamedTuple):
    """The bytes that a process holds, and the bytes that are free; None if the system does not say."""

    held: int
    free: int | None

    @classmethod
    def now(cls, device: torch.device) -> Room:
        return cls(resident_memory(device), free_memory(device))


def estimate_reading(
    reader: Reader,
    plan: ReadingPlan,
    task: Task,
    *,
    room: Room,
    kept: dict[str, int] | None = None,
) -> Estimate:
    """Estimate what reading as planned takes, from a trial.

    `room` is the memory before the net was loaded, `kept` what the job itself keeps of the longest document, in bytes
    by kind.
    """
    net = reader.model
    config = reader.model.config
    spill = bool(reader.spill)
    most_while_loading = machines.peak_memory(reader.device)
    trial = try_reading(reader, plan, task, room.free)
    rate = reader.all_ranks.own(trial.rate, reader.device)
    weights = sum(x.numel() * x.element_size() for x in (*net.parameters(), *net.buffers()))
    program = max(0, trial.idle - weights)
    free = None if room.free is None else max(0, room.free - max(0, program - room.held))
    stored = sum(kept_by_chunks(trial.reader, trial.plan, trial.reader.chunk).values())
    gaps = HEAP_GAPS if reader.device.type == "cpu" else 1.0
    at_once = gaps * max(0, trial.most - trial.idle - stored) / (trial.plan.largest or 1)

    def needed(chunk: int) -> dict[str, int]:
        tokens = min(plan.largest, chunk) if config.streams else plan.largest
        kinds = {"weights": weights, "reading": round(tokens * at_once)}
        kinds |= kept_by_chunks(reader, plan, chunk) | (kept or {})
        return {kind: size for kind, size in kinds.items() if size}

    memory = {"program": program, **needed(reader.chunk)}
    # for files whose weights were converted to another type
    memory["loading"] = max(0, most_while_loading - sum(memory.values()))
    flops = plan.flops(task.scores)
    on_disk = spilled_bytes(net, plan, reader.chunk, reader.ranks)
    on_fp32 = reader.device.type == "cpu" and reader.dtype == "fp32"
    instructions = machines.bf16_instructions() if on_fp32 else None
    return Estimate(
        memory={kind: size for kind, size in memory.items() if size},
        free=free,
        others={
            "documents": plan.documents,
            "left_out": plan.left_out,
            "longest": plan.longest_document,
            "sampled": plan.sampled,
            "tokens_read": plan.read,
            "parameters": config.num_parameters(),
            "flops_per_token": flops / (plan.read or 1),
            "tokens": plan.tokens,
            "flops": flops,
            "seconds": flops / (rate * reader.all_ranks.world) + plan.seconds,
            "dtype": reader.dtype,
            "chunk": reader.chunk,
            "spill_bytes": on_disk if spill else 0,
            "flops_per_second": rate,
            "tokens_per_second": plan.read * rate / (flops or 1),
            "reading_seconds": plan.seconds,
        },
        chunk_that_fits=fitting_chunk(lambda n: sum(needed(n).values()), reader.chunk, free)
        if config.streams
        else None,
        spillable=("hidden",) if on_disk and not spill else (),
        hint=f"this CPU has {instructions}: try --dtype bf16, which is often faster"
        if instructions
        else "",
    )
