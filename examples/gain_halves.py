"""Rank documents by the gain of their even and of their odd blocks of tokens, to see how stable the ranking is.

    longnet score corpus --context 64 --token-logprobs short.arrow
    longnet score corpus --context 4Ki --token-logprobs long.arrow
    python examples/gain_halves.py short.arrow long.arrow

Prints Spearman's rank correlation of the two halves, and the ten documents that gain most and the ten that gain least.
A block is 128 tokens, as in `longnet score -o`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

BLOCK = 128


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare the gains of two halves of each document.")
    parser.add_argument("short", help="log-probabilities of the tokens with the short context")
    parser.add_argument("long", help="those of the same tokens with the long one")
    parser.add_argument("--least", type=int, default=16, help="blocks of a document that is ranked")
    arguments = parser.parse_args(words)
    names, tokens, halves = [], [], []
    for (name, short), (_, long) in zip(documents(arguments.short), documents(arguments.long), strict=True):
        gained = long - short
        blocks = gained[: len(gained) // BLOCK * BLOCK].reshape(-1, BLOCK).mean(1)
        if len(blocks) >= arguments.least:
            names.append(name)
            tokens.append(len(gained))
            halves.append((blocks[::2].mean(), blocks[1::2].mean(), gained.mean()))
    if not names:
        sys.exit(f"no document has {arguments.least} blocks of {BLOCK} tokens: give a smaller --least")
    even, odd, gain = np.array(halves).T
    print(f"{len(names)} documents, {sum(tokens):,} tokens: Spearman's correlation {spearman(even, odd):.3f}")
    order = np.argsort(-gain)
    for title, chosen in (("gain most", order[:10]), ("gain least", order[-10:])):
        print(f"\n{title:>10}  nats   even    odd   tokens")
        for index in chosen:
            print(f"{gain[index]:16.3f} {even[index]:6.3f} {odd[index]:6.3f} {tokens[index]:8}  {names[index]}")


def documents(path: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name of each document and the log-probabilities of its tokens, (n,) float32."""
    name, parts = None, []
    with pa.memory_map(path) as file:
        reader = ipc.open_file(file)
        for batch in map(reader.get_batch, range(reader.num_record_batches)):
            for row in range(batch.num_rows):
                if batch["part"][row].as_py() == 0 and parts:
                    yield str(name), np.concatenate(parts)
                    parts = []
                name = batch["doc_id"][row].as_py()
                parts.append(batch["logprobs"][row].values.to_numpy())
    if parts:
        yield str(name), np.concatenate(parts)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of the ranks of two (n,) arrays, in which no value occurs twice."""
    ranks = [np.argsort(np.argsort(each)) for each in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    main()
