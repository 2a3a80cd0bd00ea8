"""`longnet convert` of a LongNet: the same model, in another type of weights. GGUF files are in test_gguf.py."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import RunLongnet

from longnet_cli.hub.model_names import model_path
from longnet_cli.nets.longnet import LongNet


def test_a_longnet_is_written_with_other_weights(run_longnet: RunLongnet, tmp_path: Path) -> None:
    """longnet-tiny is stored in bfloat16: in float32 it is twice as large, and back again it is the same files."""
    wide, half = tmp_path / "wide", tmp_path / "half"
    for source, output, dtype in (("longnet-tiny", wide, "fp32"), (wide, half, "bf16")):
        result = run_longnet("convert", source, "-o", output, "--dtype", dtype, code=0)
    assert "as bfloat16" in result.stderr
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (half / name).read_bytes() == (model_path("longnet-tiny") / name).read_bytes()
    assert 1.9 < (wide / "model.safetensors").stat().st_size / (half / "model.safetensors").stat().st_size < 2
    stored = LongNet.from_pretrained(wide, dtype=None).state_dict()
    for name, tensor in LongNet.from_pretrained("longnet-tiny").state_dict().items():
        assert torch.equal(stored[name], tensor)
