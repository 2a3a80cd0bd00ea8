"""From texts to batches of token ids: one thread reads, another one tokenizes, a group at a time.

Ids are collected document by document into record batches of a given size.
"""

from __future__ import annotations

import math
import time
from _thread import start_new_thread
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa

from longnet_cli.data.outputs import token_batch
from longnet_cli.data.tables import numpy_dtype

PATIENCE = 0.5  # seconds that an item from a slow producer waits for others
ABANDON_SECONDS = 2.0

Item = TypeVar("Item")
Work = Callable[[Sequence[Item], Callable[[], None]], None]


class StoppedError(Exception):
    """A signal to stop work on items that are no longer needed."""


def in_two_threads(
    items: Iterator[Item], size: Callable[[Item], int], group_size: int, work: Work[Item], *, abandon: bool = False
) -> None:
    """Read `items` here while another thread calls `work(group, check)` on groups of them, in order.

    A group has the items that bring it to `group_size`, or those that came within PATIENCE seconds. Reading stays in
    the calling thread, because Ctrl-C wakes only the main thread from waiting for a pipe. If reading fails, the items
    that were read before are still worked on. If reading is interrupted, `check` raises: long work should call it now
    and then. An error of the work is raised here. With `abandon`, an interrupt waits only ABANDON_SECONDS for the
    work to end, because work may wait for ever for the reader of a pipe.
    """
    feed = _Feed(size, group_size)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            while group := feed.take():
                work(group, feed.check)
        except StoppedError:
            pass
        except BaseException as error:
            failures.append(error)
        finally:
            feed.end()

    start_new_thread(run, ())  # not Thread.start, which waits for an Event: see _Feed
    try:
        for item in items:
            if not feed.put(item):
                break
        feed.close()
        feed.wait_for_end()
    except Exception:
        feed.close()
        feed.wait_for_end()
        raise
    except BaseException:
        feed.close(stop=True)
        feed.wait_for_end(ABANDON_SECONDS if abandon else math.inf)
        raise
    if failures:
        raise failures[0]


class _Feed(Generic[Item]):
    """The items on their way from the thread that reads to the thread that works.

    Both threads wait for a SimpleQueue and for nothing else, because a signal's handler may raise between any two
    lines of the reading thread. Between two lines of threading.Condition or Event, that leaves a lock which nobody
    releases, or releases one which nobody holds.
    """

    def __init__(self, size: Callable[[Item], int], group_size: int) -> None:
        self._size_of = size
        self._group_size = group_size
        self._items: SimpleQueue[Item | None] = SimpleQueue()  # None: no more come
        self._taken: SimpleQueue[int] = SimpleQueue()  # the sizes of groups, and 0 at the end of the work
        self._in_queue = 0  # the size of the items that are put and not yet known to be taken
        self._stopped = self._ended = False

    def put(self, item: Item) -> bool:
        """Add an item once there is room. Return False when no more items are wanted."""
        while self._in_queue >= self._group_size and not self._ended:
            with suppress(Empty):
                self._in_queue -= self._taken.get(timeout=1.0)  # a signal right before the call does not end it
        self._items.put(item)
        self._in_queue += self._size_of(item)
        return not self._ended

    def take(self) -> list[Item]:
        """Return the next group, empty at the end."""
        group: list[Item] = []
        size, deadline = 0, math.inf
        with suppress(Empty):
            while size < self._group_size:
                item = self._items.get(timeout=None if deadline == math.inf else max(0, deadline - time.monotonic()))
                if item is None:
                    self._items.put(None)  # for the next call
                    break
                if not group:
                    deadline = time.monotonic() + PATIENCE
                group.append(item)
                size += self._size_of(item)
        self.check()
        self._taken.put(size)
        return group

    def close(self, *, stop: bool = False) -> None:
        """Accept no more items. With `stop`, end the work on earlier items too."""
        self._stopped = self._stopped or stop
        self._items.put(None)

    def check(self) -> None:
        """Raise StoppedError once stopped."""
        if self._stopped:
            raise StoppedError

    def end(self) -> None:
        """Say that the work has ended."""
        self._ended = True
        self._taken.put(0)

    def wait_for_end(self, seconds: float = math.inf) -> None:
        """Wait until the work has ended, or for so many seconds."""
        deadline = time.monotonic() + seconds
        while not self._ended and (left := deadline - time.monotonic()) > 0:
            with suppress(Empty):
                self._taken.get(timeout=min(left, 1.0))  # an interrupted get may have lost what it got: look again


BATCH_ROWS = 1 << 16


class TokenBatches:
    """A collector of ids into batches of whole documents. A document larger than a batch gets a batch for each part.

    `totals` counts documents, tokens and bytes, starting from the totals of an earlier run. The batches depend only
    on the documents since the last `end_shard`, so shards are the same wherever a run resumes.
    """

    def __init__(
        self,
        schema: pa.Schema,
        batch_bytes: int,
        write: Callable[..., None],
        totals: Mapping[str, int] | None = None,
        end_shard: Callable[[], None] | None = None,
        shard_tokens: int = 0,
    ) -> None:
        self.totals = Counter(totals or {})
        self._schema = schema
        self._write = write
        self._end_shard = end_shard
        self._shard_tokens = shard_tokens
        dtype = numpy_dtype(schema.field("input_ids").type.value_type)
        self._values = np.empty(max(1, batch_bytes // dtype.itemsize), dtype)
        self._used = 0  # values, the open document's included
        self._rows: list[tuple[str, int, int]] = []  # ended rows: doc_id, part, end of their values
        self._part = 0  # of the open document
        self._counts: Counter[str] = Counter()  # not yet written
        self._in_shard = 0  # tokens

    def add(self, doc_id: str, ids: np.ndarray, size: int) -> None:
        """Append (tokens,) ids, which stand for `size` bytes of text, to the open document."""
        self.totals.update(tokens=len(ids), bytes=size)
        self._counts.update(tokens=len(ids), bytes=size)
        self._in_shard += len(ids)
        while len(ids):
            if self._used == len(self._values):
                self._make_room(doc_id)
            fitting = ids[: len(self._values) - self._used]
            self._values[self._used : self._used + len(fitting)] = fitting
            self._used += len(fitting)
            ids = ids[len(fitting) :]

    def end_document(self, doc_id: str) -> None:
        """End the open document, which may be empty, and the shard if it is full."""
        self._end_row(doc_id)
        self._part = 0
        self.totals.update(documents=1)
        self._counts.update(documents=1)
        if self._end_shard and self._in_shard >= self._shard_tokens:
            self.flush()
            self._end_shard()
            self._in_shard = 0
        elif len(self._rows) >= BATCH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that have ended, and move the open row to the front."""
        if not self._rows:
            return
        doc_ids, parts, ends = zip(*self._rows, strict=True)
        end = ends[-1]
        self._write(token_batch(self._schema, doc_ids, parts, ends, self._values[:end]), **self._counts)
        self._values[: self._used - end] = self._values[end : self._used].copy()
        self._used -= end
        self._rows.clear()
        self._counts.clear()

    def _make_room(self, doc_id: str) -> None:
        if not self._rows:  # the open document has filled a batch
            self._end_row(doc_id)
            self._part += 1
        self.flush()

    def _end_row(self, doc_id: str) -> None:
        self._rows.append((doc_id, self._part, self._used))
