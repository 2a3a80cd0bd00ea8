r"""Plans for machines that one does not have, `--dry-run --on`: memory and time of a job, for every way to share it.

    estimates of this package   FLOPs, bytes          \
    running.ranks.exchange      what ranks send        >  memory of a device, seconds by part, what limits
    `Rates`                     rates of the machine  /

Every count comes from the code that runs. Only the division by rates, and what overlaps with what, is said here: an
exchange is hidden behind a layer's attention to near keys; nothing else overlaps. `--on` names a machine of
machines.toml, or a file of one's own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from longnet_cli.attention.branches import shard_flops
from longnet_cli.attention.spans import common_span, far_spans, open_spans, span_rows
from longnet_cli.basics.configuration import StrictModel, nearest, parse, read_text, validate
from longnet_cli.basics.errors import ConfigError
from longnet_cli.basics.sizes import format_size
from longnet_cli.nets.net import NetConfig
from longnet_cli.running.ranks.exchange import Exchange, even_edges

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = Path(__file__).with_name("machines.toml")
KNOWN_BY = {  # who knows a rate: the tables of a machine, in words
    "measured": "measured by `longnet bench --calibrate`",
    "others": "measured by others",
    "data_sheet": "from data sheets",
    "assumed": "assumed",
}

UNTRIED = "arithmetic: no GPU and no cluster has run this program"


class Rates(StrictModel):
    """Rates of one device. FLOP/s, bytes per second in one direction, bytes, seconds.

    products: matrix products. share: of that rate, what a net's products reach. attention, attention_backward: the
    kernel's two passes. bandwidth: the device's memory, under elementwise operations. node_link, network: to another
    device of the node, and of another node. message: the time of an empty message. host_link: to the host's memory.
    disk: of files. memory: of the device. reserved: of that, what the program takes. host_memory: of a node.
    """

    products: float | None = Field(default=None, gt=0)
    share: float | None = Field(default=None, gt=0, le=1)
    attention: float | None = Field(default=None, gt=0)
    attention_backward: float | None = Field(default=None, gt=0)
    bandwidth: float | None = Field(default=None, gt=0)
    node_link: float | None = Field(default=None, gt=0)
    network: float | None = Field(default=None, gt=0)
    message: float | None = Field(default=None, ge=0)
    host_link: float | None = Field(default=None, gt=0)
    disk: float | None = Field(default=None, gt=0)
    memory: float | None = Field(default=None, gt=0)
    reserved: float | None = Field(default=None, ge=0)
    host_memory: float | None = Field(default=None, gt=0)


class Machine(StrictModel):
    """`devices` of one kind, `node` of them in each node. Every rate is in exactly one of the tables, by who knows it.

    The rates of products and attention are those of `dtype`.
    """

    name: str = ""
    device: Literal["cpu", "cuda"]
    dtype: Literal["fp32", "bf16"]
    devices: int = Field(default=1, gt=0, le=1 << 16)
    node: int = Field(default=1, gt=0)
    measured: Rates = Rates()
    others: Rates = Rates()
    data_sheet: Rates = Rates()
    assumed: Rates = Rates()

    @model_validator(mode="after")
    def _check(self) -> Machine:
        for rate in Rates.model_fields:
            tables = [table for table in KNOWN_BY if getattr(getattr(self, table), rate) is not None]
            if len(tables) != 1:
                found = f"is in {' and in '.join(tables)}" if tables else "is missing"
                raise ValueError(f"{rate} {found}: give it in one of the tables {', '.join(KNOWN_BY)}")
        return self

    def rate(self, name: str) -> float:
        """Return a rate by its name in `Rates`."""
        return next(x for table in KNOWN_BY if (x := getattr(getattr(self, table), name)) is not None)

    def known(self) -> dict[str, list[str]]:
        """Return the names of the rates by table; tables without a rate are left out."""
        found = {table: [*getattr(self, table).model_dump(exclude_none=True)] for table in KNOWN_BY}
        return {table: names for table, names in found.items() if names}

    def link(self, ranks: int) -> float:
        """Return the bytes per second of the slowest link among so many neighbouring ranks."""
        return self.rate("network" if ranks > self.node else "node_link")


def find_machine(name: str) -> Machine:
    """Return the machine that `--on` names: `h100x64` of the table, or a TOML file. Raises ConfigError for others."""
    if name.endswith(".toml") or "/" in name:
        return validate(Machine, {"name": name, **_read(Path(name))}, name)
    known, (kind, count) = _read(TABLE), re.fullmatch(r"(.*?)(?:x(\d+))?", name).groups()  # type: ignore[union-attr]
    if kind not in known:
        close = nearest(kind, known)
        meant = f": did you mean '{close}x{count or 1}'?" if close else "."
        raise ConfigError(
            f"--on: unknown machine '{name}'{meant} Known are {', '.join(f'{each}xN' for each in known)}, with N "
            "devices; for a machine of your own, name a .toml file, as `longnet bench --calibrate` writes it"
        )
    return validate(Machine, {"name": name, "devices": int(count or 1), **known[kind]}, f"--on {name}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return parse(read_text(path), tomllib.loads)
    except FileNotFoundError:
        raise ConfigError(f"--on {path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"--on {path}: {error.strerror}") from None
    except ValueError as error:  # of the parser, or not UTF-8
        raise ConfigError(f"--on {path}: not TOML: {error}") from None


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
        if self.peak - self.memory.get("cache", 0) - self.memory.get("key_gradients", 0) <= self.room:
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

    `seconds` of an exchange, seconds of gathering what blocks are chosen from, bytes of far rows that its shard attends
    to, bytes of gradients that are summed over the ranks (of chosen blocks, and when the chunk is one of several), and
    attention FLOPs relative to the mean of the chunk.
    """

    seconds: float = 0.0
    gathering: float = 0.0
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
    gathering = (sp - 1) * itemsize * plan.gathered(shape) / machine.link(sp)
    far = itemsize * sum(plan.sizes([[parcel for parcel in plan.joined if parcel.attended]], shape))
    first, last, pattern = edges[rank], edges[rank + 1], config.pattern
    summed = 4 * plan.summed(shape)
    if cut and config.causal:
        summed *= 2  # those of later chunks too
        for level, begin, end in open_spans(pattern, start + whole):
            mine = common_span(pattern, level, begin, start, end)
            summed += 2 * 4 * config.head_dim * sum(span_rows(pattern, mine, config.num_heads, config.kv_heads))
    spans = tuple(far_spans(pattern, first, last, config.causal, seq_len))
    heads = config.num_heads, config.head_dim
    flops = shard_flops(pattern, *heads, first, last - first, config.causal, spans, seq_len, config.kv_heads)
    mean = (config.attention_flops(start + whole) - config.attention_flops(start)) / config.num_layers / sp
    return Shared(seconds, gathering, far, summed, max(1.0, flops / mean))


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
