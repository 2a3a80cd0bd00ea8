"""The layers of a model that choose blocks, where nobody has named them.

In a pretrained Transformer, few layers look for the place at which a text stood before. They show themselves on a text
of random tokens that is read twice: nothing but such a look tells where a token stood. For each group of queries in the
second reading, a layer's votes (`attention.choosing`) are compared, with a power that lets a few sure heads count more
than many that guess: how much more does the group look for the block in which its text stood than other groups do, and
than for other blocks? That is the layer's evidence, in nats. The layers that choose are the peaks: those with more
evidence than both of their neighbours, and at least LEAST.

B texts, N tokens, L layers.
"""

from __future__ import annotations

import json
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longnet_cli.attention import Outside
from longnet_cli.attention.choosing import shares_of
from longnet_cli.attention.notation import PATTERN_FIELDS, format_pattern
from longnet_cli.attention.past import Means, unrotated
from longnet_cli.attention.pattern import SURE, VOTERS
from longnet_cli.attention.sinks import Turn
from longnet_cli.basics.errors import InputWarning
from longnet_cli.basics.verdict_cache import remembered
from longnet_cli.nets.net import Net
from longnet_cli.nets.weights import digest_of

READ, BETWEEN = (
    512,
    256,
)  # tokens of a text that are read twice, and tokens between; fewer if positions end before
IN_ALL = (
    1024  # tokens of all texts that are read twice: with 200, chance alone made 0.25 of evidence
)
EVERY = 16  # tokens per group
SECONDS = 10.0  # between two lines of progress
LEAST = 0.15  # SmolLM2: 0.19 to 1.2 at its peaks, and 0.12 at the next one


def let_layers_choose(net: Net) -> None:
    """Find the layers that choose blocks, and let them, in place, unless the pattern names them.

    What is found is kept for the next time (`basics.verdict_cache`), and a line says it. Without any evidence, the
    layer in the middle chooses. A model whose layers cannot be watched keeps a pattern in which every layer chooses.
    """
    pattern = net.config.pattern
    if (
        not pattern.chosen
        or pattern.chosen_layers
        or not net.config.causal
        or not net.config.vocab_size
    ):
        return
    begun = time.monotonic()
    evidence = remembered(_question(net), lambda: [round(x, 4) for x in layer_evidence(net)])
    if not evidence:
        return
    layers = peaks(evidence) or (len(evidence) // 2,)
    net.choose_in(layers)
    named = "/".join(map(str, layers))
    if (seconds := time.monotonic() - begun) >= 1:
        warnings.warn(
            InputWarning(
                f"blocks are chosen by the layers {named}: found in {seconds:.0f} s by a text of random tokens, and "
                f"kept for the next time (layers={named} in the pattern says the same)"
            ),
            stacklevel=2,
        )


def _question(net: Net) -> dict[str, Any]:
    """Return what decides the evidence: weights, settings, and the pattern if it hides a part of the text."""
    pattern, (read, between) = net.config.pattern, _lengths(net)
    (w, r), back = pattern.levels[0], pattern.look_backs[0]
    seen = len(pattern.levels) == r == 1 and (2 * read + between - 1) // w <= back
    settings = json.loads(net.config.model_dump_json())
    settings |= json.loads(settings.pop("source", "{}"))
    for name in (
        *PATTERN_FIELDS,
        "pattern",
        "dilated_attention",
        "as_trained",
        "max_tokens",
        "memory",
    ):
        settings.pop(name, None)
    return {
        "probe": "layers that choose",
        "model": digest_of(json.dumps(settings, sort_keys=True), net.state_dict()),
        "tokens": [read, between],
        "block": pattern.chosen_block,
        "pattern": None if seen else format_pattern(pattern),
    }


def _lengths(net: Net) -> tuple[int, int]:
    """Return the tokens that are read twice, whole blocks, and those between."""
    size, longest = net.config.pattern.chosen_block, net.config.max_tokens or 2 * READ + BETWEEN
    return min(READ, longest * 2 // 5 // size * size), min(BETWEEN, longest // 5)


def peaks(evidence: list[float]) -> tuple[int, ...]:
    """Return the layers with at least LEAST of evidence, and more than the layers before and after."""
    around = [0.0, *evidence, 0.0]
    neighbours = [max(around[layer], around[layer + 2]) for layer in range(len(evidence))]
    return tuple(
        layer for layer, own in enumerate(evidence) if own >= LEAST and own > neighbours[layer]
    )


@torch.inference_mode()
def layer_evidence(net: Net) -> list[float]:
    """Return the evidence of each layer that it finds what it has read before, in nats; [] if it cannot be told."""
    (read, between), number, said = _lengths(net), net.config.num_layers, time.monotonic()
    if read < 2 * net.config.pattern.chosen_block:
        return []
    ids = torch.from_numpy(
        np.stack(
            [
                _random_text(seed, net.config.vocab_size, read, between)
                for seed in range(IN_ALL // read)
            ]
        )
    )
    watched: list[tuple[Tensor, Tensor]] = []

    def tell(done: str) -> None:
        nonlocal said
        if time.monotonic() - said >= SECONDS:
            line = f"looking for the layers that choose blocks, once for these weights: {done} of {number} layers"
            warnings.warn(InputWarning(line), stacklevel=2)
            said = time.monotonic()

    def far(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Outside:
        tell(f"a text was read in {layer}")
        watched.append((q, k))
        return Outside()

    net(ids.to(next(net.parameters()).device), start=0, far=far)
    turns, evidence = net.turns, list[float]()
    if len(watched) != number or len(turns) != number:
        return []
    for (q, k), turn in zip(watched, turns, strict=True):
        tell(f"compared in {len(evidence)}")
        evidence.append(_evidence(net, q, k, turn, read + between))
    return evidence


def _random_text(seed: int, vocabulary: int, read: int, between: int) -> np.ndarray:
    """Return a text (tokens,) that begins and ends with the same `read` tokens.

    Tokens are as frequent as words are, by Zipf's law: the first ids of a vocabulary are characters and marks, the next
    ones are frequent.
    """
    common = min(260, vocabulary // 4)
    weights = 1 / np.arange(10, 10 + vocabulary - common)
    chance = np.random.default_rng(seed)
    ids = common + chance.choice(len(weights), read + between, p=weights / weights.sum())
    return np.concatenate([ids, ids[:read]])


def _evidence(net: Net, q: Tensor, k: Tensor, turn: Turn | None, again: int) -> float:
    """Return the evidence of one layer, from its queries (B, N, H, D) and keys (B, N, K, D).

    The second reading starts at position `again`.
    """
    pattern, tokens = net.config.pattern, q.shape[1]
    size, scale = pattern.chosen_block, q.shape[-1] ** -0.5
    blocks = again // size
    means = Means(pattern, k, blocks)
    means.write(slice(None), 0, k[:, : blocks * size], turn)
    firsts = torch.arange(again + EVERY, tokens - 1, EVERY)
    positions = (firsts[:, None] + torch.arange(1 - VOTERS, 1)).flatten()
    found = []
    for row in range(len(q)):
        voters = unrotated(q[row : row + 1, positions.to(q.device)], positions, turn)[0] * scale
        shares = shares_of(voters.unflatten(0, (len(firsts), VOTERS)), means.fine[row][:, 1:blocks])
        logs = (shares.double() ** SURE).mean((0, 2)).clamp(min=1e-36).log().cpu() / SURE
        logs = logs - logs.mean(0, keepdim=True)
        logs = logs - logs.mean(1, keepdim=True)
        for group, begin in enumerate((firsts - again).tolist()):
            right = {begin // size, (begin + 1) // size} - {0}
            found += [max(float(logs[group, block - 1]) for block in right)] if right else []
    return float(np.mean(found)) if found else 0.0
