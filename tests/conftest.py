"""What all tests share: the real command as a subprocess, hypothesis profiles, and no GPU test without a GPU."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import settings
from processes import Start

ROOT = Path(__file__).parents[1]

# "default" repeats the same examples, so that CI says the same twice; HYPOTHESIS_PROFILE=thorough hunts for new ones.
settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

RunLongnet = Callable[..., subprocess.CompletedProcess]


def pytest_configure() -> None:
    # A script's background job, `make test &`, starts with Ctrl-C ignored, and `nohup make test` with SIGHUP ignored:
    # commands under test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture
def command_env() -> dict[str, str]:
    """The environment of a command under test: imports this checkout, and sees nothing of the caller's terminal."""
    hidden = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "LONGNET_TRACEBACK")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))}


@pytest.fixture
def run_longnet(tmp_path: Path, command_env: dict[str, str]) -> RunLongnet:
    """`run_longnet("score", "-", input=...)` runs the real command in an empty folder; text=False for bytes."""

    def run(
        *args: str | Path,
        input: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
        text: bool = True,
        cwd: Path = tmp_path,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "longnet_cli", *map(str, args)],
            input=input if input is not None else ("" if text else b""),
            capture_output=True,
            text=text,
            env=command_env | dict(env or {}),
            cwd=cwd,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def start(tmp_path: Path, command_env: dict[str, str]) -> Iterator[Start]:
    """`start("tokenize", ...)` begins the real command; it is killed with the test."""
    begun: list[subprocess.Popen] = []

    def run(*args: str | Path, **options) -> subprocess.Popen:
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        words = [sys.executable, "-m", "longnet_cli", *map(str, args)]
        begun.append(subprocess.Popen(words, env=command_env, cwd=tmp_path, **options))
        return begun[-1]

    yield run
    for process in begun:
        with process:  # which closes its pipes
            process.kill()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"mounting a small file system is not permitted: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)
