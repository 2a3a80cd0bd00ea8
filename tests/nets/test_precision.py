"""Under autocast each layer casts what its products read once, and its norms do not widen what they read."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.running import device


class Casts(TorchDispatchMode):
    """Counts casts of activations, and the types that norms read."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: Counter[tuple[torch.dtype, torch.dtype]] = Counter()
        self.normed: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dim() >= 3:
            self.casts[args[0].dtype, found.dtype] += 1
        if func is torch.ops.aten.native_layer_norm.default:
            self.normed.append(args[0].dtype)
        return found


def test_products_share_one_cast_and_inner_norms_stay_narrow() -> None:
    wide, narrow = torch.float32, torch.bfloat16
    config = LongNetConfig(
        vocab_size=50, dim=32, num_layers=1, num_heads=4, ffn_dim=48, segment_lengths=(16,), dilation_rates=(1,),
        position="none",
    )  # fmt: skip
    model, ids = LongNet(config), torch.arange(40)[None]
    expected = model(ids)
    with torch.no_grad(), torch.autocast("cpu", dtype=narrow):
        model(ids)  # which probes the kernel
        with Casts() as counted:
            found = model(ids)
    # of attention's input and of the feed-forward's; out of attention its fp32 sums
    assert counted.casts[wide, narrow] <= 3
    assert counted.normed == [wide, narrow, wide, narrow, wide]
    assert found.dtype is wide
    assert (found - expected).norm() / expected.norm() < 2e-2


@pytest.mark.parametrize(
    ("flags", "notes"),
    [("flags : sse avx2 avx512f", 1), ("flags\t\t: avx512_bf16", 0), ("Features : bf16", 0), ("", 0)],
)
def test_slow_bf16_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, notes: int) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    monkeypatch.setattr(device, "CPU_INFO", tmp_path / "cpuinfo")
    device._warn_of_slow_bf16.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        chosen = [device.resolve_dtype(name, torch.device("cpu")) for name in ("auto", "fp32", "bf16", "bf16")]
    assert chosen == ["fp32", "fp32", "bf16", "bf16"]
    said = "this CPU has no bf16 instructions: --dtype fp32 is faster here"
    assert [str(each.message) for each in found] == [said] * notes
