"""Portions of work, dealt out to groups of ranks: a group that is free takes the next one.

A portion is some neighbouring documents, worked on as if there were nothing else. So the numbers of a document depend
only on its portion, not on where a run was resumed or which process reads it.

    portions --+-- taken by this group ----> work ------------------+--> results in order, on rank 0
               +-- taken by another one --> work --> shared store --+

All ranks read the same portions in the same order, and skip the portions that another group has taken. A counter in
the store says which portion is next, so a slow group takes fewer. A fast group only waits when it is AHEAD portions
past the results that rank 0 has yielded. The store is the one through which torchrun's ranks find each other.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import pyarrow as pa

from longnet_cli.basics.errors import DataError, LongNetError

if TYPE_CHECKING:
    from longnet_cli.running.ranks.ranks import Ranks

T = TypeVar("T")


class Portion(Generic[T]):
    """Neighbouring items, to be read once. The attributes are valid when all items have been read.

    `count` is the number of items, `length` their total length. `ends_shard` is true for the last portion of a shard,
    `ends_early` for one that a None among the items has ended.
    """

    def __init__(
        self,
        items: Iterator[T | None],
        count_item: Callable[[Portion[T], T], bool],
    ) -> None:
        self._items = items
        self._count_item = count_item
        self.count = 0
        self.length = 0
        self.ends_shard = False
        self.ends_early = False

    def __iter__(self) -> Iterator[T]:
        for item in self._items:
            if item is None:
                self.ends_early = True
                return
            full = self._count_item(self, item)
            yield item
            if full:
                return


def portions(
    items: Iterable[T | None],
    length: int,
    *,
    length_of: Callable[[T], int],
    shard: float = math.inf,
    size_of: Callable[[T], int] = lambda item: 1,
) -> Iterator[Portion[T]]:
    """Cut items into portions. Read each portion to its end before the next.

    A portion ends with the item that brings it to `length`: an item counts for its own length plus 1. It also ends
    with the item that brings the sum of `size_of` over the shard to `shard`, and before a None: the items that follow
    are not there yet.
    """
    remaining = iter(items)
    in_shard = 0

    def count_item(portion: Portion[T], item: T) -> bool:
        nonlocal in_shard
        portion.count += 1
        portion.length += length_of(item)
        in_shard += size_of(item)
        if in_shard >= shard:
            in_shard = 0
            portion.ends_shard = True
        return portion.ends_shard or portion.length + portion.count >= length

    for first in remaining:
        if first is not None:
            yield Portion(chain([first], remaining), count_item)


AHEAD = 64  # portions whose results may wait in memory for an earlier portion
VALUE_BYTES = 4 << 20  # size of a value in the store, which accepts up to 8 MiB
PAUSE = 0.01  # seconds between two looks at the store

_deals = count()  # numbers the deals of this process; all ranks deal in the same order


P = TypeVar("P", bound=Portion[Any])
Batches = Iterable[pa.RecordBatch]


def deal(
    portions: Iterable[P],
    work: Callable[[P], Batches],
    ranks: Ranks,
    on_other: Callable[[P], None] = lambda portion: None,
) -> Iterator[tuple[P, Batches]]:
    """Return each portion with its results, which `work` computes, in order.

    `work` must read its portion to the end. With one group, every rank works on every portion, result by result. With
    several groups, the portions are dealt out: rank 0 gets the results of all groups, and the other ranks nothing. Use
    up the results of a portion before you take the next portion. `on_other` gets each portion of another group when its
    results have arrived. No group starts a portion that is AHEAD or more past those that rank 0 has given.

    An error in reading or in `work` is raised after rank 0 has given all earlier portions. Raises DataError where the
    ranks read different portions.
    """
    if ranks.dp == 1:
        return ((portion, work(portion)) for portion in portions)
    return _Deal(ranks, work, on_other).results(portions)


class _Deal(Generic[P]):
    """One deal among several groups, on one rank. The groups share a store, where they leave results for rank 0."""

    def __init__(
        self,
        ranks: Ranks,
        work: Callable[[P], Batches],
        on_other: Callable[[P], None],
    ) -> None:
        import torch.distributed as dist

        from longnet_cli.running.ranks.ranks import TIMEOUT

        self.ranks = ranks
        self.group = ranks.of_group()
        self.work = work
        self.on_other = on_other
        self.waiting: deque[P] = deque()  # on rank 0: portions whose results are still to arrive
        # results of rank 0's own group, by the index of their portion
        self.results_here: dict[int, list[pa.RecordBatch]] = {}
        self.read = 0  # portions that this rank has read
        self.given = 0  # portions whose results rank 0 has given
        host = os.environ["MASTER_ADDR"]
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=TIMEOUT)
        # with --max-restarts, torchrun restarts lost ranks with the same store
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"longnet/{restart}/{next(_deals)}", store)

    def results(self, portions: Iterable[P]) -> Iterator[tuple[P, Batches]]:
        """Yield the portions with their results on rank 0. On the other ranks, work for it and yield nothing."""
        failure = None
        try:
            yield from self._work_on(portions)
        except LongNetError as error:
            failure = error
        while self.waiting:
            yield from self._arrived()
            time.sleep(PAUSE)
        if failure:
            # the other ranks of rank 0's group do not wait: rank 0 may need them to give the earlier portions
            while self.ranks.dp_rank and self._given() < self.read:
                time.sleep(PAUSE)
            raise failure
        if self.ranks.writes:
            self.store.set("end", "")
        while not self.store.check(["end"]):  # however long it takes: a barrier would time out
            time.sleep(10 * PAUSE)

    def _work_on(self, portions: Iterable[P]) -> Iterator[tuple[P, Batches]]:
        """Read all portions, and work on those that this group takes. On rank 0, yield what arrives meanwhile."""
        mine = self._next()
        for index, portion in enumerate(portions):
            if index == mine:
                yield from self._keep_near(index)
                self._do(index, portion)
                mine = self._next()
            else:
                deque(portion, maxlen=0)  # reads it to its end
            self.read += 1
            if self.ranks.writes:
                self.waiting.append(portion)
            yield from self._arrived()

    def _next(self) -> int:
        """Return the index of this group's next portion, which no other group takes."""
        taken = self.store.add("taken", 1) if self.group.writes else 1
        return self.group.from_first(taken - 1)

    def _keep_near(self, index: int) -> Iterator[tuple[P, Batches]]:
        """Wait until rank 0 has given all portions but the last AHEAD before this one; yield what arrives meanwhile."""
        # all ranks of a group get the same answer
        while self.group.any(self.group.writes and self._given() + AHEAD <= index):
            yield from self._arrived()
            time.sleep(PAUSE)

    def _given(self) -> int:
        """Return how many portions rank 0 has given."""
        return self.store.add("given", 0)

    def _do(self, index: int, portion: P) -> None:
        """Work on a portion, and keep its results, or leave them for rank 0."""
        results = list(self.work(portion))
        if self.ranks.writes:
            self.results_here[index] = results
        elif self.group.writes:
            data = _pack(results)
            starts = range(0, len(data), VALUE_BYTES)
            for piece, start in enumerate(starts):
                value = data[start : start + VALUE_BYTES]
                self.store.set(f"{index}/{piece}", value)  # type: ignore[arg-type]
            self.store.set(str(index), f"{len(starts)} {portion.count} {portion.length}")

    def _arrived(self) -> Iterator[tuple[P, Batches]]:
        """Yield the next portions whose results have arrived, on rank 0."""
        while self.waiting:
            index = self.given
            portion = self.waiting[0]
            if index in self.results_here:
                results: Batches = self.results_here.pop(index)
            elif self.store.check([str(index)]):
                results = self._fetch(index, portion)
                self.on_other(portion)
            else:
                return
            self.waiting.popleft()  # only now: if the results are refused, no later portion may take their place
            yield portion, results
            self.given += 1
            self.store.add("given", 1)

    def _fetch(self, index: int, portion: Portion[object]) -> Batches:
        """Return and delete the results of a portion. Raises DataError where the other rank read another portion."""
        number, *read = map(int, self.store.get(str(index)).split())
        if read != [portion.count, portion.length]:
            raise DataError(
                f"the ranks read different data: portion {index} is {portion.count} documents of {portion.length} "
                f"tokens on rank 0 and {read[0]} of {read[1]} on another: has an input changed, or does a node lack it?"
            )
        pieces = [f"{index}/{piece}" for piece in range(number)]
        data = b"".join(self.store.get(piece) for piece in pieces)
        for key in [str(index), *pieces]:
            self.store.delete_key(key)
        return pa.ipc.open_stream(data) if data else ()


def _pack(batches: list[pa.RecordBatch]) -> bytes:
    """Return record batches of one schema as an Arrow stream; empty bytes if there are none."""
    if not batches:
        return b""
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return cast(bytes, stream.getvalue().to_pybytes())
