"""`--nproc`: this command again, as several processes under torchrun; and the signals that stop them.

A signal ends `score`, `encode` and the others at once; `train` notes it, and stops where its state is consistent.
torchrun passes signals on to its ranks. If a rank fails, torchrun ends the others. If torchrun itself ends,
`end_with_parent` ends its ranks:

    before the ranks have met   there is nothing to lose: SIGINT and SIGTERM kill, and so does the end of the parent
    from then on                they unwind, and `train` saves
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from glob import glob
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from longnet_cli.basics.errors import ConfigError, LongNetError
from longnet_cli.basics.sizes import count_of


def divide(world: int, sp: int | None, dp: int | None) -> tuple[int, int]:
    """Return sp and dp of `world` processes; with neither, all ranks share each sequence.

    Raises ConfigError where dp x sp is not the number of processes.
    """
    sp = sp or _whole_quotient(world, dp) or world
    dp = dp or _whole_quotient(world, sp) or 1
    if sp * dp != world:
        fits = ", ".join(f"{world // n} x {n}" for n in range(1, world + 1) if world % n == 0)
        raise ConfigError(
            f"dp x sp is {dp} x {sp}, which needs {dp * sp} processes, and there are {world}: {fits} would fit; "
            "start more with --nproc or torchrun"
        )
    return sp, dp


def _whole_quotient(world: int, groups: int | None) -> int | None:
    """Return the processes of each of so many groups; None if they do not divide `world`, or none are given."""
    return world // groups if groups and world % groups == 0 else None


def unwind_on_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP unwind the stack instead of killing, so that temporary files are removed.

    A signal that has a handler keeps it. An ignored signal stays ignored, such as SIGHUP under nohup.
    """
    if _in_main_thread():
        stops = {
            signal.SIGINT: signal.default_int_handler,
            signal.SIGTERM: _unwind,
            signal.SIGHUP: _unwind,
        }
        for kind, handler in stops.items():
            if signal.getsignal(kind) is signal.SIG_DFL:
                signal.signal(kind, handler)


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    """Exit with code 128 + `number`. Further SIGTERM and SIGHUP are ignored: they would cut the cleanup short."""
    for kind in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, signal.SIG_IGN)
    _leave_a_closed_terminal()
    raise SystemExit(128 + number)


def _leave_a_closed_terminal() -> None:
    """Discard further output on stderr if its terminal is closed: writing to it would fail, and end the run."""
    with suppress(OSError):
        if stat.S_ISCHR(os.fstat(2).st_mode) and not os.isatty(2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class Signals:
    """The signals that a run has received since it last looked.

    SIGINT, SIGTERM and SIGHUP ask the run to stop. It looks where its state is consistent. Ranks look together:
    torchrun passes a signal on to all of them, and each gets it at a different point of its work. A rank that stopped
    at once would break the next collective of the others.
    """

    def __init__(self, largest: Callable[[float], float]) -> None:
        """Take `Ranks.largest`, by which ranks agree."""
        self._largest = largest
        self._asked = 0

    def note(self, number: int, frame: object) -> None:
        """Note a signal, as its handler. A second SIGINT kills: whoever presses Ctrl-C twice means it."""
        self._asked = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if number == signal.SIGHUP:
            _leave_a_closed_terminal()

    def look(self) -> None:
        """Raise KeyboardInterrupt (SIGINT) or SystemExit (others) on all ranks, if one of them has had a signal."""
        mine = self._asked
        asked = _BY_WEIGHT[int(self._largest(_BY_WEIGHT.index(mine)))]
        # keep a signal that came while ranks waited for each other
        if mine and self._asked == mine:
            self._asked = 0
        if asked == signal.SIGINT:
            raise KeyboardInterrupt
        if asked:
            raise SystemExit(128 + asked)


# Of several signals, the last one here decides
_BY_WEIGHT = (0, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def noted_signals(largest: Callable[[float], float]) -> Iterator[Signals]:
    """Note signals within the context: they act only where `signals.look()` is called, by all ranks together."""
    signals = Signals(largest)
    if not _in_main_thread():
        yield signals
        return
    kinds = [*_BY_WEIGHT[1:]]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
        kinds.remove(signal.SIGHUP)
    before = {kind: signal.signal(kind, signals.note) for kind in kinds}
    try:
        yield signals
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _in_main_thread() -> bool:
    """Return whether Python may set handlers here. A library's run in another thread leaves signals alone."""
    return threading.current_thread() is threading.main_thread()


def continue_children_at_the_end() -> None:
    """Once this process gets a signal to end, send SIGCONT to its children each second: a stopped one hears no other.

    Python calls no handler for this, so torchrun may set its own.
    """
    asked, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def send() -> None:
        while os.read(asked, 1)[0] not in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            pass
        while True:
            for children in Path("/proc/self/task").glob("*/children"):
                with suppress(OSError):  # a thread or a rank that has just ended
                    for child in children.read_text().split():
                        os.kill(int(child), signal.SIGCONT)
            time.sleep(1)

    threading.Thread(target=send, daemon=True).start()


# the id of the `--nproc` process, which reports what happens to its ranks
LAUNCHED = "LONGNET_LAUNCHED"
MOST_PER_CORE = 4  # processes: a machine that is asked for a thousand would hang
# the exit code of a rank of `--nproc` that lost another rank: it prints nothing (`_explain` in cli/app.py), since
# `start_ranks` names the rank that was lost
LOST = 69


def under_torchrun() -> bool:
    """Return whether this process is one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def started_by_torchrun() -> bool:
    """Return whether torchrun started this process, with any number of ranks.

    RANK does not tell: other launchers may leave it in any environment.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ


def start_ranks(nproc: int, *, dry_run: bool = False) -> None:
    """Run this command again under torchrun, as `nproc` processes, and exit as they do; return from a `dry_run`.

    Raises ConfigError under torchrun; SystemExit with the exit code of the rank that failed first, or of a signal;
    LongNetError for a rank that could not report its own failure.
    """
    if under_torchrun():
        raise ConfigError("--nproc starts torchrun, which runs this already: leave it out")
    if dry_run:
        return
    cores = os.cpu_count() or 1
    gpus = len(glob("/dev/nvidia[0-9]*"))
    most = max(8, MOST_PER_CORE * cores, gpus)
    if nproc > most:
        raise ConfigError(
            f"{nproc} processes, and this machine has {count_of(cores, 'core')}: start {most} at most (--nproc, --sp, "
            "--dp)"
        )
    arguments = [*_words_of_rank(sys.argv[1:])]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    # after a signal, ranks finish the step and save
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    continue_children_at_the_end()
    logging.disable(logging.ERROR)  # torchrun reports a failure in thirty lines; one is enough
    # a lost store is a warning with forty frames of C++
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ[LAUNCHED] = str(os.getpid())
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup; torchrun would handle it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        # not by the machine's own name: ranks hang if it cannot be looked up, as on a laptop offline
        here = ["--standalone", "--local-addr", "localhost"]
        torchrun([*here, "--nproc-per-node", str(nproc), "-m", "longnet_cli", *arguments])
    except SignalException as stop:
        raise SystemExit(128 + stop.sigval) from None
    except ChildFailedError as error:
        raise SystemExit(_exit_code(error.failures)) from None
    raise SystemExit(0)


def _words_of_rank(words: Sequence[str]) -> Iterator[str]:
    """Yield the words of a command line that a rank gets: no --nproc, and no --update, as this process has updated."""
    for before, word in pairwise(["", *words]):
        if "--nproc" not in (before, word.partition("=")[0]) and word != "--update":
            yield word


def _exit_code(failures: Mapping[int, Any]) -> int:
    """Return the exit code of the rank whose failure came first, given torchrun's failures by rank.

    Raises LongNetError for a rank that was killed, and if there is no such rank.
    """
    # ranks that failed only after another one: they lost it, or torchrun ended them
    followed = (LOST, -signal.SIGTERM, 128 + signal.SIGTERM)
    causes = [
        (rank, failure) for rank, failure in failures.items() if failure.exitcode not in followed
    ]
    if not causes:
        raise LongNetError(
            "the ranks lost each other: the network between them failed, or one hung"
        ) from None
    rank, first = min(causes, key=lambda cause: (cause[1].exitcode > 0, cause[1].timestamp))
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        raise LongNetError(f"rank {rank} was killed ({name}), and the job with it") from None
    return first.exitcode


_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent ends, and let SIGINT kill it like that.

    Call it from the main thread, before anything slow. Raises SystemExit if the parent has ended already.
    """
    parent = int(os.environ.get(LAUNCHED) or os.getppid())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit(128 + signal.SIGTERM)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def check_agent() -> None:
    """Raise LongNetError if the torchrun that started this rank ended before `end_with_parent` could see it.

    Ranks find each other through a store in torchrun itself, and would try to reach it for half an hour.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection(place, timeout=10).close()
    except ConnectionRefusedError:
        raise LongNetError("the torchrun that started this rank has ended") from None
    except OSError:
        pass  # torch says what is wrong with the network
