"""Ranks that cannot share a job are told, before any work, which would fit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from longnet_cli.basics.errors import ConfigError
from longnet_cli.jobs.training.start import check_windows
from longnet_cli.running.ranks import ranks as module
from longnet_cli.running.ranks.ranks import Ranks, _own_gpu, join


def test_a_mesh_that_does_not_fit_says_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(Exception, match=r"dp x sp is 2 x 2, .* there are 6: 6 x 1, 3 x 2, 2 x 3, 1 x 6 would fit"):
        join("cpu", sp=2, dp=2)


def test_windows_that_ranks_cannot_share_are_refused() -> None:
    check_windows(Ranks(world=4, sp=2), 256, 6)
    with pytest.raises(ConfigError, match=r"6 windows of 256 tokens, which 4 groups .*--dp 1, 2 would fit"):
        check_windows(Ranks(world=8, sp=2), 256, 6)
    with pytest.raises(ConfigError, match="--sp 3 or less"):
        check_windows(Ranks(world=4, sp=4), 3, 1)


@pytest.mark.parametrize("local_rank", ["0", "8", "-1", "first"])
def test_a_process_without_a_gpu_of_its_own_is_refused(local_rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1 if local_rank != "0" else 0)
    with pytest.raises(ConfigError, match=f"LOCAL_RANK is '{local_rank}'"):
        _own_gpu(local_rank)


def test_hosts_agree_by_gloo_where_gpus_talk_by_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """To agree on a signal between two chunks by NCCL, each would wait for what its GPU still computes."""
    asked: list[str] = []

    def begin(backend: str, **_: object) -> None:
        asked.append(backend)
        raise ConfigError("no GPU here")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(module, "select_device", torch.device)
    monkeypatch.setattr(module, "check_agent", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", begin)
    with pytest.raises(ConfigError, match="no GPU here"):
        join("cuda")
    backends = dist.distributed_c10d.BackendConfig(asked[0]).get_device_backend_map()
    assert backends == {"cpu": "gloo", "cuda": "nccl"}
    monkeypatch.setattr(dist, "all_reduce", lambda x, op, group: asked.append(x.device.type))
    assert Ranks(0, 2).largest(3.0) == 3.0
    assert asked[1:] == ["cpu"]
