"""Recall distances: for each token, the number of tokens since the document last had the same bigram.

ids        a  b  c  a  b  b  c
bigram        ab bc ca ab bb bc
distance      -  -  -  3  -  4      tokens since the same bigram; - where there was none
"""

from __future__ import annotations

import numpy as np

from longnet_cli.model.sequence import Readable

BLOCK = 1 << 18  # bigrams sorted together: 2 MB of keys stay in the cache


class Bigrams:
    """The distinct bigrams of a sequence as far as it has been read, each with the place where it was last seen.

    A bigram is the key `before << 32 | id`. Sorted tables hold the distinct keys and their last places, 16 bytes per
    key, and each key is in one table. New keys make a new table. A table less than twice as long as the next is merged
    with it, so there are few tables, a key is copied a logarithmic number of times, and a sequence of n ids takes
    O(n log^2 n). Memory is 16 bytes per distinct bigram, twice that while the longest tables are merged, plus a block.
    """

    def __init__(self, ids: Readable) -> None:
        self.ids, self.end = ids, 1  # the bigrams that end before `end` were read; the first id ends none
        self.tables: list[tuple[np.ndarray, np.ndarray]] = []  # (keys, ascending; places), both (distinct,) int64

    def distances(self, start: int, stop: int) -> np.ndarray:
        """Return, for each of the ids [start, stop), how many ids ago its bigram was last seen, 0 if never.

        The bigram of an id ends at it. The result is (stop - start,) int64, and 1 <= start <= stop. All ids before
        `start` count as seen; unread ones are read now. `start` must not be less than the `stop` of the previous call.
        """
        while self.end < start:
            self._read(min(self.end + BLOCK, start))
        found = [np.empty(0, np.int64)]
        while self.end < stop:
            found.append(self._read(min(self.end + BLOCK, stop)))
        return np.concatenate(found)

    def _read(self, stop: int) -> np.ndarray:
        """Read the bigrams that end in [self.end, stop), at least one, and return their distances."""
        ids = self.ids.read(self.end - 1, stop)
        keys = ids[:-1] << 32 | ids[1:]
        order = np.argsort(keys, kind="stable")  # the places of a bigram are then neighbours, in ascending order
        keys, places = keys[order], self.end + order
        first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))  # the first of each bigram
        before = np.concatenate(([-1], places[:-1]))
        before[first] = self._replace(keys[first], places[np.append(first[1:], len(keys)) - 1])
        distances = np.empty_like(places)
        distances[order] = np.where(before < 0, 0, places - before)
        self.end = stop
        return distances

    def _replace(self, keys: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Store the new places of distinct, ascending keys; return their old places, -1 for new keys."""
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
