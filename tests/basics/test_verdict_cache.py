"""What was found out about a model once is not found out again, unless anything that it depends on has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longnet_cli.basics import verdict_cache as verdicts
from longnet_cli.basics.verdict_cache import cache_folder, remembered


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "longnet" / "verdicts"


class Found:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Any:
        self.times += 1
        return {"layers": [self.times, None], "why": "ö"}


def test_the_same_question_is_answered_once(cache, monkeypatch):
    find = Found()
    first = remembered({"trial": "a"}, find)
    assert remembered({"trial": "a"}, find) == first == {"layers": [1, None], "why": "ö"}
    assert remembered({"trial": "b"}, find) != first
    assert find.times == len([*cache.iterdir()]) == 2
    monkeypatch.setattr(verdicts, "_version", lambda name: "of another library")
    assert remembered({"trial": "a"}, find)["layers"] == [3, None]


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "{}", '{"asked": {}, "found": 7}', "[" * 100_000, "\x00"]
)
def test_a_damaged_answer_is_found_again(cache, damage):
    find = Found()
    remembered({"trial": "a"}, find)
    [path] = cache.iterdir()
    path.write_text(damage)
    assert remembered({"trial": "a"}, find)["layers"] == [2, None]
    assert json.loads(path.read_text())["found"]["layers"] == [2, None]


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    find = Found()
    assert [remembered({"trial": "a"}, find)["layers"][0] for _ in range(2)] == [1, 2]
    assert (tmp_path / "file").read_text() == "kept"


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/longnet")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/longnet")
