"""A GGUF file becomes an ordinary folder of transformers, and is read as one; what cannot be is told in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="gguf is not installed: pip install '.[gguf]'")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install '.[gguf]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[gguf]'")

import gguf
import transformers as hf
from huggingface_hub import constants
from huggingface_hub.errors import StrictDataclassError
from loopback_hub import fill_cache
from processes import invoke, refused, total
from tokenizers.pre_tokenizers import ByteLevel

from longnet_cli.basics.errors import CheckpointError
from longnet_cli.cli.progress import progress
from longnet_cli.models.folder import ModelFolder
from longnet_cli.models.gguf import (
    WITHOUT_EFFECT,
    complete,
    convert_gguf,
    open_gguf,
)

HEADS, KEY_HEADS, DIM, FFN, LAYERS = 4, 2, 64, 96, 2
NAMES = {  # of a layer of llama.cpp's, and of transformers'
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
WORDS = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "th", "the"]


def random_net(kind: str = "llama", **more: Any) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(
        kind, vocab_size=len(WORDS), hidden_size=DIM, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=128, rms_norm_eps=1e-5,
        **{"pad_token_id": None} | more,
    )  # fmt: skip
    net = hf.AutoModelForCausalLM.from_config(config).eval()
    for name, tensor in net.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(tensor)
    return net


def write_gguf(
    path: Path,
    model: hf.PreTrainedModel,
    kind: str = "F32",
    keys: Mapping[str, Any] = MappingProxyType({}),
    tensors: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Path:
    """`model` as llama.cpp holds it: rows of Llama's queries and keys in pairs of neighbours, matrices of type `kind`.

    `keys`, of the architecture or with two dots, and `tensors` are added.
    """
    arch = model.config.model_type
    writer = gguf.GGUFWriter(str(path), arch)
    own = {
        "block_count": LAYERS, "context_length": 128, "embedding_length": DIM, "feed_forward_length": FFN,
        "attention.head_count": HEADS, "attention.head_count_kv": KEY_HEADS, "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": DIM // HEADS, "vocab_size": len(WORDS),
    }  # fmt: skip
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in ({f"{arch}.{key}": value for key, value in own.items()} | keys).items():
        add[type(value)](key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3] + [1] * (len(WORDS) - 2))  # control, normal
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    found |= {
        f"blk.{i}.{a}": f"model.layers.{i}.{b}" for i in range(LAYERS) for a, b in NAMES.items()
    }
    for name, own_name in found.items():
        for part in ("weight", "bias"):
            x = state.get(f"{own_name}.{part}", np.zeros(1))
            if not x.any():
                continue
            if arch == "llama" and name.endswith(("attn_q", "attn_k")):
                heads = HEADS if name.endswith("q") else KEY_HEADS
                x = x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
            type_ = gguf.GGMLQuantizationType[kind if x.ndim == 2 else "F32"]
            writer.add_tensor(
                f"{name}.{part}",
                gguf.quants.quantize(np.ascontiguousarray(x), type_),
                raw_dtype=type_,
            )
    for name, x in tensors.items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3(factor: float, low: float, high: float, original: int) -> tuple[dict, np.ndarray]:
    """The settings of transformers, and the factors that llama.cpp makes of them, one by one."""
    factors = []
    for i in range(DIM // HEADS // 2):
        wavelength = 2 * math.pi * 10000.0 ** (2 * i / (DIM // HEADS))
        smooth = (original / wavelength - low) / (high - low)
        middle = 1 / ((1 - smooth) / factor + smooth)
        factors.append(
            1.0
            if wavelength < original / high
            else factor
            if wavelength > original / low
            else middle
        )
    settings = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
    }
    return settings | {"original_max_position_embeddings": original}, np.array(factors, np.float32)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SHORT = np.linspace(1, 2, 8, dtype=np.float32)
IN_YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 32}
SCALED = {  # settings of transformers; keys and tensors of the file
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"llama.rope.scaling.type": "linear"}, {}),
    "linear without a type": ({"rope_type": "linear", "factor": 4.0}, {}, {}),
    "yarn": (YARN, IN_YARN, {}),
    **{
        f"llama 3, {limits}": (settings, {"llama.rope.scaling.original_context_length": limits[-1]}, {
            "rope_freqs.weight": factors
        })
        for limits in ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 64))
        for settings, factors in [llama3(*limits)]
    },
}  # fmt: skip


def nats(model: hf.PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(2, len(WORDS), (1, 120), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids, labels=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])


def scaled_up(net: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """Make the weights so large that each setting shows: without it, tokens are off by more than a tenth of a nat."""
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            tensor.mul_(1 if "norm" in name or "bias" in name else 12)
    return net


@pytest.mark.parametrize("case", SCALED)
def test_positions_are_those_of_the_same_weights_in_transformers(tmp_path, case):
    settings, keys, tensors = SCALED[case]
    if not tensors:
        keys = {"llama.rope.scaling.factor": 4.0, **keys}
    plain, model = scaled_up(random_net()), scaled_up(random_net(rope_parameters=settings))
    source = write_gguf(tmp_path / "model.gguf", model, keys=keys, tensors=tensors)
    invoke(f"convert {source} -o {tmp_path}/made", code=0)
    found, wanted = nats(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "made")), nats(model)
    assert (found - wanted).abs().max() < 2e-4
    assert (nats(plain) - wanted).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_qwen_has_the_biases_and_norms_of_its_file(tmp_path, kind):
    """And heads that are not as wide as the net is by their number, as those of Qwen 3."""
    width = 32 if kind == "qwen3" else DIM // HEADS
    model = scaled_up(random_net(kind, head_dim=width))
    for name, tensor in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(tensor)
    keys = {
        f"{kind}.attention.key_length": width,
        f"{kind}.rope.dimension_count": width,
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.padding_token_id": 0,
    }
    source = write_gguf(tmp_path / "model.gguf", model, keys=keys)
    names = {tensor.name for tensor in open_gguf(source).tensors}
    assert ("blk.1.attn_q.bias" in names, "blk.1.attn_q_norm.weight" in names) == (
        kind == "qwen2",
        kind == "qwen3",
    )
    invoke(f"convert {source} -o {tmp_path}/made", code=0)
    found = nats(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "made"))
    assert (found - nats(model)).abs().max() < 2e-4


@pytest.mark.parametrize("kind", ["phi3", "gemma2"])
def test_another_architecture_is_refused_by_name(tmp_path, kind):
    source = write_gguf(tmp_path / "model.gguf", random_net(kind))
    error = refused(f"convert {source} -o {tmp_path}/made")
    said = f"general.architecture = {kind}: of GGUF files, llama, qwen2, qwen3 are read"
    assert (error.exit_code, str(error).startswith(f"{source}: {said}")) == (4, True)


def test_a_file_on_a_hub_has_its_commit_in_the_folder_made_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    data = write_gguf(tmp_path / "made.gguf", random_net()).read_bytes()
    commit = fill_cache(tmp_path / "hub", "org/llama", {"q.gguf": data})
    assert invoke(f"convert org/llama:q.gguf -o {tmp_path}/made").exit_code == 0
    assert (
        json.loads((tmp_path / "made/config.json").read_text())["_name_or_path"]
        == f"org/llama@{commit}:q.gguf"
    )


def test_a_converted_folder_is_the_model_and_loads_anywhere(tmp_path):
    """Exactly, where weights are plain; with its tokenizer, in the type that is asked for."""
    model, folder = random_net(), tmp_path / "llama"
    result = invoke("convert", write_gguf(tmp_path / "model.gguf", model), "-o", folder, code=0)
    assert (
        result.stderr
        == f"{tmp_path}/model.gguf: LlamaForCausalLM, of F32 weights as float32 -> {folder}\n"
    )
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        *_names(folder)
    }
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype is torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    words = hf.AutoTokenizer.from_pretrained(folder)
    text = "the moth, then"
    assert words.decode(words(text, add_special_tokens=False).input_ids) == text
    assert (
        ModelFolder(folder).tokenizer().encode(text).tolist()
        == words(text, add_special_tokens=False).input_ids
    )
    again = refused(f"convert {tmp_path}/model.gguf -o {folder}")
    assert (again.exit_code, "is not an empty folder" in str(again)) == (2, True)


def test_quantized_weights_are_written_as_plain_ones(tmp_path):
    source = write_gguf(tmp_path / "model.gguf", random_net(), "Q8_0")
    for dtype, kind in (("auto", torch.bfloat16), ("fp32", torch.float32), ("fp16", torch.float16)):
        result = invoke(f"convert {source} -o {tmp_path}/{dtype} --dtype {dtype}")
        assert f"of F32, Q8_0 weights as {str(kind).removeprefix('torch.')}" in result.stderr
        loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / dtype)
        assert loaded.dtype is kind
        assert not hasattr(loaded.config, "quantization_config")
    exact = (
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "fp32")
        .model.layers[0]
        .mlp.up_proj.weight
    )
    own = random_net().model.layers[0].mlp.up_proj.weight
    assert 0 < (exact - own).abs().max() <= own.abs().max() / 127


def test_progress_is_that_of_the_library(tmp_path, capfd, monkeypatch):
    """Also where the library writes its own bar: ours comes out, and nothing else. The file is read once."""
    source, more = write_gguf(tmp_path / "model.gguf", random_net(), "Q8_0"), list[int]()
    own, reads = gguf.GGUFReader.__init__, list[Any]()
    monkeypatch.setattr(
        gguf.GGUFReader, "__init__", lambda self, *given: own(self, reads.append(given) or given[0])
    )
    with progress("converting", total=100, unit="parts", every=0) as advance:
        convert_gguf(
            source,
            tmp_path / "made",
            progress=lambda percent: (more.append(percent), advance(percent)),
        )
    assert (sum(more), min(more) >= 0, len(reads)) == (100, True, 1)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(more)
    assert all(line.startswith("converting: ") for line in lines)


def test_a_file_is_a_model(tmp_path):
    """Converted on the way, in the type it is computed in, with the scores of its folder; nothing stays behind."""
    source, text = write_gguf(tmp_path / "model.gguf", random_net()), tmp_path / "text.txt"
    text.write_text("the moth, then the other")
    assert invoke(f"convert {source} -o {tmp_path}/llama -q").stderr == ""
    pattern = ["--pattern", "window:8,sinks=2"]
    found = invoke(f"score {text} -m {source} --format json", *pattern)
    assert f"`longnet convert {source} -o DIR` does it once" in found.stderr
    of_folder = total(text, "-m", tmp_path / "llama", *pattern)
    assert json.loads(found.stdout)["total"] == of_folder | {"model": str(source)}
    assert invoke(f"encode {text} -m {source} -o {tmp_path}/out.arrow").exit_code == 0
    assert "longnet convert" in str(refused(f"pattern {source}"))


def test_a_cut_file_cannot_be_converted(tmp_path):
    source = write_gguf(tmp_path / "model.gguf", random_net())
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[: 1 << 14])
    error = refused(f"convert {tmp_path}/cut.gguf -o {tmp_path}/out")
    assert (error.exit_code, "transformers cannot read it" in str(error)) == (4, True)
    assert {*_names(tmp_path)} == {"cut.gguf", "model.gguf"}


REFUSED = {  # keys and tensors of a file, and what is said
    "llama.attention.clamp_kqv = 8.0: LlamaConfig has no such setting": {"llama.attention.clamp_kqv": 8.0},
    "llama.attention.causal = False": {"llama.attention.causal": False},
    "llama.expert_count = 8": {"llama.expert_count": 8},
    "llama.attention.key_length = 16": {"llama.rope.dimension_count": 8, "llama.attention.key_length": 16},
    "llama.unheard_of = 1": {"llama.unheard_of": 1},
    "unheard.of = 1": {"unheard.of": 1},
    "head_dim = 1": {"head_dim": 1},
    "split.count = 2": {"split.count": 2},
    "tokenizer.ggml.pre = deepseek-coder: its way to split words": {"tokenizer.ggml.pre": "deepseek-coder"},
    "rope.scaling.type = su: transformers has no such rotation": {
        "llama.rope.scaling.type": "su", "llama.rope.scaling.factor": 4.0,
    },
    "llama.rope.scaling.alpha = 2.0": {"llama.rope.scaling.alpha": 2.0},
    "llama.rope.scale_linear = 4.0": {"llama.rope.scale_linear": 4.0},
    "rope_freqs.weight: the file has another scaling": {
        "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "yarn", "rope_freqs.weight": SHORT,
    },
    "rope_freqs.weight: these factors are no scaling of Llama 3": {"rope_freqs.weight": SHORT},
    "blk.0.attn_q_norm.weight: the net has no place for this tensor": {"blk.0.attn_q_norm.weight": SHORT},
    "blk.0.attn_q.bias: the net has no place for this tensor": {"blk.0.attn_q.bias": SHORT},
    "blk.2.attn_q.weight: the net has no place for this tensor": {"blk.2.attn_q.weight": SHORT},
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_what_the_net_has_no_place_for_is_refused_by_name(tmp_path, said):
    keys = {key: value for key, value in REFUSED[said].items() if not isinstance(value, np.ndarray)}
    source = write_gguf(
        tmp_path / "model.gguf",
        random_net(),
        keys=keys,
        tensors={key: x for key, x in REFUSED[said].items() if key not in keys},
    )
    error = refused(f"convert {source} -o {tmp_path}/out")
    assert (error.exit_code, str(error).startswith(f"{source}: {said}")) == (4, True)
    assert not (tmp_path / "out").exists()


def test_every_key_of_an_architecture_is_read_or_refused_or_known_to_do_nothing(
    tmp_path,
):
    """With 7 as its value, which the net does not have: what does not show in the settings is one of a few."""
    groups = [
        gguf.Keys.LLM,
        gguf.Keys.Attention,
        gguf.Keys.Rope,
        gguf.Keys.SSM,
        gguf.Keys.Split,
        gguf.Keys.ClipVision,
    ]
    names = [
        value
        for group in groups
        for value in vars(group).values()
        if isinstance(value, str) and "{arch}" in value
    ]
    model, silent = random_net(), set()

    def settings(**keys: int) -> dict[str, Any]:
        source = write_gguf(tmp_path / "model.gguf", model, keys=keys)
        config = hf.AutoConfig.from_pretrained(tmp_path, gguf_file=source.name)
        return complete(config, open_gguf(source), "llama").to_dict()

    plain = settings()
    for name in {name.format(arch="llama", dense="dense_2") for name in names}:
        with suppress(CheckpointError, StrictDataclassError):
            if settings(**{name: 7}) == plain:
                silent.add(name.removeprefix("llama"))
    assert silent == WITHOUT_EFFECT | {".rope.scaling.original_context_length"}


def test_words_are_split_as_the_file_says(tmp_path):
    text = "the 123 moths"
    splits = {"gpt-2": ["the", " 123", " moths"], "smollm": ["the", " ", "1", "2", "3", " moths"],
              "llama-bpe": ["the", " ", "123", " moths"]}  # fmt: skip
    newer = find_spec("transformers.integrations.gguf")  # an older one knows no way of Llama's
    for pre, wanted in splits.items() if newer else [*splits.items()][:2]:
        source = write_gguf(tmp_path / "model.gguf", random_net(), keys={"tokenizer.ggml.pre": pre})
        assert invoke(f"convert {source} -o {tmp_path}/{pre}").exit_code == 0
        words = hf.AutoTokenizer.from_pretrained(tmp_path / pre).backend_tokenizer.pre_tokenizer
        assert [word.replace("\u0120", " ") for word, _ in words.pre_tokenize_str(text)] == wanted


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]
