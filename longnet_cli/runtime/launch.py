"""`--nproc`: this command again, as several processes under torchrun."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import NoReturn

from longnet_cli.errors import ConfigError, LongNetError
from longnet_cli.runtime.signals import continue_children_at_the_end, hand_on_sigusr1

LAUNCHED = "LONGNET_LAUNCHED"  # the id of the `--nproc` process, which reports what happens to its ranks
LOST = 69  # exit code of a rank of `--nproc` that lost another rank


def under_torchrun() -> bool:
    """Return whether this process is one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def started_by_torchrun() -> bool:
    """Return whether torchrun started this process, with any number of ranks.

    RANK does not tell: other launchers may leave it in any environment.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ


def start_ranks(nproc: int) -> NoReturn:
    """Run this command again under torchrun, as `nproc` processes, and exit as they do.

    Raises ConfigError under torchrun; SystemExit with the exit code of the rank that failed first, or of a signal;
    LongNetError for a rank that could not report its own failure.
    """
    if under_torchrun():
        raise ConfigError("--nproc starts torchrun, which runs this already: leave it out")
    arguments, words = [], iter(sys.argv[1:])
    for word in words:
        if word == "--nproc":
            next(words, None)
        elif word != "--update" and not word.startswith("--nproc="):  # this process has updated
            arguments.append(word)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # after a signal, ranks finish the step and save
    hand_on_sigusr1()
    continue_children_at_the_end()
    logging.disable(logging.ERROR)  # torchrun reports a failure in thirty lines; one is enough
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost store is a warning with forty frames of C++
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
        # ranks that failed only after another one: they lost it, or torchrun ended them
        followed = (LOST, -signal.SIGTERM, 128 + signal.SIGTERM)
        causes = [(rank, found) for rank, found in error.failures.items() if found.exitcode not in followed]
        if not causes:
            raise LongNetError("the ranks lost each other: the network between them failed, or one hung") from None
        rank, first = min(causes, key=lambda cause: (cause[1].exitcode > 0, cause[1].timestamp))
        if first.exitcode < 0:
            name = signal.Signals(-first.exitcode).name
            raise LongNetError(f"rank {rank} was killed ({name}), and the job with it") from None
        raise SystemExit(first.exitcode) from None
    raise SystemExit(0)
