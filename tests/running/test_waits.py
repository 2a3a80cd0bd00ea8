"""How often the host waits for the device, counted on a CPU: once in a training step, once a chunk, late, in scoring.

A GPU computes while the host prepares what comes next, until the host asks for a number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import scores
from torch import Tensor
from torch.overrides import TorchFunctionMode

from longnet_cli.basics.events import Events
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.jobs import generating
from longnet_cli.jobs.scoring import scoring
from longnet_cli.jobs.training.loop import train
from longnet_cli.jobs.training.recipe import load_recipe
from longnet_cli.jobs.training.windows import TokenStream
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.running import reader
from longnet_cli.running.causal_stream import CausalStream

MODEL: dict[str, Any] = {
    "vocab_size": 257, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "position": "rope",
    "segment_lengths": [32, 64], "dilation_rates": [1, 2],
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(256, size=5000)


class Asked(TorchFunctionMode):
    """Counts the calls that ask a tensor for its numbers; that no operator does by itself is in test_fake_devices."""

    NAMES = frozenset(
        ["item", "tolist", "cpu", "numpy", "nonzero", "equal", "__bool__", "__int__", "__float__"]
    )

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.number += getattr(function, "__name__", "") in self.NAMES
        return function(*args, **(kwargs or {}))


def test_a_training_step_of_four_chunks_waits_once(tmp_path, monkeypatch):
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
        monkeypatch.setattr(
            TokenStream, "read_into", lambda *x: reads.append(asked.number) or read_into(*x)
        )
        train(recipe, tmp_path / "run", events=Events(step=lambda *_: counts.append(asked.number)))
    # the first step also finds the attention kernel
    assert [after - before for before, after in pairwise(counts)] == [1, 1, 1]
    # eleven reads without fetching: those of the first chunk become one, before the host waits for the step before
    assert [Counter(reads)[count] for count in counts] == [9, 9, 8, 0]


def test_scoring_asks_for_a_chunk_when_the_next_is_on_its_way(monkeypatch):
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
    monkeypatch.setattr(
        reader.Reader, "_ids", staticmethod(lambda *place: events.append("read") or read(*place))
    )
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
def test_a_gpu_computes_the_next_token_while_one_is_written(ahead, reads_all, monkeypatch):
    """On a CPU, a token is shown first. Of the last one, nothing comes after but what the stream has to read."""
    monkeypatch.setattr(generating, "runs_ahead", lambda device: ahead)
    net, events = LongNet(LongNetConfig(**MODEL)), list[str]()
    stream, prompt = CausalStream(net) if reads_all else None, Document("a", TOKENS[:5], None, "a")
    net.register_forward_hook(lambda *_: events.append("computed"))
    for _ in generating.generate(net, prompt, bos=256, tokenizer=None, max_tokens=3, stream=stream):
        events.append("written")
    of_tokens = ["computed", "written"] if ahead else ["written", "computed"]
    assert events == [
        "computed",
        *of_tokens,
        *of_tokens,
        "written",
        *(["computed"] if reads_all else []),
    ]
