"""Plans for machines that one does not have: `--dry-run --on`. The memory and time of a job, for every way to share it.

    estimates of this package   FLOPs, bytes          \\
    runtime.exchange            what ranks send        >  memory of a device, seconds by part, what limits
    estimating.machines         rates of the machine  /

Every count comes from the code that runs. Only the division by rates, and what overlaps with what, is said here: an
exchange is hidden behind a layer's attention to near keys; nothing else overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from longnet_cli.attention.branches import shard_flops
from longnet_cli.attention.spans import common_span, far_spans, open_spans, span_rows
from longnet_cli.errors import ConfigError
from longnet_cli.estimating.machines import Machine
from longnet_cli.model.net import NetConfig
from longnet_cli.runtime.exchange import Exchange, even_edges
from longnet_cli.sizes import format_size

ROOM = 0.9  # share of a device's memory that a plan may fill: allocators leave gaps
HIDDEN = "exchange, hidden"  # a part of the time that other parts cover


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """One way to share a job: `dp` groups of `sp` devices. Sizes are bytes of one device.

    `seconds` has the time by part: of one step of `seq_len` tokens per sequence, or of all documents. `forward` is the
    share of the first pass in it. `total` is the time of the whole job, `tokens` what `seconds` are for, on all
    devices, `flops` what the model needs for them.
    """

    machine: Machine
    sp: int
    dp: int
    chunk: int
    shard: str = ""
    again: bool = False  # layers are computed again in the backward pass
    memory: dict[str, int]
    seconds: dict[str, float]
    total: float
    tokens: int
    flops: float
    forward: float = 0.0
    what: str = "a step"  # that takes `seconds`
    host: int = 0  # bytes of a node's memory

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def room(self) -> int:
        return int(ROOM * self.machine.rate("memory"))

    @property
    def fits(self) -> bool:
        return self.peak <= self.room and self.host <= self.machine.rate("host_memory")

    @property
    def step(self) -> float:
        return sum(seconds for part, seconds in self.seconds.items() if part != HIDDEN)

    @property
    def limit(self) -> str:
        """The part that takes the most time."""
        return max((seconds, part) for part, seconds in self.seconds.items() if part != HIDDEN)[1]

    @property
    def largest(self) -> str:
        """The kind that takes the most memory."""
        return max((size, kind) for kind, size in self.memory.items() if kind != "program")[1]

    @property
    def advice(self) -> str:
        if self.peak - self.memory.get("cache", 0) <= self.room:
            return "keep what chunks remember, or hidden states, on a disk (--spill DIR)"
        return "take more devices or larger ones, shorter sequences or a smaller model"

    @property
    def options(self) -> str:
        shard = f" --shard {self.shard}" if self.shard else ""
        again = " --set train.activation_checkpointing=true" if self.again else ""
        return f"--sp {self.sp} --dp {self.dp} --chunk {format_size(self.chunk)}{shard}{again}"

    def as_dict(self) -> dict[str, Any]:
        """Return the machine format."""
        return {
            "machine": self.machine.name, "devices": self.machine.devices, "sp": self.sp, "dp": self.dp,
            "chunk": self.chunk, "shard": self.shard or None,
            "activation_checkpointing": self.again, "memory_bytes": self.memory, "peak_bytes": self.peak,
            "room_bytes": self.room, "host_bytes": self.host, "fits": self.fits,
            "seconds_by_part": self.seconds, "limit": self.limit,
            "seconds_at_once": self.step, "forward_seconds": self.forward, "tokens_at_once": self.tokens,
            "seconds": self.total, "flops": self.flops, "rates": self.machine.known(),
        }  # fmt: skip


class Shared(NamedTuple):
    """Costs of a chunk that ranks share, for one device: per layer, its busiest rank.

    `seconds` of an exchange, bytes of far rows that its shard attends to, bytes whose gradients are summed over the
    ranks when the chunk is one of several, and attention FLOPs relative to the mean of all tokens.
    """

    seconds: float = 0.0
    far: int = 0
    summed: int = 0
    balance: float = 1.0


def shared(config: NetConfig, machine: Machine, seq_len: int, chunk: int, sp: int) -> Shared:
    """Return the costs of sharing the last full chunk of `chunk` tokens per rank, from the plan of a real exchange.

    In a causal net the last rank receives the most, in a bidirectional one a rank in the middle.
    """
    if sp == 1:
        return Shared()
    whole, itemsize = min(seq_len, chunk * sp), 2 if machine.dtype == "bf16" else 4
    start = (seq_len // whole - 1) * whole
    edges, rank, cut = even_edges(start, whole, sp), sp - 1 if config.causal else sp // 2, whole < seq_len
    plan = Exchange(config, edges, rank=rank, cached=cut and config.causal)
    shape = 1, 0, config.kv_heads, config.head_dim
    seconds = 0.0
    for sizes in (plan.sizes(plan.sent, shape), plan.sizes(plan.received, shape)):
        inside = sum(size for peer, size in enumerate(sizes) if peer // machine.node == rank // machine.node)
        links = inside / machine.rate("node_link"), (sum(sizes) - inside) / machine.rate("network")
        messages = machine.rate("message") * sum(size > 0 for size in sizes)
        seconds = max(seconds, itemsize * max(links) + messages)
    far = itemsize * sum(plan.sizes([[parcel for parcel in plan.joined if parcel.attended]], shape))
    first, last, pattern = edges[rank], edges[rank + 1], config.pattern
    summed = 0
    if cut and config.causal:
        for level, begin, end in open_spans(pattern, start + whole):
            mine = common_span(pattern, level, begin, start, end)
            summed += 2 * 4 * config.head_dim * sum(span_rows(pattern, mine, config.num_heads, config.kv_heads))
    spans = tuple(far_spans(pattern, first, last, config.causal, seq_len))
    heads = config.num_heads, config.head_dim
    flops = shard_flops(pattern, *heads, first, last - first, config.causal, spans, seq_len, config.kv_heads)
    mean = config.attention_flops(seq_len) / seq_len / config.num_layers * (last - first)
    return Shared(seconds, far, summed, max(1.0, flops / mean))


def meshes(devices: int, sp: int | None, dp: int | None) -> list[tuple[int, int]]:
    """Return every (sp, dp) that uses all devices, with those that are named. Raises ConfigError where none does."""
    every = [(n, devices // n) for n in range(1, devices + 1) if devices % n == 0]
    found = [(n, groups) for n, groups in every if sp in (None, n) and dp in (None, groups)]
    if not found:
        fits = ", ".join(f"{groups} x {n}" for n, groups in every)
        raise ConfigError(
            f"dp x sp is {dp or 'any'} x {sp or 'any'}, and there are {devices} devices: {fits} would fit"
        )
    return found


def ordered(plans: Sequence[JobPlan]) -> list[JobPlan]:
    """Return the plans that fit, the fastest first, then the others, by their memory."""
    return sorted(plans, key=lambda plan: (not plan.fits, plan.total if plan.fits else plan.peak, plan.shard == "full"))
