"""Portions of work, dealt out to groups of ranks: a group that is free takes the next one.

    portions --+-- taken by this group ----> work ------------------+--> results in order, on rank 0
               +-- taken by another one --> work --> shared store --+

All ranks read the same portions in the same order, and skip the portions that another group has taken. A counter in
the store says which portion is next, so a slow group takes fewer. A fast group only waits when it is AHEAD portions
past the results that rank 0 has yielded. The store is the one through which torchrun's ranks find each other.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Generic, TypeVar, cast

import pyarrow as pa
import torch.distributed as dist

from longnet_cli.basics.errors import DataError, LongNetError
from longnet_cli.running.ranks.portions import Portion
from longnet_cli.running.ranks.ranks import TIMEOUT, Ranks

AHEAD = 64  # portions whose results may wait in memory for an earlier portion
VALUE_BYTES = 4 << 20  # size of a value in the store, which accepts up to 8 MiB
PAUSE = 0.01  # seconds between two looks at the store

_deals = count()  # numbers the deals of this process; all ranks deal in the same order


P = TypeVar("P", bound=Portion[Any])
R = TypeVar("R")


def pack_batches(batches: Iterable[pa.RecordBatch]) -> bytes:
    """Return record batches of one schema as an Arrow stream; empty bytes if there are none."""
    sink, writer = pa.BufferOutputStream(), None
    for batch in batches:
        writer = writer or pa.ipc.new_stream(sink, batch.schema)
        writer.write_batch(batch)
    if writer:
        writer.close()
    return cast(bytes, sink.getvalue().to_pybytes())


def unpack_batches(data: bytes) -> Iterable[pa.RecordBatch]:
    """Return the record batches that `pack_batches` was given."""
    return pa.ipc.open_stream(data) if data else ()


@dataclass(frozen=True)
class Codec(Generic[R]):
    """The functions that pack the results of a portion into bytes, and unpack them again."""

    pack: Callable[[Iterable[R]], bytes]
    unpack: Callable[[bytes], Iterable[R]]


BATCHES = Codec(pack_batches, unpack_batches)


def deal(
    portions: Iterable[P],
    work: Callable[[P], Iterable[R]],
    ranks: Ranks,
    codec: Codec[R],
    on_other: Callable[[P], None] | None = None,
    *,
    ahead: int = AHEAD,
) -> Iterator[tuple[P, Iterable[R]]]:
    """Yield each portion with its results, which `work` computes, in order.

    `work` must read its portion to the end. With one group, every rank works on every portion, result by result. With
    several groups, the portions are dealt out: rank 0 yields the results of all groups, which other groups send through
    `codec`, and the other ranks yield nothing. Use up the results of a portion before you take the next portion.
    `on_other` gets each portion of another group when its results have arrived. No group starts a portion that is
    `ahead` or more past those that rank 0 has yielded.

    An error in reading or in `work` is raised after rank 0 has yielded all earlier portions. Raises DataError where the
    ranks read different portions.
    """
    if ranks.dp == 1:
        for portion in portions:
            yield portion, work(portion)
        return
    table = _DealStore(ranks, next(_deals))
    waiting: deque[P] = deque()  # on rank 0: the portions whose results are still to arrive
    own: dict[int, list[R]] = {}  # results of this group, by the index of their portion
    given = 0  # portions whose results rank 0 has yielded

    def come() -> Iterator[tuple[P, Iterable[R]]]:
        """Yield the next portions whose results have arrived, on rank 0."""
        nonlocal given
        while waiting and (given in own or table.has(given)):
            portion, results = waiting[0], own.pop(given, None)
            sent = codec.unpack(table.get(given, portion)) if results is None else results
            waiting.popleft()  # only now: if `get` refuses the results, no later portion may take their place
            if on_other and results is None:
                on_other(portion)
            yield portion, sent
            given += 1
            table.say_given()

    mine, number, failure = table.take(), 0, None
    try:
        for index, portion in enumerate(portions):
            if index != mine:
                for _ in portion:
                    pass
            else:
                while table.must_wait(index, ahead):
                    yield from come()
                    time.sleep(PAUSE)
                results = list(work(portion))
                if ranks.first:
                    own[index] = results
                elif table.group.first:
                    table.put(index, portion, codec.pack(results))
                mine = table.take()
            number += 1
            waiting.extend([portion] if ranks.first else [])
            yield from come()
    except LongNetError as error:
        failure = error
    while waiting:
        yield from come()
        time.sleep(PAUSE)
    if failure:
        # the other ranks of rank 0's group do not wait: rank 0 may need them to yield the earlier portions
        while ranks.dp_rank and table.given() < number:
            time.sleep(PAUSE)
        raise failure
    table.end() if ranks.first else table.wait_for_end()


class _DealStore:
    """The shared store of one deal, from which groups take portions and in which they leave results for rank 0."""

    def __init__(self, ranks: Ranks, deal: int) -> None:
        self.group = ranks.of_group()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=TIMEOUT)
        # with --max-restarts, torchrun restarts lost ranks with the same store
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"longnet/{restart}/{deal}", store)

    def take(self) -> int:
        """Return the index of this group's next portion, which no other group takes."""
        return self.group.from_first(self.store.add("taken", 1) - 1 if self.group.first else 0)

    def must_wait(self, index: int, ahead: int) -> bool:
        """Return whether portion `index` is `ahead` or more past those that rank 0 has yielded.

        All ranks of a group get the same answer.
        """
        return self.group.any(self.group.first and self.given() + ahead <= index)

    def given(self) -> int:
        """Return how many portions rank 0 has yielded."""
        return self.store.add("given", 0)

    def say_given(self) -> None:
        """Count one more portion that rank 0 has yielded."""
        self.store.add("given", 1)

    def put(self, index: int, portion: Portion[Any], data: bytes) -> None:
        """Store the results of a portion. Only one rank of the group calls it."""
        pieces = range(0, len(data), VALUE_BYTES)
        for piece, start in enumerate(pieces):
            self.store.set(f"{index}/{piece}", data[start : start + VALUE_BYTES])  # type: ignore[arg-type]
        self.store.set(str(index), f"{len(pieces)} {portion.items} {portion.length}")

    def has(self, index: int) -> bool:
        return bool(self.store.check([str(index)]))

    def get(self, index: int, portion: Portion[Any]) -> bytes:
        """Return and delete the results of a portion. Raises DataError where the other rank read another portion."""
        number, *read = map(int, self.store.get(str(index)).split())
        if read != [portion.items, portion.length]:
            raise DataError(
                f"the ranks read different data: portion {index} is {portion.items} documents of {portion.length} "
                f"tokens on rank 0 and {read[0]} of {read[1]} on another: has an input changed, or does a node lack it?"
            )
        pieces = [f"{index}/{piece}" for piece in range(number)]
        data = b"".join(self.store.get(piece) for piece in pieces)
        for key in [str(index), *pieces]:
            self.store.delete_key(key)
        return data

    def end(self) -> None:
        """Tell the other ranks that rank 0 has finished."""
        self.store.set("end", "")

    def wait_for_end(self) -> None:
        """Wait for rank 0, however long it takes: a barrier would time out."""
        while not self.store.check(["end"]):
            time.sleep(10 * PAUSE)
