"""What all tests share: the real command as a subprocess, hypothesis profiles, and no GPU test without a GPU."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from forked import Command, Forked
from hypothesis import settings
from places import ROOT
from processes import Start

# "default" repeats the same examples, so that CI says the same twice; `make quick` takes "quick", and
# HYPOTHESIS_PROFILE=thorough hunts for new ones.
settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
settings.register_profile("quick", deadline=None, max_examples=10, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Where tests marked `gpu` run; `cpu` tries the tests themselves.
GPU = os.environ.get("LONGNET_TEST_DEVICE", "cuda")

STARTS = {"command_env", "longnet", "python", "run_longnet", "start"}  # fixtures
ROOMS_OF_PROCESSES = {"clients", "commands", "docs", "ranks"}  # folders of tests/

RunLongnet = Callable[..., subprocess.CompletedProcess]


def pytest_configure(config: pytest.Config) -> None:
    config.add_cleanup(_own_cache().cleanup)
    # A script's background job, `make test &`, starts with Ctrl-C ignored, and `nohup make test` with SIGHUP ignored:
    # commands under test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _own_cache() -> TemporaryDirectory:
    """Give the tests a cache folder with all that is in the user's, but for what `longnet` itself keeps there."""
    place, user = TemporaryDirectory(), Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    for path in user.iterdir() if user.is_dir() else ():
        if path.name != "longnet":
            Path(place.name, path.name).symlink_to(path)
    os.environ["XDG_CACHE_HOME"] = place.name
    return place


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts commands or ranks, which only the full suite runs, not `make quick`."""
    for item in items:
        starts = STARTS.intersection(getattr(item, "fixturenames", ()))
        if starts or ROOMS_OF_PROCESSES.intersection(item.path.relative_to(ROOT / "tests").parts):
            item.add_marker("full")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and GPU != "cpu":
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def environment() -> dict[str, str]:
    hidden = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "LONGNET_TRACEBACK")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))}


@pytest.fixture
def command_env() -> dict[str, str]:
    """The environment of a command under test: imports this checkout, and sees nothing of the caller's terminal."""
    return environment()


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    with Forked(tmp_path_factory.mktemp("forked"), environment()) as forked:
        yield forked


@pytest.fixture(scope="session")
def longnet(forked: Forked) -> Path:
    """The path of a program that is `longnet` and starts at once: see forked.py."""
    return forked.longnet


@pytest.fixture(scope="session")
def python(forked: Forked) -> Path:
    """The path of a program that is `python` and starts at once: it has imported longnet_cli and torch."""
    return forked.python


@pytest.fixture
def run_longnet(tmp_path: Path, command_env: dict[str, str], longnet: Path) -> RunLongnet:
    """`run_longnet("score", "-", input=...)` runs the command in an empty folder; text=False for bytes.

    `fresh` is for what forked.py cannot do: for one, what Python reads when it starts.
    """

    def run(
        *args: str | Path,
        input: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
        text: bool = True,
        cwd: Path = tmp_path,
        timeout: float = 120,
        fresh: bool = False,
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*([sys.executable, "-m", "longnet_cli"] if fresh else [longnet]), *map(str, args)],
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
def start(tmp_path: Path, command_env: dict[str, str], longnet: Path) -> Iterator[Start]:
    """`start("tokenize", ...)` starts the command; it is killed with the test. For `fresh`, see run_longnet."""
    begun: list[subprocess.Popen] = []

    def run(*args: str | Path, fresh: bool = False, **options) -> subprocess.Popen:
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        options |= {"env": command_env, "cwd": tmp_path}
        if fresh:
            process = subprocess.Popen([sys.executable, "-m", "longnet_cli", *map(str, args)], **options)
        else:
            process = Command([longnet, *map(str, args)], **options)
        begun.append(process)
        return process

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
