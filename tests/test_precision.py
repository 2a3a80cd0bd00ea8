"""Under autocast each layer casts what its products read once, and its norms do not widen what they read.

pytest tests/test_precision.py
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longnet_cli.model import LongNet, LongNetConfig


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
