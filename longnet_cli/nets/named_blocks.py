"""The blocks that a text names: those in which rare pairs and triples of its last tokens stood before.

A group of queries sees the first block of the document and `chosen - 1` others at most. They are found by the last
SPAN tokens, up to the group's first one. Each pair and each triple of these that stood in at most MOST_PLACES places
before the group's window adds the log of its rarity to the blocks in which it stood. Where it ends in the second half
of a block, NEXT times that goes to the next block, where the text goes on. The blocks with the highest sums are named.

This takes no queries and no keys: a text names the same blocks for every layer, in any chunks and in any process.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from longnet_cli.attention import Outside, Pattern
from longnet_cli.attention.chosen import Chosen, ChosenCall, Group, chosen_calls, groups_of
from longnet_cli.basics.errors import ConfigError
from longnet_cli.nets.net import FarProvider

SPAN = 64
MOST_PLACES = 256
NEXT = 0.9
FACTOR = np.int64(6364136223846793005)  # of hashes


class ReadText:
    """The token ids of a text so far, and an index of their pairs and triples, of 32 bytes per token.

    The index grows with the windows of the groups that are asked for, which therefore come in order. Its arrays are
    replaced, and never written to, so a fork shares them.
    """

    def __init__(self) -> None:
        self.ids = torch.zeros(0, dtype=torch.int64)
        self._indexed = 0
        self._hashes = np.zeros(0, np.int64)  # of all pairs and triples, ascending
        self._ends = np.zeros(0, np.int64)  # the position at which each one ends

    def fork(self) -> ReadText:
        """Return another text with the same tokens so far."""
        return copy.copy(self)

    def put(self, start: int, ids: Tensor) -> None:
        """Take the tokens (n,) from position `start` on."""
        earlier = self.ids[:start]
        self.ids = torch.cat([earlier, ids.cpu().long()])

    def named(self, pattern: Pattern, first: int, near: int) -> list[int]:
        """Return the blocks, ascending, that the group sees whose first position and whose window's are given."""
        if near > self._indexed:
            self._grow(near)
        size = pattern.chosen_block
        best = self._best(first, near // size, size)
        others = best[: pattern.chosen - 1].tolist()
        return [0, *sorted(others)]

    def _best(self, first: int, blocks: int, size: int) -> np.ndarray:
        """Return those of the first `blocks` blocks, without block 0, that are named at all, the best first."""
        begin = max(0, first - SPAN + 1)
        hashes, _ = _ngrams(self.ids[begin : first + 1])
        hashes = np.unique(hashes)
        begins = np.searchsorted(self._hashes, hashes, "left")
        counts = np.searchsorted(self._hashes, hashes, "right") - begins
        rare = counts <= MOST_PLACES
        begins = begins[rare]
        counts = counts[rare]
        ends = [self._ends[:0]]  # of the rare ones, wherever they stood
        for begin, count in zip(begins, counts, strict=True):
            ends.append(self._ends[begin : begin + count])
        places = np.concatenate(ends)
        worth = np.repeat(np.log1p(blocks / counts.clip(1)), counts)
        block_of = places // size
        is_late = places % size >= size // 2
        size_of_sums = blocks + 1
        of_own = np.bincount(block_of, worth, size_of_sums)
        of_next = np.bincount(block_of[is_late] + 1, worth[is_late], size_of_sums)
        sums = of_own + NEXT * of_next
        named = 1 + np.flatnonzero(sums[1:blocks])
        # rounded, sums are equal in any order of adding; of equals, the earlier block comes first
        order = np.argsort(-sums[named].round(6), kind="stable")
        return named[order]

    def _grow(self, stop: int) -> None:
        """Put the tokens before position `stop` into the index."""
        begin = max(0, self._indexed - 2)
        hashes, indices = _ngrams(self.ids[begin:stop])
        ends = begin + indices
        is_new = ends >= self._indexed
        hashes = np.concatenate([self._hashes, hashes[is_new]])
        ends = np.concatenate([self._ends, ends[is_new]])
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._ends = ends[order]
        self._indexed = stop


def _ngrams(tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes of all pairs and triples of tokens (n,), and the index at which each one ends."""
    ids = tokens.numpy() + 1  # so that no pair is as a triple that begins with 0
    with np.errstate(over="ignore"):
        first_ids = ids[:-1]
        pairs = first_ids * FACTOR + ids[1:]
        triples = pairs[:-1] * FACTOR + ids[2:]
    index = np.arange(len(ids))
    return np.concatenate([pairs, triples]), np.concatenate([index[1:], index[2:]])


def named_calls(
    pattern: Pattern,
    tokens: Tensor | None,
    texts: list[ReadText],
    start: int = 0,
) -> list[ChosenCall]:
    """Return which blocks the groups of a shard see. Its tokens (B, n), from `start` on, are added to the `texts`.

    There is a text for each row; `texts` may be empty at first.

    Raises ConfigError for vectors, which name nothing.
    """
    if tokens is None or tokens.is_floating_point():
        raise ConfigError(
            "chosen blocks are named by token ids, and these are vectors: take a window"
        )

    texts += [ReadText() for _ in tokens[len(texts) :]]

    def blocks_by_group() -> Iterator[tuple[Group, list[int]]]:
        for row, (text, ids) in enumerate(zip(texts, tokens, strict=True)):
            text.put(start, ids)
            for group in groups_of(pattern, row, start, start + len(ids)):
                first = group.start // pattern.chosen_every * pattern.chosen_every
                yield group, text.named(pattern, first, group.near)

    return chosen_calls(pattern, start, blocks_by_group(), tokens.device)


def whole_text(pattern: Pattern, tokens: Tensor | None) -> FarProvider:
    """Return what gives each layer the chosen blocks of whole documents (B, n), which start with these tokens."""
    outside = Outside((), Chosen(named_calls(pattern, tokens, [])))
    return lambda layer, q, k, v: outside
