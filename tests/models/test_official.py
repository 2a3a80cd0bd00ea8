"""`longnet convert` of official checkpoints: the golden tensors come out, and what does not fit is named.

Of a LongNet, it writes the same model, in another type of weights. GGUF files are in test_gguf.py.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from builders import level_options, official_slide_state, read_golden
from safetensors.torch import save_file
from torch import nn

from longnet_cli.hub.model_names import model_path
from longnet_cli.nets.config import SlideConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.slide import SlideEncoder


@pytest.mark.parametrize(
    "kind",
    ["pth", *(pytest.param(kind, marks=pytest.mark.ci) for kind in ("legacy", "safetensors"))],
)
def test_golden_slide_encoder(run_longnet, tmp_path, kind):
    state, wanted, theirs = read_golden("slide_encoder_zero_key")
    path = tmp_path / "slide_encoder.pth"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state, "epoch": 3}, path, _use_new_zipfile_serialization=kind == "pth")
    run_longnet(f"convert {path} -o {tmp_path}/out", *level_options(theirs), code=0)
    encoder = SlideEncoder.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        inputs = wanted["features"][None], wanted["coords"][None]
        torch.testing.assert_close(
            encoder(*inputs, pool="cls")[0], wanted["cls"], rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            encoder(*inputs, pool="mean")[0], wanted["pooled"], rtol=0, atol=1e-5
        )
        layers = encoder(*inputs, pool="cls", all_layers=True)[:, 0]
        torch.testing.assert_close(layers, wanted["cls_of_layers"], rtol=0, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "slide_encoder.pth" in card
    assert "- num_heads: 16\n- segment_lengths: (16, 46" in card


@pytest.mark.parametrize("name", ["decoder_subln_xpos", "encoder_subln_zero_key"])
def test_golden_torchscale(run_longnet, tmp_path, name):
    state, wanted, theirs = read_golden(name)
    side = name.partition("_")[0]
    # of larger models
    inside = {f"module.model.slide_encoder.{side}.{key}": tensor for key, tensor in state.items()}
    torch.save(inside, tmp_path / "net.pt")
    heads = [] if theirs["xpos"] else ["--heads", str(theirs["heads"])]  # its scales say them
    run_longnet(
        f"convert {tmp_path}/net.pt -o {tmp_path}/out",
        *heads,
        *level_options(theirs),
        code=0,
    )
    net = LongNet.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        if side == "decoder":
            ours, golden = net.logits(net(wanted["tokens"])), wanted["logits"]
        else:
            ours, golden = net(embeddings=wanted["embeddings"]), wanted["out"]
    torch.testing.assert_close(ours, golden, rtol=0, atol=1e-5)


def test_the_official_models_are_known(run_longnet, tmp_path):
    """Prov-GigaPath's heads and pattern need not be given."""
    torch.save({"model": official_slide_state()}, tmp_path / "slide.pth")
    run_longnet(f"convert {tmp_path}/slide.pth -o {tmp_path}/slide --dtype bf16", code=0)
    config = SlideEncoder.from_pretrained(tmp_path / "slide", dtype=None).config
    assert config.pattern == SlideConfig.gigapath().pattern
    assert (config.num_heads, config.in_features, config.padding) == (16, 6, "zero_key")


def test_what_does_not_fit_is_named(run_longnet, tmp_path):
    state = official_slide_state(
        **{"encoder.layers.1.ffn.fc1.bias": torch.zeros(7), "classifier.weight": torch.zeros(2, 2)}
    )
    del state["norm.bias"]
    torch.save(state, tmp_path / "slide.pth")
    result = run_longnet(f"convert {tmp_path}/slide.pth -o {tmp_path}/out")
    assert (result.returncode, result.stderr.count("\n")) == (4, 1)
    assert "missing tensor norm.bias" in result.stderr
    assert "unexpected tensor classifier.weight" in result.stderr
    assert "encoder.layers.1.ffn.fc1.bias has shape (7,), and the net needs (64,)" in result.stderr
    assert not (tmp_path / "out").exists()


class Runs:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.path, "it ran")


def test_nothing_in_a_pickle_runs(run_longnet, tmp_path):
    torch.save(
        {"model": official_slide_state(), "then": Runs(tmp_path / "ran")}, tmp_path / "zip.pth"
    )
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    for name in ("zip.pth", "bare.pkl", "module.pth"):
        result = run_longnet(f"convert {tmp_path}/{name} -o {tmp_path}/out")
        assert (result.returncode, result.stderr.count("\n")) == (4, 1), result.stderr
        assert "not a plain state dict (" in result.stderr
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_a_damaged_file(run_longnet, tmp_path):
    torch.save(official_slide_state(), tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    result = run_longnet(f"convert {tmp_path}/cut.pth -o {tmp_path}/out")
    assert (result.returncode, result.stderr.count("\n")) == (4, 1)


def test_a_longnet_is_written_with_other_weights(run_longnet, tmp_path):
    """longnet-tiny is stored in bfloat16: in float32 it is twice as large, and back again it is the same files."""
    wide, half = tmp_path / "wide", tmp_path / "half"
    for source, output, dtype in (("longnet-tiny", wide, "fp32"), (wide, half, "bf16")):
        result = run_longnet(f"convert {source} -o {output} --dtype {dtype}", code=0)
    assert "as bfloat16" in result.stderr
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (half / name).read_bytes() == (model_path("longnet-tiny") / name).read_bytes()
    assert (
        1.9
        < (wide / "model.safetensors").stat().st_size / (half / "model.safetensors").stat().st_size
        < 2
    )
    stored = LongNet.from_pretrained(wide, dtype=None).state_dict()
    for name, tensor in LongNet.from_pretrained("longnet-tiny").state_dict().items():
        assert torch.equal(stored[name], tensor)
