"""Proves that items read in one thread and worked on in another stay in order, in time and accounted for."""

import itertools
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from longnet_cli.jobs.tokenizing import overlapped
from longnet_cli.running.ranks.dealing import portions


def groups(items: Iterator[int], work=list) -> Iterator[list[int]]:
    return (found for _, found in overlapped(portions(items, 5, length_of=lambda item: 0), work))


def test_all_items_come_once_in_order_and_the_reader_is_one_group_ahead():
    read = []
    items = (read.append(item) or item for item in range(1000))
    for index, group in enumerate(groups(items)):
        assert group == list(range(5 * index, 5 * index + 5))
        assert len(read) <= 5 * index + 10


def test_a_slow_producer_does_not_keep_items_waiting():
    found = groups(iter([0, None, 1, None, None, 2]))
    assert [next(found), next(found), next(found)] == [[0], [1], [2]]
    arrived = threading.Event()

    def items() -> Iterator[int]:
        yield from (0, None)
        assert arrived.wait(30)  # the first item must be worked on before the second is there
        yield 1

    found = groups(items(), lambda group: arrived.set() or group)
    assert [*found] == [[0], [1]]


def test_a_failure_of_the_work_ends_the_reading():
    def work(group):
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        list(groups(itertools.repeat(0), work))


def test_an_interruption_waits_for_the_work_that_has_begun_and_for_no_more():
    begun, done = threading.Event(), []

    def work(group):
        begun.set()
        time.sleep(0.1)
        done.append(group)
        return group

    def items() -> Iterator[int]:
        yield from range(8)
        assert begun.wait(30)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(groups(items(), work))
    assert done == [[0, 1, 2, 3, 4]]


def test_an_interruption_between_any_two_lines_is_what_the_caller_sees():
    """A handler that raises inside threading.Condition leaves its lock in the wrong state, once in 150 times here."""

    class Interruption(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interruption

    def run(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        list(groups(itertools.repeat(0, 100_000)))  # not for ever: Python drops what is raised in a garbage collection

    seen, chance, before = 0, random.Random(0), signal.signal(signal.SIGALRM, interrupt)
    switched = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(1500):
            try:
                run(chance.uniform(0.0001, 0.003))
            except Interruption:
                seen += 1
    finally:
        sys.setswitchinterval(switched)
        signal.signal(signal.SIGALRM, before)
    assert seen > 1400
