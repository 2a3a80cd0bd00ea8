"""Signals: noted while a run works, acted on where its state is whole, and handed on to the ranks of `--nproc`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longnet_cli.runtime.ranks import Ranks


class Signals:
    """SIGINT and SIGTERM, which ask a run to stop, and SIGUSR1, which asks it to save, until it next looks.

    A run looks where its state is whole. Ranks look together: torchrun passes a signal on to each of them, which meets
    it in another place, and one that left at once would break off the others in their next collective.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self._asked = ranks, 0

    def note(self, number: int, frame: object) -> None:
        """A signal handler. After a first SIGINT a second one kills: whoever presses twice means it."""
        if number != signal.SIGUSR1 or not self._asked:
            self._asked = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def look(self) -> bool:
        """Whether to save and go on. Raises KeyboardInterrupt (SIGINT) or SystemExit (SIGTERM), on all ranks."""
        mine = self._asked
        asked = self.ranks.largest(_WEIGHT[mine])
        if mine and self._asked == mine:  # not one that came meanwhile: ranks wait for each other here
            self._asked = 0
        if asked == _WEIGHT[signal.SIGINT]:
            raise KeyboardInterrupt
        if asked == _WEIGHT[signal.SIGTERM]:
            raise SystemExit(128 + signal.SIGTERM)
        return asked == _WEIGHT[signal.SIGUSR1]


_WEIGHT = {0: 0, signal.SIGUSR1: 1, signal.SIGINT: 2, signal.SIGTERM: 3}  # of several, the largest decides


@contextmanager
def noted_signals(ranks: Ranks) -> Iterator[Signals]:
    """`with noted_signals(ranks) as signals`: signals only act where `signals.look()` is called."""
    signals = Signals(ranks)
    if not _in_main_thread():
        yield signals
        return
    before = {kind: signal.signal(kind, signals.note) for kind in _WEIGHT if kind}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # held back until now, see `cli/train.py`
    try:
        yield signals
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _in_main_thread() -> bool:
    """Only there may Python set handlers: as a library, in a thread, a run leaves signals alone."""
    return threading.current_thread() is threading.main_thread()


def hand_on_sigusr1() -> None:
    """Send each SIGUSR1, of which torchrun would die, on to its processes.

    A thread waits for it, and no other sees it. The processes begin with it held back as well, so it cannot kill one
    that does not listen yet. Elsewhere than on Linux, and before they are there, it is lost.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

    def hand_on() -> None:
        while True:
            signal.sigwait({signal.SIGUSR1})
            for children in Path("/proc/self/task").glob("*/children"):
                with suppress(OSError):  # a thread or a rank that has just ended
                    for child in children.read_text().split():
                        os.kill(int(child), signal.SIGUSR1)

    threading.Thread(target=hand_on, daemon=True).start()
