"""How ranks join and wait for each other: each on a GPU of its own, or on hosts."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from places import ROOT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longnet_cli.basics.errors import ConfigError
from longnet_cli.jobs.training.checkpoint import Checkpoints
from longnet_cli.running.ranks import ranks as module
from longnet_cli.running.ranks.ranks import Ranks, _own_gpu, join


@pytest.mark.parametrize("local_rank", ["0", "8", "-1", "first"])
def test_a_process_without_a_gpu_of_its_own_is_refused(local_rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1 if local_rank != "0" else 0)
    with pytest.raises(ConfigError, match=f"LOCAL_RANK is '{local_rank}'"):
        _own_gpu(local_rank)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four GPUs, and rank 0 of four."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(module, "select_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


@pytest.mark.usefixtures("four_gpus")
def test_hosts_agree_by_gloo_where_gpus_talk_by_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """To agree on a signal between two chunks by NCCL, each would wait for what its GPU still computes."""
    asked: list[str] = []

    def begin(backend: str, **_: object) -> None:
        asked.append(backend)
        raise ConfigError("no GPU here")

    monkeypatch.setattr(module, "check_agent", lambda: None)
    monkeypatch.setattr(dist, "init_process_group", begin)
    with pytest.raises(ConfigError, match="no GPU here"):
        join("cuda")
    backends = dist.distributed_c10d.BackendConfig(asked[0]).get_device_backend_map()
    assert backends == {"cpu": "gloo", "cuda": "nccl"}
    monkeypatch.setattr(dist, "all_reduce", lambda x, op, group: asked.append(x.device.type))
    assert Ranks(0, 2).largest(3.0) == 3.0
    assert asked[1:] == ["cpu"]


@pytest.mark.usefixtures("four_gpus")
def test_gpus_wait_for_minutes_and_hosts_for_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose GPU hangs keeps all its connections: only a timeout ends it, and the others with it."""
    every, own, other = (MagicMock(name=name) for name in ("every", "own", "other"))
    given = MagicMock()
    monkeypatch.setattr(dist, "init_process_group", given)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=every))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "new_group", MagicMock(side_effect=[own, other]))
    assert join("cuda", sp=2)[0].group is own
    assert given.call_args.kwargs["timeout"] >= timedelta(minutes=30)
    for group in (every, own):
        group._get_backend.assert_called_with(torch.device("cuda:0"))
        group._get_backend.return_value._set_default_timeout.assert_called_with(timedelta(minutes=10))


@pytest.mark.usefixtures("one_process")
def test_ranks_wait_for_each_other_on_their_hosts() -> None:
    with Collectives() as seen:
        Ranks(0, 2).barrier()
    assert seen.names == ["allreduce_"]  # of a tensor of the host; a barrier is a call of NCCL, where there is one


def test_all_ranks_wait_until_a_checkpoint_is_on_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rank 0 writes longest: on their hosts, the others have the time for that."""
    done: list[str] = []
    monkeypatch.setattr(Ranks, "barrier", lambda _: done.append("waited"))
    monkeypatch.setattr(Checkpoints, "_write", lambda *_: done.append("written"))
    Checkpoints(tmp_path, Ranks(1, 2), keep=1).save(3, {}, {})
    assert done == ["written", "waited"]


INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("limits", "then"),
    [
        ((1024, 4096), 3072),
        ((1024, 2048), 2048),
        ((1024, INFINITE), 3072),
        ((4096, 4096), None),
        ((INFINITE,) * 2, None),
    ],
)
def test_a_process_may_connect_to_a_thousand_others(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], then: int | None
) -> None:
    raised = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, wanted: raised.append((kind, wanted)))
    module._allow_files(3072)
    assert raised == ([] if then is None else [(resource.RLIMIT_NOFILE, (then, limits[1]))])


class Collectives(TorchDispatchMode):
    """The names of all collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process that is all ranks of its group, whatever it says of others."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_the_gradients_of_a_gpu_are_summed_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each dtype; hosts sum one by one."""
    gradients = [torch.ones(n, dtype=dtype) for n in range(1, 9) for dtype in (torch.float32, torch.float64)]
    with Collectives() as of_hosts:
        Ranks(0, 2).sum(*gradients)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    with Collectives() as of_gpus:
        Ranks(0, 2).sum(*gradients)
    assert of_hosts.names == ["allreduce_"] * 16
    assert of_gpus.names == ["allreduce_coalesced_"] * 2
    assert all(x.eq(1).all() for x in gradients)


@pytest.mark.slow
def test_all_ranks_enter_the_same_collectives() -> None:
    """torch compares the operator, shape and dtype of each collective of all tests of ranks, before it starts.

    Where a job is ended, it says more than the tests want to read.
    """
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/ranks")]
    tests += ["-m", "not slow", "-k", "not ends_the_job"]
    env = os.environ | {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    done = subprocess.run(tests, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
