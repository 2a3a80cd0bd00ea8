"""What all tests share: the real command as a process, hypothesis profiles, no GPU test without a GPU, and the order.

`pytest --record-durations` writes how many seconds the tests of each file take to tests/durations.json.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from forked import Command, Forked
from hypothesis import settings
from places import ROOT
from processes import Start, environment, words_of

pytest_plugins = ["real_files"]  # the fixtures of tests/real

# "default" and "ci" repeat the same examples, so that a test says the same twice; .ci/run takes "ci", and
# HYPOTHESIS_PROFILE=thorough hunts for new ones.
settings.register_profile("default", deadline=None, max_examples=12, derandomize=True)
settings.register_profile("ci", deadline=None, max_examples=20, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Where tests marked `gpu` run; `cpu` tries the tests themselves, `emulated` a GPU's kernels with numbers: emulated.py.
GPU = os.environ.get("LONGNET_TEST_DEVICE", "cuda")
if EMULATED := GPU == "emulated":
    GPU = "cpu"

STARTS = {"command_env", "longnet", "python", "run_longnet", "run_python", "start"}  # fixtures
ROOMS_OF_PROCESSES = {"clients", "commands", "docs", "ranks"}  # folders of tests/
ROOMS_OF_CI = {"clients"}
DURATIONS = ROOT / "tests/durations.json"

RunLongnet = Callable[..., subprocess.CompletedProcess]


def pytest_configure(config: pytest.Config) -> None:
    config.add_cleanup(_own_cache().cleanup)
    # by the process that starts all
    if config.getoption("--record-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())
    # A script's background job, `make test &`, starts with Ctrl-C ignored, and `nohup make test` with SIGHUP ignored:
    # commands under test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _own_cache() -> TemporaryDirectory:
    """Give the tests a cache folder with all that is in the user's, but for what `longnet` itself keeps there."""
    place, user = (
        TemporaryDirectory(),
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser(),
    )
    for path in user.iterdir() if user.is_dir() else ():
        if path.name != "longnet":
            Path(place.name, path.name).symlink_to(path)
    os.environ["XDG_CACHE_HOME"] = place.name
    return place


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-durations", action="store_true", help=f"write how long tests take to {DURATIONS}"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make quick` and `make test` leave out, and put the files first that take longest.

    A worker that is done takes the last tests of another (`--dist worksteal`), so these must be short. A file that
    nobody has timed counts as an average one.
    """
    for item in items:
        folders = item.path.relative_to(ROOT / "tests").parts
        if STARTS.intersection(
            getattr(item, "fixturenames", ())
        ) or ROOMS_OF_PROCESSES.intersection(folders):
            item.add_marker("full")
        if ROOMS_OF_CI.intersection(folders):
            item.add_marker("ci")
        if "real" in folders:
            item.add_marker("real")
    seconds = json.loads(DURATIONS.read_text(encoding="utf-8"))
    average = sum(seconds.values()) / max(1, len(seconds))
    items.sort(key=lambda item: -seconds.get(file_of(item.nodeid), average))


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


class Recorder:
    """Adds up the seconds of each file, and writes them at the end, where they are more than those written before."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[file_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        known = json.loads(DURATIONS.read_text(encoding="utf-8"))
        known = {file: seconds for file, seconds in known.items() if (ROOT / file).exists()}
        # One run has only a part of a file that has tests for CI alone
        for file, seconds in self.seconds.items():
            known[file] = max(known.get(file, 0), round(seconds, 1))
        DURATIONS.write_text(json.dumps(known, indent=0, sort_keys=True) + "\n", encoding="utf-8")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and GPU != "cpu":
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


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


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small LongNet, for commands."""
    from builders import tiny_model

    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", position="rope")


@pytest.fixture
def run_longnet(tmp_path: Path, command_env: dict[str, str], longnet: Path) -> RunLongnet:
    """`run_longnet("score -", input=...)` runs the command in an empty folder; text=False for bytes.

    It fails where the exit code is not `code`. `fresh` is for what forked.py cannot do: for one, what Python reads when
    it starts.
    """

    def run(
        *args: str | Path,
        input: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
        text: bool = True,
        cwd: Path = tmp_path,
        timeout: float = 120,
        fresh: bool = False,
        code: int | None = None,
    ) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [*([sys.executable, "-m", "longnet_cli"] if fresh else [longnet]), *words_of(args)],
            input=input if input is not None else ("" if text else b""),
            capture_output=True,
            text=text,
            env=command_env | dict(env or {}),
            cwd=cwd,
            timeout=timeout,
            check=False,
        )
        assert code in (None, done.returncode), done.stderr
        return done

    return run


@pytest.fixture
def run_python(tmp_path: Path, command_env: dict[str, str]) -> RunLongnet:
    """`run_python("-c", program)` runs Python, or `python`, in an empty folder. Its exit code must be `code`."""

    def run(
        *args: str | Path, code: int = 0, python: str | Path = sys.executable, **options
    ) -> subprocess.CompletedProcess:
        options = {"cwd": tmp_path, "env": command_env, "timeout": 600} | options
        command = [python, *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        assert done.returncode == code, done.stderr
        return done

    return run


@pytest.fixture
def start(tmp_path: Path, command_env: dict[str, str], longnet: Path) -> Iterator[Start]:
    """`start("tokenize", ...)` starts the command; it is killed with the test. For `fresh`, see run_longnet."""
    begun: list[subprocess.Popen] = []

    def run(*args: str | Path, fresh: bool = False, **options) -> subprocess.Popen:
        options = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        } | options
        options |= {"env": command_env, "cwd": tmp_path}
        if fresh:
            command = [sys.executable, "-m", "longnet_cli", *words_of(args)]
            process = subprocess.Popen(command, **options)
        else:
            process = Command([longnet, *words_of(args)], **options)
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
