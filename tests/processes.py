"""Commands in this process; and as real ones, ended at random moments or on a full disk, and what they leave behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from places import ROOT
from typer.testing import CliRunner, Result

from longnet_cli.basics.errors import LongNetError
from longnet_cli.cli.app import app

Start = Callable[..., subprocess.Popen]  # the fixture `start`
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# the peak above what the same imports take, and the bytes of the weights
LOADING = """
import json, sys, torch
from pathlib import Path
from transformers.models.llama import modeling_llama
import longnet_cli.models.hf.pretrained_net
from longnet_cli.models.folder import ModelFolder
from longnet_cli.running.device import peak_memory, resident_memory
before = resident_memory(torch.device("cpu"))
net = ModelFolder(Path(sys.argv[1])).net(dtype=getattr(torch, sys.argv[2]))
weights = sum(p.numel() * p.element_size() for p in net.parameters())
print(json.dumps([peak_memory(torch.device("cpu")) - before, weights]))
"""


def environment() -> dict[str, str]:
    hidden = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "LONGNET_TRACEBACK")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))}


def words_of(args: Sequence[str | Path | int]) -> list[str]:
    """The words of a command: those of the first argument, which may be several, and the others as they are."""
    words = [*map(str, args)]
    return [*" ".join(words[:1]).split(), *words[1:]]


def invoke(*args: str | Path | int, code: int | None = None) -> Result:
    """`invoke("score --last 9", path)` runs the command in this process, where its libraries are loaded.

    It fails where the exit code is not `code`.
    """
    result = CliRunner().invoke(app, words_of(args))
    assert code in (None, result.exit_code), result.output
    return result


def refused(*args: str | Path | int) -> LongNetError:
    """Its one line, with nothing on stdout."""
    result = invoke(*args)
    assert isinstance(result.exception, LongNetError), result.output
    assert "\n" not in str(result.exception)
    assert result.stdout == ""
    return result.exception


def total(*args: str | Path | int, code: int = 0) -> dict:
    """What `score` says of all documents together."""
    return json.loads(invoke("score", *args, "--format", "json", code=code).stdout)["total"]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder and those below, by its path there."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("waited in vain")


def wait_for_news(process: subprocess.Popen, folder: Path) -> None:
    """Until the process makes a file of a new name in the folder, or ends."""

    def files() -> set[str]:
        return set(os.listdir(folder)) if folder.exists() else set()

    before = files()
    wait_for(lambda: process.poll() is not None or bool(files() - before))


def kill_and_resume(start: Start, command: list[str | Path], folder: Path, kills: int) -> None:
    """Kill the command at `kills` random moments or more, until half of them have hit the writing of shards.

    It is resumed each time, in as many folders as that takes.
    """
    began = time.monotonic()
    process = start(*command, "-o", folder / "whole")
    wait_for_news(process, folder / "whole")
    writing = time.monotonic()
    assert process.wait() == 0
    seconds, writing = time.monotonic() - began, time.monotonic() - writing
    whole = contents(folder / "whole")
    shards = {name for name in whole if name.endswith(".arrow")} - {"_manifest.arrow"}
    chance = random.Random(1)
    killed = in_the_middle = 0
    for attempt in range(50):
        place = folder / str(attempt)
        enough = killed >= kills and in_the_middle >= kills / 2
        while not place.exists() or contents(place) != whole:
            process = start(*command, "-o", place, "--resume")
            try:
                if enough:
                    process.wait()
                elif chance.random() < 0.3:
                    process.wait(chance.uniform(0, seconds))
                else:  # at first there are only imports
                    wait_for_news(process, place)
                    process.wait(chance.uniform(0, writing))
                assert process.returncode == 0, process.stderr and process.stderr.read()
                assert contents(place) == whole
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                wait_for(lambda place=place: not processes_of(place))  # type: ignore[misc]
                killed += 1
                found = contents(place) if place.exists() else {}
                finished = shards & found.keys()
                in_the_middle += 0 < len(finished) < len(shards)
                assert "_manifest.arrow" not in found or finished == shards
                assert all(found[name] == whole[name] for name in finished)
        if enough:
            return
    raise AssertionError(f"{in_the_middle} of {killed} kills hit the writing")


def processes_of(word: str | Path) -> list[int]:
    """Of all processes that run, those with this word in their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            runs = place.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
            if runs and os.fsencode(word) in place.joinpath("cmdline").read_bytes().split(b"\0"):
                found.append(int(place.name))
        except OSError:  # it has just ended
            continue
    return found


def kill_training(
    begin: Callable[[Path], subprocess.Popen], folder: Path, kills: int
) -> Counter[tuple[str, str]]:
    """Kill runs at random moments, resume each of them until it ends, and compare it with one that nobody killed.

    `begin` starts or resumes a run in a folder. A kill hits one of its processes, at the start, while a checkpoint is
    written, or in a step; soon after it none is left. Returns how often which process was hit when.
    """
    start = time.monotonic()
    process = begin(folder / "whole")
    wait_for_news(process, folder / "whole/checkpoints")
    start = time.monotonic() - start
    assert process.wait() == 0
    expected, chance, hits = contents_of_run(folder / "whole"), random.Random(1), Counter()
    finished = True
    while hits.total() < kills or not finished:
        if finished:
            run = folder / f"run{hits.total()}"
        moment = ("start", "checkpoint", "step")[hits.total() % 3]
        process = begin(run)
        if hits.total() >= kills:
            assert process.wait() == 0
        elif moment == "start":
            time.sleep(chance.uniform(0, start))
        else:
            # one that is being written has a name of its own
            wait_for_news(process, run / "checkpoints")
            time.sleep(chance.uniform(0, 0.02 if moment == "checkpoint" else 0.5))
        if process.poll() is None and (victims := processes_of(run)):
            victim = chance.choice(victims)
            os.kill(victim, signal.SIGKILL)
            hits["launcher" if victim == process.pid else "rank", moment] += 1
            deadline = time.monotonic() + 30
            while processes_of(run) or process.poll() is None:
                assert time.monotonic() < deadline, f"{processes_of(run)} live on after {hits}"
                time.sleep(0.05)
        finished = process.returncode == 0
        if finished:
            assert contents_of_run(run) == expected
    return hits


def contents_of_run(run: Path) -> dict[str, bytes]:
    """The model, and the tensors of the last checkpoint: after a resume, another of its files may hold one."""
    found = {"model.safetensors": (run / "model.safetensors").read_bytes()}
    for path in max((run / "checkpoints").glob("step-*")).glob("*.safetensors"):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        for name, facts in json.loads(data[8:end]).items():
            if name != "__metadata__":
                first, last = facts["data_offsets"]
                found[f"{name} {facts['shape']}"] = data[end + first : end + last]
    return found


def extra_memory(folder: Path, dtype: str, env: dict[str, str]) -> list[int]:
    """(bytes that loading a model takes at its peak, bytes of the weights), in a process of its own."""
    command = [sys.executable, "-c", LOADING, str(folder), dtype]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)
