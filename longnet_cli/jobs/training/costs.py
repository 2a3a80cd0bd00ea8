"""The estimate of `longnet train --dry-run`: parameters, memory by kind, FLOPs and time of a recipe.

What a token takes in a step, and the time of a layer, are measured; all else is counted, and nothing of the recipe's
size is allocated. The memory is one rank's, as if everything were held at one time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import torch

from longnet_cli.attention.pattern import ceil_div
from longnet_cli.basics.errors import LongNetError
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.jobs.estimating import Estimate
from longnet_cli.jobs.reading_plan import ReadingPlan, cache_bytes
from longnet_cli.nets.net import LOGITS_LIMIT
from longnet_cli.running.device import (
    free_memory,
    resident_memory,
    resolve_dtype,
    trim_memory,
    wait_for,
)
from longnet_cli.running.ranks.ranks import ALONE, Ranks
from longnet_cli.running.reader import (
    GPU_TRAINING_CHUNK,
    SHORTEST_CHUNK,
    TRAINING_CHUNK,
    chunk_of,
    fitting_chunk,
)

from .limits import check_ranks
from .recipe import Recipe, Stage
from .step_bytes import activation_bytes, far_bytes, itemsize_of, logits_bytes, step_of_layers

GAPS = 2  # bytes of logits on a CPU, relative to those in use: the heap is kept, and cannot reuse all that is freed
SECONDS = 0.25  # that the step takes whose rate counts


def settle_chunk(recipe: Recipe, device: torch.device, ranks: Ranks) -> Recipe:
    """Return the recipe with a `train.chunk` that keeps a GPU busy, unless it names one. All ranks call it together.

    The chunk is the longest power of two up to `GPU_TRAINING_CHUNK` that leaves a fifth of the free memory, and at
    least the default, which a CPU uses.
    """
    if device.type == "cpu" or recipe.names_chunk:
        return recipe
    needed = partial(_needed_bytes, recipe, device, ranks)
    longest = fitting_chunk(needed, GPU_TRAINING_CHUNK, 0.8 * free_memory(device), TRAINING_CHUNK)
    return recipe.with_chunk(chunk_of(None, longest or TRAINING_CHUNK, ranks=ranks))


def estimate_memory(recipe: Recipe, device: torch.device, ranks: Ranks) -> Estimate:
    """Return the memory that training by `recipe` will take beside what this process holds now, and no time."""
    train = recipe.train
    free = free_memory(device)
    # a chunk of a bidirectional net cannot be shorter than a window
    shortest = SHORTEST_CHUNK if recipe.model.causal else ceil_div(train.longest, ranks.sp)
    needed = partial(_needed_bytes, recipe, device, ranks)
    return Estimate(
        held={"program": resident_memory(device)},
        needed=training_memory(recipe, device, ranks),
        free=free,
        chunk_that_fits=fitting_chunk(needed, train.chunk, free, shortest),
        spillable="" if train.spill else "cache",
    )


def estimate_training(recipe: Recipe, device: torch.device, ranks: Ranks = ALONE) -> Estimate:
    """Return what training by `recipe` will take on this machine.

    `flops_per_token` counts a forward and a backward pass; `flops` also counts what is computed again. `seconds` is the
    time for `flops` at the `step_rate` of each rank. Raises ConfigError as `check_ranks` does.
    """
    config = recipe.model
    train = recipe.train
    check_ranks(recipe, ranks)
    dtype = resolve_dtype(train.dtype, device)
    # FLOPs of one forward and one backward pass over all tokens, and those that are executed
    flops_of_passes = flops = 0.0
    for stage in train.stages:
        tokens_of_stage = stage.steps * recipe.step_tokens(stage)
        window = config.training_flops([stage.seq_len], train.predicted)
        flops_of_passes += tokens_of_stage * (window / stage.seq_len)
        flops += tokens_of_stage * step_flops(recipe, stage, ranks).all
    rate = ranks.own(step_rate(recipe, device), device)
    _load_libraries(recipe, device)
    return replace(
        estimate_memory(recipe, device, ranks),
        others={
            "parameters": config.num_parameters(),
            "trained": config.trained,
            "flops_per_token": flops_of_passes / recipe.tokens,
            "tokens": recipe.tokens,
            "steps": recipe.steps_in_words,
            "flops": flops,
            "seconds": flops / (rate * ranks.world),
            "dtype": dtype,
            "chunk": train.chunk,
            "spill_bytes": stored_bytes(recipe, device, ranks) if train.spill else 0,
            "flops_per_second": rate,
            "tokens_per_second": recipe.tokens * rate * ranks.world / flops,
        },
    )


def step_rate(recipe: Recipe, device: torch.device) -> float:
    """Return the FLOP/s of one rank in a step of one layer, without logits: the better of two that take `SECONDS`."""
    config = recipe.model
    train = recipe.train
    again = train.activation_checkpointing
    step = step_of_layers(config, 1, train.dtype, recipe.adapter, again, device)

    def timed(tokens: int) -> float:
        began = time.perf_counter()
        step(tokens)
        wait_for(device)
        return time.perf_counter() - began

    tokens = SHORTEST_CHUNK
    while (seconds := min(timed(tokens), timed(tokens))) < SECONDS and tokens < train.chunk:
        tokens *= 2
    flops = config.training_flops([tokens], 0.0)
    flops += again * (tokens * config.layer_flops() + config.attention_flops(tokens))
    return flops / config.num_layers / seconds


def _load_libraries(recipe: Recipe, device: torch.device) -> None:
    """Use an optimizer and the tokenizer, so that this process holds their libraries; a step has been made before."""
    weight = torch.nn.Parameter(torch.zeros(1, device=device))
    weight.sum().backward()
    torch.optim.AdamW([weight]).step()
    with suppress(LongNetError):  # which is said when training starts
        tokenizer = Tokenizer.load(recipe.data.tokenizer)
        tokenizer.encode("some words")  # it makes tables for the first text
    trim_memory(device)


def _needed_bytes(recipe: Recipe, device: torch.device, ranks: Ranks, chunk: int) -> int:
    return sum(training_memory(recipe.with_chunk(chunk), device, ranks).values())


def costly_evaluation(recipe: Recipe, lengths: Sequence[int]) -> str | None:
    """Return a line if held-out documents of these lengths cost more FLOPs than the steps between two evaluations."""
    config = recipe.model
    train = recipe.train
    step = min(
        config.training_flops([stage.seq_len], train.predicted) * train.windows(stage)
        for stage in train.stages
    )
    of_step = train.stages[0].seq_len if train.objective == "masked" else max(lengths, default=1)
    size = train.held_out_context or of_step
    reading = ReadingPlan(config, train.chunk)
    windows = [min(size, tokens - start) for tokens in lengths for start in range(0, tokens, size)]
    reading.add((tokens, round(tokens * train.predicted)) for tokens in windows)
    times = reading.flops() / (step * train.evaluate_every)
    if times <= 1:
        return None
    between = f"{times:.1f} times the FLOPs of the {train.evaluate_every} steps between two"
    return f"an evaluation takes {between}: raise train.evaluate_every, or cut documents (train.held_out_context)"


class StepFlops(NamedTuple):
    """FLOPs per token that a step executes, by kind; `forwards` and `logits` count the forward passes, of both kinds.

    `logits` counts a pass over the share of tokens that are predicted as that share.
    """

    products: float
    attention: float
    attention_backward: float
    forwards: float
    logits: float

    @property
    def all(self) -> float:
        return self.products + self.attention + self.attention_backward


def step_flops(recipe: Recipe, stage: Stage, ranks: Ranks) -> StepFlops:
    """Return the FLOPs per token of a step in this stage, on all ranks.

    Of a window's chunks, all but the last are computed again for the backward pass. With
    `train.activation_checkpointing`, each is computed once more. Logits are computed again where they are more than
    `LOGITS_LIMIT`.
    """
    train = recipe.train
    config = recipe.model
    tokens = stage.seq_len
    chunk = train.chunk * ranks.sp
    predicted = train.predicted
    chunks = ceil_div(tokens, chunk)
    forwards = 1 + (chunks - 1) * chunk / tokens + train.activation_checkpointing
    logits = predicted
    if tokens_at_once(recipe, stage, ranks) * predicted * config.vocab_size > LOGITS_LIMIT:
        logits *= 2
    one_pass = config.attention_flops(tokens) / tokens
    backward = config.attention_backward_flops(tokens) / tokens
    products = config.training_flops([tokens], predicted) / tokens - one_pass - backward
    products += (forwards - 1) * config.layer_flops()
    products += (logits - predicted) * config.vocabulary_flops()
    return StepFlops(products, forwards * one_pass, backward, forwards, logits)


def training_memory(recipe: Recipe, device: torch.device, ranks: Ranks) -> dict[str, int]:
    """Return the bytes of one rank at its peak, by kind.

    Each kind is that of the stage that takes the most of it. activations: of all layers, for the tokens of a forward
    pass. logits: of tokens that are predicted, with `GAPS`. cache: rows that pass from chunk to chunk, and rows that
    are stored for the backward pass, with their gradients; with `train.spill`, what is stored is on a disk.
    evaluation, merged: what reading the held-out documents, and LoRA's merged weights in float32, take beyond a step's
    activations, logits and cache, which are gone by then. A checkpoint is written from the tensors themselves, and
    takes nothing. For the other kinds, see `_weights_memory`.
    """
    config = recipe.model
    train = recipe.train
    itemsize = itemsize_of(train.dtype, device)
    tokens = max(tokens_at_once(recipe, stage, ranks) for stage in train.stages)
    per_token = activation_bytes(
        config,
        resolve_dtype(train.dtype, device),
        json.dumps(recipe.adapter),
        train.activation_checkpointing,
    )
    logits = logits_bytes(config, round(tokens * train.predicted))
    far = far_bytes(config, train.longest, train.chunk * ranks.sp, itemsize)
    step = {
        "activations": tokens * per_token,
        "logits": GAPS * logits if device.type == "cpu" else logits,
        "cache": far.passing if train.spill else far.passing + far.stored,
    }
    memory = _weights_memory(recipe, itemsize, ranks) | step
    later = {"evaluation": _evaluation_bytes(recipe, itemsize)}
    if config.frozen and device.type == "cpu":
        later["merged"] = 4 * config.num_parameters()
    kind, size = max(later.items(), key=itemgetter(1))
    beyond = size - sum(step.values())
    if beyond > 0:
        memory[kind] = beyond
    return memory


def _weights_memory(recipe: Recipe, itemsize: int, ranks: Ranks) -> dict[str, int]:
    """Return the bytes of one rank that do not depend on the tokens of a forward pass, by kind.

    weights: 4 bytes per number, and the copy of the matrices that autocast makes. Beside LoRA's, they are of the types
    in which they are kept, and one matrix at a time is cast to the type of products. gradients: 4 bytes per trained
    number; the vocabulary's twice where a step has several forward passes. optimizer: 8 bytes per trained number, the
    two moments of AdamW. With `parallel.shard` "full", a
    rank holds its share of all these, and in a step all weights and gradients besides.
    """
    config = recipe.model
    train = recipe.train
    table = config.vocab_size * config.dim
    weights = 4 * config.trained + config.frozen_bytes
    gradients = 4 * config.trained
    moments = 8 * config.trained
    if recipe.parallel.shard == "full" and ranks.world > 1:
        weights += weights // ranks.world
        gradients += gradients // ranks.world
        moments //= ranks.world
    if config.frozen:
        are_narrow = config.frozen_bytes < 4 * config.num_parameters()
        weights += itemsize * table if are_narrow is (itemsize == 4) else 0
    else:
        if itemsize < 4:
            weights += itemsize * (config.layer_weights + table)
        if max(map(recipe.step_tokens, train.stages)) > train.chunk * ranks.world:
            gradients += 4 * table  # that of the table, while another chunk's is added to it
    return {"weights": weights, "gradients": gradients, "optimizer": moments}


def _evaluation_bytes(recipe: Recipe, itemsize: int) -> int:
    """Return the bytes of one rank, beside the weights, while held-out documents are read; 0 without any.

    They are those of a document of two chunks, or of the text's bytes if these are fewer: no document is opened. As for
    any reading, they are activations or logits (two numbers each), hidden states and, in a causal net, the cache.
    """
    files = recipe.data.held_out_files
    if not files:
        return 0
    config = recipe.model
    chunk = recipe.train.chunk
    most = min(2 * chunk, recipe.train.held_out_context or 2 * chunk)
    tokens = min(most, Inputs(files).num_bytes() or most)
    at_once = min(tokens, chunk)
    needed = max(config.forward_bytes(at_once), logits_bytes(config, at_once))
    needed += 2 * 4 * config.dim * tokens
    if config.causal and tokens > chunk:
        needed += cache_bytes(config, tokens, itemsize)
    return needed


def tokens_at_once(recipe: Recipe, stage: Stage, ranks: Ranks) -> int:
    """Return the most tokens of a forward pass on one rank, as `objective.backward` groups or cuts sequences."""
    chunk = recipe.train.chunk * ranks.sp
    rows = recipe.train.windows(stage) // ranks.dp
    if recipe.train.across_documents:
        rows = min(rows, max(1, chunk // stage.seq_len))
    # documents of several windows may fill a chunk
    return ceil_div(min(chunk, rows * stage.seq_len), ranks.sp)


def stored_bytes(recipe: Recipe, device: torch.device, ranks: Ranks) -> int:
    """Return the bytes of far rows and their gradients that one rank stores, in memory or in `train.spill`'s file."""
    itemsize = itemsize_of(recipe.train.dtype, device)
    chunk = recipe.train.chunk * ranks.sp
    return far_bytes(recipe.model, recipe.train.longest, chunk, itemsize).stored
