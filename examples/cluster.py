"""Plan a run for machines that one does not have: memory and time, for every way to share it. docs/ranks.md

    python examples/cluster.py plan longnet-2.7b --on h100x8 --set train.batch_tokens=4Mi    # training by a recipe
    python examples/cluster.py plan --model longnet-tiny --tokens 1Gi --on h100x8            # reading a document
    torchrun --standalone --nproc-per-node 2 examples/cluster.py calibrate here.toml         # this machine's rates

All counts of FLOPs and bytes come from the code that runs. Only the division by rates, and what overlaps with what, is
said here: an exchange is hidden behind a layer's attention to near keys, and nothing else overlaps. A plan is
arithmetic: no GPU and no cluster has run this program.
"""

from __future__ import annotations

import itertools
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer

from longnet_cli.attention import Pattern, dilated_attention
from longnet_cli.attention.branches import BACKWARD_FLOPS, attention_flops, branches, pairs
from longnet_cli.attention.notation import format_pattern, parse_pattern
from longnet_cli.attention.spans import Lanes, far_spans, open_spans
from longnet_cli.basics.errors import ConfigError, InputWarning, LongNetError
from longnet_cli.basics.sizes import (
    format_bytes,
    format_count,
    format_duration,
    format_size,
    parse_size,
)
from longnet_cli.jobs.reading_plan import ReadingPlan, cache_bytes, spilled_bytes
from longnet_cli.jobs.training.costs import StepFlops, step_flops, stored_bytes, training_memory
from longnet_cli.jobs.training.limits import check_ranks
from longnet_cli.jobs.training.recipe import Recipe, Stage, load_recipe, parse_overrides
from longnet_cli.jobs.training.step_bytes import (
    TRIED_TOKENS,
    bytes_per_token,
    itemsize_of,
    logits_bytes,
    unwritten_longnet,
)
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.config import LongNetConfig, NetConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import Net
from longnet_cli.running.device import (
    DTYPES,
    free_memory,
    precision,
    resident_memory,
    resolve_dtype,
)
from longnet_cli.running.ranks.exchange import Exchange
from longnet_cli.running.ranks.ranks import Ranks, even_edges, join, leave
from longnet_cli.running.reader import GPU_BENCH_CHUNK, SHORTEST_CHUNK, chunk_beside, fitting_chunk

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KNOWN_BY = {  # the tables of a machine in a TOML file: who knows its rates
    "measured": "measured by `cluster.py calibrate`",
    "others": "measured by others",
    "data_sheet": "from data sheets",
    "assumed": "assumed",
}
RATES = (  # machines.toml says what each is
    "products", "share", "attention", "attention_backward", "bandwidth", "node_link", "network", "message",
    "host_link", "disk", "memory", "reserved",
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """`devices` of one kind, `node` of them in each node. `known` says by which table each rate is known."""

    name: str
    device: str
    dtype: str
    devices: int
    node: int
    rates: dict[str, float]
    known: dict[str, list[str]]

    @property
    def itemsize(self) -> int:
        """The bytes per number of matrix products."""
        return DTYPES[self.dtype].itemsize

    def link(self, ranks: int) -> float:
        """Return the bytes per second of the slowest link among so many neighbouring ranks."""
        return self.rates["network" if ranks > self.node else "node_link"]


def find_machine(name: str) -> Machine:
    """Return the machine of a name, as h100x64 of machines.toml, or of a .toml file. Raises ConfigError for others."""
    of_own = name.endswith(".toml")
    path = Path(name) if of_own else Path(__file__).with_name("machines.toml")
    try:
        facts: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--on {name}: {error}") from None
    if not of_own:
        kind, _, count = name.partition("x")
        if kind not in facts or not (count or "1").isdigit():
            raise ConfigError(
                f"--on {name}: known are {', '.join(f'{kind}xN' for kind in facts)}, and .toml files"
            )
        facts = facts[kind] | {"devices": int(count or 1)}
    if facts.get("device") not in ("cpu", "cuda") or facts.get("dtype") not in ("fp32", "bf16"):
        raise ConfigError(f"--on {name}: device is cpu or cuda, and dtype is fp32 or bf16")
    known = {by: list(facts[by]) for by in KNOWN_BY if by in facts}
    given = list(itertools.chain(*known.values()))
    if wrong := sorted({*given} ^ {*RATES}) or sorted(
        rate for rate in RATES if given.count(rate) > 1
    ):
        raise ConfigError(
            f"--on {name}: {wrong[0]}: each of {', '.join(RATES)} belongs into one table"
        )
    rates = {rate: float(value) for by in known for rate, value in facts[by].items()}
    sizes = facts.get("devices", 1), facts.get("node", 1)
    if (
        min(
            *sizes, *(value for rate, value in rates.items() if rate not in ("message", "reserved"))
        )
        <= 0
    ):
        raise ConfigError(f"--on {name}: devices, node and rates must be positive")
    return Machine(name, facts["device"], facts["dtype"], *sizes, rates, known)


HIDDEN = "exchange, hidden"  # a part of the time that other parts cover
ROOM = 0.9  # share of a device's memory that a plan may fill: allocators leave gaps
BACKWARD_MOVES = 2  # bytes that elementwise operations move in a backward pass, times the forward's
UPDATE_BYTES = (
    40  # per parameter: AdamW reads and writes weights and moments, clipping the gradients
)
TENSORS = 20  # parameters of a layer: without FSDP, each has its own all-reduce


@dataclass(frozen=True)
class Plan:
    """One way to share a job: `memory` (bytes of a device) by kind, `seconds` of a step or a document by part."""

    options: str
    memory: dict[str, int]
    seconds: dict[str, float]
    tokens: int  # that `seconds` are for, on all devices
    total: float  # seconds of the whole job
    room: float
    idle: int = 0  # devices without a document

    @property
    def peak(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.room

    @property
    def at_once(self) -> float:
        return sum(self.seconds.values()) - self.seconds[HIDDEN]


def ordered(plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans that fit, the fastest first, then the others, by their memory.

    Plans come in with the simplest first, which stay before others whose three printed digits are the same.
    """
    return sorted(
        plans,
        key=lambda plan: (not plan.fits, float(f"{plan.total if plan.fits else plan.peak:.3g}")),
    )


class Shared(NamedTuple):
    """Costs of a chunk that ranks share, per layer, of its busiest rank."""

    seconds: float = 0.0  # of an exchange of far rows
    far: int = 0  # bytes of far rows that its shard attends to
    summed: int = 0  # bytes of gradients that are summed over the ranks
    balance: float = 1.0  # attention FLOPs, relative to the mean of the chunk


def shared(config: NetConfig, machine: Machine, tokens: int, chunk: int, sp: int) -> Shared:
    """Return the costs of sharing the last full chunk of `chunk` tokens per rank, from the plan of a real exchange.

    In a causal net the last rank receives the most, in a bidirectional one a rank in the middle. Where the chunk is one
    of several, gradients of rows that later chunks see are summed.
    """
    if sp == 1:
        return Shared()
    whole, pattern, rates = min(tokens, chunk * sp), config.pattern, machine.rates
    start = (tokens // whole - 1) * whole
    rank, cut = sp - 1 if config.causal else sp // 2, whole < tokens
    edges = even_edges(start, whole, sp)
    exchange = Exchange(config, edges, rank=rank, cached=cut and config.causal)
    shape = 1, 0, config.kv_heads, config.head_dim
    seconds = 0.0
    for numbers in (exchange.sizes(exchange.sent, shape), exchange.sizes(exchange.received, shape)):
        inside = sum(
            n for peer, n in enumerate(numbers) if peer // machine.node == rank // machine.node
        )
        slower = max(inside / rates["node_link"], (sum(numbers) - inside) / rates["network"])
        seconds = max(
            seconds, machine.itemsize * slower + rates["message"] * sum(n > 0 for n in numbers)
        )
    attended = [parcel for parcel in exchange.joined if parcel.attended]
    far = machine.itemsize * sum(exchange.sizes([attended], shape))
    summed = 0
    if cut and config.causal:
        lanes = Lanes(pattern, config.num_heads, config.kv_heads)
        for span in open_spans(pattern, start + whole):
            rows = sum(lanes.counts(span.part(start, span.stop)))
            summed += 2 * 4 * config.head_dim * rows
    flops = shard_flops(config, edges[rank], edges[rank + 1], tokens)
    mean = (
        (config.attention_flops(start + whole) - config.attention_flops(start))
        / config.num_layers
        / sp
    )
    return Shared(seconds, far, summed, max(1.0, flops / mean))


def shard_flops(config: NetConfig, first: int, last: int, total: int) -> int:
    """Return the FLOPs of a layer's forward pass over tokens [first, last) of a document: near and far keys."""
    pattern, causal = config.pattern, config.causal
    spans = tuple(far_spans(pattern, first, last, causal, total)) if first < last else ()
    lanes = Lanes(pattern, config.num_heads, config.kv_heads)
    calls = branches(lanes, first, last - first, causal, "exact", spans, total)
    return 2 * config.head_dim * sum(map(pairs, calls))


def moved_bytes(config: NetConfig, itemsize: int) -> tuple[float, int]:
    """Return the bytes per token that a forward pass's elementwise operations move: of all layers, of the logits.

    Of the residual stream, in float32, a layer's two norms read it, and two sums read and write it: 24 bytes. Of
    numbers as wide as matrix products', the norms write 2, the rotations of q and k move 4, the norm of attention's
    output 2, and the sums read 2. Gelu and the inner norm of the feed-forward part read and write `ffn_dim` numbers.
    The merge of levels reads an output of each level and moves a float32 sum, for 1 / r of the tokens. The logarithm
    of a logit moves three float32 numbers.
    """
    merged = sum(1 / rate for rate in config.pattern.dilation_rates) * (8 + itemsize)
    layer = config.dim * (24 + 10 * itemsize + merged) + 4 * itemsize * config.ffn_dim
    return config.num_layers * layer, 12 * config.vocab_size


def seconds_by_part(
    config: NetConfig,
    machine: Machine,
    sp: int,
    tokens: int,
    chunk: int,
    sequences: float,
    work: StepFlops,
    predicted: float = 0.0,
) -> dict[str, float]:
    """Return the seconds by part of passes over `sequences` of so many tokens, on a group of `sp` devices.

    `work` has their FLOPs per token. The share `predicted` of the tokens has logits in a backward pass.
    """
    rates, back = machine.rates, BACKWARD_MOVES if work.attention_backward else 0
    costs, of_device = shared(config, machine, tokens, chunk, sp), sequences * tokens / sp
    chunks = ceil(tokens / (chunk * sp))
    exchanges = sequences * chunks * config.num_layers
    forward = work.attention / work.forwards / rates["attention"]  # seconds per token, of one pass
    backward = work.attention_backward / rates["attention_backward"]
    # Tokens times layers of the attention that hides an exchange
    near = tokens / sp / chunks / config.num_layers
    covers = [(work.forwards, near * forward), (bool(back), near * backward)]
    layers, logits = moved_bytes(config, machine.itemsize)
    moved = (work.forwards + back) * layers + (work.logits + back * predicted) * logits
    summing = 2 * (1 - 1 / sp) * costs.summed / machine.link(sp) if back else 0.0
    open_exchange = sum(times * max(0.0, costs.seconds - cover) for times, cover in covers)
    return {
        "matrix products": of_device * work.products / (rates["products"] * rates["share"]),
        "attention": of_device * costs.balance * (work.forwards * forward + backward),
        "elementwise": of_device * moved / rates["bandwidth"],
        "exchange": exchanges * (open_exchange + summing),
        HIDDEN: exchanges * sum(times * min(costs.seconds, cover) for times, cover in covers),
    }


def meshes(machine: Machine, sp: int | None = None, dp: int | None = None) -> list[tuple[int, int]]:
    """Return every (sp, dp) that uses all devices, with those that are named. Raises ConfigError where none does."""
    every = [
        (n, machine.devices // n) for n in range(1, machine.devices + 1) if machine.devices % n == 0
    ]
    named = [(n, groups) for n, groups in every if sp in (None, n) and dp in (None, groups)]
    if not named:
        raise ConfigError(
            f"dp x sp is {dp or 'any'} x {sp or 'any'}, and there are {machine.devices} devices"
        )
    return named


def training_plans(recipe: Recipe, machine: Machine) -> list[Plan]:
    """Return plans for training by a recipe, in order.

    What it names of sp, dp, shard, chunk and activation_checkpointing stays; of the rest, every choice is tried.
    """
    if recipe.train.dtype not in ("auto", machine.dtype):
        raise ConfigError(
            f"the rates of {machine.name} are of {machine.dtype}, not of {recipe.train.dtype}"
        )
    recipe = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"dtype": machine.dtype})}
    )
    named, train, plans, refusal = recipe.parallel, recipe.train, [], None
    shards = [named.shard] if "shard" in named.model_fields_set else ["none", "full"]
    if machine.devices == 1:
        shards = ["none"]
    again = (
        [train.activation_checkpointing]
        if "activation_checkpointing" in train.model_fields_set
        else [False, True]
    )
    for (sp, dp), shard, checkpoints in itertools.product(
        meshes(machine, named.sp, named.dp), shards, again
    ):
        parallel = named.model_copy(update={"sp": sp, "dp": dp, "shard": shard})
        update = {
            "train": train.model_copy(update={"activation_checkpointing": checkpoints}),
            "parallel": parallel,
        }
        try:
            plans.append(
                training_plan(
                    recipe.model_copy(update=update), machine, Ranks(0, machine.devices, sp)
                )
            )
        except ConfigError as error:
            refusal = error
    if refusal and not plans:
        raise refusal
    return ordered(plans)


def training_plan(recipe: Recipe, machine: Machine, ranks: Ranks) -> Plan:
    """Return the plan for these ranks, with the recipe's chunk or the longest that fits. Raises as `check_ranks`."""
    config, device, room = (
        recipe.model,
        torch.device(machine.device),
        ROOM * machine.rates["memory"],
    )
    longest, program = (
        max(recipe.train.stages, key=lambda stage: stage.seq_len),
        int(machine.rates["reserved"]),
    )
    if not recipe.names_chunk:

        def needed(chunk: int) -> int:
            return program + sum(training_memory(recipe.with_chunk(chunk), device, ranks).values())

        share = ceil(longest.seq_len / ranks.sp)
        most = min(share, GPU_BENCH_CHUNK) if config.causal else share
        shortest = min(SHORTEST_CHUNK, most) if config.causal else most
        powers = [1 << power for power in range(shortest.bit_length(), most.bit_length())]
        chunk = fitting_chunk(needed, most, room, shortest)
        recipe = recipe.with_chunk(chunk or min([shortest, *powers, most], key=needed))
    check_ranks(recipe, ranks)
    steps = {stage: step_seconds(recipe, stage, machine, ranks) for stage in recipe.train.stages}
    far = (
        config.num_layers
        * shared(config, machine, longest.seq_len, recipe.train.chunk, ranks.sp).far
    )
    memory = {"program": program, **training_memory(recipe, device, ranks), "far rows": far}
    again = (
        " --set train.activation_checkpointing=true"
        if recipe.train.activation_checkpointing
        else ""
    )
    mesh = f"--sp {ranks.sp} --dp {ranks.dp} --chunk {format_size(recipe.train.chunk)}"
    total = sum(
        stage.steps * (sum(parts.values()) - parts[HIDDEN]) for stage, parts in steps.items()
    )
    options = f"{mesh} --shard {recipe.parallel.shard}{again}"
    return Plan(options, memory, steps[longest], recipe.step_tokens(longest), total, room)


def step_seconds(recipe: Recipe, stage: Stage, machine: Machine, ranks: Ranks) -> dict[str, float]:
    """Return the seconds of a step by part. Gradients are summed over all devices, in a ring."""
    config, train, world, rates = recipe.model, recipe.train, ranks.world, machine.rates
    sequences, full = train.windows(stage) / ranks.dp, recipe.parallel.shard == "full"
    passes = seconds_by_part(
        config, machine, ranks.sp, stage.seq_len, train.chunk, sequences, step_flops(recipe, stage, ranks),
        train.predicted,
    )  # fmt: skip
    messages = (2 if full else TENSORS) * config.num_layers * (world > 1)
    ring = 2 * (world - 1) / world / machine.link(world)
    spilled = stored_bytes(recipe, torch.device(machine.device), ranks) if train.spill else 0
    return passes | {
        "weights": ring * 4 * config.trained + messages * rates["message"],
        "update": UPDATE_BYTES * config.trained / (world if full else 1) / rates["bandwidth"],
        "spilling": 2 * sequences * spilled / rates["disk"],
    }


@lru_cache(maxsize=1)  # asked for every plan
def reading_bytes(net: Net, dtype: str) -> int:
    """Return the bytes that a token takes in a forward pass without gradients."""
    if next(net.parameters()).is_meta:
        net = unwritten_longnet(cast(LongNetConfig, net.config), 1).eval()

    @torch.inference_mode()
    def read(tokens: int) -> None:
        ids = net.inputs_like((1, tokens))
        with precision(dtype, ids.device):
            net(ids)

    most = max(2, net.config.max_tokens or 2 * TRIED_TOKENS)
    read(2)  # the first pass loads libraries, and tries attention kernels
    return bytes_per_token(read, min(TRIED_TOKENS, most // 2))


def reading_memory(net: Net, plan: ReadingPlan, dtype: str, *, scores: bool) -> dict[str, int]:
    """Return the bytes of one device that reads a window as planned, without what a bidirectional net keeps.

    Autocast copies the matrices. Logits take the place of the activations, which are gone by then. hidden: float32
    hidden states that wait, in pieces and joined, of two chunks. cache: of a causal net.
    """
    config = net.config
    itemsize = itemsize_of(dtype, next(net.parameters()).device)
    cast_to = itemsize if itemsize < next(net.parameters()).itemsize else 0
    waiting = min(plan.longest, 2 * plan.chunk)
    at_once = plan.at_once(plan.chunk)
    activations = at_once * reading_bytes(net, dtype)
    kinds = {}
    if config.causal and plan.in_chunks(plan.chunk):
        kinds["cache"] = cache_bytes(config, plan.longest, itemsize)
        # the keys of each level, and values, of a layer are stored when the next one asks
        by_level = isinstance(config, LongNetConfig) and config.position == "rope_by_level"
        keys = len(config.pattern.levels) if by_level else 1
        activations += itemsize * at_once * config.head_dim * (keys + 1) * config.kv_heads
    logits = logits_bytes(config, at_once * scores)
    weights = sum(x.numel() * x.element_size() for x in (*net.parameters(), *net.buffers()))
    return {
        "weights": weights + cast_to * config.layer_weights,
        "activations": activations,
        "logits": max(0, logits - activations),
        "hidden": 2 * 4 * config.dim * waiting,
        **kinds,
    }


def keys_again(config: NetConfig, tokens: int, chunk: int) -> int:
    """Return the FLOPs per token of the keys that a bidirectional net computes twice, layer by layer.

    These are queries, keys and values, by three matrices (dim, dim), where chunks see keys of each other.
    """
    if config.causal or tokens <= chunk:
        return 0
    edges = [(start, min(start + chunk, tokens)) for start in (0, chunk)]
    sees = any(far_spans(config.pattern, *edge, False, tokens) for edge in edges)
    return 3 * 2 * config.dim**2 * config.num_layers if sees else 0


def reading_plans(
    net: Net,
    machine: Machine,
    tokens: int,
    documents: int,
    chunk: int | None,
    scores: bool,
    spill: bool,
) -> list[Plan]:
    """Return plans for reading `documents` of so many tokens, each by one group of devices, in order."""
    config, rates = net.config, machine.rates
    chunk = chunk or chunk_beside(config, int(rates["memory"]) if machine.device == "cuda" else 0)
    # one forward pass is one device's
    shareable = net.layer_by_layer and tokens > chunk
    read, plans = ReadingPlan(config, chunk), []
    read.add([(tokens, tokens * scores)])
    attention = read.attention_flops() / tokens
    flops = read.flops() / tokens - attention
    flops += keys_again(config, tokens, chunk)
    for sp, dp in meshes(machine, None if shareable else 1):
        ranks = Ranks(0, sp, sp)
        # A longer bidirectional one is read layer by layer
        exchanging = config.causal or tokens <= chunk * sp
        memory = {
            "program": int(rates["reserved"]),
            **reading_memory(net, read, machine.dtype, scores=scores),
        }
        # what a bidirectional net keeps between its layers: on the device, in the host's memory, or on a disk
        kept = 0 if config.causal else spilled_bytes(net, read, chunk, ranks)
        beside = not spill and (
            machine.device == "cpu" or sum(memory.values()) + kept <= 0.5 * rates["memory"]
        )
        traffic = 0 if beside or not kept else 3 * 4 * config.dim * config.num_layers * tokens / sp
        memory["hidden"] += kept * beside
        work = StepFlops(flops, attention, 0.0, 1, scores)
        if exchanging:
            seconds = seconds_by_part(config, machine, sp, tokens, chunk, 1, work)
        else:
            seconds = seconds_by_part(config, machine, 1, tokens, chunk, 1 / sp, work)
        seconds["spilling" if spill else "host"] = traffic / rates["disk" if spill else "host_link"]
        total = ceil(documents / dp) * (sum(seconds.values()) - seconds[HIDDEN])
        options = f"--sp {sp} --dp {dp} --chunk {format_size(chunk)}"
        idle = sp * max(0, dp - documents)
        plans.append(
            Plan(
                options,
                memory,
                seconds,
                tokens * min(dp, documents),
                total,
                ROOM * rates["memory"],
                idle,
            )
        )
    return ordered(plans)


def started(command: Sequence[str], options: str, machine: Machine) -> str:
    """Return the line that starts a command of `longnet` with the options of a plan on each node of a machine."""
    nodes, words = machine.devices // machine.node, f"{shlex.join(command)} {options}"
    if machine.devices == 1:
        return f"longnet {words}"
    where = (
        f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
        if nodes > 1
        else "--standalone"
    )
    return f"torchrun {where} --nproc-per-node {min(machine.node, machine.devices)} -m longnet_cli {words}"


def show(
    plans: Sequence[Plan],
    machine: Machine,
    what: str,
    command: Sequence[str],
    others: Mapping[str, Callable[[], list[Plan]]],
) -> None:
    """Print the first plan, the memory and the time of all plans, who knows the rates, and how to start `command` so.

    If no plan fits, say whether `others` do, the plans with more options.
    """

    def line(name: str, value: str, note: str = "") -> None:
        print(f"{name:<16} {value:>11}  {note}".rstrip(" "))

    def bar(part: float, whole: float) -> str:
        return "#" * round(30 * part / whole)

    best, fitting = plans[0], sum(plan.fits for plan in plans)
    line(
        "machine",
        machine.name,
        f"devices: {machine.devices:,}, {machine.node} per node, {machine.dtype}",
    )
    line("plan", "", best.options)
    if best.idle:
        line(
            "",
            "",
            f"{best.idle} of {machine.devices} devices have nothing to read: one reads a document of this length",
        )
    fate = f"the fastest of {fitting} that fit, of {len(plans)}"
    if not fitting:
        fate = f"none of {len(plans)} fits"
        helps = [option for option, others_of in others.items() if others_of()[0].fits]
        fate += f": {' or '.join(helps)} would" if helps else f", nor with {' or '.join(others)}"
    line("", "", f"{fate}\n")
    for kind, size in best.memory.items():
        if size:
            line(kind, format_bytes(size), bar(size, best.peak))
    line(
        "peak memory",
        format_bytes(best.peak),
        f"of a device; a plan may fill {format_bytes(best.room)}\n",
    )
    for part, seconds in best.seconds.items():
        note = "while attention runs" if part == HIDDEN else bar(seconds, best.at_once)
        if seconds:
            line(part, format_duration(seconds), note)
    speed = f"{format_count(best.tokens / best.at_once)} tokens/s"
    line(what, format_duration(best.at_once), f"{format_count(best.tokens)} tokens, {speed}")
    line("in all", format_duration(best.total), "\n")
    for plan in plans[1:]:
        line(
            format_duration(plan.total),
            format_bytes(plan.peak),
            plan.options + ", does not fit" * (not plan.fits),
        )
    if fitting:
        print(f"\n{started(command, best.options, machine)}\n")
    for by, rates in machine.known.items():
        print(f"{KNOWN_BY[by]}: {', '.join(rates)}")
    print("arithmetic: no GPU and no cluster has run this program")
    if not fitting:
        raise typer.Exit(5)


app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0]
)
Size = Annotated[int, typer.Option(parser=parse_size, metavar="SIZE")]
NARROW = "window:1Ki"  # a pattern that keeps little, to propose where nothing fits


def size_option(text: str) -> Any:
    """Return an option for a size, with its help."""
    return typer.Option(parser=parse_size, metavar="SIZE", help=text)


@app.command("plan")
def plan_command(
    recipe: Annotated[str | None, typer.Argument(help="A recipe, to plan training by it.")] = None,
    on: Annotated[str, typer.Option(help="h100x8, h200x64, a100x8, or a .toml file.")] = "h100x8",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A key of the recipe: train.chunk=64Ki")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model, to plan reading in place of training.")
    ] = None,
    tokens: Annotated[int | None, size_option("The tokens of each document to read.")] = None,
    documents: Annotated[int, size_option("The number of documents to read.")] = 1,
    pattern: Annotated[
        Pattern | None,
        typer.Option(
            parser=parse_pattern,
            metavar="PATTERN",
            help="Read by this pattern, not the model's own.",
        ),
    ] = None,
    chunk: Annotated[
        int | None,
        size_option(
            "The tokens that a device reads at a time; otherwise, as many as commands take."
        ),
    ] = None,
    encode: Annotated[
        bool, typer.Option("--encode", help="Make vectors; otherwise, tokens are scored.")
    ] = False,
    spill: Annotated[
        bool, typer.Option("--spill", help="Keep on a disk what --spill of the commands keeps.")
    ] = False,
) -> None:
    """Print memory and time of training by a recipe, or of reading documents, for every way to share it."""
    machine = find_machine(on)
    warnings.filterwarnings("ignore", "this CPU", InputWarning)  # the plan is for another machine
    if recipe is not None and model is None:
        sets = [word for setting in settings or () for word in ("--set", setting)]
        found = load_recipe(recipe, parse_overrides(settings or []))
        more = [] if found.data.sources else ["--data", "DATA", "--tokenizer", "TOKENIZER"]
        spilled = found.model_copy(update={"train": found.train.model_copy(update={"spill": "."})})
        command = ["train", recipe, "-o", "run", *more, *sets]
        others = {} if found.train.spill else {"--spill": partial(training_plans, spilled, machine)}
        show(training_plans(found, machine), machine, "a step", command, others)
        for line in found.notes():
            print(line)
        return
    if recipe is not None or model is None or tokens is None:
        raise ConfigError("give a recipe, or --model and --tokens")
    folder = ModelFolder.find(model)

    def plans(pattern: Pattern | None, spill: bool) -> list[Plan]:
        config = folder.net_config(pattern)
        if type(config) is LongNetConfig:
            with torch.device("meta"):  # a LongNet needs no weights
                net: Net = LongNet(config)
        else:
            net = folder.net(pattern=pattern, dtype=DTYPES[machine.dtype])
        scores = net.config.causal and bool(net.config.vocab_size) and not encode
        return reading_plans(net, machine, tokens, documents, chunk, scores, spill)

    others = {} if spill else {"--spill": partial(plans, pattern, True)}
    others |= {f"--pattern {NARROW}": partial(plans, parse_pattern(NARROW), spill)}
    asked = [
        *(["--pattern", format_pattern(pattern)] if pattern else ()),
        *(["--spill", "."] if spill else ()),
    ]
    command = ["encode" if encode else "score", "DOCUMENTS", "--model", model, *asked, "-o", "rows"]
    show(plans(pattern, spill), machine, "at once", command, others)


SECONDS = (
    0.5  # per rate; the fastest run counts, because other work on the machine only slows a run
)
TOKENS, DIM, HEADS = 1 << 11, 512, 8  # of products, attention and elementwise operations
BYTES = 1 << 24  # of a message, and of a file


@app.command("calibrate")
def calibrate_command(
    file: Annotated[Path, typer.Argument(help="The .toml file to write.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, fp32 or bf16")] = "auto",
) -> None:
    """Measure this machine for five seconds, and write its rates for `plan --on`. torchrun starts several ranks."""
    ranks, where = join(device)
    rates = measured_rates(where, resolve_dtype(dtype, where), ranks, file.absolute().parent)
    leave()
    link = rates.get("node_link", rates["bandwidth"])
    assumed = {"network": link, "host_link": rates["bandwidth"]}
    if ranks.world == 1:
        assumed |= {"message": 0.0, "node_link": link}
    lines = [f'device = "{where.type}"', f'dtype = "{resolve_dtype(dtype, where)}"']
    lines += [f"devices = {ranks.world}", f"node = {ranks.world}"]
    for table, values in (("measured", rates), ("assumed", assumed)):
        lines += ["", f"[{table}]", *(f"{name} = {value:.4g}" for name, value in values.items())]
    if ranks.writes:
        file.write_text("\n".join(lines) + "\n")
        print(f"{ranks.world} x {where.type} -> {file}")


def measured_rates(where: torch.device, dtype: str, ranks: Ranks, folder: Path) -> dict[str, float]:
    """Return the rates of the slowest of all `ranks`, which call it together. Files are written to `folder`."""
    torch.manual_seed(0)
    made: dict[str, Any] = {"device": where, "dtype": DTYPES[dtype]}

    def best(run: Callable[[], object]) -> float:
        return ranks.largest(fastest(run, where, ranks))

    x, weight = torch.randn(TOKENS, DIM, **made), torch.randn(4 * DIM, DIM, **made)
    rates = {
        "products": 2 * weight.numel() * TOKENS / best(lambda: F.linear(x, weight)),
        "share": 1.0,
    }
    pattern = Pattern((TOKENS,), (1,))
    q, k, v = (
        torch.randn(1, TOKENS, HEADS, DIM // HEADS, requires_grad=True, **made) for _ in range(3)
    )
    flops = attention_flops(pattern, HEADS, DIM // HEADS, TOKENS, True)
    with torch.no_grad():
        rates["attention"] = flops / best(lambda: dilated_attention(q, k, v, pattern, causal=True))
    out = dilated_attention(q, k, v, pattern, causal=True)
    back = best(lambda: torch.autograd.grad(out, (q, k, v), out.detach(), retain_graph=True))
    rates["attention_backward"] = BACKWARD_FLOPS * flops / back
    wide, moved = (
        F.linear(x, weight),
        (5 * x.numel() + 4 * weight.shape[0] * TOKENS) * x.element_size(),
    )

    # As in a layer: they move x five times, `wide` four times
    def elementwise() -> tuple[torch.Tensor, torch.Tensor]:
        return F.layer_norm(x, x.shape[1:]) + x, F.layer_norm(F.gelu(wide), wide.shape[1:])

    rates["bandwidth"] = moved / best(elementwise)
    if ranks.world > 1:
        sent, empty = (
            torch.ones(n * ranks.world, device=where) for n in (BYTES // 4 // ranks.world, 1)
        )
        got, share = torch.empty_like(sent), BYTES * (ranks.world - 1) / ranks.world
        rates["message"] = best(lambda: dist.all_to_all_single(empty.clone(), empty)) / (
            ranks.world - 1
        )
        rates["node_link"] = share / best(lambda: dist.all_to_all_single(got, sent))

    def rewrite() -> None:
        os.pwrite(file.fileno(), bytes(BYTES), 0)
        os.fsync(file.fileno())

    with tempfile.TemporaryFile(dir=folder) as file:
        rates["disk"] = BYTES / best(rewrite)
    free = free_memory(where) / (1 if where.type == "cuda" else ranks.world)
    return rates | {
        "memory": free + resident_memory(where),
        "reserved": float(resident_memory(where)),
    }


def fastest(run: Callable[[], object], device: torch.device, ranks: Ranks) -> float:
    """Return the seconds of the fastest of the runs in `SECONDS`, after one that warms up. All ranks run as often."""
    best, begin, times = float("inf"), clock(device), 0
    while times < 4 or ranks.any(clock(device) < begin + SECONDS):
        start = clock(device)
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, clock(device) - start) if times else best
        times += 1
    return best


def clock(device: torch.device) -> float:
    """Return seconds: of a CPU, only those in which this process computes, whatever else the machine does."""
    return (
        time.process_time() / torch.get_num_threads()
        if device.type == "cpu"
        else time.perf_counter()
    )


if __name__ == "__main__":
    try:
        app()
    except LongNetError as error:
        sys.exit(f"error: {error}")
