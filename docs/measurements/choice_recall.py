"""Compare the blocks that each layer sees with those that its queries weigh most, of all keys. Nothing is trained.

    python examples/real_model.py runs/real
    python docs/measurements/choice_recall.py runs/real/smollm2 finding --text runs/real/prose/*.txt --tokens 10K 100K
    python docs/measurements/choice_recall.py longnet-tiny finding --text SOURCES... --tokens 10K 100K 1M
    python docs/measurements/choice_recall.py longnet-tiny finding --random --tokens 10K 100K 1M

A document is read once per pattern. At the end of each number of `--tokens`, it takes `--groups` groups of queries,
evenly among those of the last 4,096 tokens. A block's weight for a group is its share of the softmax over all keys that
could be chosen, un-rotated, as they are compared in the choice, in the mean over the group's queries and the heads. The
exact choice is as many blocks as the group sees, those with the largest weights; block 0, which all see, is left out.
The recall of a choice is the weight of what it sees, relative to the weight of the exact choice.

It writes one line of JSON per pattern, number of tokens and layer that sees chosen blocks: `pattern, tokens, layer,
kind` (chooses, or follows another layer's choice), `groups, recall, exact` (the share of all weight that the exact
choice has) and `seconds`, those of reading on until there. The table on stderr has the means over layers of a kind.
With `--random`, the document is random tokens, in which nothing stands out. Give `--spill` for keys that do not fit in
memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longnet_cli import CausalStream, ConfigError, LongNetError, ModelFolder, Net, parse_pattern
from longnet_cli.attention.groups import GroupedPart
from longnet_cli.attention.past import Past, unrotated
from longnet_cli.attention.sinks import Turn
from longnet_cli.basics.sizes import parse_size

LAST = 4096  # tokens of which groups are taken
STEP = 4096  # keys that are un-rotated at a time

Row = dict[str, Any]


class Group(NamedTuple):
    """A group of queries (n, H, D), the first of them at `first`, and the blocks (m,) that it sees before `near`."""

    first: int
    near: int
    queries: Tensor
    seen: Tensor


class Watched:
    """A net that hands out the queries of its layers: `queries`, of the last call, by layer (B, n, H, D)."""

    def __init__(self, net: Net) -> None:
        self.net, self.config, self.queries = net, net.config, dict[int, Tensor]()

    def __call__(self, tokens: Tensor, *, far: Any, **options: Any) -> Tensor:
        def watched(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Any:
            self.queries[layer] = q
            return far(layer, q, k, v)

        return self.net(tokens, far=watched, **options)


def read_groups(stream: CausalStream, ids: np.ndarray, number: int) -> dict[int, list[Group]]:
    """Read the last ids (n,) of a document at once; return `number` of their groups, by layer."""
    choices: dict[int, list[tuple[GroupedPart, Tensor]]] = defaultdict(list)
    stream.watch(lambda layer, seen: choices[layer].append((seen.part, seen.blocks[0])))
    begin, pattern = stream.position, stream.model.config.pattern
    stream(torch.from_numpy(ids)[None])
    stream.watch(lambda *_: None)
    every, groups = pattern.chosen_every, {}
    for layer, calls in choices.items():
        some = []
        for part, chosen in calls:
            first = part.groups.start // every * every
            for start, blocks in zip(range(first, first + every * part.groups.number, every), chosen, strict=False):
                inside = slice(start - begin, start - begin + every)
                if 1 < len(blocks) < part.groups.near // pattern.chosen_block and 0 <= inside.start <= len(ids) - every:
                    some.append(
                        Group(start, part.groups.near, stream.model.queries[layer][0, inside], blocks[1:].long())
                    )
        if some:
            groups[layer] = [some[i] for i in np.linspace(0, len(some) - 1, min(number, len(some))).astype(int)]
    return groups


def all_keys(past: Past, turn: Turn | None) -> Tensor:
    """Return the keys of all whole blocks of a past, un-rotated, in row 0: (K, tokens, D)."""
    size, parts = past.pattern.chosen_block, []
    for blocks in torch.arange(past.blocks.number).split(STEP // size):
        into = past.waiting.new_empty(2, len(blocks), size, *past.waiting.shape[3:])
        past.blocks.take(0, blocks, into)
        positions = torch.arange(int(blocks[0]) * size, (int(blocks[-1]) + 1) * size)
        parts.append(unrotated(into[0].flatten(0, 1)[None], positions, turn)[0])
    return torch.cat(parts).transpose(0, 1).contiguous()


def recall(group: Group, keys: Tensor, size: int, turn: Turn | None) -> tuple[float, float]:
    """Return the recall of a group's choice of blocks of `size` keys, and the share of all weight of the exact choice.

    keys (K, tokens, D) as `all_keys` gives them.
    """
    positions = torch.arange(group.first, group.first + len(group.queries))
    queries = unrotated(group.queries[None], positions, turn)[0] * keys.shape[2] ** -0.5
    weights = torch.zeros(group.near // size - 1)
    for own, of_head in zip(queries.unflatten(1, (len(keys), -1)).unbind(1), keys, strict=True):
        scores = own.flatten(0, 1) @ of_head[size : group.near].T
        weights += scores.softmax(-1).mean(0).unflatten(0, (-1, size)).sum(1) / len(keys)
    exact = weights.topk(len(group.seen)).values.sum()
    return float(weights[group.seen - 1].sum() / exact), float(exact)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of each pattern."""
    folder = ModelFolder.find(options.model)
    tokenizer, sizes = folder.tokenizer(), sorted(options.tokens)
    for written in options.patterns:
        net = folder.net(pattern=parse_pattern(written))
        if not net.config.pattern.chosen:
            raise ConfigError(f"{written}: there are no chosen blocks")
        start = net.start_rows(folder.bos(tokenizer))
        if options.random:
            ids = np.random.default_rng(options.seed).integers(net.config.vocab_size, size=sizes[-1])
        else:
            texts = (Path(path).read_text(encoding="utf-8", errors="replace") for path in options.text)
            ids = np.concatenate([tokenizer.encode(text) for text in texts])
        ids = np.concatenate([start, ids]).astype(np.int64)
        if len(ids) < sizes[-1]:
            raise ConfigError(f"the text has {len(ids)} tokens, and {sizes[-1]} are needed: give more files")
        stream = CausalStream(Watched(net), spill=options.spill)  # type: ignore[arg-type]
        for tokens in sizes:
            begin, last = time.perf_counter(), max(stream.position, tokens - LAST)
            for at in range(stream.position, last, options.chunk):
                stream(torch.from_numpy(ids[at : min(at + options.chunk, last)])[None])
            groups = read_groups(stream, ids[last:tokens], options.groups)
            row = {"pattern": written, "tokens": tokens, "seconds": round(time.perf_counter() - begin, 1)}
            for layer, some in groups.items():
                past = stream.caches[layer].past
                assert past
                turn = net.turns[layer]
                keys = all_keys(past, turn)
                recalls, exact = zip(
                    *(recall(group, keys, net.config.pattern.chosen_block, turn) for group in some), strict=True
                )
                result = {
                    "layer": layer,
                    "kind": net.config.pattern.kind(layer),
                    "groups": len(some),
                    "recall": float(np.mean(recalls)),
                }
                yield row | result | {"exact": float(np.mean(exact))}


def table(rows: list[Row]) -> Iterator[str]:
    """Yield lines of Markdown: a row per pattern and number of tokens, with means over layers that choose, and others.

    Each cell has the recall, and the share of all weight that the exact choice has.
    """
    yield "| pattern | tokens | layers that choose | layers that follow |"
    yield "|---|---|---|---|"
    ways: dict[tuple, dict[str, list[tuple]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        ways[row["pattern"], row["tokens"]][row["kind"]].append((row["recall"], row["exact"]))
    for (pattern, tokens), of_kind in ways.items():
        means = (np.mean(of_kind[kind], 0) if of_kind[kind] else None for kind in ("chooses", "follows"))
        cells = ["" if mean is None else f"{mean[0]:.2f} of {mean[1]:.2f}" for mean in means]
        yield f"| `{pattern}` | {tokens:,} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder, or a name")
    parser.add_argument("patterns", nargs="+")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", metavar="FILE", help="files, joined")
    source.add_argument("--random", action="store_true", help="read random tokens")
    parser.add_argument("--tokens", type=parse_size, nargs="+", default=[10_000, 100_000], help="where to compare")
    parser.add_argument("--groups", type=int, default=64, help="to compare")
    parser.add_argument("--chunk", type=parse_size, default=4096, help="tokens that are in memory at once")
    parser.add_argument("--spill", type=Path, help="a folder for a file of keys")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_intermixed_args()
    rows = []
    try:
        for row in measure(options):
            print(json.dumps(row), flush=True)
            rows.append(row)
    except (LongNetError, ValueError, OSError) as error:
        parser.exit(2, f"choice_recall: {error}\n")
    print(*table(rows), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
