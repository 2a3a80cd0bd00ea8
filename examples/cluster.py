"""Plan a run for machines that one does not have: memory and time, for every way to share it. docs/cluster.md

    python examples/cluster.py plan longnet-2.7b --on h100x8 --set train.batch_tokens=4Mi    # training by a recipe
    python examples/cluster.py plan --model longnet-tiny --tokens 1Gi --on h100x8            # reading a document
    python examples/cluster.py exchange geometric:1Gi --tokens 1Gi --ranks 1024              # what ranks send
    torchrun --standalone --nproc-per-node 2 examples/cluster.py exchange geometric:64Ki --tokens 64Ki    # and its time
    torchrun --standalone --nproc-per-node 2 examples/cluster.py calibrate here.toml         # this machine's rates

All counts of FLOPs and bytes come from the code that runs. Only the division by rates, and what overlaps with what, is
said here: an exchange is hidden behind a layer's attention to near keys, and nothing else overlaps. A plan is
arithmetic: no GPU and no cluster has run this program.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer

from longnet_cli.attention import Pattern, dilated_attention
from longnet_cli.attention.branches import BACKWARD_FLOPS, attention_flops, branches, pairs
from longnet_cli.attention.groups import ChoiceStage, chosen_flops, first_means, stages
from longnet_cli.attention.notation import format_pattern, parse_pattern
from longnet_cli.attention.pattern import MEAN_OF, RUN, LayerKind
from longnet_cli.attention.spans import common_span, far_spans, open_spans, span_rows
from longnet_cli.basics.errors import ConfigError, InputWarning, LongNetError
from longnet_cli.basics.sizes import format_bytes, format_count, format_duration, format_size, parse_size
from longnet_cli.jobs.describing import out_of_reach
from longnet_cli.jobs.estimating.memory import reading_memory, spilled_bytes
from longnet_cli.jobs.estimating.reading import ReadingPlan
from longnet_cli.jobs.training.costs import StepFlops, step_flops, stored_bytes, training_memory
from longnet_cli.jobs.training.recipe import Recipe, Stage, load_recipe, parse_overrides
from longnet_cli.jobs.training.start import check_ranks
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.config import LongNetConfig, NetConfig, parse_config
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import Net
from longnet_cli.running.chunk_size import GPU_BENCH_CHUNK, SHORTEST_CHUNK, chunk_beside, fitting_chunk
from longnet_cli.running.device import DTYPES, free_memory, resident_memory, resolve_dtype
from longnet_cli.running.ranks.edges import even_edges
from longnet_cli.running.ranks.exchange import Exchange
from longnet_cli.running.ranks.fetching import RUN_BYTES
from longnet_cli.running.ranks.ranks import Ranks, join, leave

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
    "collective", "host_link", "disk", "memory", "reserved",
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
            raise ConfigError(f"--on {name}: known are {', '.join(f'{kind}xN' for kind in facts)}, and .toml files")
        facts = facts[kind] | {"devices": int(count or 1)}
    if facts.get("device") not in ("cpu", "cuda") or facts.get("dtype") not in ("fp32", "bf16"):
        raise ConfigError(f"--on {name}: device is cpu or cuda, and dtype is fp32 or bf16")
    known = {by: list(facts[by]) for by in KNOWN_BY if by in facts}
    given = list(itertools.chain(*known.values()))
    if wrong := sorted({*given} ^ {*RATES}) or sorted(rate for rate in RATES if given.count(rate) > 1):
        raise ConfigError(f"--on {name}: {wrong[0]}: each of {', '.join(RATES)} belongs into one table")
    rates = {rate: float(value) for by in known for rate, value in facts[by].items()}
    sizes = facts.get("devices", 1), facts.get("node", 1)
    if min(*sizes, *(value for rate, value in rates.items() if rate not in ("message", "collective", "reserved"))) <= 0:
        raise ConfigError(f"--on {name}: devices, node and rates must be positive")
    return Machine(name, facts["device"], facts["dtype"], *sizes, rates, known)


HIDDEN = "exchange, hidden"  # a part of the time that other parts cover
ROOM = 0.9  # share of a device's memory that a plan may fill: allocators leave gaps
BACKWARD_MOVES = 2  # bytes that elementwise operations move in a backward pass, times the forward's
UPDATE_BYTES = 40  # per parameter: AdamW reads and writes weights and moments, clipping the gradients
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
    return sorted(plans, key=lambda plan: (not plan.fits, float(f"{plan.total if plan.fits else plan.peak:.3g}")))


class Shared(NamedTuple):
    """Costs of a chunk that ranks share, per layer, of its busiest rank."""

    seconds: float = 0.0  # of an exchange of far rows
    choosing: float = 0.0  # seconds of fetching what blocks are chosen from, and the chosen ones
    fetching: float = 0.0  # seconds of fetching the chosen ones alone
    giving: float = 0.0  # seconds of giving their gradients back
    far: int = 0  # bytes of far rows that its shard attends to
    summed: int = 0  # bytes of gradients that are summed over the ranks
    balance: float = 1.0  # attention FLOPs, relative to the mean of the chunk


def shared(config: NetConfig, machine: Machine, tokens: int, chunk: int, sp: int) -> Shared:
    """Return the costs of sharing the last full chunk of `chunk` tokens per rank, from the plan of a real exchange.

    In a causal net the last rank receives the most, in a bidirectional one a rank in the middle. Where the chunk is one
    of several, gradients of rows that later chunks see are summed. Chosen blocks are those that are expected, in the
    mean of layers, and nothing hides them.
    """
    if sp == 1:
        return Shared()
    whole, pattern, rates = min(tokens, chunk * sp), config.pattern, machine.rates
    start = (tokens // whole - 1) * whole
    rank, cut = sp - 1 if config.causal else sp // 2, whole < tokens
    edges = even_edges(start, whole, sp, pattern.edge_size)
    exchange = Exchange(config, edges, rank=rank, cached=cut and config.causal)
    shape = 1, 0, config.kv_heads, config.head_dim
    seconds = 0.0
    for numbers in (exchange.sizes(exchange.sent, shape), exchange.sizes(exchange.received, shape)):
        inside = sum(n for peer, n in enumerate(numbers) if peer // machine.node == rank // machine.node)
        slower = max(inside / rates["node_link"], (sum(numbers) - inside) / rates["network"])
        seconds = max(seconds, machine.itemsize * slower + rates["message"] * sum(n > 0 for n in numbers))
    # early blocks are in everyone's past: their ranks send more than one receives, unless chunks deal them out
    busiest = 1 + sum(1 / reader for reader in range(1, sp)) / max(1, tokens // whole)
    moved = chosen_bytes(exchange, config, machine.itemsize)
    calls = chosen_collectives(exchange, config, machine.itemsize)
    choosing, fetching, giving = (
        busiest * x / machine.link(sp) + n * rates["collective"] for x, n in zip(moved, calls, strict=True)
    )
    attended = [parcel for parcel in exchange.joined if parcel.attended]
    far = machine.itemsize * sum(exchange.sizes([attended], shape))
    summed = 0
    if cut and config.causal:
        for level, begin, end in open_spans(pattern, start + whole):
            mine = common_span(pattern, level, begin, start, end)
            summed += 2 * 4 * config.head_dim * sum(span_rows(pattern, mine, config.num_heads, config.kv_heads))
    flops = shard_flops(config, edges[rank], edges[rank + 1], tokens)
    mean = (config.attention_flops(start + whole) - config.attention_flops(start)) / config.num_layers / sp
    return Shared(seconds, choosing, fetching, giving, far, summed, max(1.0, flops / mean))


def shard_flops(config: NetConfig, first: int, last: int, total: int) -> int:
    """Return the FLOPs of a layer's forward pass over tokens [first, last) of a document: near, far, chosen keys."""
    pattern, heads, causal = config.pattern, (config.num_heads, config.head_dim), config.causal
    spans = tuple(far_spans(pattern, first, last, causal, total)) if first < last else ()
    calls = branches(pattern, config.num_heads, first, last - first, causal, "exact", spans, total, config.kv_heads)
    before, after = (sum(chosen_flops(pattern, *heads, stop)) for stop in (first, last))
    return 2 * config.head_dim * sum(map(pairs, calls)) + after - before


def chosen_bytes(exchange: Exchange, config: NetConfig, itemsize: int) -> tuple[float, float, float]:
    """Return the bytes that a rank is expected to receive for chosen blocks, in the mean of layers.

    They are those of a forward pass that chooses, of one that sees the same blocks again, and of gradients.
    """
    pattern = config.pattern
    if not pattern.chosen:
        return 0.0, 0.0, 0.0
    sizes = pattern, config.kv_heads, config.head_dim, itemsize
    choosing = fetching = giving = 0.0
    for kind, layers in pattern.kinds(config.num_layers).items():
        fetches = Fetches.expected(pattern, exchange.edges, exchange.rank, kind)
        tails = itemsize * pattern.last_queries * config.dim if kind == "chooses" else 0
        choosing += layers / config.num_layers * (tails + fetches.received(*sizes))
        again = fetches._replace(means=0.0, ids=fetches.blocks)
        fetching += layers / config.num_layers * again.received(*sizes)
        giving += layers / config.num_layers * fetches.given(*sizes)
    return choosing, fetching, giving


def chosen_collectives(exchange: Exchange, config: NetConfig, itemsize: int) -> tuple[float, float, float]:
    """Return the collectives for chosen blocks, in the mean of layers, of the same passes as `chosen_bytes`."""
    found = [0.0, 0.0, 0.0]
    for kind, layers in config.pattern.kinds(config.num_layers).items() if config.pattern.chosen else ():
        of_layer = collectives(config.pattern, exchange.edges, config.kv_heads, config.head_dim, itemsize, kind)
        for index, number in enumerate(of_layer):
            found[index] += layers / config.num_layers * number
    return found[0], found[1], found[2]


FETCHED = 1024  # queries
# Measured (docs/measurements/finding.md), of FETCHED neighbouring queries. SEEN_: the distinct blocks that they see;
# how many times as many candidates, and blocks that remain after an earlier stage, their scans have as one scan. NEW_:
# the share of each that the FETCHED queries before them have not
SEEN_BLOCKS, SEEN_CANDIDATES, SEEN_IN_STAGES = 480, 4.0, 2.1
NEW_BLOCKS, NEW_CANDIDATES, NEW_IN_STAGES = 0.63, 0.42, 0.12


class Fetches(NamedTuple):
    """The expected numbers of blocks and means that a rank fetches of a layer's past, and of ids that it asks for."""

    blocks: float
    means: float
    ids: float

    @classmethod
    def expected(cls, pattern: Pattern, edges: Sequence[int], rank: int, kind: LayerKind = "chooses") -> Fetches:
        """Return what a rank fetches from others in a forward pass of a document, if shards have these edges."""
        (w,), (back,), size = pattern.segment_lengths, pattern.look_backs, pattern.chosen_block
        others, total, kept = edges[rank] // size, edges[-1] // size, first_means(pattern)
        blocks = means = ids = 0.0
        if kind == "chooses":  # those that all ranks have, summed over the ranks: each number goes twice
            means += 2 * (min(total, kept) * size // MEAN_OF + max(0, total - kept) // RUN)
        for position in range(edges[rank], edges[rank + 1], FETCHED):
            before = max(0, position // w - back) * w // size
            if not others or not before:
                continue
            share, first = min(1.0, others / before), position == edges[rank]
            new_blocks = 1.0 if first else 0.0 if kind == "sees_block_0" and before > pattern.chosen else NEW_BLOCKS
            seen = share * new_blocks * seen_blocks(pattern, before, kind)
            blocks, ids = blocks + seen, ids + seen
            for stage, distinct, new in scanned_stages(pattern, before) if kind == "chooses" and total > kept else ():
                if distinct < before:
                    asked = share * (1 if first else new) * distinct
                    means, ids = means + asked * stage.means, ids + asked
        return cls(blocks, means, ids)

    def received(self, pattern: Pattern, kv_heads: int, head_dim: int, itemsize: int) -> float:
        """Return the bytes of these blocks, means and ids, with `itemsize` bytes per number of a key."""
        of_block = 2 * pattern.chosen_block * itemsize
        return kv_heads * head_dim * (self.blocks * of_block + self.means * max(4, itemsize)) + 24 * self.ids

    def given(self, pattern: Pattern, kv_heads: int, head_dim: int, itemsize: int) -> float:
        """Return the bytes of the gradients of these blocks."""
        return self.blocks * 2 * pattern.chosen_block * kv_heads * head_dim * max(4, itemsize)


def seen_blocks(pattern: Pattern, before: int, kind: LayerKind) -> int:
    """Return the distinct blocks that FETCHED queries see of those before them."""
    return before if before <= pattern.chosen else 1 if kind == "sees_block_0" else min(before, SEEN_BLOCKS)


def scanned_stages(pattern: Pattern, before: int) -> Iterator[tuple[ChoiceStage, float, float]]:
    """Yield the stages of the scans of FETCHED queries, and last their votes.

    Each comes with the number of distinct blocks compared, and the share of them that the queries before have not.
    """
    if before <= pattern.chosen:
        return
    planned, distinct, new = stages(pattern, before - 1), float(before), 0.0
    for stage in planned:
        yield stage, distinct, new
        last = stage == planned[-1]
        distinct = min(before, (SEEN_CANDIDATES if last else SEEN_IN_STAGES) * stage.blocks)
        new = NEW_CANDIDATES if last else NEW_IN_STAGES
    yield ChoiceStage(pattern.chosen_block // MEAN_OF, 0), distinct, new


def collectives(
    pattern: Pattern, edges: Sequence[int], kv_heads: int, head_dim: int, itemsize: int, kind: LayerKind
) -> tuple[int, int, int]:
    """Return the collectives for a layer's chosen blocks: in a forward pass, again without asking, of gradients.

    The last rank, which fetches most, has runs of the expected blocks. A backward pass has those of the last two.
    """
    fetches = Fetches.expected(pattern, edges, len(edges) - 2, kind)
    blocks = fetches.blocks * 2 * pattern.chosen_block * kv_heads * head_dim * itemsize
    runs, asking = ceil(blocks / RUN_BYTES), 0 if kind == "follows" else 2
    if kind == "chooses":
        long = edges[-1] // pattern.chosen_block > first_means(pattern)
        scans = ceil(fetches.means * kv_heads * head_dim * max(4, itemsize) / RUN_BYTES) + 2 * len(stages(pattern))
        asking += 2 + scans * long  # the last queries and the first means; stages after the first
    return asking + runs, runs, runs


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
    near = tokens / sp / chunks / config.num_layers  # tokens times layers of the attention that hides an exchange
    covers = [(work.forwards, near * forward), (bool(back), near * backward)]
    layers, logits = moved_bytes(config, machine.itemsize)
    moved = (work.forwards + back) * layers + (work.logits + back * predicted) * logits
    summing = 2 * (1 - 1 / sp) * costs.summed / machine.link(sp) if back else 0.0
    again = work.forwards - 1 + bool(back)  # passes in which the same blocks are fetched again
    chosen = costs.choosing + again * costs.fetching + bool(back) * costs.giving
    open_exchange = sum(times * max(0.0, costs.seconds - cover) for times, cover in covers)
    return {
        "matrix products": of_device * work.products / (rates["products"] * rates["share"]),
        "attention": of_device * costs.balance * (work.forwards * forward + backward),
        "elementwise": of_device * moved / rates["bandwidth"],
        "exchange": exchanges * (open_exchange + chosen + summing),
        HIDDEN: exchanges * sum(times * min(costs.seconds, cover) for times, cover in covers),
    }


def meshes(machine: Machine, sp: int | None = None, dp: int | None = None) -> list[tuple[int, int]]:
    """Return every (sp, dp) that uses all devices, with those that are named. Raises ConfigError where none does."""
    every = [(n, machine.devices // n) for n in range(1, machine.devices + 1) if machine.devices % n == 0]
    named = [(n, groups) for n, groups in every if sp in (None, n) and dp in (None, groups)]
    if not named:
        raise ConfigError(f"dp x sp is {dp or 'any'} x {sp or 'any'}, and there are {machine.devices} devices")
    return named


def training_plans(recipe: Recipe, machine: Machine) -> list[Plan]:
    """Return plans for training by a recipe, in order.

    What it names of sp, dp, shard, chunk and activation_checkpointing stays; of the rest, every choice is tried.
    """
    if recipe.train.dtype not in ("auto", machine.dtype):
        raise ConfigError(f"the rates of {machine.name} are of {machine.dtype}, not of {recipe.train.dtype}")
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"dtype": machine.dtype})})
    named, train, plans, refusal = recipe.parallel, recipe.train, [], None
    shards = [named.shard] if "shard" in named.model_fields_set else ["none", "full"]
    if machine.devices == 1 or recipe.optimizer.name == "muon":
        shards = ["none"]
    again = [train.activation_checkpointing] if "activation_checkpointing" in train.model_fields_set else [False, True]
    for (sp, dp), shard, checkpoints in itertools.product(meshes(machine, named.sp, named.dp), shards, again):
        parallel = named.model_copy(update={"sp": sp, "dp": dp, "shard": shard})
        update = {"train": train.model_copy(update={"activation_checkpointing": checkpoints}), "parallel": parallel}
        try:
            plans.append(training_plan(recipe.model_copy(update=update), machine, Ranks(0, machine.devices, sp)))
        except ConfigError as error:
            refusal = error
    if refusal and not plans:
        raise refusal
    return ordered(plans)


def training_plan(recipe: Recipe, machine: Machine, ranks: Ranks) -> Plan:
    """Return the plan for these ranks, with the recipe's chunk or the longest that fits. Raises as `check_ranks`."""
    config, device, room = recipe.model, torch.device(machine.device), ROOM * machine.rates["memory"]
    longest, program = max(recipe.train.stages, key=lambda stage: stage.seq_len), int(machine.rates["reserved"])
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
    far = config.num_layers * shared(config, machine, longest.seq_len, recipe.train.chunk, ranks.sp).far
    memory = {"program": program, **training_memory(recipe, device, ranks), "far rows": far}
    again = " --set train.activation_checkpointing=true" if recipe.train.activation_checkpointing else ""
    mesh = f"--sp {ranks.sp} --dp {ranks.dp} --chunk {format_size(recipe.train.chunk)}"
    total = sum(stage.steps * (sum(parts.values()) - parts[HIDDEN]) for stage, parts in steps.items())
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


def reading_plans(
    net: Net, machine: Machine, tokens: int, documents: int, chunk: int | None, scores: bool, spill: bool
) -> list[Plan]:
    """Return plans for reading `documents` of so many tokens, each by one group of devices, in order."""
    config, rates = net.config, machine.rates
    chunk = chunk or chunk_beside(config, int(rates["memory"]) if machine.device == "cuda" else 0)
    shareable = net.layer_by_layer and tokens > chunk  # one forward pass is one device's
    read, plans = ReadingPlan(net, chunk), []
    read.add([(tokens, tokens * scores)])
    flops, attention = read.product_flops(scores) / tokens, read.attention_flops() / tokens
    for sp, dp in meshes(machine, None if shareable else 1):
        ranks = Ranks(0, sp, sp)
        exchanging = config.causal or tokens <= chunk * sp  # a longer bidirectional one is read layer by layer
        how = {"scores": scores, "spill": spill or not config.causal}
        memory = {"program": int(rates["reserved"]), **reading_memory(net, read, chunk, machine.dtype, ranks, **how)}
        # what a bidirectional net keeps between its layers: on the device, in the host's memory, or on a disk
        kept = 0 if config.causal else spilled_bytes(net, read, chunk, machine.dtype, ranks)
        beside = not spill and (machine.device == "cpu" or sum(memory.values()) + kept <= 0.5 * rates["memory"])
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
        plans.append(Plan(options, memory, seconds, tokens * min(dp, documents), total, ROOM * rates["memory"], idle))
    return ordered(plans)


def started(command: Sequence[str], options: str, machine: Machine) -> str:
    """Return the line that starts a command of `longnet` with the options of a plan on each node of a machine."""
    nodes, words = machine.devices // machine.node, f"{shlex.join(command)} {options}"
    if machine.devices == 1:
        return f"longnet {words}"
    where = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500" if nodes > 1 else "--standalone"
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
    line("machine", machine.name, f"devices: {machine.devices:,}, {machine.node} per node, {machine.dtype}")
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
    line("peak memory", format_bytes(best.peak), f"of a device; a plan may fill {format_bytes(best.room)}\n")
    for part, seconds in best.seconds.items():
        note = "while attention runs" if part == HIDDEN else bar(seconds, best.at_once)
        if seconds:
            line(part, format_duration(seconds), note)
    speed = f"{format_count(best.tokens / best.at_once)} tokens/s"
    line(what, format_duration(best.at_once), f"{format_count(best.tokens)} tokens, {speed}")
    line("in all", format_duration(best.total), "\n")
    for plan in plans[1:]:
        line(format_duration(plan.total), format_bytes(plan.peak), plan.options + ", does not fit" * (not plan.fits))
    if fitting:
        print(f"\n{started(command, best.options, machine)}\n")
    for by, rates in machine.known.items():
        print(f"{KNOWN_BY[by]}: {', '.join(rates)}")
    print("arithmetic: no GPU and no cluster has run this program")
    if not fitting:
        raise typer.Exit(5)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0])
Size = Annotated[int, typer.Option(parser=parse_size, metavar="SIZE")]
NARROW = "window:1Ki"  # a pattern that keeps little, to propose where nothing fits


def size_option(text: str) -> Any:
    """Return an option for a size, with its help."""
    return typer.Option(parser=parse_size, metavar="SIZE", help=text)


@app.command("plan")
def plan_command(
    recipe: Annotated[str | None, typer.Argument(help="A recipe, to plan training by it.")] = None,
    on: Annotated[str, typer.Option(help="h100x8, h200x64, a100x8, or a .toml file.")] = "h100x8",
    settings: Annotated[list[str] | None, typer.Option("--set", help="A key of the recipe: train.chunk=64Ki")] = None,
    model: Annotated[str | None, typer.Option(help="A model, to plan reading in place of training.")] = None,
    tokens: Annotated[int | None, size_option("The tokens of each document to read.")] = None,
    documents: Annotated[int, size_option("The number of documents to read.")] = 1,
    pattern: Annotated[
        Pattern | None,
        typer.Option(parser=parse_pattern, metavar="PATTERN", help="Read by this pattern, not the model's own."),
    ] = None,
    chunk: Annotated[
        int | None, size_option("The tokens that a device reads at a time; otherwise, as many as commands take.")
    ] = None,
    encode: Annotated[bool, typer.Option("--encode", help="Make vectors; otherwise, tokens are scored.")] = False,
    spill: Annotated[bool, typer.Option("--spill", help="Keep on a disk what --spill of the commands keeps.")] = False,
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
        longest = max(stage.seq_len for stage in found.train.stages)
        if line := out_of_reach(found.model.pattern, found.model.num_layers, longest):
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
    asked = [*(["--pattern", format_pattern(pattern)] if pattern else ()), *(["--spill", "."] if spill else ())]
    command = ["encode" if encode else "score", "DOCUMENTS", "--model", model, *asked, "-o", "rows"]
    show(plans(pattern, spill), machine, "at once", command, others)


@app.command("exchange")
def exchange_command(
    pattern: Annotated[Pattern, typer.Argument(parser=parse_pattern, help="As in `longnet pattern`.")],
    tokens: Size,
    ranks: Size = 64,
    heads: Size = 12,
    head_dim: Size = 64,
    layers: Size = 1,
    bidirectional: Annotated[bool, typer.Option("--bidirectional")] = False,
) -> None:
    """Print what ranks send for one layer's forward pass in bf16, as a line of JSON.

    The plan of every rank is made. received, sent: bytes of the rank that has the most. peers: the most ranks from
    which a rank receives. far: the most bytes of far rows that a rank holds. chosen: of `received`, the bytes expected
    for chosen blocks, in the mean of `--layers` layers, some of which may follow others' choices. collectives: of a
    forward pass of all layers, and of_step: of a training step, with none computed again. formula: bytes by the
    formula of docs/ranks.md, which counts levels wider than a shard. balance: attention FLOPs of the busiest rank,
    relative to the mean. Ends with an error if a rank would send other rows than its reader expects.

    Under torchrun, its processes are the ranks, and exchange random numbers. seconds: of far rows, without chosen
    blocks, forward and backward. seconds_of_all: of all keys and values, which dense attention needs, forward.
    collective: of one in which each tells each other a number, `collective` in machines.toml.
    """
    here, where = join()
    ranks = here.world if here.world > 1 else ranks
    causal, edges = not bidirectional, even_edges(0, tokens, ranks, pattern.edge_size)
    shape, number = (1, 0, heads, head_dim), 2
    sizes = {"vocab_size": 0, "dim": heads * head_dim, "num_layers": layers, "num_heads": heads, "ffn_dim": 1}
    config = parse_config({**sizes, "position": "none", "causal": causal}, "exchange", pattern)
    sends, sent, expected = (np.zeros((ranks, ranks), np.int64) for _ in range(3))  # [maker, reader]
    held, flops = np.zeros(ranks, np.int64), np.zeros(ranks)
    exchange = Exchange(config, edges, rank=0)
    for rank in range(ranks):
        exchange = exchange.of_rank(rank)
        sends[rank] = exchange.sizes(exchange.sent, shape)
        sent[rank] = [hash(tuple(parcels)) for parcels in exchange.sent]
        expected[:, rank] = [hash(tuple(parcels)) for parcels in exchange.received]
        held[rank] = sum(exchange.sizes([exchange.joined], shape))
        flops[rank] = shard_flops(config, edges[rank], edges[rank + 1], tokens)
    for maker, reader in np.argwhere(sent != expected)[:1]:
        raise LongNetError(f"{tokens:,} tokens: rank {maker} sends other rows than rank {reader} expects")
    chosen = np.zeros(ranks)  # bytes
    for rank in range(ranks) if pattern.chosen else ():
        exchange = exchange.of_rank(rank)
        chosen[rank], *_ = chosen_bytes(exchange, config, number)
        sends[:rank, rank] += round(chosen[rank] / number / max(1, rank))  # evenly from those before it
    rows = sum(w / r * (1 - tokens / ranks / w) for w, r in pattern.levels if w > tokens / ranks)
    facts = {"pattern": format_pattern(pattern), "causal": causal, "tokens": tokens, "ranks": ranks}
    facts |= {"received": int(number * sends.sum(0).max()), "received_mean": float(number * sends.sum(0).mean())}
    facts |= {"sent": int(number * sends.sum(1).max()), "peers": int((sends > 0).sum(0).max())}
    facts |= {"far": int(number * held.max()), "chosen": int(chosen.max()), "chosen_mean": float(chosen.mean())}
    forward, again, back = (config.num_layers * x for x in chosen_collectives(exchange, config, number))
    facts |= {"collectives": round(forward + layers)}  # with those of far rows
    facts |= {"collectives_of_step": round(forward + again + back + 2 * layers)}
    facts |= {"formula": 2 * number * heads * head_dim * rows, "balance": float(flops.max() / flops.mean())}
    facts |= exchange_seconds(exchange.of_rank(here.rank), heads, head_dim, here, where) if here.world > 1 else {}
    leave()
    if here.writes:
        print(json.dumps(facts))


def exchange_seconds(
    exchange: Exchange, heads: int, head_dim: int, ranks: Ranks, where: torch.device
) -> dict[str, Any]:
    """Return the seconds in which all `ranks`, which call it together, exchange keys and values of one layer."""
    tokens = [b - a for a, b in itertools.pairwise(exchange.edges)]
    made: dict[str, Any] = {"dtype": torch.bfloat16, "device": where}
    k, v = (torch.ones(1, tokens[ranks.rank], heads, head_dim, requires_grad=True, **made) for _ in range(2))
    *shards, own = torch.ones(ranks.world + 1, 2, max(tokens), heads, head_dim, **made)

    def forward() -> list[torch.Tensor]:
        far, _ = exchange.run(k, v)
        for keys in far:
            if keys.ready:
                keys.ready()
        return [x for keys in far for x in (keys.k, keys.v)]

    def backward() -> object:
        return torch.autograd.grad(got, (k, v), grads, retain_graph=True) if got else None

    got = forward()
    grads = [torch.ones_like(x) for x in got]
    numbers = torch.zeros(ranks.world, dtype=torch.int64, device=where)
    small = partial(dist.all_to_all_single, torch.empty_like(numbers), numbers)
    runs = forward, backward, lambda: dist.all_gather(shards, own), small
    seconds = [ranks.largest(fastest(run, where, ranks)) for run in runs]
    return {"seconds": seconds[:2], "seconds_of_all": seconds[2], "collective": seconds[3]}


SECONDS = 0.5  # per rate; the fastest run counts, because other work on the machine only slows a run
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
        assumed |= {"message": 0.0, "collective": 0.0, "node_link": link}
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
    rates = {"products": 2 * weight.numel() * TOKENS / best(lambda: F.linear(x, weight)), "share": 1.0}
    pattern = Pattern((TOKENS,), (1,))
    q, k, v = (torch.randn(1, TOKENS, HEADS, DIM // HEADS, requires_grad=True, **made) for _ in range(3))
    flops = attention_flops(pattern, HEADS, DIM // HEADS, TOKENS, True)
    with torch.no_grad():
        rates["attention"] = flops / best(lambda: dilated_attention(q, k, v, pattern, causal=True))
    out = dilated_attention(q, k, v, pattern, causal=True)
    back = best(lambda: torch.autograd.grad(out, (q, k, v), out.detach(), retain_graph=True))
    rates["attention_backward"] = BACKWARD_FLOPS * flops / back
    wide, moved = F.linear(x, weight), (5 * x.numel() + 4 * weight.shape[0] * TOKENS) * x.element_size()

    def elementwise() -> tuple[torch.Tensor, torch.Tensor]:  # as in a layer: they move x five times, `wide` four times
        return F.layer_norm(x, x.shape[1:]) + x, F.layer_norm(F.gelu(wide), wide.shape[1:])

    rates["bandwidth"] = moved / best(elementwise)
    if ranks.world > 1:
        sent, empty = (torch.ones(n * ranks.world, device=where) for n in (BYTES // 4 // ranks.world, 1))
        got, share = torch.empty_like(sent), BYTES * (ranks.world - 1) / ranks.world
        rates["collective"] = best(lambda: dist.all_to_all_single(empty.clone(), empty))
        rates["message"] = best(lambda: dist.all_to_all_single(empty.clone(), empty)) / (ranks.world - 1)
        rates["node_link"] = share / best(lambda: dist.all_to_all_single(got, sent))

    def rewrite() -> None:
        os.pwrite(file.fileno(), bytes(BYTES), 0)
        os.fsync(file.fileno())

    with tempfile.TemporaryFile(dir=folder) as file:
        rates["disk"] = BYTES / best(rewrite)
    free = (free_memory(where) or 0) / (1 if where.type == "cuda" else ranks.world)
    return rates | {"memory": free + resident_memory(where), "reserved": float(resident_memory(where))}


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
    return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.perf_counter()


if __name__ == "__main__":
    try:
        app()
    except LongNetError as error:
        sys.exit(f"error: {error}")
