"""Proves that items read in one thread and worked on in another stay in order, in time and accounted for."""

import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from processes import wait_for

from longnet_cli.jobs import tokenizing as feed
from longnet_cli.jobs.tokenizing import in_two_threads


def one(item: int) -> int:
    return 1


def test_all_items_come_once_in_order_in_groups_of_the_size():
    groups = []
    in_two_threads(iter(range(1000)), one, 7, lambda group, check: groups.append(list(group)))
    assert [item for group in groups for item in group] == list(range(1000))
    assert {len(group) for group in groups[:-1]} == {7}


def test_the_reader_does_not_run_ahead():
    read, worst = 0, 0

    def items() -> Iterator[int]:
        nonlocal read
        while read < 200:
            read += 1
            yield read

    def work(group, check):
        nonlocal worst
        wait_for(lambda: read >= min(200, group[-1] + 5))
        worst = max(worst, read - group[-1])

    in_two_threads(items(), one, 5, work)
    assert worst <= 6


def test_a_slow_producer_does_not_keep_items_waiting():
    arrived = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        assert arrived.wait(30)  # the first item must be worked on before the second is there
        yield 1

    in_two_threads(items(), one, 10, lambda group, check: arrived.set())


def test_what_was_read_before_a_failure_is_worked_on():
    done = []

    def items() -> Iterator[int]:
        yield from range(20)
        raise ValueError("bad item")

    with pytest.raises(ValueError, match="bad item"):
        in_two_threads(items(), one, 3, lambda group, check: done.extend(group))
    assert done == list(range(20))


def test_a_failure_of_the_work_ends_the_reading():
    def work(group, check):
        raise ValueError("no room")

    def endless() -> Iterator[int]:
        while True:
            yield 0

    with pytest.raises(ValueError, match="no room"):
        in_two_threads(endless(), one, 3, work)


@pytest.mark.parametrize("endless", [False, True])
def test_an_interruption_stops_the_work_at_its_next_check_and_waits_for_it(endless):
    """Be it that the reading waits for the work, or for its end."""
    stopped = threading.Event()

    def work(group, check):
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        try:
            for _ in range(3000):
                check()
                time.sleep(0.01)
        except feed.StoppedError:
            time.sleep(0.1)
            stopped.set()
            raise

    with pytest.raises(KeyboardInterrupt):
        in_two_threads(itertools.repeat(0) if endless else iter([0]), one, 3, work)
    assert stopped.is_set()


def test_work_that_hangs_is_abandoned_only_where_that_is_allowed(monkeypatch):
    monkeypatch.setattr(feed, "ABANDON_SECONDS", 0.1)
    release = threading.Event()

    def work(group, check):
        os.kill(os.getpid(), signal.SIGINT)
        release.wait(30)

    with pytest.raises(KeyboardInterrupt):
        in_two_threads(iter(range(10)), one, 3, work, abandon=True)
    assert not release.is_set()
    release.set()


def test_an_interruption_between_any_two_lines_is_what_the_caller_sees(monkeypatch):
    """A handler that raises inside threading.Condition leaves its lock in the wrong state, once in 150 times here."""
    monkeypatch.setattr(feed, "ABANDON_SECONDS", 0.01)

    class Interruption(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interruption

    def run(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        in_two_threads(itertools.repeat(0), one, 3, lambda group, check: None, abandon=True)

    chance, before = random.Random(0), signal.signal(signal.SIGALRM, interrupt)
    switched = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(1500):
            with pytest.raises(Interruption):
                run(chance.uniform(0.0001, 0.003))
    finally:
        sys.setswitchinterval(switched)
        signal.signal(signal.SIGALRM, before)
