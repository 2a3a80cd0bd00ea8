"""A watch on the processes of a job: no rank outlives its parent or another rank, whatever it waits for.

A rank often waits in C: for the others at the start, or in a collective. Python's signal handlers do not run there.

    before the ranks have met   there is nothing to lose: SIGINT and SIGTERM kill, and so does the end of the parent
    from then on                a thread sees the parent or a rank end; after GRACE seconds, it ends this process

The kernel reports the end of another rank, wherever it ran and however it ended: rank 0 has a TCP connection to each of
the others, on which only a password is ever sent. A rank that is only busy, or stopped in a debugger, keeps it open.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from longnet_cli.basics.errors import LongNetError
from longnet_cli.running.ranks.launch import LAUNCHED, LOST

if TYPE_CHECKING:
    from longnet_cli.running.ranks.ranks import Ranks

GRACE = 20.0  # seconds in which a rank may save, clean up and say what happened

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_SIGSTKFLT = 16  # Linux defines it and never sends it
_over, _orphaned = threading.Event(), threading.Event()


def die_with_parent() -> None:
    """Let the end of the parent, SIGINT and SIGTERM kill this process at once. Call it before anything slow.

    Raises SystemExit if the parent has ended already.
    """
    parent = int(os.environ.get(LAUNCHED) or os.getppid())
    _ask_for(signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(128 + signal.SIGTERM)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def check_agent() -> None:
    """Raise LongNetError if the torchrun that started this rank ended before `die_with_parent` could see it.

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


def watch(ranks: Ranks, grace: float = GRACE) -> None:
    """Watch the parent and the other ranks until `stop_watching`. All ranks must call it together.

    When the parent ends, this process gets SIGTERM. When the parent or a rank has ended, this process ends `grace`
    seconds later, unless it has ended by itself.
    """
    parent, lines = os.getppid(), _connect(ranks) if ranks.world > 1 else []
    _over.clear()
    if sys.platform == "linux":
        # For a process in which C code holds the interpreter's lock, so that no Python thread runs. The handler is C's
        # `alarm`. Called with the signal's number, it lets SIGALRM kill the process after as many seconds.
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        libc.signal(_SIGSTKFLT, ctypes.cast(libc.alarm, ctypes.c_void_p))
        _ask_for(_SIGSTKFLT)
    threading.Thread(target=_watch, args=(parent, lines, grace), name="watch", daemon=True).start()


def stop_watching() -> None:
    """Stop watching, so that the other processes may end. Call it when all ranks have done their work."""
    _over.set()


def _ask_for(signum: int) -> None:
    """Have the kernel send a signal to this process when its parent ends."""
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)


def _watch(parent: int, lines: Sequence[socket.socket], grace: float) -> None:
    with selectors.DefaultSelector() as selector:
        for line in lines:
            selector.register(line, selectors.EVENT_READ)
        while not selector.select(timeout=1) and os.getppid() == parent:
            if _over.is_set():
                return
    orphaned = os.getppid() != parent
    if orphaned:
        signal.alarm(0)  # cancel the handler's: this thread ends the process
        _say_orphaned()
        os.kill(os.getpid(), signal.SIGTERM)
    if _over.wait(grace):
        return
    if LAUNCHED not in os.environ and not orphaned:  # otherwise the parent reports it
        _say("another rank ended")
    os._exit(128 + signal.SIGTERM if orphaned else LOST if LAUNCHED in os.environ else 1)


def tell_of_lost_parent() -> None:
    """Say on rank 0 if the parent has ended, which would have reported a lost rank. Only for a process at its end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, which ends the others: nothing may come in between
    time.sleep(0.5)  # its connections break a moment before it ends
    if os.getppid() != int(os.environ[LAUNCHED]):
        _say_orphaned()


def _say_orphaned() -> None:
    """Say once, on rank 0, that the parent has ended."""
    if os.environ.get("RANK", "0") == "0" and not _orphaned.is_set():
        _orphaned.set()
        _say("the process that started this rank ended")


def _say(what: str) -> None:
    with suppress(OSError, ValueError, AttributeError):  # stderr may be gone too
        sys.stderr.write(f"longnet: error: rank {os.environ.get('RANK')}: {what}, and this one with it\n")
        sys.stderr.flush()


def _connect(ranks: Ranks) -> list[socket.socket]:
    """Return connections that break when a process ends: on rank 0 to all others, on the others to rank 0."""
    together = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]  # on one machine
    with _listen("127.0.0.1" if together else "", ranks.world) as server:
        port = ranks.from_first(server.getsockname()[1])
        password = ranks.from_first(secrets.randbits(52)).to_bytes(7, "big")
        if not ranks.first:
            place = "127.0.0.1" if together else os.environ["MASTER_ADDR"], port
            lines = [socket.create_connection(place, timeout=60)]
            lines[0].sendall(password)
        else:
            lines = []
            server.settimeout(60)
            while len(lines) < ranks.world - 1:
                line, _ = server.accept()
                line.settimeout(10)
                with suppress(OSError):
                    if line.recv(len(password)) == password:  # otherwise it is a stranger
                        lines.append(line)
    for line in lines:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # notices within a minute that a machine is gone
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return lines


def _listen(host: str, callers: int) -> socket.socket:
    """Listen on any port. All `callers` may call at once: none must wait for another try."""
    if not host and socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=callers, dualstack_ipv6=True)
    return socket.create_server((host, 0), backlog=callers)
