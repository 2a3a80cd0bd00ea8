"""Commands as real processes: ended at random moments, or on a full disk, and what they leave behind."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

Start = Callable[..., subprocess.Popen]  # the fixture `start`


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("waited in vain")


def wait_for_news(process: subprocess.Popen, folder: Path) -> None:
    """Until the process makes a file in the folder, or ends."""

    def files() -> int:
        return len(os.listdir(folder)) if folder.exists() else 0

    before = files()
    wait_for(lambda: process.poll() is not None or files() > before)


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
    shards = {name for name in whole if name.endswith(".arrow")}
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
                killed += 1
                found = contents(place) if place.exists() else {}
                finished = shards & found.keys()
                in_the_middle += 0 < len(finished) < len(shards)
                assert "_manifest.json" not in found or finished == shards
                assert all(found[name] == whole[name] for name in finished)
        if enough:
            return
    raise AssertionError(f"{in_the_middle} of {killed} kills hit the writing")


def assert_full(process: subprocess.Popen, reason: str, folder: Path, whole: dict[str, bytes]) -> list[str]:
    """One line, exit code 1, and only whole shards; returns their names."""
    _, said = process.communicate()
    assert process.returncode == 1
    assert said.decode().count("\n") == 1
    assert said.startswith(b"longnet: error: ")
    assert f"cannot write: {reason}".encode() in said
    assert str(folder).encode() in said
    found = contents(folder)
    shards = [name for name in found if name.endswith(".arrow")]
    assert all(found[name] == whole[name] for name in shards)
    assert "_manifest.json" not in found
    assert not [name for name in found if name.endswith(".tmp")]
    return shards
