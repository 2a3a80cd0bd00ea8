"""`longnet convert` of a LongNet: the same model, in another type of weights. GGUF files are in test_gguf.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import RunLongnet

from longnet_cli.model import LongNet
from longnet_cli.presets import find_model


def test_a_longnet_in_half_the_size(run_longnet: RunLongnet, tmp_path: Path) -> None:
    wide = find_model("longnet-tiny")
    result = run_longnet("convert", "longnet-tiny", "-o", tmp_path / "half", "--dtype", "bf16")
    assert result.returncode == 0, result.stderr
    assert "as bfloat16" in result.stderr
    names = [{path.name for path in folder.iterdir()} for folder in (wide, tmp_path / "half")]
    assert names[0] >= names[1] == {"config.json", "model.safetensors", "tokenizer.json"}
    weights = LongNet.from_pretrained(tmp_path / "half").state_dict()
    for name, tensor in LongNet.from_pretrained(wide).state_dict().items():
        assert torch.equal(weights[name], tensor.bfloat16())
    found = run_longnet("score", "--model", tmp_path / "half", "--format", "json", Path(__file__))
    assert json.loads(found.stdout)["total"]["n_tokens"] > 100


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["longnet-tiny"], 2, "give --dtype"),
        (["longnet-nosuch", "--dtype", "bf16"], 4, "no such file"),
        (["llama", "--dtype", "bf16"], 2, "already a folder of transformers"),
    ],
)
def test_what_is_not_converted(run_longnet: RunLongnet, tmp_path: Path, words: list[str], code: int, line: str) -> None:
    (tmp_path / "llama").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "llama" / name).write_text('{"model_type": "llama"}')
    source = tmp_path / "llama" if words[0] == "llama" else words[0]
    result = run_longnet("convert", source, *words[1:], "-o", tmp_path / "out")
    assert (result.returncode, result.stderr.count("\n")) == (code, 1)
    assert line in result.stderr
    assert not (tmp_path / "out").exists()
