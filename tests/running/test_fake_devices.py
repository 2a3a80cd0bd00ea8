"""Every step between tokens and numbers, on fake tensors of a GPU: shapes, types and devices, and no number.

A tensor left on the CPU is found as on a real GPU, whose operators refuse two devices. Reading a number, which would
wait for the GPU, is found as well: there is none. Gradients of fake GPU tensors need a driver; without a GPU, the meta
device shows the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from longnet_cli.attention import dilated, planning
from longnet_cli.attention.cuda_kernels import CudaFlashKernel
from longnet_cli.jobs.training.objective import backward
from longnet_cli.jobs.training.optimizer import build_optimizer
from longnet_cli.jobs.training.recipe import OptimizerRecipe
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import IGNORED
from longnet_cli.running import chunked_backward, layerwise
from longnet_cli.running.causal_stream import CausalStream
from longnet_cli.running.chunked_backward import backward_in_chunks
from longnet_cli.running.layerwise import _Layers, hidden_in_chunks
from longnet_cli.running.ranks.ranks import Ranks

FAKE = torch.cuda.is_available()
GPU = torch.device("cuda", 0) if FAKE else torch.device("meta")
HOST = torch.device("cpu") if FAKE else GPU


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a GPU, whatever it really has: tensors are fake, and its flash kernel is there."""
    monkeypatch.setattr(dilated, "select_kernel", lambda *_: CudaFlashKernel())
    monkeypatch.setattr(chunked_backward, "random_state", lambda device: [])
    monkeypatch.setattr(chunked_backward, "set_random_state", lambda state, device: None)
    if not FAKE:  # there is no autocast on the meta device
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    planning._plan.cache_clear()  # plans keep tensors: none of a real device here, nor fake ones afterwards
    with FakeTensorMode() if FAKE else nullcontext():
        yield
    planning._plan.cache_clear()


def net(causal: bool = True, **options) -> LongNet:
    config = LongNetConfig(
        vocab_size=64, dim=64, num_layers=2, num_heads=4, ffn_dim=96, position="rope", causal=causal,
        segment_lengths=(16, 64), dilation_rates=(1, 4), **options,
    )  # fmt: skip
    net = LongNet(config)
    for module in net.modules():  # as `net.to` would, which cannot swap fake parameters
        for name, weight in [*module.named_parameters(recurse=False)]:
            setattr(
                module,
                name,
                nn.Parameter(torch.empty(weight.shape, dtype=torch.bfloat16, device=GPU)),
            )
    return net


def ids(rows: int, tokens: int) -> Tensor:
    return torch.zeros(rows, tokens, dtype=torch.int64, device=GPU)


@pytest.mark.parametrize("options", [{}, {"look_back": 1, "sinks": 4}], ids=["paper", "sinks"])
def test_forward_nll_backward_and_optimizer(options):
    model = net(**options)
    # torch's fused AdamW refuses the meta device
    optimizer = (
        build_optimizer(model, OptimizerRecipe()) if FAKE else torch.optim.AdamW(model.parameters())
    )
    total = backward(model, ids(2, 100), ids(2, 100), chunk=300, starts=[[0], [0, 30, 77]])
    assert (total.device, total.dtype) == (GPU, torch.float64)
    assert all(p.grad is not None and p.grad.device == GPU for p in model.parameters())
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"look_back": 1, "sinks": 4}], ids=["paper", "sinks"])
def test_streaming_and_chunked_backward(options):
    model = net(**options)
    stream = CausalStream(model)
    for tokens in (40, 7, 1, 100):
        hidden = stream(ids(2, tokens))
        assert (hidden.device, hidden.shape) == (GPU, (2, tokens, 64))
    assert backward_in_chunks(model, ids(1, 150), ids(1, 150), 40).device == GPU


def test_masked_targets_on_the_host_are_found_there():
    """Asking a GPU which tokens are hidden would wait for it in every forward."""
    targets = torch.full((2, 100), IGNORED)
    targets[:, ::7] = 1
    assert backward(net(causal=False), ids(2, 100), targets, chunk=100).device == GPU


def test_layer_by_layer_on_the_device_reads_no_number(monkeypatch):
    """Where there is room, hidden states stay there, and so do the rows that chunks see of each other."""
    made: list[torch.device] = []
    monkeypatch.setattr(layerwise, "free_memory", lambda device: made.append(device) or 1 << 40)
    parts = list(hidden_in_chunks(net(causal=False), ids_at, 150, 40))
    assert [(part.device, part.shape[1]) for part in parts] == [
        (GPU, 40),
        (GPU, 40),
        (GPU, 40),
        (GPU, 30),
    ]
    assert made == [GPU]  # nobody asked how much of the host's is free


def ids_at(start: int, stop: int) -> Tensor:
    return ids(1, stop - start)


def test_padded_rows_and_layer_by_layer():
    model = net(causal=False)
    assert model(ids(3, 50), lengths=[50, 20, 31]).device == GPU
    layers = _Layers(model, 150, 40, "fp32", Ranks())
    on_host = {"dtype": torch.bfloat16, "device": HOST}  # where hidden states are
    hidden, rows = torch.zeros(1, 150, 64, **on_host), torch.zeros(2, layers.rows, 16, **on_host)
    segments = layers._collect(model.layers[0], hidden, rows)
    for chunk in layers.chunks:
        far, x = layers._far(segments, chunk), hidden[:, chunk.place]
        assert layers._compute(model.layers[0], x, chunk, far, True).device == GPU
