"""Folders of transformers models that were saved with a pattern: nothing runs them dense by mistake."""

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")

import transformers as hf
from hf_models import built, ids, llama, sharing

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import ConfigError
from longnet_cli.integrations.transformers import (
    use_dilated_attention,
    use_own_attention,
    write_pattern,
)
from longnet_cli.models.hf.pretrained_folder import DILATED_TYPE, from_file

SINKS = Pattern.window(8, sinks=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    use_dilated_attention(built(llama), SINKS).save_pretrained(tmp_path / "dilated")
    return tmp_path / "dilated"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_what_does_not_know_the_type_names_the_import(folder, monkeypatch):
    found = config_of(folder)
    assert found["architectures"] == ["DilatedLlamaForCausalLM"]
    # at which LlamaForCausalLM fails, which looks at no type
    assert found["attn_implementation"] == "dilated"
    monkeypatch.delitem(hf.CONFIG_MAPPING._extra_content, DILATED_TYPE)
    with pytest.raises(
        ValueError, match=r"model type `import longnet_cli\.integrations\.transformers`"
    ):
        hf.AutoModelForCausalLM.from_pretrained(folder)


def test_what_was_opened_is_saved_as_it_was(folder, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    # that of all others
    assert hf.MODEL_FOR_CAUSAL_LM_MAPPING[hf.LlamaConfig] is hf.LlamaForCausalLM
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
    assert config_of(tmp_path / "own") == {
        key: value for key, value in own.items() if key != "dilated_attention"
    } | {"model_type": "llama"}


def test_undone_attention_leaves_no_hook():
    model = built(sharing)
    for _ in range(2):
        use_dilated_attention(model, Pattern.window(8))
        assert len(model.model._forward_pre_hooks) == 1
    use_own_attention(model)
    assert not model.model._forward_pre_hooks


@pytest.mark.parametrize("asked", ["sdpa", "eager"])
def test_a_folder_that_is_opened_dense_says_so(folder, asked):
    with pytest.warns(UserWarning, match=f"attn_implementation='{asked}' runs it dense") as noted:
        hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=asked)
    assert len(noted) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        hf.AutoModelForCausalLM.from_pretrained(folder)


def test_whoever_put_a_pattern_there_it_is_saved_as_one(tmp_path):
    config = built(llama).config
    write_pattern(config, SINKS)
    config.save_pretrained(tmp_path / "a")
    assert config_of(tmp_path / "a")["model_type"] == DILATED_TYPE
    config = built(llama).config
    config.dilated_attention = {"segment_lengths": [8, 16], "dilation_rates": [1, 2]}
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="dilated")
    model(ids(50))
    model.save_pretrained(tmp_path / "b")
    assert config_of(tmp_path / "b")["model_type"] == DILATED_TYPE


def test_a_dense_pattern_is_no_secret(tmp_path):
    use_dilated_attention(built(llama), Pattern.dense()).save_pretrained(tmp_path)
    assert config_of(tmp_path)["model_type"] == "llama"
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_an_unknown_type_behind_it_is_named(folder):
    data = config_of(folder) | {"dilated_model_type": "nobody"}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="does not know the model type 'nobody'"):
        hf.AutoConfig.from_pretrained(folder)
