"""`longnet` and `python` for tests, forked from a process that has imported all: a tenth of a second, not two.

    with Forked(folder, environment) as forked:
        subprocess.run([forked.longnet, "score", "text.txt"])

`forked.longnet` is a program like any other, in a shell and in a pipe. It gives its arguments, folder, environment,
handles and limits to the process that forks, passes signals on, and ends as the command ends. These differ from
`python -m longnet_cli`, which is for tests of them: the process is not a child, has another command line and process
group; what Python reads when it starts (PYTHON* variables, the locale) is that of the first process; and Python does
not shut down, which takes longer than a command. `forked.python` runs a script, -c or -m in the same way. Scripts start
it as sys.executable, and torchrun starts the ranks of `--nproc` with it, unless PYTHON_EXEC names another.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

from asking import end

JOBS = (
    "benchmark",
    "encoding",
    "training.costs",
    "inspecting",
    "plotting.runs",
    "scoring.scoring",
    "tokenizing",
)
IMPORTED = [f"longnet_cli.jobs.{job}" for job in (*JOBS, "training.loop")]
IMPORTED += ["longnet_cli.cli.app", "torch._dynamo", "torch.distributed.run"]
OF_EXTRAS = ("matplotlib.figure", "transformers.models.llama.modeling_llama")
HIGH = 512  # handles from here on are free


class Command(subprocess.Popen):
    """`forked.longnet` that runs. Where it is killed, its command has ended when it has."""

    def kill(self) -> None:
        self.send_signal(signal.SIGUSR2)


class Forked:
    """The process that forks, until the `with` block ends; `longnet` and `python` are the paths of the programs."""

    def __init__(self, folder, environment: dict[str, str]) -> None:
        place, self.longnet, self.python = folder / "socket", folder / "longnet", folder / "python"
        for program in (self.longnet, self.python):
            ask = f"'{sys.executable}' -I -S '{Path(__file__).with_name('asking.py')}' '{place}' '{program}'"
            program.write_text(f'#!/bin/sh\nexec {ask} "$@"\n')
            program.chmod(0o755)
        command = [sys.executable, __file__, str(place)]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.server.stdout.readline()

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        with self.server:
            self.server.stdin.close()


def serve(place: str) -> None:
    """Fork for every job, until stdin ends; returns in the child. It only imports: a fork keeps no other thread."""
    import gc
    import importlib
    import selectors

    for name in IMPORTED:
        importlib.import_module(name)
    for name in OF_EXTRAS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    commands = importlib.import_module("typer.main")
    commands.get_command = functools.cache(commands.get_command)
    # which takes longer than a small command
    commands.get_command(sys.modules["longnet_cli.cli.app"].app)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(64)
    waiting = selectors.DefaultSelector()
    waiting.register(sys.stdin, selectors.EVENT_READ)
    waiting.register(listener, selectors.EVENT_READ)
    print("ready", flush=True)
    running: dict[int, tuple[socket.socket, int]] = {}  # who asked for a process, and its pidfd
    while True:
        for key, _ in waiting.select():
            if key.fileobj is sys.stdin:
                for process in running:
                    os.kill(process, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj is listener:
                client, _ = listener.accept()
                try:
                    _, handles, _, _ = socket.recv_fds(client, 1, 32)
                    job = json.loads(client.makefile().readline())
                except (OSError, ValueError):  # it was killed before it had asked
                    client.close()
                    continue
                process = os.fork()
                if process == 0:
                    for file in (
                        waiting,
                        listener,
                        client,
                        *(other for other, _ in running.values()),
                    ):
                        file.close()  # else a collection would, when its number is another file's
                    become(job, handles)
                    return
                for handle in handles:
                    os.close(handle)
                # it may have been killed: then its socket is at its end
                with contextlib.suppress(OSError):
                    client.sendall(f"{process}\n".encode())
                running[process] = client, os.pidfd_open(process)
                for file in running[process]:
                    waiting.register(file, selectors.EVENT_READ, process)
            elif key.data in running:  # it has ended, or the one who asked for it
                client, handle = running.pop(key.data)
                if key.fileobj is client:
                    os.kill(key.data, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1])
                with contextlib.suppress(OSError):
                    client.sendall(f"{code}\n".encode())
                for file in (client, handle):
                    waiting.unregister(file)
                client.close()
                os.close(handle)


def become(job: dict, handles: list[int]) -> None:
    """Make this process what it would be if Python had just started."""
    given = [fcntl.fcntl(handle, fcntl.F_DUPFD, HIGH) for handle in handles]
    os.closerange(0, HIGH)
    for source, handle in zip(given, job["handles"], strict=True):
        os.dup2(source, handle)
    os.closerange(HIGH, HIGH + 64)
    streams = [None] * 3
    for handle in {0, 1, 2}.intersection(job["handles"]):
        by_line = handle == 2 or os.isatty(handle)
        errors = "backslashreplace" if handle == 2 else None
        mode = "w" if handle else "r"
        streams[handle] = open(handle, mode, 1 if by_line else -1, errors=errors, closefd=False)  # noqa: SIM115
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__ = streams
    sys.argv = job["args"]
    # which these read when they are imported
    if any(name.startswith("HF_") for name in job["environment"]):
        for name in [*sys.modules]:
            if name.partition(".")[0] in ("accelerate", "huggingface_hub", "transformers"):
                del sys.modules[name]
    os.environ.clear()
    os.environ.update(job["environment"])
    os.environ.setdefault("PYTHON_EXEC", str(Path(sys.argv[0]).with_name("python")))
    if "LONGNET_LAUNCHED" in os.environ:  # in a rank, which ends with its parent
        os.environ["LONGNET_LAUNCHED"] = str(os.getppid())
    os.chdir(job["cwd"])
    for limit, value in job["limits"]:
        resource.setrlimit(limit, tuple(value))


def run() -> int:
    """The program; returns its exit code."""
    from longnet_cli.cli.app import main

    try:
        if Path(sys.argv[0]).name == "python":
            run_python()
        else:
            main()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    return 0


def run_python() -> None:
    """A script, or -c or -m, after options that take no value."""
    sys.executable, *sys.argv = sys.argv
    while sys.argv[0] not in ("-c", "-m") and sys.argv[0].startswith("-"):
        sys.argv.pop(0)
    kind, sys.path[0] = sys.argv[0], ""
    if kind == "-c":
        exec(sys.argv.pop(1), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv.pop(0)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
    end(run())
