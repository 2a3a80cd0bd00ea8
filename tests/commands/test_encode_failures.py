"""Proves that whatever ends `encode` (and `score`), its output is whole or says that it is not; --resume completes it.

Real processes: killed at random moments, stopped by signals, on a full disk.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.ipc as ipc
import pytest
from builders import tiny_model
from conftest import RunLongnet
from processes import Start, invoke, kill_and_resume, wait_for

from longnet_cli.cli.output import say_what_is_kept
from longnet_cli.data.outputs import ShardWriter
from longnet_cli.data.shards import ShardFolder

SIZES = {"dim": 32, "num_layers": 4, "num_heads": 4, "ffn_dim": 64, "position": "rope"}
SIZES |= {"segment_lengths": (64, 1024), "dilation_rates": (1, 4)}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """JSON Lines of 40 documents of 10 to 4000 bytes, and one of 15,000 in their midst, which fills a shard alone."""
    chance = random.Random(0)
    lengths = [chance.randint(10, 4000) for _ in range(40)]
    lengths.insert(20, 15_000)
    lines = [json.dumps({"id": str(n), "text": "".join(chance.choices("abc d\n", k=k))}) for n, k in enumerate(lengths)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "corpus.jsonl"


@pytest.mark.ci
def test_killed_and_resumed_the_vectors_are_the_same(start: Start, corpus: Path, tmp_path: Path) -> None:
    model = f"{tiny_model(tmp_path / 'model', **SIZES)}/"
    command = ["encode", corpus, "-m", model, "--span", "50", "--chunk", "2000", "--shard-rows", "100"]
    kill_and_resume(start, command, tmp_path, kills=3)


@pytest.mark.ci
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_spilled_encode(
    kind: signal.Signals, tmp_path: Path, command_env: dict[str, str], run_longnet: RunLongnet
) -> None:
    """Of a bidirectional net: it leaves no half output, and after the next run nothing of the first."""
    model = tiny_model(tmp_path / "model", **SIZES, causal=False)
    text, spill, out = tmp_path / "long.txt", tmp_path / "spill", tmp_path / "out"
    text.write_text("the quick brown fox " * 20_000)
    spill.mkdir()
    arguments = ["encode", text, "-m", f"{model}/", "--chunk", "512", "--spill", spill, "-o", out / "vectors.arrow"]
    words = [sys.executable, "-m", "longnet_cli", *map(str, arguments)]
    with subprocess.Popen(words, env=command_env, stderr=subprocess.PIPE) as job:
        wait_for(lambda: job.poll() is not None or str(spill) in Path(f"/proc/{job.pid}/maps").read_text())
        assert job.poll() is None
        job.send_signal(kind)
        job.communicate(timeout=60)
    assert job.returncode in (-kind, 128 + kind)
    assert list(spill.iterdir()) == []
    assert not (out / "vectors.arrow").exists()

    text.write_text("short " * 500)  # the next run, which is done soon
    done = run_longnet(*arguments)
    assert done.returncode == 0, done.stderr
    assert list(spill.iterdir()) == []
    assert [path.name for path in out.iterdir()] == ["vectors.arrow"]
    assert ipc.open_file(out / "vectors.arrow").read_all().num_rows == 1


@pytest.mark.parametrize("command", ["score", "encode"])
def test_a_stopped_command_says_what_is_kept(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = f"{tiny_model(tmp_path / 'model')}/"
    texts = [tmp_path / f"{name}.txt" for name in "abcd"]
    for path in texts:
        path.write_text("some text " * 3)
    shards = ["--shard-tokens", "20"] if command == "score" else ["--shard-rows", "1"]
    end_shard, ended = ShardFolder.end_shard, []

    def stop(self: ShardFolder) -> None:
        ended.append(end_shard(self))
        if len(ended) % 2 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(ShardFolder, "end_shard", stop)
    folder = [command, *texts, "-m", model, *shards, "-o", tmp_path / "out"]
    said = f"stopped: {tmp_path / 'out'} keeps 2 documents: the same command with --resume goes on\n"
    assert said in invoke(*folder).stderr
    assert "keeps 4 documents" in invoke(*folder, "--resume").stderr
    assert invoke(*folder[:-1], tmp_path / "other", "-q").stderr.strip() in ("", "Aborted!", "Aborted.")

    def stop_at_once(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "write", stop_at_once)
    alone = invoke(command, *texts, "-m", model, "-o", tmp_path / "rows.arrow")
    assert f"stopped: nothing is kept in {tmp_path / 'rows.arrow'}, which is written whole" in alone.stderr


@pytest.mark.parametrize(("stop", "world", "said"), [(143, 1, True), (143, 2, False), (None, 2, True)])
def test_a_rank_that_another_one_ends_says_nothing(
    stop: int | None, world: int, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises((SystemExit, KeyboardInterrupt)), say_what_is_kept("-", quiet=False):
        raise SystemExit(stop) if stop else KeyboardInterrupt
    assert capsys.readouterr().err.startswith("stopped: ") == said
