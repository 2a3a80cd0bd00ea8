"""The commands under a real torchrun: the same results as one process, and an end for all when one ends.

Signals act where a run looks for them, on all ranks alike, and no rank outlives its parent.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from builders import job_folder, metrics_of
from files import write_file
from processes import TORCHRUN, kill_training, processes_of, wait_for

from longnet_cli.basics.errors import LongNetError
from longnet_cli.jobs.training.checkpoint import checkpoints_in, find_damage, read_checkpoint
from longnet_cli.running.ranks.launch import Signals, check_agent, noted_signals
from longnet_cli.running.ranks.ranks import Ranks

TRAIN = ["-m", "longnet_cli", "train"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return job_folder(tmp_path)


@pytest.fixture
def aborting(folder: Path, command_env: dict[str, str]) -> dict[str, str]:
    """An environment in which a rank aborts when its interpreter shuts down, as threads of gloo sometimes do."""
    (folder / "sitecustomize.py").write_text(
        "import atexit, os\nif 'RANK' in os.environ: atexit.register(os.abort)\n"
    )
    return {
        "PYTHONPATH": os.pathsep.join((command_env["PYTHONPATH"], str(folder))),
        "PYTHON_EXEC": sys.executable,
    }


@pytest.mark.ci
def test_a_rank_with_bad_data_ends_the_job_and_says_where(folder, run_longnet, aborting):
    rows = [[index % 250 for index in range(400)] for _ in range(20)]
    rows[17][200] = 9999
    write_file(folder / "bad.arrow", pa.table({"input_ids": rows}))
    # only one of them reads it
    words = "train recipe.toml --data bad.arrow -o run --nproc 2 --dp 2"
    done = run_longnet(words, cwd=folder, env=aborting, timeout=60, code=3)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("longnet: error: rank ")
    assert "bad.arrow, row 17, offset 200: token id 9999" in line


def test_a_short_document_is_not_shared_with_chosen_blocks_either(run_longnet, tmp_path):
    """Though one process reads it: a long one after it would end the job."""
    (tmp_path / "a.txt").write_text("short")
    command = ["score", "a.txt", "--pattern", "window:16,chosen=2x16", "-o", "s.arrow"]
    done = run_longnet(*command, "--sp", "2", code=2)
    assert "a pattern with chosen blocks is read by one process" in done.stderr
    assert not (tmp_path / "s.arrow").exists()
    run_longnet(*command, "--dp", "2", code=0)


@pytest.mark.ci
def test_a_run_goes_on_with_any_number_of_processes(folder, run_longnet, aborting):
    command = ["train -o run --set train.log_every=1", "--set"]
    for steps, words in enumerate(["recipe.toml --dp 2", "", "--sp 2", ""], 1):
        stage = f"train.stages=[{{seq_len=256, steps={steps}}}]"
        run_longnet(*command, stage, *words.split(), cwd=folder, env=aborting, code=0)
    assert [line["step"] for line in metrics_of(folder / "run")] == [1, 2, 3, 4]
    done = run_longnet("train recipe.toml -o run --set parallel.dp=2", cwd=folder)
    # a recipe that is named is meant
    assert "which needs 2 processes, and there are 1" in done.stderr


def ranks_of(job: subprocess.Popen, folder: Path) -> set[int]:
    return {*processes_of(folder / "run")} - {job.pid}


def start_training(folder: Path, env: dict[str, str], *start: str, until: int) -> subprocess.Popen:
    """A long run of two ranks, which has begun or gone on, and reached a step."""
    command = [sys.executable, *start, *TRAIN, str(folder / "recipe.toml")]
    command += ["-o", str(folder / "run"), "--set", "train.stages=[{seq_len=256, steps=100000}]"]
    command += ["--set", "train.save_every=10", *([] if start else ["--nproc", "2"])]
    job = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    metrics, deadline = folder / "run/metrics.jsonl", time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= until):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return job


@pytest.mark.ci
def test_a_killed_rank_ends_the_job_and_the_next_run_goes_on_until_sigterm(folder, command_env):
    job = start_training(folder, command_env, until=15)
    began = time.monotonic()
    os.kill(max(ranks_of(job, folder)), signal.SIGKILL)
    _, stderr = job.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert job.returncode == 1
    assert stderr.splitlines()[1:] == [
        "longnet: error: rank 1 was killed (SIGKILL), and the job with it"
    ]
    newest = checkpoints_in(folder / "run/checkpoints")[0]
    assert find_damage(newest) is None
    saved = read_checkpoint(newest)["progress"]["step"]
    reached = (folder / "run/metrics.jsonl").read_text().count("\n")
    assert saved <= reached

    job = start_training(folder, command_env, *TORCHRUN, until=reached + 5)
    job.send_signal(signal.SIGTERM)  # to torchrun, which passes it on
    _, stderr = job.communicate(timeout=60)
    assert job.returncode != 0
    assert f"continuing after step {saved}\n" in stderr
    assert re.search(
        rf"^longnet: stopped after step .*saved in {folder}/run: the same command goes on$",
        stderr,
        re.M,
    )
    assert "longnet: error" not in stderr
    steps = [line["step"] for line in metrics_of(folder / "run")]
    assert steps == list(range(1, len(steps) + 1))
    assert read_checkpoint(checkpoints_in(folder / "run/checkpoints")[0])["progress"][
        "step"
    ] == len(steps)


@pytest.mark.parametrize(
    "start", [[], pytest.param(TORCHRUN, marks=pytest.mark.slow)], ids=["nproc", "torchrun"]
)
def test_a_launcher_killed_while_its_ranks_start_leaves_none(start, folder, command_env):
    command = [sys.executable, *start, *TRAIN, f"{folder}/recipe.toml", "-o", f"{folder}/run"]
    with subprocess.Popen([*command, *([] if start else ["--nproc", "2"])], env=command_env) as job:
        wait_for(lambda: job.poll() is not None or len(processes_of(folder / "run")) == 3)
        job.kill()
    wait_for(lambda: not processes_of(folder / "run"))
    assert not (folder / "run").exists()


@pytest.mark.ci
@pytest.mark.parametrize("way", ["killed", "a rank stopped"])
def test_a_launcher_that_ends_takes_its_ranks_with_it_in_few_words(way, folder, command_env):
    """One that is killed, and one that gets SIGTERM while a rank is stopped and hears no signal."""
    job = start_training(folder, command_env, until=10)
    began = time.monotonic()
    if way == "killed":
        job.kill()
    else:
        os.kill(min(ranks_of(job, folder)), signal.SIGSTOP)
        job.terminate()
    _, stderr = job.communicate(timeout=90)  # until no rank holds it
    assert time.monotonic() - began < 60
    lines = [line for line in stderr.splitlines() if ", and saved in" not in line]
    assert (job.returncode, lines[1:]) == (-signal.SIGKILL if way == "killed" else 143, [])


@pytest.mark.slow
def test_ranks_meet_on_a_machine_whose_name_cannot_be_looked_up(folder, command_env):
    """Such as a laptop offline, or a container without a line in /etc/hosts."""
    start = 'hostname nowhere.invalid && exec "$@"'
    renamed = ["unshare", "--user", "--map-root-user", "--uts", "sh", "-c", start, "sh"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*renamed, "true"], capture_output=True).returncode
    ):
        pytest.skip("this machine gives nobody a hostname of their own")
    command = [sys.executable, *["-m", "longnet_cli", "score", "texts", "-m", "./decoder"]]
    options = {"cwd": folder, "env": command_env, "capture_output": True, "timeout": 120}
    ways = ([*renamed, *command, "--dp", "2"], command)
    found = [subprocess.run(words, **options) for words in ways]
    assert [done.returncode for done in found] == [0, 0]
    assert found[0].stdout == found[1].stdout


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "full"])
def test_thirty_kills_of_ranks_and_launchers(shard, folder, command_env):
    """With dropout: two ranks on a CPU end with the same bytes each time, and so does what is resumed."""
    begun = itertools.count()

    def begin(run: Path) -> subprocess.Popen:
        launched = next(begun) % 2
        start, end = (TORCHRUN, []) if launched else ([], ["--nproc", "2"])
        command = [
            sys.executable,
            *start,
            *TRAIN,
            str(folder / "recipe.toml"),
            "-q",
            "-o",
            str(run),
        ]
        for setting in (
            "train.stages=[{seq_len=256, steps=200}]",
            "train.save_every=5",
            "model.dropout=0.1",
            f'parallel.shard="{shard}"',
        ):
            command += ["--set", setting]
        return subprocess.Popen([*command, *end], env=command_env, stderr=subprocess.DEVNULL)

    hits = kill_training(begin, folder, 15)
    print(hits)
    assert {process for process, _ in hits} == {"launcher", "rank"}


def test_signals_are_given_back():
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    with noted_signals(Ranks().largest):
        pass
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_that_comes_while_ranks_look_is_seen_the_next_time():
    def interrupted(value: float) -> float:
        if not came:
            came.append(value)
            signal.raise_signal(signal.SIGTERM)
        return value

    came: list[float] = []
    with noted_signals(interrupted) as signals:
        signals.look()
        with pytest.raises(SystemExit):
            signals.look()


def test_a_signal_of_any_rank_decides():
    with pytest.raises(KeyboardInterrupt):
        Signals(lambda value: max(value, 1)).look()  # another rank had SIGINT


# its ranks are forks, each blocked in another way
PARENT = """
import ctypes, os, signal, sys, time
from longnet_cli.running.ranks.launch import unwind_on_signals
from longnet_cli.running.ranks.launch import end_with_parent

def block(library):
    "For ever, and no signal interrupts it."
    lock = ctypes.create_string_buffer(64)
    for _ in range(2):
        library.pthread_mutex_lock(lock)

def rank(how):
    met, where = how.split()
    end_with_parent()
    if met == "met":
        unwind_on_signals()
    try:
        os.write(1, b"ready\\n")
        if where == "python":
            time.sleep(99)
        block(ctypes.CDLL(None) if where == "released" else ctypes.PyDLL(None))
    finally:
        os.write(1, b"unwound\\n")
        os._exit(0)

for how in sys.argv[2:]:
    if os.fork() == 0:
        rank(how)
time.sleep(99)
"""


def orphans(word: str, *ways: str) -> str:
    """Kill the parent of such ranks when all are ready; what was said when none was left."""
    command = [sys.executable, "-c", PARENT, word, *ways]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as parent:
        try:
            assert [parent.stdout.readline() for _ in ways] == ["ready\n"] * len(ways)
        finally:
            parent.kill()
        wait_for(lambda: not processes_of(word))
        return parent.stdout.read()


def test_no_rank_outlives_its_parent(tmp_path):
    said = orphans(str(tmp_path), "alone python", "alone released", "alone held", "met python")
    assert said == "unwound\n"  # by the one that has something to lose


def test_a_rank_whose_torchrun_has_ended_says_so(monkeypatch):
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LongNetError, match="the torchrun that started this rank has ended"):
        check_agent()
