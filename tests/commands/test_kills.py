"""Killed at random moments: saved states, and chosen blocks in a file, of one process and of several; the same bytes.

Forty kills and more: pytest -m slow tests/commands/test_kills.py
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from builders import recipe_with_checkpoints, tiny_model, write_corpus
from conftest import RunLongnet
from processes import Start, contents, kill_and_resume, kill_training, wait_for_news

pytestmark = pytest.mark.slow
CHOSEN = "window:64,chosen=4x32,chosen_every=16"
RANKS = ["--nproc", "2", "--dp", "2"]


def test_killed_saves_leave_a_state_and_end_with_the_same_bytes(
    start: Start, run_longnet: RunLongnet, tmp_path: Path
) -> None:
    """Twelve kills of `generate --save-state`, six of them while it saves, over nothing and over an earlier state."""
    model = tiny_model(tmp_path / "model", position="rope", dim=256, num_layers=4, num_heads=4)
    reading = ["--model", f"{model}/", "--pattern", "dense", "--chunk", "2048", "-q"]
    (tmp_path / "book.txt").write_text("some words, and others. " * 500)
    assert run_longnet("generate", "-i", "book.txt", *reading, "--save-state", "base").returncode == 0
    command = ["generate", "and more", *reading, "--state", "base", "--save-state"]

    def pieces(folder: Path) -> dict[str, bytes]:
        """The files of a state, without the random part of their names."""
        listed = json.loads((folder / "manifest.json").read_text())["state"]["files"]
        return {name[-13:]: (folder / name).read_bytes() for name in listed}

    process = start(*command, "whole")
    wait_for_news(process, tmp_path / "whole")
    began = time.monotonic()
    assert process.wait() == 0
    saving, base, whole = time.monotonic() - began, pieces(tmp_path / "base"), pieces(tmp_path / "whole")
    chance, kills, while_saving = random.Random(1), 0, 0
    assert base != whole
    while kills < 12 or while_saving < 6:
        place = tmp_path / f"place{kills}"
        if kills % 2:
            assert run_longnet("generate", "-i", "book.txt", *reading, "--save-state", place).returncode == 0
        for _ in range(3):
            process = start(*command, place)
            wait_for_news(process, place)
            try:
                process.wait(chance.uniform(0, saving))
                assert process.returncode == 0
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                while_saving += any(path.name.endswith(".tmp") for path in place.iterdir())
                if (place / "manifest.json").exists():
                    assert pieces(place) in (base, whole)
        done = run_longnet(*command, place)
        assert done.returncode == 0, done.stderr
        assert pieces(place) == whole
        assert len(contents(place)) == 1 + len(whole)
    print(f"{kills} kills, {while_saving} while it saved")


@pytest.mark.parametrize("ranks", [[], RANKS], ids=["alone", "dp"])
def test_killed_jobs_that_spill_end_with_the_same_bytes(start: Start, tmp_path: Path, ranks: list[str]) -> None:
    """Ten kills or more each; nothing is left in the folder of the file."""
    model = tiny_model(tmp_path / "model", position="rope", dim=32, num_layers=4, num_heads=4)
    chance = random.Random(0)
    lines = [{"id": str(n), "text": "".join(chance.choices("abc d\n", k=chance.randint(100, 4000)))} for n in range(40)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "spilled").mkdir()
    command = ["encode", tmp_path / "corpus.jsonl", "-m", f"{model}/", "--pattern", CHOSEN, "--pool", "last"]
    command += ["--span", "50", "--chunk", "512", "--shard-rows", "100", "--spill", tmp_path / "spilled", *ranks]
    kill_and_resume(partial(start, fresh=bool(ranks)), command, tmp_path, kills=10)
    assert not [*(tmp_path / "spilled").iterdir()]


def test_killed_runs_that_spill_on_two_ranks_end_with_the_same_bytes(
    command_env: dict[str, str], tmp_path: Path
) -> None:
    """Twelve kills of `train --spill` with two groups of ranks."""
    found = recipe_with_checkpoints(write_corpus(tmp_path, 400, 20), **{
        "model.position": "rope", "model.segment_lengths": [16], "model.dilation_rates": [1], "model.look_back": 1,
        "model.overlap": "once", "model.queries": "all", "model.chosen": 2, "model.chosen_block": 8,
        "model.chosen_every": 4, "train.stages": [{"seq_len": 100, "steps": 60}], "train.save_every": 3,
        "train.spill": str(tmp_path / "spilled"), "train.batch_tokens": 200,
    })  # fmt: skip
    (tmp_path / "spilled").mkdir()
    (tmp_path / "recipe.json").write_text(found.model_dump_json())

    def begin(run: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "longnet_cli", "train", str(tmp_path / "recipe.json"), "-q", "-o", str(run)]
        return subprocess.Popen([*command, *RANKS], env=command_env, stderr=subprocess.DEVNULL)

    print(kill_training(begin, tmp_path, 12))
    assert not [*(tmp_path / "spilled").iterdir()]
