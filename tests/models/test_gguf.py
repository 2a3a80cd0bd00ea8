"""A GGUF file becomes an ordinary folder of transformers, and is read as one; what cannot be is told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="gguf is not installed: pip install 'longnet-cli[gguf]'")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'longnet-cli[gguf]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'longnet-cli[gguf]'")

import gguf
import transformers as hf
from huggingface_hub import constants
from loopback_hub import fill_cache
from processes import invoke, total
from tokenizers.pre_tokenizers import ByteLevel

from longnet_cli.basics.errors import CheckpointError, ConfigError
from longnet_cli.models.folder import ModelFolder

HEADS, KEY_HEADS, DIM, FFN, LAYERS = 4, 2, 64, 96, 2
NAMES = {  # of a layer of llama.cpp's, and of transformers'
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
WORDS = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "th", "the"]


def random_llama() -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=DIM, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=128, rms_norm_eps=1e-5,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def write_gguf(path: Path, model: hf.LlamaForCausalLM, kind: str = "F32") -> Path:
    """`model` as llama.cpp holds it: rows of queries and keys in pairs of neighbours, matrices of type `kind`."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(DIM // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3] + [1] * (len(WORDS) - 2))  # control, normal
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    found |= {f"blk.{i}.{a}": f"model.layers.{i}.{b}" for i in range(LAYERS) for a, b in NAMES.items()}
    for name, own in found.items():
        x = state[f"{own}.weight"]
        if name.endswith(("attn_q", "attn_k")):
            heads = HEADS if name.endswith("q") else KEY_HEADS
            x = x.reshape(heads, 2, -1, DIM).swapaxes(1, 2).reshape(x.shape)
        x = np.ascontiguousarray(x)
        type_ = gguf.GGMLQuantizationType[kind if x.ndim == 2 else "F32"]
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(x, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_on_a_hub_has_its_commit_in_the_folder_made_of_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    data = write_gguf(tmp_path / "made.gguf", random_llama()).read_bytes()
    commit = fill_cache(tmp_path / "hub", "org/llama", {"q.gguf": data})
    assert invoke("convert", "org/llama:q.gguf", "-o", tmp_path / "made").exit_code == 0
    assert json.loads((tmp_path / "made/config.json").read_text())["_name_or_path"] == f"org/llama@{commit}:q.gguf"


def test_a_converted_folder_is_the_model_and_loads_anywhere(tmp_path: Path) -> None:
    """Exactly, where weights are plain; with its tokenizer, in the type that is asked for."""
    model, folder = random_llama(), tmp_path / "llama"
    result = invoke("convert", write_gguf(tmp_path / "model.gguf", model), "-o", folder)
    assert result.exit_code == 0, result.output
    assert result.stderr == f"{tmp_path}/model.gguf: LlamaForCausalLM, of F32 weights as float32 -> {folder}\n"
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {*_names(folder)}
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype is torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    words = hf.AutoTokenizer.from_pretrained(folder)
    text = "the moth, then"
    assert words.decode(words(text, add_special_tokens=False).input_ids) == text
    assert ModelFolder(folder).tokenizer().encode(text).tolist() == words(text, add_special_tokens=False).input_ids
    again = invoke("convert", tmp_path / "model.gguf", "-o", folder)
    assert isinstance(again.exception, ConfigError)
    assert "is not an empty folder" in str(again.exception)


def test_quantized_weights_are_written_as_plain_ones(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", random_llama(), "Q8_0")
    for dtype, kind in (("auto", torch.bfloat16), ("fp32", torch.float32), ("fp16", torch.float16)):
        result = invoke("convert", source, "-o", tmp_path / dtype, "--dtype", dtype)
        assert f"of F32, Q8_0 weights as {str(kind).removeprefix('torch.')}" in result.stderr
        loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / dtype)
        assert loaded.dtype is kind
        assert not hasattr(loaded.config, "quantization_config")
    exact = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "fp32").model.layers[0].mlp.up_proj.weight
    own = random_llama().model.layers[0].mlp.up_proj.weight
    assert 0 < (exact - own).abs().max() <= own.abs().max() / 127


def test_a_file_is_a_model(tmp_path: Path) -> None:
    """Converted on the way, in the type it is computed in, with the scores of its folder; nothing stays behind."""
    source, text = write_gguf(tmp_path / "model.gguf", random_llama()), tmp_path / "text.txt"
    text.write_text("the moth, then the other")
    assert invoke("convert", source, "-o", tmp_path / "llama", "-q").stderr == ""
    pattern = ["--pattern", "window:8,sinks=2"]
    found = invoke("score", text, "-m", source, "--format", "json", *pattern)
    assert "converted for this run" in found.stderr
    of_folder = total(text, "-m", tmp_path / "llama", *pattern)
    assert json.loads(found.stdout)["total"] == of_folder | {"model": str(source)}
    assert invoke("encode", text, "-m", source, "-o", tmp_path / "out.arrow").exit_code == 0
    for command in (["bench", "--op", "model", "--seq", "64", "-m", source], ["pattern", source]):
        refused = invoke(*command)
        assert isinstance(refused.exception, CheckpointError), refused.output
        assert "longnet convert" in str(refused.exception)


def test_files_that_cannot_be_converted(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", random_llama())
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[: 1 << 14])
    (tmp_path / "text.txt").write_text("not a model")
    cases = (
        ("cut.gguf", "transformers cannot read it"),
        ("text.txt", "neither a GGUF file nor a checkpoint"),
        ("none.gguf", "no such file"),
    )
    for name, message in cases:
        result = invoke("convert", tmp_path / name, "-o", tmp_path / "out")
        assert isinstance(result.exception, CheckpointError), result.output
        assert message in str(result.exception)
        assert not [name for name in _names(tmp_path) if "out" in name]


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]
