"""Distances of recall: for each token, how long ago the document last had the same bigram.

ids        a  b  c  a  b  b  c
bigram        ab bc ca ab bb bc
distance      -  -  -  3  -  4      tokens since the same bigram; - where there was none
"""

from __future__ import annotations

import numpy as np

from longnet_cli.runtime.reading import Ids

BLOCK = 1 << 18  # bigrams sorted together: 2 MB of keys stay in the cache


class Bigrams:
    """The bigrams of a sequence, with the place where each was last seen, as far as the sequence has been read.

    A bigram is the key `before << 32 | id`. Sorted tables hold the distinct keys and their last places, 16 bytes each,
    every key in one table. New keys make a new table, and a table less than twice as long as the next is joined with
    it: so there are few, a key is copied a logarithmic number of times, and a sequence of n ids takes O(n log^2 n).
    Memory: 16 bytes a distinct bigram, twice that while the longest tables are joined, and that of a block.
    """

    def __init__(self, ids: Ids) -> None:
        self.ids, self.end = ids, 1  # the bigrams that end before `end` were read; the first id ends none
        self.tables: list[tuple[np.ndarray, np.ndarray]] = []  # (keys, ascending; places), both (distinct,) int64

    def distances(self, start: int, stop: int) -> np.ndarray:
        """Return how many ids ago the bigram that ends in each of the ids [start, stop) was last seen, 0 if never.

        (stop - start,) int64, 1 <= start <= stop. All ids before `start` count as seen: those not read yet are read
        now. Calls go on in the sequence: `start` is not less than the `stop` of the call before.
        """
        while self.end < start:
            self._read(min(self.end + BLOCK, start))
        found = [np.empty(0, np.int64)]
        while self.end < stop:
            found.append(self._read(min(self.end + BLOCK, stop)))
        return np.concatenate(found)

    def _read(self, stop: int) -> np.ndarray:
        """Read the bigrams that end in [self.end, stop), at least one: their distances."""
        ids = self.ids.read(self.end - 1, stop)
        keys = ids[:-1] << 32 | ids[1:]
        order = np.argsort(keys, kind="stable")  # each bigram's places stand together, in ascending order
        keys, places = keys[order], self.end + order
        first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))  # of each bigram
        before = np.concatenate(([-1], places[:-1]))
        before[first] = self._replace(keys[first], places[np.append(first[1:], len(keys)) - 1])
        distances = np.empty_like(places)
        distances[order] = np.where(before < 0, 0, places - before)
        self.end = stop
        return distances

    def _replace(self, keys: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Note where distinct, ascending keys are now; return where each was before, -1 if nowhere."""
        before = np.full(len(keys), -1)
        new = np.arange(len(keys))
        for known, last in self.tables:
            at = np.minimum(known.searchsorted(keys[new]), len(known) - 1)
            hit = known[at] == keys[new]
            before[new[hit]] = last[at[hit]]
            last[at[hit]] = places[new[hit]]
            new = new[~hit]
        if len(new):
            self.tables.append((keys[new], places[new]))
        while len(self.tables) > 1 and len(self.tables[-2][0]) < 2 * len(self.tables[-1][0]):
            more, their = self.tables.pop()
            known, last = self.tables.pop()
            at = known.searchsorted(more)
            self.tables.append((np.insert(known, at, more), np.insert(last, at, their)))
        return before
