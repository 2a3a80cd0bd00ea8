"""Ranks that cannot share a job are told, before any work, which would fit. pytest tests/test_ranks.py"""

from __future__ import annotations

import pytest
import torch

from longnet_cli.errors import ConfigError
from longnet_cli.runtime.ranks import Ranks, _own_gpu, join
from longnet_cli.training.checks import check_windows


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
