"""The end of a rank whose parent has ended. How ranks end with each other is left to torchrun.

before the ranks have met   there is nothing to lose: SIGINT and SIGTERM kill, and so does the end of the parent
from then on                they unwind, and `train` saves
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

from longnet_cli.basics.errors import LongNetError
from longnet_cli.running.ranks.launch import LAUNCHED

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
