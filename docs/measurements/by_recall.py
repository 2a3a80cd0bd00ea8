"""Group the loss of tokens by how many tokens ago their document last had the same two tokens in a row.

    longnet score DOCUMENTS... --context 2Ki --token-logprobs near.arrow
    longnet score DOCUMENTS... --token-logprobs far.arrow
    python docs/measurements/by_recall.py near.arrow far.arrow

Prints a table: for new pairs and for each range of distances, the tokens, the nats per token in each file, and the
perplexity of each file relative to the first one. Standard errors are over documents, each of which a file has whole.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter

import numpy as np

from longnet_cli import LongNetError
from longnet_cli.jobs.scoring.measures import Clusters
from longnet_cli.jobs.scoring.token_logprobs import LogprobFile


def distances(ids: np.ndarray) -> np.ndarray:
    """Return (n,) how many ids ago the pair that ends at each of `ids` (n,) was last there, 0 for a new pair."""
    pairs = ids[:-1].astype(np.int64) << 32 | ids[1:]
    # The places of a pair are then neighbours, in ascending order
    order = np.argsort(pairs, kind="stable")
    found = np.zeros(len(ids), np.int64)
    found[order[1:] + 1] = np.where(np.diff(pairs[order]) == 0, np.diff(order), 0)
    return found


def documents(name: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the name, ids (n,) and log-probabilities (n,) of each document in a file."""
    for doc_id, rows in groupby(LogprobFile(name).rows(), attrgetter("doc_id")):
        parts = [(row.ids, row.logprobs) for row in rows]
        yield doc_id, *map(np.concatenate, zip(*parts, strict=True))


def table(files: Sequence[str]) -> Iterator[str]:
    """Yield lines of Markdown: nats are the first quantities of a row's documents, tokens the last one."""
    rows = [Clusters(len(files) + 1) for _ in range(64)]
    for of_files in zip(*map(documents, files), strict=True):
        _, ids, _ = of_files[0]
        if not all(np.array_equal(ids, others) for _, others, _ in of_files):
            raise LongNetError(f"document {of_files[0][0]!r} has other tokens in another file")
        # 0 for a new pair, otherwise 1 + the floor of log2
        row = np.frexp(distances(ids).astype(float))[1]
        sums = [np.bincount(row, -logprobs.astype(float), 64) for _, _, logprobs in of_files]
        counts = np.bincount(row, minlength=64)
        for place in np.flatnonzero(counts):
            rows[place].add([*(each[place] for each in sums), counts[place]])
    yield (
        " | ".join(
            [
                "| said tokens ago",
                "tokens",
                *files,
                *(f"ppl of {name} / first" for name in files[1:]),
            ]
        )
        + " |"
    )
    yield "|---" * (2 * len(files) + 1) + "|"
    for place, row in enumerate(rows):
        if row.documents:
            *nats, tokens = row.sums
            cells = [
                f"{2 ** (place - 1):,} to {2**place - 1:,}" if place else "new",
                f"{tokens:,.0f}",
            ]
            cells += [f"{each / tokens:.3f}" for each in nats]
            for file in range(1, len(files)):
                weights = np.eye(len(files) + 1)[file] - np.eye(len(files) + 1)[0]
                ratio = math.exp(weights @ row.sums / tokens)
                error = row.error(weights, -1)
                cells.append(
                    f"{ratio:.3f}" if error is None else f"{ratio:.3f} +- {ratio * error:.3f}"
                )
            yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", help="of score --token-logprobs, of the same documents")
    try:
        print(*table(parser.parse_args().files), sep="\n")
    except (LongNetError, ValueError) as error:
        parser.exit(3, f"by_recall: {error}\n")
