"""The command in processes forked from one that has imported torch: a run costs tenths of a second, not seconds.

    with Forked() as forked:
        done = forked.run(["score", "text.txt"], folder)

As a script it is that first process. It only imports: threads that had worked before a fork would be missing after it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

CPU_SECONDS = 10  # that a run may use: a hang, if it is not one that waits, however busy the machine is
MEMORY = 12 << 30  # bytes of addresses that a run may have: what asks for more fails, instead of filling the machine


class Done(NamedTuple):
    """`code` is None where the run was killed for taking longer than it may, negative where a signal ended it.

    -SIGXCPU is that of one that used more than CPU_SECONDS.
    """

    code: int | None
    stdout: str
    stderr: str
    seconds: float


class Forked:
    def __init__(self, folder: Path) -> None:
        self.out, self.err = folder / "stdout", folder / "stderr"
        env = {name: value for name, value in os.environ.items() if not name.startswith("LONGNET_")}
        root = str(Path(__file__).parents[1])
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "NO_COLOR": "1"}
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        with self.server:
            self.server.stdin.close()

    def run(self, args: list[str], cwd: Path, *, seconds: float = 60, closed: tuple[int, ...] = ()) -> Done:
        """Run the command in a folder, stdin empty, with some of the handles 0, 1 and 2 `closed`."""
        job = [args, str(cwd), str(self.out), str(self.err), seconds, closed]
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        code, took = json.loads(self.server.stdout.readline())
        return Done(code, *(path.read_text(errors="replace") for path in (self.out, self.err)), took)


def _serve() -> None:
    import longnet_cli.benchmark
    import longnet_cli.encoding
    import longnet_cli.inspecting
    import longnet_cli.integrations.loading
    import longnet_cli.plotting
    import longnet_cli.tokenizing
    import longnet_cli.training.estimate
    import longnet_cli.training.loop  # noqa: F401

    for line in sys.stdin:
        args, cwd, out, err, seconds, closed = json.loads(line)
        began = time.monotonic()
        process = os.fork()
        if process == 0:
            _run(args, cwd, out, err, closed)
        status = None
        while status is None and time.monotonic() < began + seconds:
            found, value = os.waitpid(process, os.WNOHANG)
            status = value if found else None
            if status is None:
                time.sleep(0.002)
        if status is None:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
        code = None if status is None else os.waitstatus_to_exitcode(status)
        print(json.dumps([code, time.monotonic() - began]), flush=True)


def _run(args: list[str], cwd: str, out: str, err: str, closed: list[int]) -> None:
    from longnet_cli.cli.app import app, run

    code = 99  # of what `run` should have told of
    try:
        os.setpgid(0, 0)
        os.chdir(cwd)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
        for handle, path in enumerate((os.devnull, out, err)):
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC if handle else os.O_RDONLY)
            os.dup2(file, handle)
            os.close(file)
        errors = (None, None, "backslashreplace")  # as Python opens its own
        streams = [open(n, "w" if n else "r", closefd=False, errors=errors[n]) for n in range(3)]  # noqa: SIM115
        for handle in closed:
            os.close(handle)
            streams[handle] = None
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__ = streams
        sys.argv = ["longnet", *args]
        run(app)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream:
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
