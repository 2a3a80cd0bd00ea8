"""Signals: they unwind a command, or are noted while a run works and acted on where its state is whole.

SIGUSR1 is handed on to the ranks of `--nproc`; torchrun hands on those that stop.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from longnet_cli.runtime.ranks import Ranks


def unwind_on_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP, which would kill, unwind the stack: so `finally` blocks remove temporary files.

    Those that are handled stay so, and those that are ignored, as SIGHUP under nohup.
    """
    if _in_main_thread():
        stops = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _unwind, signal.SIGHUP: _unwind}
        for kind, handler in stops.items():
            if signal.getsignal(kind) is signal.SIG_DFL:
                signal.signal(kind, handler)


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    """Further signals cannot cut it short."""
    for kind in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, signal.SIG_IGN)
    _leave_a_closed_terminal()
    raise SystemExit(128 + number)


def _leave_a_closed_terminal() -> None:
    """Send to nowhere what is still said on stderr where that was the terminal: it would fail, and end the run."""
    with suppress(OSError):
        if stat.S_ISCHR(os.fstat(2).st_mode) and not os.isatty(2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class Signals:
    """SIGINT, SIGTERM and SIGHUP, which ask a run to stop, and SIGUSR1, which asks it to save, until it next looks.

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
        if number == signal.SIGHUP:
            _leave_a_closed_terminal()

    def look(self) -> bool:
        """Return whether to save and go on. Raises KeyboardInterrupt (SIGINT) or SystemExit (others), on all ranks."""
        mine = self._asked
        asked = self.ranks.largest(_WEIGHT[mine])
        if mine and self._asked == mine:  # not one that came meanwhile: ranks wait for each other here
            self._asked = 0
        if asked == _WEIGHT[signal.SIGINT]:
            raise KeyboardInterrupt
        for stop in (signal.SIGTERM, signal.SIGHUP):
            if asked == _WEIGHT[stop]:
                raise SystemExit(128 + stop)
        return asked == _WEIGHT[signal.SIGUSR1]


# of several, the largest decides
_WEIGHT = {0: 0, signal.SIGUSR1: 1, signal.SIGINT: 2, signal.SIGTERM: 3, signal.SIGHUP: 4}


@contextmanager
def noted_signals(ranks: Ranks) -> Iterator[Signals]:
    """`with noted_signals(ranks) as signals`: signals only act where `signals.look()` is called."""
    signals = Signals(ranks)
    if not _in_main_thread():
        yield signals
        return
    kinds = [kind for kind in _WEIGHT if kind]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
        kinds.remove(signal.SIGHUP)
    before = {kind: signal.signal(kind, signals.note) for kind in kinds}
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
