"""Resumed = uninterrupted: a run that is killed, stopped, or finds damaged checkpoints ends with the same bytes.

Thirty kills: pytest -m slow tests/jobs/test_checkpoint.py
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from builders import metrics_of, write_corpus
from builders import recipe_with_checkpoints as recipe
from many_ranks import run_ranks
from processes import Start, contents, kill_training, wait_for
from safetensors.torch import load_file

from longnet_cli.basics.errors import CheckpointError, ConfigError, LongNetError
from longnet_cli.basics.events import Events
from longnet_cli.basics.sealed_manifests import write_sealed
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.jobs.training import loop
from longnet_cli.jobs.training.checkpoint import (
    Checkpoints,
    checkpoints_in,
    find_damage,
    read_checkpoint,
    save_tensors,
)
from longnet_cli.jobs.training.loop import train
from longnet_cli.jobs.training.recipe import Recipe
from longnet_cli.jobs.training.run_folder import prepare_run
from longnet_cli.nets.longnet import LongNet
from longnet_cli.running.ranks.ranks import Ranks

pytestmark = pytest.mark.full

# a recipe, a run of it that was stopped, and the bytes it must end with
Made = tuple[Recipe, Path, bytes]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path, 400, 1)


def step_of(run: Path) -> int:
    """The step of the newest checkpoint."""
    return read_checkpoint(checkpoints_in(run / "checkpoints")[0])["progress"]["step"]


class Stop:
    """A real signal at the n-th moment at which a run can stop."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, moment: int, kind: signal.Signals = signal.SIGINT
    ) -> None:
        from longnet_cli.running.ranks.launch import Signals

        look, self.moments = Signals.look, 0

        def counted(signals: Signals) -> None:
            self.moments += 1
            if self.moments == moment:
                signal.raise_signal(kind)
            look(signals)

        monkeypatch.setattr(Signals, "look", counted)


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param({}, marks=pytest.mark.ci),
        {"look_back": 1, "overlap": "once", "sinks": 2},
    ],
)
def test_a_run_stopped_anywhere_goes_on_to_the_same_bytes(corpus, tmp_path, monkeypatch, pattern):
    model = {f"model.{key}": value for key, value in pattern.items()} | {
        "model.position": "rope" if pattern else "xpos"
    }
    found = recipe(corpus, **model)
    with monkeypatch.context() as patch:
        counter = Stop(patch, -1)
        train(found, tmp_path / "whole")
    weights = (tmp_path / "whole/model.safetensors").read_bytes()
    lines = metrics_of(tmp_path / "whole")
    assert counter.moments > 25
    steps = set()
    for attempt, moment in enumerate(range(5, counter.moments, counter.moments // 3)):
        run = tmp_path / f"{attempt}"
        with monkeypatch.context() as patch:
            Stop(patch, moment, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[attempt % 3])
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                train(found, run)
        steps.add(step_of(run))
        LongNet.from_pretrained(run)
        train(found, run)
        assert (run / "model.safetensors").read_bytes() == weights
        assert contents(run / "best") == contents(tmp_path / "whole/best")
        again = metrics_of(run)
        measured = dict.fromkeys(("tokens_per_second", "peak_memory_bytes"))
        assert [line | measured for line in again] == [line | measured for line in lines]
    assert len(steps) > 2
    assert any(step % 2 for step in steps)  # not only where a checkpoint was due


def test_a_step_whose_evaluation_is_stopped_is_told(corpus, tmp_path, monkeypatch):
    evaluate = loop.evaluate

    def stopped(*args: Any, **options: Any) -> object:
        signal.raise_signal(signal.SIGINT)
        return evaluate(*args, **options)

    monkeypatch.setattr(loop, "evaluate", stopped)
    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        train(
            recipe(corpus),
            tmp_path / "run",
            events=Events(step=lambda tokens, line: steps.append(tokens)),
        )
    assert step_of(tmp_path / "run") == len(steps) == 4


def test_a_later_damaged_checkpoint_does_not_push_out_the_one_just_written(tmp_path):
    (tmp_path / "step-00000020").mkdir()
    (tmp_path / "step-00000020/state.json").write_text("{}")
    checkpoints = Checkpoints(tmp_path, Ranks(), keep=1)
    for step in (4, 8):
        checkpoints.save(step, {"a": torch.zeros(1)}, {})
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000020", "step-00000008"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    found = recipe(write_corpus(folder, 400, 1))
    train(found, folder / "whole")
    steps = []

    def stop(tokens: int, line: object) -> None:
        steps.append(tokens)
        if len(steps) == 7:
            raise LongNetError("stop")

    with pytest.raises(LongNetError, match="stop"):
        train(found, folder / "run", events=Events(step=stop))
    assert [path.name for path in checkpoints_in(folder / "run/checkpoints")] == [
        "step-00000006",
        "step-00000004",
    ]
    return found, folder / "run", (folder / "whole/model.safetensors").read_bytes()


@pytest.fixture
def stopped(made: Made, tmp_path: Path) -> Made:
    """Of its own; there are checkpoints at steps 4 and 6."""
    found, run, weights = made
    return found, Path(shutil.copytree(run, tmp_path / "run")), weights


@pytest.mark.parametrize(
    "damage",
    [
        "flip",
        "no state",
        *(
            pytest.param(kind, marks=pytest.mark.ci)
            for kind in ("truncate", "flip the state", "no tensors")
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(stopped, damage):
    found, run, weights = stopped
    newest = checkpoints_in(run / "checkpoints")[0]
    (tensors,) = newest.glob("*.safetensors")
    victim = newest / "state.json" if "state" in damage else tensors
    data = bytearray(victim.read_bytes())
    if damage.startswith("flip"):
        place = data.index(b'"tokens": ') + 10 if "state" in damage else len(data) // 2
        data[place] ^= 1
        victim.write_bytes(data)
    elif damage == "truncate":
        victim.write_bytes(data[:-100])
    else:
        victim.unlink()
    notes: list[str] = []
    began: list[int] = []
    train(
        found, run, events=Events(note=notes.append, begin=lambda step, tokens: began.append(step))
    )
    assert began == [4]
    if damage == "no state":  # as if its writer was killed: it is none
        assert notes == []
    else:
        (note,) = notes
        assert str(newest) in note
        assert "damaged" in note
        assert "\n" not in note
    assert (run / "model.safetensors").read_bytes() == weights
    assert not newest.exists()  # written anew, and pruned


def test_all_damaged(stopped):
    found, run, _ = stopped
    newest, older = checkpoints_in(run / "checkpoints")
    write_sealed(newest / "state.json", 1, {}, [])
    (older / "state.json").write_text("{}")
    assert (
        find_damage(newest)
        == "state.json: it was changed or damaged after it was written, or is not of version 2"
    )
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        train(found, run)
    with pytest.raises(ConfigError, match="already holds a run"):
        train(found, run, resume=False)


def test_a_run_without_a_checkpoint_says_that_it_starts_again(stopped, tmp_path):
    found, run, weights = stopped
    (tmp_path / "a").mkdir()
    shutil.copy(run / "recipe.json", tmp_path / "a")  # what a run leaves that is killed at once
    notes: list[str] = []
    train(found, tmp_path / "a", events=Events(note=notes.append))
    assert (
        f"{tmp_path / 'a'}: a run that has saved no checkpoint, so it starts again (train.save_every)"
        in notes
    )
    assert (tmp_path / "a/model.safetensors").read_bytes() == weights


def test_resume_from_a_path(stopped, tmp_path):
    found, run, weights = stopped
    older = checkpoints_in(run / "checkpoints")[1]
    for name, path in (("a", older), ("b", run)):
        train(found, tmp_path / name, resume=str(path))
        assert (tmp_path / name / "model.safetensors").read_bytes() == weights
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        train(found, tmp_path / "c", resume=str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"recipe\.toml: neither a run nor a checkpoint.* put --resume at the end"
    ):
        prepare_run(None, {}, run, resume="recipe.toml")
    for resume, output in ((True, run), (str(run), tmp_path / "c"), (older, tmp_path / "c")):
        assert prepare_run(None, {}, output, resume=resume) == found
    unsaid = found.model_dump(mode="json", exclude={"train": {"chunk"}})
    same = tmp_path / "same.json"
    same.write_text(json.dumps(unsaid))
    assert prepare_run(str(same), {}, tmp_path / "new").train.chunk != found.train.chunk
    assert prepare_run(str(same), {}, run) == found  # it keeps its chunk
    assert prepare_run(str(same), {"train.chunk": 77}, run).train.chunk == 77
    # whose later checkpoints would stay beside ours
    for output, resume in ((run, older), (tmp_path / "a", run)):
        with pytest.raises(ConfigError, match="already holds a run"):
            train(found, output, resume=str(resume))
    for path in checkpoints_in(run / "checkpoints")[:1]:
        (path / "state.json").write_text("{}")
    train(found, run, resume=str(run))  # from the one before it, as by itself
    assert (run / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    "name", ["config.json", "best", "checkpoints/step-00000001", "recipe.json", "metrics.jsonl"]
)
def test_files_that_no_run_has_written_are_not_replaced(stopped, tmp_path, name):
    found, _, _ = stopped
    (tmp_path / "same.json").write_text(found.model_dump_json())
    (tmp_path / "mine" / name).parent.mkdir(parents=True)
    (tmp_path / "mine" / name).write_text('{"mine": 1}')
    with pytest.raises(
        ConfigError, match=rf"mine holds {name.partition('/')[0]}, which no run has written"
    ):
        prepare_run(str(tmp_path / "same.json"), {}, tmp_path / "mine")


def test_equal_tensors_give_equal_files(tmp_path):
    """Of every type that a checkpoint has, in any order."""
    tensors = {
        "model.a": torch.zeros(3),
        "model.b": torch.ones(4, dtype=torch.int64),
        "random": torch.get_rng_state(),
    }
    found = set()
    for number, order in enumerate((1, -1)):
        (tmp_path / str(number)).mkdir()
        save_tensors(tmp_path / str(number), dict([*tensors.items()][::order]))
        (file,) = (tmp_path / str(number)).iterdir()
        found.add(file.read_bytes())
        assert all(torch.equal(x, tensors[name]) for name, x in load_file(file).items())
    assert len(found) == 1


def test_equal_tensors_of_two_ranks_give_equal_files(tmp_path):
    run_ranks(2, tmp_path, _save_often, tmp_path)
    first, *others = (contents(tmp_path / str(number)) for number in range(5))
    assert all(other == first for other in others)
    assert len(first) == 2


def _save_often(folder: Path) -> None:
    for number in range(5):
        if dist.get_rank() == 0:
            (folder / str(number)).mkdir()
        dist.barrier()
        save_tensors(folder / str(number), {f"random.{dist.get_rank()}": torch.ones(3)})


def test_what_is_no_checkpoint_stays(stopped):
    """Old checkpoints are removed with the files that they list, and nothing else is."""
    found, run, weights = stopped
    mine, old = run / "checkpoints/step-00000001", checkpoints_in(run / "checkpoints")[-1]
    mine.mkdir()
    (mine / "state.json").write_text('{"mine": 1}')
    (mine / "weights.safetensors").write_text("mine")
    (old / "notes.txt").write_text("mine")
    train(found, run)
    assert (run / "model.safetensors").read_bytes() == weights
    assert {path.name for path in mine.iterdir()} == {"state.json", "weights.safetensors"}
    assert [path.name for path in old.iterdir()] == ["notes.txt"]


def test_the_tokenizer_may_lie_elsewhere_but_not_be_another(stopped, tmp_path):
    found, run, weights = stopped
    (tmp_path / "mine").mkdir()
    mine = json.loads(Tokenizer.bytes().to_json())
    (tmp_path / "mine/tokenizer.json").write_text(json.dumps(mine, indent=4))
    settings = found.model_dump()
    settings["data"] |= {"tokenizer": str(tmp_path / "mine")}
    train(Recipe.model_validate(settings), run)
    assert (run / "model.safetensors").read_bytes() == weights
    vocabulary = mine["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "mine/tokenizer.json").write_text(json.dumps(mine))
    with pytest.raises(ConfigError, match=r"was made with another tokenizer than .*mine"):
        train(Recipe.model_validate(settings), run)


def test_what_may_change_in_a_resumed_run(stopped, tmp_path):
    found, run, weights = stopped
    moved = shutil.copy(found.data.train[0], tmp_path / "moved.txt")  # type: ignore[index]
    settings = found.model_dump()
    settings["data"] |= {"train": [str(moved)], "held_out": None}
    settings["train"] |= {"save_every": 1, "keep": 1}
    train(Recipe.model_validate(settings), run)
    assert (run / "model.safetensors").read_bytes() == weights
    settings["optimizer"]["lr"] = 1.0
    settings["train"]["seed"] = 5
    with pytest.raises(
        ConfigError, match=r"another optimizer.lr, train.seed: go on with the recipe of its run"
    ):
        train(Recipe.model_validate(settings), run)


def test_more_steps_extend_a_run_that_has_ended(corpus, tmp_path):
    """As if it had them from the start: the constant rate gives the same bytes, others are those of the new end."""

    def run(steps: int, folder: str, decay: str = "constant", last: int = 100) -> Path:
        stages = [{"seq_len": 32, "steps": 3}, {"seq_len": last, "steps": steps}]
        settings = {"train.stages": stages, "schedule.decay": decay, "train.log_every": 1}
        train(recipe(corpus, **settings), tmp_path / folder)
        return tmp_path / folder

    assert run(2, "extended") == run(4, "extended")
    whole = run(4, "whole")
    assert (tmp_path / "extended/model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()
    for fewer in ({"steps": 3}, {"steps": 5, "last": 64}):
        with pytest.raises(ConfigError, match=r"another train\.stages: go on"):
            run(folder="extended", **fewer)
    for steps, folder in ((2, "falling"), (4, "falling"), (4, "falls")):
        run(steps, folder, "linear")
    rates = [[line["lr"] for line in metrics_of(tmp_path / name)] for name in ("falling", "falls")]
    assert rates[0][5:] == rates[1][5:]
    assert rates[0][4] < rates[0][5]


def test_a_checkpoint_that_cannot_be_written(corpus, small_disk):
    found = recipe(corpus, **{"train.keep": 9, "train.save_every": 1, "data.held_out": None})
    with pytest.raises(
        LongNetError, match=r"cannot write the checkpoint: No space left on device; the one before"
    ) as e:
        train(found, small_disk / "run")
    assert "\n" not in str(e.value)
    whole = checkpoints_in(small_disk / "run/checkpoints")
    assert whole
    assert all(find_damage(path) is None for path in whole)
    assert not list((small_disk / "run/checkpoints").glob(".*"))


def test_a_failure_of_the_writer_is_said(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise ConfigError("checkpoints need another torch")

    monkeypatch.setattr("longnet_cli.jobs.training.checkpoint.save_tensors", fail)
    with pytest.raises(
        LongNetError, match="cannot write the checkpoint: checkpoints need another torch; the one"
    ):
        Checkpoints(tmp_path, Ranks(), keep=2).save(1, {"a": torch.zeros(1)}, {})


KILLS = [pytest.param(3, 30, marks=pytest.mark.ci), pytest.param(30, 200, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kills", "steps"), KILLS)
def test_killed_runs_end_with_the_same_bytes(start, corpus, tmp_path, kills, steps):
    stages = [{"seq_len": 32, "steps": steps // 2}, {"seq_len": 100, "steps": steps // 2}]
    found = recipe(corpus, **{"train.stages": stages, "train.save_every": 3})
    (tmp_path / "recipe.json").write_text(found.model_dump_json())
    kill_training(
        lambda run: start("train", tmp_path / "recipe.json", "-q", "-o", run, fresh=True),
        tmp_path,
        kills,
    )


def endless(start: Start, corpus: Path, folder: Path, **options: Any) -> subprocess.Popen:
    """Start a run of a million steps."""
    found = recipe(corpus, **{"train.stages": [{"seq_len": 32, "steps": 10**6}]})
    (folder / "recipe.json").write_text(found.model_dump_json())
    return start("train", folder / "recipe.json", "-o", "run", fresh=True, **options)


@pytest.mark.ci
def test_ctrl_c_saves_and_says_how_to_go_on(start, corpus, tmp_path):
    process = endless(start, corpus, tmp_path)
    wait_for(
        lambda: process.poll() is not None or bool(checkpoints_in(tmp_path / "run/checkpoints"))
    )
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert b"Traceback" not in said
    newest = checkpoints_in(tmp_path / "run/checkpoints")[0]
    assert find_damage(newest) is None
    step = read_checkpoint(newest)["progress"]["step"]
    goes_on = (
        f"longnet: stopped after step {step:,}, and saved in run: `longnet train -o run` goes on"
    )
    assert said.decode().splitlines()[-1] == goes_on
    LongNet.from_pretrained(tmp_path / "run")


@pytest.mark.ci
def test_a_terminal_that_is_closed_saves(start, corpus, tmp_path):
    """Its last words would fail: the exit code still says that all is saved."""
    ours, terminal = os.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    process = endless(start, corpus, tmp_path, start_new_session=True, **streams)
    os.close(terminal)
    wait_for(
        lambda: process.poll() is not None or bool(checkpoints_in(tmp_path / "run/checkpoints"))
    )
    os.close(ours)
    process.send_signal(signal.SIGHUP)  # as a shell does when its terminal closes
    assert process.wait(60) == 129
    assert find_damage(checkpoints_in(tmp_path / "run/checkpoints")[0]) is None
    LongNet.from_pretrained(tmp_path / "run")


def test_a_signal_while_the_data_is_read_claims_no_checkpoint(start, corpus, tmp_path):
    (tmp_path / "recipe.json").write_text(recipe(corpus).model_dump_json())
    os.mkfifo(tmp_path / "data")  # nobody writes to it: reading never ends
    process = start("train", tmp_path / "recipe.json", "--data", tmp_path / "data", "-o", "run")

    def is_read() -> bool:
        with contextlib.suppress(OSError):  # a writer cannot open it before there is a reader
            return os.open(tmp_path / "data", os.O_WRONLY | os.O_NONBLOCK) > 0
        return process.poll() is not None

    wait_for(is_read)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said.startswith(b"training ")
    assert said.endswith(b"nothing new is saved, and the same command starts again\n")
    assert not (tmp_path / "run").exists()
