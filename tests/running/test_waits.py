"""How often the host waits for the device, counted on a CPU: once in a training step, once a chunk, late, in scoring.

A GPU computes while the host prepares what comes next, until the host asks for a number.

Every step between tokens and numbers is also run on fake tensors of a GPU: shapes, types and devices, and no number. A
tensor left on the CPU is found as on a real GPU, whose operators refuse two devices. Gradients of fake GPU tensors need
a driver; without a GPU, the meta device shows the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import scores
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from longnet_cli.attention import dilated, planning
from longnet_cli.attention.cuda_kernels import CudaFlashKernel
from longnet_cli.data.documents import Document
from longnet_cli.jobs import generating
from longnet_cli.jobs.scoring import scoring
from longnet_cli.jobs.training.loop import train
from longnet_cli.jobs.training.objective import backward
from longnet_cli.jobs.training.recipe import OptimizerRecipe, load_recipe
from longnet_cli.jobs.training.start import build_optimizers
from longnet_cli.jobs.training.windows import TokenStream
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import IGNORED
from longnet_cli.running import chunked_backward, layerwise, reader
from longnet_cli.running.causal_stream import CausalStream
from longnet_cli.running.chunked_backward import backward_in_chunks
from longnet_cli.running.layerwise import _Layers, hidden_in_chunks
from longnet_cli.running.ranks.ranks import Ranks

MODEL: dict[str, Any] = {
    "vocab_size": 257, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "position": "rope",
    "segment_lengths": [32, 64], "dilation_rates": [1, 2],
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(256, size=5000)


class Asked(TorchFunctionMode):
    """Counts the calls that ask a tensor for its numbers; that no operator does by itself is tested below."""

    NAMES = frozenset(["item", "tolist", "cpu", "numpy", "nonzero", "equal", "__bool__", "__int__", "__float__"])

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += getattr(function, "__name__", "") in self.NAMES
        return function(*args, **(kwargs or {}))


def test_a_training_step_of_four_chunks_waits_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"input_ids": pa.array([TOKENS], pa.large_list(pa.int64()))})
    with pa.ipc.new_file(tmp_path / "tokens.arrow", table.schema) as file:
        file.write_table(table)
    recipe = load_recipe(
        None,
        {
            "model": MODEL, "data.train": [str(tmp_path / "tokens.arrow")], "train.chunk": 64,
            "train.stages": [{"seq_len": 256, "steps": 4}], "train.batch_tokens": 256, "schedule.warmup_steps": 0,
            "train.log_every": 100,
        },
    )  # fmt: skip
    counts: list[int] = []
    reads: list[int] = []  # how often the host had waited before
    read_into = TokenStream.read_into
    with Asked() as asked:
        monkeypatch.setattr(TokenStream, "read_into", lambda *x: reads.append(asked.number) or read_into(*x))
        train(recipe, tmp_path / "run", on_step=lambda *_: counts.append(asked.number))
    # the first step also finds the attention kernel
    assert [after - before for before, after in pairwise(counts)] == [1, 1, 1]
    # eleven reads without fetching: those of the first chunk become one, before the host waits for the step before
    assert [Counter(reads)[count] for count in counts] == [9, 9, 8, 0]


def test_scoring_asks_for_a_chunk_when_the_next_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    net = LongNet(LongNetConfig(**MODEL))
    net(torch.zeros(1, 8, dtype=torch.int64))  # finds the attention kernel
    net.register_forward_hook(lambda *_: events.append("computed"))

    def to_host(x: Tensor) -> Callable[[], Tensor]:
        def wait() -> Tensor:
            events.append("waited")
            return x

        return wait

    monkeypatch.setattr(scoring, "to_host", to_host)
    read = reader.Reader._ids
    monkeypatch.setattr(reader.Reader, "_ids", staticmethod(lambda *place: events.append("read") or read(*place)))
    documents = [Document("a", TOKENS[:255], None, "a"), Document("b", TOKENS[:60], None, "b")]
    with Asked() as asked:
        found = list(scores(net, documents, bos=256, chunk=64))
    assert [each.score.n_tokens for each in found] == [255, 60]
    assert events == [
        "read", "computed", "read", "computed", "waited", "read", "computed", "waited", "read", "computed", "waited",
        "waited",  # at the end of a document
        "read", "computed", "waited",
    ]  # fmt: skip
    assert asked.number == events.count("waited")  # and then, numpy for what has come


@pytest.mark.parametrize("reads_all", [False, True])
@pytest.mark.parametrize("ahead", [False, True], ids=["a CPU", "a GPU"])
def test_a_gpu_computes_the_next_token_while_one_is_written(
    ahead: bool, reads_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, a token is shown first. Of the last one, nothing comes after but what the stream has to read."""
    monkeypatch.setattr(generating, "runs_ahead", lambda device: ahead)
    net, events = LongNet(LongNetConfig(**MODEL)), list[str]()
    stream, prompt = CausalStream(net) if reads_all else None, Document("a", TOKENS[:5], None, "a")
    net.register_forward_hook(lambda *_: events.append("computed"))
    for _ in generating.generate(net, prompt, bos=256, tokenizer=None, max_tokens=3, stream=stream):
        events.append("written")
    of_tokens = ["computed", "written"] if ahead else ["written", "computed"]
    assert events == ["computed", *of_tokens, *of_tokens, "written", *(["computed"] if reads_all else [])]


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
            setattr(module, name, nn.Parameter(torch.empty(weight.shape, dtype=torch.bfloat16, device=GPU)))
    return net


def ids(rows: int, tokens: int) -> Tensor:
    return torch.zeros(rows, tokens, dtype=torch.int64, device=GPU)


@pytest.mark.parametrize("options", [{}, {"look_back": 1, "sinks": 4}], ids=["paper", "sinks"])
def test_forward_nll_backward_and_optimizer(options: dict) -> None:
    model = net(**options)
    # torch's fused AdamW refuses the meta device
    optimizers = build_optimizers(model, OptimizerRecipe()) if FAKE else [torch.optim.AdamW(model.parameters())]
    total = backward(model, ids(2, 100), ids(2, 100), chunk=300, starts=[[0], [0, 30, 77]])
    assert (total.device, total.dtype) == (GPU, torch.float64)
    assert all(p.grad is not None and p.grad.device == GPU for p in model.parameters())
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"look_back": 1, "sinks": 4}], ids=["paper", "sinks"])
def test_streaming_and_chunked_backward(options: dict) -> None:
    model = net(**options)
    stream = CausalStream(model)
    for tokens in (40, 7, 1, 100):
        hidden = stream(ids(2, tokens))
        assert (hidden.device, hidden.shape) == (GPU, (2, tokens, 64))
    assert backward_in_chunks(model, ids(1, 150), ids(1, 150), 40).device == GPU


def test_masked_targets_on_the_host_are_found_there() -> None:
    """Asking a GPU which tokens are hidden would wait for it in every forward."""
    targets = torch.full((2, 100), IGNORED)
    targets[:, ::7] = 1
    assert backward(net(causal=False), ids(2, 100), targets, chunk=100).device == GPU


def test_layer_by_layer_on_the_device_reads_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is room, hidden states stay there, and so do the rows that chunks see of each other."""
    made: list[torch.device] = []
    monkeypatch.setattr(layerwise, "free_memory", lambda device: made.append(device) or 1 << 40)
    parts = list(hidden_in_chunks(net(causal=False), ids_at, 150, 40))
    assert [(part.device, part.shape[1]) for part in parts] == [(GPU, 40), (GPU, 40), (GPU, 40), (GPU, 30)]
    assert made == [GPU]  # nobody asked how much of the host's is free


def ids_at(start: int, stop: int) -> Tensor:
    return ids(1, stop - start)


def test_padded_rows_and_layer_by_layer() -> None:
    model = net(causal=False)
    assert model(ids(3, 50), lengths=[50, 20, 31]).device == GPU
    layers = _Layers(model, 150, 40, "fp32", Ranks())
    collected = torch.zeros(
        2, 1, layers.rows, 4, 16, dtype=torch.bfloat16, device=HOST
    )  # where hidden states are: the host
    for start, stop, *_ in layers.mine:
        x = torch.zeros(1, stop - start, 64, dtype=torch.bfloat16, device=HOST)
        layers._collect(collected, start, *layers._keys(model.layers[0], x, start))
        far = layers._far(collected, start, stop)
        assert layers._compute(model.layers[0], x, start, far, True).device == GPU
