"""Compare what a plan predicts for this machine with what this machine takes: forward, backward, and a training step.

    torchrun --standalone --nproc-per-node 2 examples/cluster.py calibrate here.toml
    torchrun --standalone --nproc-per-node 2 examples/predicted.py here.toml

The file and the run need the same number of processes; without torchrun, there is one. It prints a line of JSON per
net and direction: `processes, net, tokens, direction, predicted, measured` (seconds) and `ratio`. `update` is the rest
of a training step: gradients summed over processes, clipped and applied. The fastest of several runs counts. On a CPU,
seconds are those in which the process computes, as in the calibration: other work on the machine adds none.
"""

from __future__ import annotations

import json
import sys

import torch
from cluster import HIDDEN, Machine, fastest, find_machine, seconds_by_part, training_plans

from longnet_cli import LongNet
from longnet_cli.jobs.training.costs import StepFlops
from longnet_cli.jobs.training.gradients import backward
from longnet_cli.jobs.training.optimizer import build_optimizers
from longnet_cli.jobs.training.recipe import Recipe, load_recipe
from longnet_cli.running.device import precision
from longnet_cli.running.ranks.exchange import Exchange, even_edges
from longnet_cli.running.ranks.fsdp import clip_gradients, sum_gradients
from longnet_cli.running.ranks.ranks import Ranks, join, leave

NETS = {  # name: width, layers, heads, vocabulary, tokens
    "narrow": (256, 4, 4, 256, 4096),
    "wide": (768, 2, 12, 256, 2048),
    "words": (256, 2, 4, 8192, 2048),
    "long": (128, 2, 4, 256, 16384),
}


def recipe_of(name: str, processes: int) -> Recipe:
    """Return a recipe whose step is one sequence, shared by all processes."""
    dim, layers, heads, vocab, tokens = NETS[name]
    levels = {"segment_lengths": [512, 2048, tokens], "dilation_rates": [1, 4, tokens // 512]}
    sizes = {"dim": dim, "num_layers": layers, "num_heads": heads, "ffn_dim": 4 * dim, "vocab_size": vocab, **levels}
    train = {"stages": [{"seq_len": tokens, "steps": 1}], "batch_tokens": tokens, "chunk": tokens // processes}
    tables = {"model": {**sizes, "position": "rope"}, "train": train, "parallel": {"sp": processes, "shard": "none"}}
    return load_recipe(None, {f"{table}.{key}": x for table, found in tables.items() for key, x in found.items()})


def measure(recipe: Recipe, ranks: Ranks, device: torch.device) -> dict[str, float]:
    """Return the seconds of each direction, of the slowest process."""
    net, config, train = LongNet(recipe.model).to(device), recipe.model, recipe.train
    tokens = train.stages[0].seq_len
    ids = torch.randint(config.vocab_size, (1, tokens), device=device)
    optimizers = build_optimizers(net, recipe.optimizer)
    far = Exchange(config, even_edges(0, tokens, ranks.world), group=ranks.group) if ranks.group else None
    mine = far.shard if far else slice(None)

    def forward() -> None:
        with torch.no_grad(), precision(train.dtype, device):
            net.nll(net(ids[:, mine], start=far.start if far else 0, far=far), ids[:, mine])

    def gradients() -> None:
        net.zero_grad()
        backward(net, ids, ids, chunk=train.chunk, scale=1 / tokens, dtype=train.dtype, ranks=ranks)

    def update() -> None:
        sum_gradients(net, ranks)
        clip_gradients(net, recipe.optimizer.clip)
        for optimizer in optimizers:
            optimizer.step()

    passed, both = (ranks.largest(fastest(run, device, ranks)) for run in (forward, gradients))
    rest = ranks.largest(fastest(update, device, ranks))
    return {"forward": passed, "backward": both - passed, "update": rest, "step": both + rest}


def predict(recipe: Recipe, machine: Machine, processes: int) -> dict[str, float]:
    """Return the seconds of each direction, by the plan for the recipe."""
    config, tokens, chunk = recipe.model, recipe.train.stages[0].seq_len, recipe.train.chunk
    flops, attention = config.layer_flops() + config.vocabulary_flops(), config.attention_flops(tokens) / tokens
    passed = seconds_by_part(config, machine, processes, tokens, chunk, 1, StepFlops(flops, attention, 0.0, 1, 1.0))
    step = training_plans(recipe, machine)[0].seconds
    forward, whole = (sum(parts.values()) - parts[HIDDEN] for parts in (passed, step))
    update = step["weights"] + step["update"]
    return {"forward": forward, "backward": whole - update - forward, "update": update, "step": whole}


def main() -> None:
    machine = find_machine(sys.argv[1])
    ranks, device = join("cpu" if machine.device == "cpu" else "auto")
    for name in NETS:
        recipe = recipe_of(name, ranks.world)
        measured, predicted = measure(recipe, ranks, device), predict(recipe, machine, ranks.world)
        for direction, seconds in predicted.items() if ranks.first else ():
            row = {"processes": ranks.world, "net": name, "tokens": NETS[name][-1], "direction": direction}
            row |= {"predicted": seconds, "measured": measured[direction], "ratio": seconds / measured[direction]}
            print(json.dumps({key: float(f"{x:.3g}") if isinstance(x, float) else x for key, x in row.items()}))
    leave()


if __name__ == "__main__":
    main()
