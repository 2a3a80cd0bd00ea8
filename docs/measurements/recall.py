"""Train small nets to recall, and print how often they are right by distance: how far back a pattern can find.

    python docs/measurements/recall.py window:16 window:16,chosen=16x4,chosen_every=1 --seeds 3 -o recall.png

The task is multi-query associative recall (Arora et al., arXiv 2312.04927). A key and its value are somewhere in a
sequence of noise, and the key comes again `distance` tokens later. Only looking back can tell which value follows it.
A window of w tokens that looks back b segments reaches layers * (1 + b) * w tokens. Distances are multiples of the
reach of the first pattern.

`--rows docs/recall.jsonl -o docs/recall.png` draws rows again that were measured before.

The net reads each token together with the `--width` - 1 tokens before it, a short convolution. Without one it first has
to find induction heads, which takes most of the training and says nothing about the pattern.

It writes one line of JSON per pattern, seed and distance: `pattern, position, seed, distance, reach, accuracy, chance,
keys` (per query, on average over the second half of a sequence), `seen` (the share of positions at that distance that
some head of a query sees; null for chosen blocks, which the content decides) and `seconds` of training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longnet_cli import LongNet, LongNetConfig, parse_pattern
from longnet_cli.attention import Pattern

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from reference import key_counts

KEYS, VALUES = 64, 32  # ids: keys, then values, then one for noise
SHORT = 128  # tokens of the first sequences
SPACING = 8  # tokens per key


class Recaller(nn.Module):
    """A LongNet whose input at each position is the sum of embeddings of the last `width` tokens."""

    def __init__(self, config: LongNetConfig, width: int) -> None:
        super().__init__()
        self.net = LongNet(config)
        self.before = nn.ModuleList(
            nn.Embedding(config.vocab_size, config.dim) for _ in range(width - 1)
        )
        for table in self.before:
            nn.init.normal_(table.weight, std=config.dim**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Return hidden states (rows, tokens, dim) of ids (rows, tokens)."""
        x = self.net.embed(ids)
        for shift, table in enumerate(self.before, 1):
            x = x + F.pad(table(ids[:, :-shift]), (0, 0, shift, 0))
        return self.net(embeddings=x)


def sequences(
    rng: np.random.Generator, count: int, tokens: int, distances: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Return ids (count, tokens), and the row, position and value of every query, (queries,) each.

    A query is a key that repeats an earlier one, at one of the `distances` that fit. Its value is the id after it.
    """
    ids = np.full((count, tokens), KEYS + VALUES)
    distances = distances[distances < tokens - 4]
    found = []
    for row in range(count):
        taken = np.zeros(tokens, bool)
        for key in rng.permutation(KEYS)[: tokens // SPACING]:
            distance = int(rng.choice(distances))
            start = int(rng.integers(0, tokens - distance - 1))
            places = [start, start + 1, start + distance, start + distance + 1]
            if taken[places].any():
                continue  # one key less, rather than a search for another place
            taken[places] = True
            value = KEYS + int(rng.integers(VALUES))
            ids[row, places] = [key, value, key, value]
            found.append((row, start + distance, value))
    return (ids, *np.array(found).T)


def train(pattern: Pattern, args: argparse.Namespace, seed: int, longest: int) -> Recaller:
    """Train on sequences of SHORT to `longest` tokens, with distances of all sizes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    sizes = {
        "num_layers": args.layers,
        "num_heads": args.heads,
        "dim": args.dim,
        "ffn_dim": 2 * args.dim,
    }
    config = LongNetConfig(
        vocab_size=KEYS + VALUES + 1, position=args.position, pattern=pattern, **sizes
    )
    net = Recaller(config, args.width)
    matrices = [p for p in net.net.layers.parameters() if p.dim() == 2]
    others = [p for p in net.parameters() if all(p is not each for each in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    distances = np.unique(np.geomspace(4, longest, 100).astype(int))
    for step in range(args.steps):
        done = (
            step / args.steps
        )  # short for a third of the steps, then of any length up to a growing limit
        tokens = int(SHORT * (longest / SHORT) ** (min(1.0, max(0.0, 3 * done - 1)) * rng.random()))
        ids, rows, places, values = sequences(
            rng, max(1, args.batch_tokens // tokens), tokens, distances
        )
        logits = net.net.logits(net(torch.from_numpy(ids))[rows, places])
        loss = F.cross_entropy(logits, torch.from_numpy(values))
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / 30, 3 - 3 * done)
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 49:
            print(f"step {step + 1}, {tokens} tokens: {loss.item():.3f} nats", file=sys.stderr)
    return net.eval()


@torch.inference_mode()
def accuracy(net: Recaller, seed: int, tokens: int, distance: int, queries: int = 1000) -> float:
    """Return the share of queries at `distance` whose value the net ranks first."""
    rng = np.random.default_rng([seed, distance])
    right = total = 0
    while total < queries:
        ids, rows, places, values = sequences(
            rng, max(1, 8192 // tokens), tokens, np.array([distance])
        )
        logits = net.net.logits(net(torch.from_numpy(ids))[rows, places])
        right += int((logits.argmax(-1) == torch.from_numpy(values)).sum())
        total += len(values)
    return right / total


def seen(
    pattern: Pattern, heads: int, tokens: int, distances: list[int]
) -> tuple[float, list[float | None]]:
    """Return the keys per query, and for each distance the share of queries with a head that sees the value.

    Both are means over the queries in the second half of a sequence. With chosen blocks, nobody knows the shares.
    """
    found = np.zeros(len(distances))
    counts = key_counts(pattern, heads, tokens, causal=True, start=0, padding="exact")[0] > 0
    queries = torch.arange(tokens // 2, tokens)
    keys = float(counts[:, queries].sum(-1).float().mean()) + pattern.chosen_keys
    if pattern.chosen:
        return keys, [None] * len(distances)
    for i, distance in enumerate(distances):
        late = queries[queries >= distance]
        found[i] = float(
            counts[:, late, late - distance + 1].any(0).float().mean()
        )  # where the value stood
    return keys, found.tolist()


def results(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train and test a net for each pattern and seed. Yield a row for each distance."""
    first = parse_pattern(args.patterns[0])
    reach = args.layers * (1 + first.look_backs[0]) * first.segment_lengths[0]
    distances = [int(times * reach) for times in args.times]
    longest = int(1.25 * distances[-1])
    for text in args.patterns:
        pattern = parse_pattern(text)
        keys, shares = seen(pattern, args.heads, longest, distances)
        for seed in range(args.seeds):
            began = time.monotonic()
            net = train(pattern, args, seed, longest)
            seconds = time.monotonic() - began
            for distance, share in zip(distances, shares, strict=True):
                tokens = max(SHORT, int(1.25 * distance))
                yield {
                    "pattern": text,
                    "position": args.position,
                    "seed": seed,
                    "distance": distance,
                    "reach": reach,
                    "accuracy": accuracy(net, seed, tokens, distance),
                    "chance": 1 / VALUES,
                    "keys": keys,
                    "seen": share,
                    "seconds": seconds,
                }


def means(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each pattern: its accuracy at each distance, the mean over seeds."""
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        of = [row for row in rows if row["pattern"] == pattern]
        distances = [*dict.fromkeys(row["distance"] for row in of)]
        accuracy = [
            float(np.mean([row["accuracy"] for row in of if row["distance"] == each]))
            for each in distances
        ]
        seeds, position = len(of) // len(distances), of[0].get("position", "rope")
        yield {"pattern": pattern, "position": position, "keys": of[0]["keys"], "seeds": seeds} | {
            "distances": distances, "accuracy": accuracy, "chance": of[0]["chance"]
        }  # fmt: skip


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Draw accuracy by distance: a line per pattern through the means over seeds, a dot per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for text in dict.fromkeys(row["pattern"] for row in rows):
        found = defaultdict(list)
        for row in rows:
            if row["pattern"] == text:
                found[row["distance"]].append(row["accuracy"])
        (line,) = axes.plot([*found], [np.mean(each) for each in found.values()], label=text)
        axes.plot(
            *np.array([(d, a) for d, each in found.items() for a in each]).T,
            "o",
            ms=3,
            color=line.get_color(),
        )
    axes.axvline(rows[0]["reach"], color="0.6", ls=":")
    axes.text(rows[0]["reach"], 1.01, " reach of the first", ha="left", va="bottom", color="0.4")
    axes.axhline(rows[0]["chance"], color="0.6", ls=":")
    axes.set(
        xscale="log",
        xlabel="tokens between a key and its question",
        ylabel="share answered",
        ylim=(0, 1.08),
    )
    axes.set_xscale("log", base=2)
    figure.legend(fontsize="small", loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=300)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("patterns", nargs="*", help="as --pattern takes them")
    parser.add_argument(
        "--rows", type=Path, help="rows that were written before, to draw them or print their means"
    )
    parser.add_argument("-o", "--output", help="draw a picture into this file")
    parser.add_argument(
        "--times", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4, 16, 64], help="of the reach"
    )
    parser.add_argument("--position", choices=["rope", "rope_by_level"], default="rope")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--width", type=int, default=2, help="tokens that a position reads")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows else []
    try:
        for text in args.patterns:
            parse_pattern(text)
    except ValueError as error:
        parser.error(str(error))
    for row in results(args) if args.patterns else means(rows):
        rows += [row] if args.patterns else []
        print(json.dumps(row), flush=True)
    if args.output:
        draw(rows, args.output)
