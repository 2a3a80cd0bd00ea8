"""Folders of transformers models that were saved with a pattern: nothing runs them dense by mistake."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'longnet-cli[hf]'")

import transformers as hf

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import ConfigError
from longnet_cli.integrations.transformers import use_dilated_attention, use_own_attention, write_pattern
from longnet_cli.models.folder import ModelFolder
from longnet_cli.models.hf.pretrained_folder import DILATED_TYPE, from_file

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SINKS = Pattern.window(8, sinks=2)


def llama() -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=128)
    return hf.LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    use_dilated_attention(llama(), SINKS).save_pretrained(tmp_path / "dilated")
    return tmp_path / "dilated"


def ids() -> torch.Tensor:
    return torch.randint(64, (2, 50), generator=torch.Generator().manual_seed(1))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


CODE = """
import transformers as hf
for name in ("AutoModelForCausalLM", "AutoModel", "LlamaForCausalLM"):
    try:
        print(getattr(hf, name).from_pretrained("dilated").config._attn_implementation)
    except ValueError as error:
        print("failed:", str(error).partition(" is not supported")[0].partition(" but ")[0])
print(hf.AutoModelForCausalLM.from_pretrained("dense").config._attn_implementation)
"""
FAILED = "failed: The checkpoint you are trying to load has model type `import longnet_cli.integrations.transformers`"


@pytest.mark.slow
def test_without_the_import_it_fails_and_with_it_it_works(folder: Path, tmp_path: Path) -> None:
    """In processes of their own, which import transformers alone, and then the line that the error names."""
    llama().save_pretrained(tmp_path / "dense")  # without a pattern any tool opens it

    def run(code: str) -> list[str]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert run(CODE) == [FAILED, FAILED, 'failed: Specified `attn_implementation="dilated"`', "sdpa"]
    assert run(DILATED_TYPE + CODE) == ["dilated", "dilated", "dilated", "sdpa"]


def test_what_does_not_know_the_type_names_the_import(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_of(folder)["architectures"] == ["DilatedLlamaForCausalLM"]
    monkeypatch.delitem(hf.CONFIG_MAPPING._extra_content, DILATED_TYPE)
    with pytest.raises(ValueError, match=r"model type `import longnet_cli\.integrations\.transformers`"):
        hf.AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def test_auto_classes_give_the_model_that_was_saved(folder: Path) -> None:
    expected = use_dilated_attention(llama(), SINKS)
    dense = llama()(ids()).logits
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is hf.LlamaForCausalLM
    assert torch.equal(model(ids()).logits, expected(ids()).logits)
    assert (model(ids()).logits - dense).norm() > 0.01 * dense.norm()
    inner = hf.AutoModel.from_pretrained(folder)
    assert torch.equal(inner(ids()).last_hidden_state, expected.model(ids()).last_hidden_state)
    net = ModelFolder(folder).net()  # the commands open it as before
    assert net.config.pattern == SINKS
    assert torch.equal(net.logits(net(ids())), expected(ids()).logits)
    assert ModelFolder(folder).net_config().pattern == SINKS


def test_what_was_opened_is_saved_as_it_was(folder: Path, tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    copies = [model, copy.deepcopy(model), hf.AutoModelForCausalLM.from_config(model.config)]
    for i, each in enumerate(copies):
        each.save_pretrained(tmp_path / str(i))
        assert config_of(tmp_path / str(i)) == config_of(folder)
    again = pickle.loads(pickle.dumps(model.config))
    assert again == model.config
    again.save_pretrained(tmp_path / "pickled")
    assert config_of(tmp_path / "pickled")["model_type"] == DILATED_TYPE
    own = from_file(config_of(folder))
    assert (own["model_type"], own["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert model.config.model_type == "llama"  # in memory it is what it is, for peft and others
    use_own_attention(model).save_pretrained(tmp_path / "own")
    assert config_of(tmp_path / "own") == {key: value for key, value in own.items() if key != "dilated_attention"} | {
        "model_type": "llama"
    }


def test_whoever_put_a_pattern_there_it_is_saved_as_one(tmp_path: Path) -> None:
    config = llama().config
    write_pattern(config, SINKS)
    config.save_pretrained(tmp_path / "a")
    assert config_of(tmp_path / "a")["model_type"] == DILATED_TYPE
    config = llama().config
    config.dilated_attention = {"segment_lengths": [8, 16], "dilation_rates": [1, 2]}
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="dilated")
    model(ids())
    model.save_pretrained(tmp_path / "b")
    assert config_of(tmp_path / "b")["model_type"] == DILATED_TYPE


def test_a_dense_pattern_is_no_secret(tmp_path: Path) -> None:
    use_dilated_attention(llama(), Pattern.dense()).save_pretrained(tmp_path)
    assert config_of(tmp_path)["model_type"] == "llama"
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_an_unknown_type_behind_it_is_named(folder: Path) -> None:
    data = config_of(folder) | {"dilated_model_type": "nobody"}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="does not know the model type 'nobody'"):
        hf.AutoConfig.from_pretrained(folder)
