"""The plan of `longnet train --dry-run --on`: the memory and the time of a step, for every way to share it."""

from __future__ import annotations

from itertools import product

import torch

from longnet_cli.errors import ConfigError
from longnet_cli.estimating.machines import Machine
from longnet_cli.estimating.plan import HIDDEN, ROOM, JobPlan, meshes, ordered, shared
from longnet_cli.estimating.training_job import memory_by_kind, step_flops
from longnet_cli.runtime.chunks import GPU_BENCH_CHUNK, SHORTEST_CHUNK
from longnet_cli.runtime.ranks import Ranks
from longnet_cli.training.checks import check_ranks
from longnet_cli.training.far_bytes import stored_bytes
from longnet_cli.training.recipe import Recipe, Stage

BACKWARD_MOVES = 2  # bytes that elementwise operations move in a backward pass, times the forward's
UPDATE_BYTES = 40  # per parameter: AdamW reads and writes weights and moments, clipping the gradients
TENSORS = 20  # parameters of a layer: without FSDP, each has its own all-reduce


def plan_training(recipe: Recipe, machine: Machine) -> list[JobPlan]:
    """Return plans for training by a recipe on all devices, the fastest first; those that do not fit come last.

    What the recipe names of sp, dp, shard, chunk and activation_checkpointing stays. Of the rest, every choice is
    tried, with the longest chunk that fits. Raises ConfigError for a dtype that the machine's rates are not of, and as
    `check_ranks` does.
    """
    if recipe.train.dtype not in ("auto", machine.dtype):
        raise ConfigError(f"the rates of {machine.name} are of {machine.dtype}: leave out --dtype {recipe.train.dtype}")
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"dtype": machine.dtype})})
    chosen, refusal = recipe.parallel, None
    shards = ["none", "full"] if machine.devices > 1 and recipe.optimizer.name != "muon" else ["none"]
    shards = [chosen.shard] if "shard" in chosen.model_fields_set else shards
    again = [recipe.train.activation_checkpointing]
    again = again if "activation_checkpointing" in recipe.train.model_fields_set else [False, True]
    found = []
    for (sp, dp), shard, checkpoints in product(meshes(machine.devices, chosen.sp, chosen.dp), shards, again):
        ranks, update = Ranks(0, machine.devices, sp), {"sp": sp, "dp": dp, "shard": shard}
        train = recipe.train.model_copy(update={"activation_checkpointing": checkpoints})
        tried = recipe.model_copy(update={"train": train, "parallel": chosen.model_copy(update=update)})
        if not recipe.names_chunk:
            tried = tried.with_chunk(_chunk(tried, machine, ranks))
        try:
            check_ranks(tried, ranks)
            found.append(_plan(tried, machine, ranks))
        except ConfigError as error:
            refusal = error
    if not found and refusal:
        raise refusal
    return ordered(found)


def _chunk(recipe: Recipe, machine: Machine, ranks: Ranks) -> int:
    """Return the longest chunk that fits, a window's share or a power of two; where none fits, the smallest of all."""
    most = -(-max(stage.seq_len for stage in recipe.train.stages) // ranks.sp)
    powers = [1 << power for power in range(SHORTEST_CHUNK.bit_length(), GPU_BENCH_CHUNK.bit_length())]
    choices = [n for n in powers if n < most and recipe.model.causal]
    choices += [most] if most <= GPU_BENCH_CHUNK or not choices else []

    def needed(chunk: int) -> int:
        return sum(_memory(recipe.with_chunk(chunk), machine, ranks).values())

    room = ROOM * machine.rate("memory")
    return next((n for n in reversed(choices) if needed(n) <= room), min(choices, key=needed))


def _memory(recipe: Recipe, machine: Machine, ranks: Ranks, far: int = 0) -> dict[str, int]:
    kinds = {"program": int(machine.rate("reserved")), **memory_by_kind(recipe, torch.device(machine.device), ranks)}
    return {kind: size for kind, size in {**kinds, "far rows": far}.items() if size}


def _plan(recipe: Recipe, machine: Machine, ranks: Ranks) -> JobPlan:
    train, config = recipe.train, recipe.model
    steps = {stage: _step(recipe, stage, machine, ranks) for stage in train.stages}
    stage = max(train.stages, key=lambda stage: stage.seq_len)
    seconds, forward, far = steps[stage]
    tokens = train.windows(stage) * stage.seq_len
    return JobPlan(
        machine=machine,
        sp=ranks.sp,
        dp=ranks.dp,
        chunk=train.chunk,
        shard=recipe.parallel.shard,
        again=train.activation_checkpointing,
        memory=_memory(recipe, machine, ranks, far * config.num_layers),
        seconds=seconds,
        total=sum(each.steps * (sum(found.values()) - found[HIDDEN]) for each, (found, _, _) in steps.items()),
        tokens=tokens,
        flops=config.training_flops([stage.seq_len], train.predicted) / stage.seq_len * tokens,
        forward=forward,
    )


def _step(recipe: Recipe, stage: Stage, machine: Machine, ranks: Ranks) -> tuple[dict[str, float], float, int]:
    """Return the seconds of a step by part, those of its first forward pass, and the bytes of far rows per layer."""
    config, train, rate, world = recipe.model, recipe.train, machine.rate, ranks.world
    work, costs = step_flops(recipe, stage, ranks), shared(config, machine, stage.seq_len, train.chunk, ranks.sp)
    windows = train.windows(stage) / ranks.dp  # of a group
    tokens, chunks = windows * stage.seq_len / ranks.sp, -(-stage.seq_len // (train.chunk * ranks.sp))
    layers, logits = config.moved_bytes(2 if machine.dtype == "bf16" else 4)
    products, attention = rate("products") * rate("share"), work.attention / work.forwards / rate("attention")
    backward = work.attention_backward / rate("attention_backward")
    near = stage.seq_len / ranks.sp / chunks / config.num_layers  # tokens of a layer's attention, in one chunk
    waits = [(work.forwards, near * attention), (1, near * backward)]
    exchanges, trained = windows * chunks * config.num_layers, config.trained
    moved = (work.forwards + BACKWARD_MOVES) * layers + (work.logits + BACKWARD_MOVES * train.predicted) * logits
    messages = (TENSORS if recipe.parallel.shard == "none" else 2) * config.num_layers
    ring = 2 * (world - 1) / world / machine.link(world)
    spilled = stored_bytes(recipe, torch.device(machine.device), ranks) if train.spill else 0
    summed = 2 * (1 - 1 / ranks.sp) * costs.summed / machine.link(ranks.sp)
    seconds = {
        "matrix products": tokens * work.products / products,
        "attention": tokens * costs.balance * (work.forwards * attention + backward),
        "elementwise": tokens * moved / rate("bandwidth"),
        "exchange": exchanges * (sum(n * max(0.0, costs.seconds - t) for n, t in waits) + summed),
        HIDDEN: exchanges * sum(n * min(costs.seconds, t) for n, t in waits),
        "weights": ring * 4 * trained + messages * rate("message") * (world > 1),
        "update": UPDATE_BYTES * trained / (world if recipe.parallel.shard == "full" else 1) / rate("bandwidth"),
        "reading": 4 * tokens / rate("disk"),
        "spilling": 2 * windows * spilled / rate("disk"),
    }
    plain = config.layer_flops() + train.predicted * config.vocabulary_flops()
    forward = plain / products + costs.balance * attention + (layers + train.predicted * logits) / rate("bandwidth")
    return seconds, tokens * forward + exchanges * max(0.0, costs.seconds - near * attention), costs.far
