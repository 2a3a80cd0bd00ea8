"""A file or a folder is there whole or not at all, whenever a signal comes; links and devices stay what they are."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from longnet_cli.basics.atomic import atomic_write, whole_folder


def is_interrupted(work: Callable[[Path], None], folder: Path, line: int) -> bool:
    """Work with a Ctrl-C at one of the lines that Python runs, also in libraries. Return whether there were enough."""
    lines_left = line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines_left
        if event == "line":
            if lines_left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
            lines_left -= 1
        return trace

    sys.settrace(trace)
    try:
        work(folder)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def write_whole_file(folder: Path) -> None:
    with atomic_write(folder / "a.json") as file:
        file.write(b"new")


def write_whole_folder(folder: Path) -> None:
    with whole_folder(folder, "a.json") as place:
        (place / "a.json").write_bytes(b"new")


@pytest.mark.parametrize("write", [write_whole_file, write_whole_folder])
@pytest.mark.parametrize("old", [[], ["a.json"]])
def test_a_signal_at_any_line_leaves_nothing(tmp_path, write, old):
    for line in count():
        folder = tmp_path / str(line) / "new"
        for name in old:
            folder.mkdir(parents=True)
            (folder / name).write_bytes(b"old")
        interrupted = is_interrupted(write, folder, line)
        files = {path.name: path.read_bytes() for path in folder.glob("*")}
        if not interrupted:
            break
        assert files in (dict.fromkeys(old, b"old"), {"a.json": b"new"}), line
    assert files == {"a.json": b"new"}
    assert line > 50


def test_until_the_block_ends_nothing_has_the_final_name(tmp_path):
    with atomic_write(tmp_path / "a.json") as file:
        file.write(b"1")
        assert not (tmp_path / "a.json").exists()
    assert (tmp_path / "a.json").read_bytes() == b"1"
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~umask
    assert os.listdir(tmp_path) == ["a.json"]


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for path in (tmp_path / "link", Path("/dev/null")):
        with atomic_write(path) as file:
            file.write(b"1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"1"
    assert not Path("/dev/null").is_file()
