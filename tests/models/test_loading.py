"""Loading a model of transformers takes the memory of its weights, once; they have the type that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")

import transformers as hf
from processes import extra_memory

from longnet_cli.models.folder import ModelFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 151 MB in bf16, most of them in one table."""
    place = tmp_path_factory.mktemp("llama")
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    }
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=33_000, tie_word_embeddings=True, **sizes)
    )
    model.to(torch.bfloat16).save_pretrained(place)
    return place


@pytest.mark.ci
@pytest.mark.full
def test_weights_are_mapped_not_copied(folder, command_env):
    # the first time, a few tokens go through the model
    tried, weights = extra_memory(folder, "bfloat16", command_env)
    assert weights > 140_000_000
    assert tried <= 1.6 * weights
    extra, _ = extra_memory(folder, "bfloat16", command_env)
    print(f"{tried / weights:.2f} and then {extra / weights:.2f} times the weights")
    assert extra <= 1.3 * weights


def test_weights_have_the_type_that_is_asked_for(folder):
    for dtype in (torch.bfloat16, torch.float32):
        net = ModelFolder(folder).net(dtype=dtype)
        assert {parameter.dtype for parameter in net.parameters()} == {dtype}
        assert net.model.base_model.rotary_emb.inv_freq.dtype is torch.float32
