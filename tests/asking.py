"""The program behind `forked.longnet`: it has a command run by the process of forked.py, and ends as that ends.

It imports little, since it starts hundreds of times: python -I -S asking.py SOCKET PROGRAM ARGUMENT...
"""

import json
import os
import resource
import signal
import socket
import sys

LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE)
SIGNALS = {number: number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
SIGNALS[signal.SIGUSR2] = signal.SIGKILL  # which nothing can pass on: see Command.kill in forked.py


def ask(place: str, args: list[str]) -> int:
    """Have the command run with what this process has; returns its exit code, or minus the signal that ended it."""
    process = None

    def pass_on(number: int, _: object) -> None:
        if process is None:
            os._exit(128 + number)
        os.kill(process, SIGNALS[number])

    handles = [handle for handle in map(int, os.listdir("/proc/self/fd")) if is_open(handle)]
    limits = [(limit, resource.getrlimit(limit)) for limit in LIMITS]
    job = {
        "args": args,
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
        "handles": handles,
        "limits": limits,
    }
    for number in SIGNALS:
        signal.signal(number, pass_on)
    server = socket.socket(socket.AF_UNIX)
    server.connect(place)
    socket.send_fds(server, [b"\n"], handles)
    server.sendall(json.dumps(job).encode() + b"\n")
    answers = server.makefile()
    process = int(answers.readline())
    return int(answers.readline())


def is_open(handle: int) -> bool:
    try:
        os.fstat(handle)
    except OSError:
        return False
    return True


def end(code: int) -> None:
    """End with an exit code, or by the signal that is minus the code."""
    if code < 0:
        if code != -signal.SIGKILL:  # which has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    end(ask(sys.argv[1], sys.argv[2:]))
