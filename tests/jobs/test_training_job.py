"""What `train --dry-run` says is what training takes: the peak of real runs, FLOPs as torch counts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import invoke
from strategies import document_starts
from torch.utils.flop_counter import FlopCounterMode

from longnet_cli.attention import Pattern
from longnet_cli.attention.spans import open_spans
from longnet_cli.jobs.training.costs import (
    estimate_training,
    settle_chunk,
    training_memory,
)
from longnet_cli.jobs.training.objective import plan_forwards
from longnet_cli.jobs.training.recipe import Recipe, load_recipe
from longnet_cli.jobs.training.step_bytes import (
    activation_bytes,
    bytes_per_token,
    seen_segments,
    step_of_layers,
)
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.running.ranks.ranks import ALONE, Ranks

CPU = torch.device("cpu")
MODEL = {
    "vocab_size": 100, "dim": 64, "num_layers": 1, "num_heads": 4, "ffn_dim": 192,
    "segment_lengths": (64, 256), "dilation_rates": (1, 2),
}  # fmt: skip
# the tests of real memory: enough of it beside that of Python and torch, in seconds
LARGE = {"vocab_size": 8192, "dim": 128, "num_layers": 8, "num_heads": 4, "ffn_dim": 512}


def recipe(model: dict, seq_len: int = 1024, **train: object) -> Recipe:
    train = {key: x for key, x in train.items() if x is not None} | {
        "stages": [{"seq_len": seq_len, "steps": 1}]
    }
    sections = {
        "model": {key: list(x) if isinstance(x, tuple) else x for key, x in model.items()},
        "train": train,
    }
    return load_recipe(
        None,
        {f"{name}.{key}": x for name, section in sections.items() for key, x in section.items()},
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("again", [False, True])
def test_what_a_token_takes_is_measured_in_a_few_layers(dtype, again):
    """As torch sees it in a step of three layers, though two are measured; and without the gradients of weights."""
    config = LongNetConfig(**MODEL | {"num_layers": 3})
    whole = activation_bytes(config, dtype, "null", again)
    step = step_of_layers(config, 3, dtype, None, again, CPU)
    assert whole == bytes_per_token(step)
    layer = whole - activation_bytes(
        LongNetConfig(**MODEL | {"num_layers": 2}), dtype, "null", again
    )
    s, d, f = 4 if dtype == "fp32" else 2, MODEL["dim"], MODEL["ffn_dim"]
    # by hand; of both norms, their statistics
    kept = (8 + 7 * s) * d + 3 * s * f + 16 + 4 * s + 4 * MODEL["num_heads"]
    assert layer == (4 * d if again else kept)


def test_a_kernel_for_gpus_is_named_and_a_cpu_measures(monkeypatch):
    monkeypatch.setenv("LONGNET_KERNEL", "cuda_flash")
    assert activation_bytes(LongNetConfig(**MODEL | {"dim": 32}), "fp32", "null", False) > 0
    assert os.environ["LONGNET_KERNEL"] == "cuda_flash"


def test_flops_are_those_that_torch_counts():
    """Of the matrices; attention's kernels, which torch does not count, have a test in test_benchmark.py."""
    config = LongNetConfig(**MODEL)
    net, ids = LongNet(config), torch.randint(0, 100, (1, 256))
    net(ids)  # the first forward probes the kernel, by matrix products
    with FlopCounterMode(display=False) as counter:
        net.nll(net(ids), ids).sum().backward()
    counted = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)
    )
    # next to no attention
    one_key = LongNetConfig(**(MODEL | {"segment_lengths": (1,), "dilation_rates": (1,)}))
    attention = 3.5 * 4 * 64 / 2
    assert one_key.training_flops([256]) - attention * 256 == pytest.approx(counted)
    assert config.training_flops([256]) > one_key.training_flops([256])
    unpredicted = config.training_flops([256]) - config.training_flops([256], predicted=0.25)
    assert unpredicted == pytest.approx(256 * 3 * 0.75 * 2 * 64 * 100)


RUN = """
import json, sys
import torch
from longnet_cli.running.device import keep_freed_memory, peak_memory
from longnet_cli.jobs.training.costs import estimate_training
from longnet_cli.jobs.training.loop import train
from longnet_cli.jobs.training.recipe import load_recipe

recipe = load_recipe(None, json.loads(sys.argv[1]))
found = estimate_training(recipe, torch.device("cpu"))
keep_freed_memory(torch.device("cpu"))
train(recipe, sys.argv[2])
print(json.dumps([found.memory, peak_memory(torch.device("cpu"))]))
"""


@pytest.mark.ci
@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "model.segment_lengths": [2048, 4096],
            "model.dilation_rates": [1, 1],
            "train.chunk": 512,
            "seq_len": 4096,
        },
        {"train.chunk": 8192, "train.batch_tokens": 256, "data.held_out": True},
        {
            "model.kv_heads": 1,
            "model.norm": "rmsnorm",
            "model.ffn": "swiglu",
            "model.bias": False,
            "train.chunk": 512,
            "seq_len": 4096,
        },
        {"model.dim": 384, "model.ffn_dim": 1536, "train.batch_tokens": 256, "train.save_every": 1},
    ],
    ids=[
        "sequences side by side",
        "a sequence in chunks",
        "held-out documents take more",
        "layers like Llama's in chunks",
        "weights take the most",
    ],
)
def test_the_peak_is_that_of_a_real_run(changes, tmp_path, command_env):
    data = tmp_path / "data.txt"
    data.write_text("a line of text.\n" * 1024)
    settings = {f"model.{key}": value for key, value in LARGE.items()} | {
        "model.segment_lengths": [64, 256], "model.dilation_rates": [1, 2], "model.position": "rope",
        "data.train": [str(data)], "train.chunk": 2048, "train.batch_tokens": 4096, "train.across_documents": True,
    } | changes  # fmt: skip
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("another line.\n" * 1170)
    settings["data.held_out"] = [str(held_out)] * settings.get("data.held_out", False)
    settings["train.stages"] = [{"seq_len": settings.pop("seq_len", 256), "steps": 2}]
    words = [sys.executable, "-c", RUN, json.dumps(settings), tmp_path / "out"]
    done = subprocess.run(words, capture_output=True, text=True, env=command_env, check=True)
    memory, peak = json.loads(done.stdout)
    print(
        {kind: f"{size / 2**20:.0f} MiB" for kind, size in memory.items()},
        f"{peak / 2**20:.0f} MiB",
    )
    # With two threads, the heap has room for a third copy of an evaluation's logits. With one it has not:
    # on an AMD EPYC, the plan is then 26 % above the peak.
    assert sum(memory.values()) == pytest.approx(
        peak, rel=0.3 if settings["data.held_out"] else 0.1
    )
    assert ("evaluation" in memory) is bool(settings["data.held_out"])


def test_a_dry_run_plans_for_many_ranks_in_one_process(tmp_path):
    """It gives each of them its share of a step, and of this CPU."""
    data = tmp_path / "a.txt"
    data.write_text("a line of text.\n" * 9)

    def facts(*words: object) -> dict:
        return json.loads(invoke(*words, "--dry-run", "--format", "json").stdout)

    train = "train", "longnet-1m", "--data", data, "--set", "data.held_out=[]"
    alone, shared = facts(*train), facts(*train, "--sp", 64)
    assert alone["parameters"] == alone["trained"] == 162_160_896
    assert alone["steps"].startswith("30,000 steps of 16 x 65,536 tokens, then 5,000 ")
    assert alone["peak_bytes"] == sum(alone["memory_bytes"].values())
    assert alone["memory_bytes"]["cache"] > shared["memory_bytes"]["cache"] == 0
    assert shared["flops_per_second"] < alone["flops_per_second"] / 8
    assert facts("score", data, "--dp", 64)["tokens"] == facts("score", data)["tokens"]


def test_ranks_hold_their_share_beside_what_a_step_gathers():
    one = recipe(MODEL, chunk=1024, batch_tokens=1024)
    shared = one.model_copy(update={"parallel": one.parallel.model_copy(update={"shard": "full"})})
    whole, share = (training_memory(each, CPU, Ranks(0, 4, 4)) for each in (one, shared))
    for kind in ("weights", "gradients"):
        assert share[kind] == pytest.approx(1.25 * whole[kind])
    assert share["optimizer"] == pytest.approx(whole["optimizer"] / 4)


def test_documents_of_several_windows_fill_a_chunk():
    """The largest forward that packing makes of short documents is what the activations are counted for."""
    packed, apart = (
        training_memory(
            recipe(MODEL, 1000, chunk=1600, batch_tokens=4000, across_documents=across),
            CPU,
            Ranks(),
        )["activations"]
        for across in (False, True)
    )
    ids = torch.zeros(4, 1000, dtype=torch.int64)
    ids[:, ::37] = 1
    forwards = plan_forwards(document_starts(ids, 1), 1000, 1600)
    largest = max(
        sum(stop - start for row in each.rows for _, start, stop in row) for each in forwards
    )
    assert 1500 < largest <= 1600
    assert packed == 1.6 * apart


@given(st.integers(1, 60), st.integers(0, 4), st.integers(1, 60), st.integers(1, 400))
def test_seen_segments(w, back, chunk, seq_len):
    seen = {
        span.start // w
        for end in range(chunk, seq_len, chunk)
        for span in open_spans(Pattern((w,), (1,), look_back=back), end)
    }
    assert seen_segments(w, back, chunk, seq_len) == len(seen)


def test_the_last_chunk_alone_is_not_computed_again():
    whole, halves, uneven = (
        estimate_training(recipe(MODEL, chunk=chunk, batch_tokens=1024), CPU).facts["flops"]
        for chunk in (1024, 512, 1023)
    )
    assert (uneven - whole) / (halves - whole) == pytest.approx(2 * 1023 / 1024)


def test_short_documents_have_little_attention():
    config = LongNetConfig(**MODEL)
    whole, apart = config.training_flops([512]), config.training_flops([32] * 16)
    assert apart == 16 * config.training_flops([32]) < whole


def test_a_chunk_that_fits_is_found(monkeypatch):
    def with_chunk(chunk: int) -> Recipe:
        return recipe(MODEL, seq_len=256, chunk=chunk, batch_tokens=10_000)

    free = sum(training_memory(with_chunk(4096), CPU, ALONE).values())
    monkeypatch.setattr("longnet_cli.jobs.training.costs.free_memory", lambda device: free)
    found = estimate_training(with_chunk(10_000), CPU)
    assert not found.fits
    assert found.chunk_that_fits == 4096
    assert found.advice == "--chunk 4096 fits"
    assert estimate_training(with_chunk(4096), CPU).fits
    assert not estimate_training(with_chunk(4352), CPU).fits


@pytest.mark.parametrize(
    ("gib", "chunk"), [(0, 16384), (5, 16384), (24, 32768), (80, 131072), (1000, 131072)]
)
def test_a_gpu_gets_the_longest_chunk_that_it_holds(monkeypatch, gib, chunk):
    monkeypatch.setattr("longnet_cli.jobs.training.costs.free_memory", lambda device: gib << 30)
    model = MODEL | {"dim": 768, "num_layers": 12, "num_heads": 12, "ffn_dim": 3072}
    settings = {"dtype": "bf16", "seq_len": 1 << 20}
    gpu, found = torch.device("cuda"), recipe(model, **settings)
    assert settle_chunk(found, gpu, Ranks()).train.chunk == chunk
    assert settle_chunk(found, CPU, ALONE) == found
    named = recipe(model, chunk=1000, **settings)
    assert settle_chunk(named, gpu, Ranks()) == named


def test_no_chunk_cuts_a_bidirectional_window(monkeypatch):
    def with_window(seq_len: int, chunk: int) -> Recipe:
        model = MODEL | {"causal": False, "position": "rope"}
        return recipe(model, seq_len, objective="masked", chunk=chunk, batch_tokens=8192)

    free = sum(training_memory(with_window(1024, 1024), CPU, ALONE).values())
    monkeypatch.setattr("longnet_cli.jobs.training.costs.free_memory", lambda device: free)
    assert estimate_training(with_window(1024, 8192), CPU).chunk_that_fits == 1024
    found = estimate_training(with_window(2048, 8192), CPU)
    assert found.chunk_that_fits is None
    assert found.advice.startswith("no chunk fits: choose shorter windows")
