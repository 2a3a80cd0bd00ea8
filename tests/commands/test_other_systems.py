"""Proves that commands work without what only Linux has. It is taken away in a process of its own, which then runs
score, encode and train, with and without a file for what memory does not hold.
"""

from __future__ import annotations

import json

import pytest
from processes import invoke

WITHOUT_LINUX = """
import builtins, ctypes, io, os, sys, sysconfig
import torch, torch.distributed, pyarrow.parquet
sysconfig.get_config_vars()

def gone(name):
    raise FileNotFoundError(2, "No such file or directory", name)

def only_others(real):
    def call(path, *args, **options):
        return gone(path) if str(path).startswith(("/proc", "/sys")) else real(path, *args, **options)
    return call

for module, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "listdir"), (os, "scandir")):
    setattr(module, name, only_others(getattr(module, name)))
for module, name in ((os, "posix_fallocate"), (os, "sched_getaffinity"), (os, "memfd_create")):
    delattr(module, name)
def no_libc(name, *args, real=ctypes.CDLL, **options):
    return gone("libc") if name in (None, "libc.so.6") else real(name, *args, **options)

ctypes.CDLL = no_libc
sys.platform = "darwin"
from longnet_cli.cli.app import main
for words in WORDS:
    sys.argv = ["longnet", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (words, end.code)
"""
CHOSEN = ["--pattern", "window:16,chosen=4x8,chosen_every=4", "--chunk", "64"]
MODEL = [word for key in (
    "train.spill=.", "train.chunk=64", "train.batch_tokens=256", "model.dim=16", "model.num_layers=1",
    "model.num_heads=2", "model.ffn_dim=16", "model.pattern=window:32", "model.position=rope",
) for word in ("--set", key)]  # fmt: skip
COMMANDS = [
    ["score", "text.txt", "--format", "json"],
    ["score", "text.txt", "--format", "json", *CHOSEN],
    ["encode", "text.txt", "-o", "vectors.arrow"],
    ["train", "--data", "text.txt", "-o", "run", "--seq-len", "256", "--steps", "2", *MODEL],
]


@pytest.mark.ci
def test_commands_need_nothing_that_only_linux_has(tmp_path, run_python):
    (tmp_path / "text.txt").write_text("what a reader finds again, " * 60)
    program = WITHOUT_LINUX.replace("WORDS", repr(COMMANDS))
    done = run_python("-c", program, timeout=300)
    values, end = [], 0
    while end < len(done.stdout.rstrip()):
        value, end = json.JSONDecoder().raw_decode(done.stdout, end)
        values.append(value["total"]["nll_sum"])
        end += len(done.stdout[end:]) - len(done.stdout[end:].lstrip())
    for value, command in zip(values, COMMANDS, strict=False):
        here = json.loads(invoke(*command[:1], tmp_path / command[1], *command[2:]).stdout)[
            "total"
        ]["nll_sum"]
        assert value == pytest.approx(here, rel=1e-6)
    assert len(values) == 2
    assert (tmp_path / "vectors.arrow").is_file()
    assert (tmp_path / "run/model.safetensors").is_file()


def test_mps_is_refused_by_name():
    assert "'mps' is not a device: it has no float64" in invoke("score x.txt --device mps").stderr
