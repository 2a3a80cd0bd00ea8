"""Two threads: one reads items, the other works on them, a group at a time."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

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
    done = threading.Event()  # not Thread.join, which takes the thread for ended once a signal has interrupted it

    def run() -> None:
        try:
            while group := feed.take():
                work(group, feed.check)
        except StoppedError:
            pass
        except BaseException as error:
            failures.append(error)
        finally:
            feed.close(stop=True)
            done.set()

    threading.Thread(target=run, daemon=True).start()
    try:
        for item in items:
            if not feed.put(item):
                break
        feed.close()
        done.wait()
    except Exception:
        feed.close()
        done.wait()
        raise
    except BaseException:
        feed.close(stop=True)
        done.wait(ABANDON_SECONDS if abandon else None)
        raise
    if failures:
        raise failures[0]


class _Feed(Generic[Item]):
    def __init__(self, size: Callable[[Item], int], group_size: int) -> None:
        self._size_of = size
        self._group_size = group_size
        self._changed = threading.Condition()
        self._items: list[Item] = []
        self._size = 0
        self._closed = self._stopped = False

    def put(self, item: Item) -> bool:
        """Add an item once there is room. Return False when no more items are wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self._size < self._group_size or self._closed)
            self._items.append(item)
            self._size += self._size_of(item)
            if len(self._items) == 1 or self._size >= self._group_size:
                self._changed.notify_all()
            return not self._closed

    def take(self) -> list[Item]:
        """Return the next group, empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            self._changed.wait_for(lambda: self._size >= self._group_size or self._closed, PATIENCE)
            group, self._items, self._size = self._items, [], 0
            self._changed.notify_all()
            self.check()
            return group

    def close(self, *, stop: bool = False) -> None:
        """Accept no more items. With `stop`, end the work on earlier items too."""
        with self._changed:
            self._closed = True
            self._stopped = self._stopped or stop
            self._changed.notify_all()

    def check(self) -> None:
        """Raise StoppedError once stopped."""
        if self._stopped:
            raise StoppedError
