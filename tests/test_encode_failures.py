"""A spilled encode that is killed leaves no half output, and after the next run nothing of the first.

Real processes and real kills. pytest tests/test_killed_encode.py
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.ipc as ipc
import pytest
import torch
from conftest import RunLongnet

from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.model import LongNet, LongNetConfig


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LongNetConfig(
        vocab_size=257,
        dim=32,
        num_layers=4,
        num_heads=4,
        ffn_dim=64,
        segment_lengths=(64, 1024),
        dilation_rates=(1, 4),
        causal=False,
        position="rope",
    )
    LongNet(config).save_pretrained(tmp_path / "model", Tokenizer.bytes().to_json())
    return tmp_path / "model"


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_spilled_encode(
    kind: signal.Signals, encoder: Path, tmp_path: Path, command_env: dict[str, str], run_longnet: RunLongnet
) -> None:
    text, spill, out = tmp_path / "long.txt", tmp_path / "spill", tmp_path / "out"
    text.write_text("the quick brown fox " * 20_000)
    spill.mkdir()
    arguments = ["encode", text, "-m", f"{encoder}/", "--chunk", "512", "--spill", spill, "-o", out / "vectors.arrow"]
    command = [sys.executable, "-m", "longnet_cli", *map(str, arguments)]
    with subprocess.Popen(command, env=command_env, stderr=subprocess.PIPE) as job:
        while job.poll() is None and str(spill) not in Path(f"/proc/{job.pid}/maps").read_text():
            time.sleep(0.02)
        time.sleep(0.2)
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
