"""Conversion of a GGUF file, the format of llama.cpp, to an ordinary Hugging Face model folder. Needs the extra `gguf`.

transformers reads the file and undoes its quantization. The new folder loads anywhere, without GGUF. transformers
reads some keys of the metadata, of the net and of its tokenizer, and drops all others, such as the scaling of rotary
positions. Here, a key is read by transformers, read by us (SETTINGS, and all of `rope.`), or without effect. Any other
refuses the file by its name, unless its value says that the net has no such thing.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections import UserDict
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from copy import deepcopy
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers

from longnet_cli.basics.atomic import whole_folder
from longnet_cli.basics.errors import CheckpointError, ConfigError, extra, one_line
from longnet_cli.hub.model_names import name_origin
from longnet_cli.nets.weights import check_finite

_NEEDED = ("transformers", "gguf", "accelerate")
_PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # types that are not quantized

_MOST_READS = 1 << 23  # of metadata: a word of a vocabulary takes three. Gemma 3 takes 3.4 million


class _Bar(io.StringIO):
    """A file for a progress bar of tqdm to write to. `on_percent` gets how many more percent are done."""

    def __init__(self, on_percent: Callable[[int], None]) -> None:
        super().__init__()
        self.on_percent, self.percent = on_percent, 0

    def write(self, text: str) -> int:
        if percent := re.search(r"(\d+)%\|", text):
            self.on_percent(int(percent[1]) - self.percent)
            self.percent = int(percent[1])
        return len(text)


def convert_gguf(
    path: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    origin: str | None = None,
    on_percent: Callable[[int], None] = lambda more: None,
) -> str:
    """Write the model and the tokenizer of a GGUF file to a new folder: safetensors and JSON, whole or not at all.

    `dtype` is the type of the weights. None keeps the file's type, or takes bfloat16 if the weights are quantized.
    `origin` names the file in config.json, if it is on a hub. `on_percent` gets how many more percent are unpacked.
    Returns a description such as `LlamaForCausalLM, of F32, Q4_1 weights as bfloat16`. Raises ConfigError if a library
    is missing or the folder is in use, CheckpointError for a file that transformers cannot read.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ConfigError(f"{path}: GGUF needs {', '.join(missing)}: {extra('gguf')}")
    import transformers as hf

    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    with whole_folder(folder) as place, ExitStack() as stack:
        try:
            reader = stack.enter_context(_read_once(path))
            on_percent(0)
            tensors = reader.tensors
            kinds = {tensor.tensor_type.name for tensor in tensors}
            wide = max(kinds & {"F16", "BF16"}, default="F32")
            chosen = dtype or (_PLAIN[wide] if kinds <= _PLAIN.keys() else torch.bfloat16)
            given = {"gguf_file": path.name, "local_files_only": True}
            config = hf.AutoConfig.from_pretrained(path.parent, **given)
            arch = value_of(reader.fields["general.architecture"])
            config = complete(config, reader, reads(path, arch))
            surplus = _check_net(config, arch, tensors, hf)
            with redirect_stderr(_Bar(on_percent)):  # no option turns the library's bar off
                model, report = hf.AutoModelForCausalLM.from_pretrained(
                    path.parent, config=config, dtype=chosen, output_loading_info=True, **given
                )
            tokenizer = hf.AutoTokenizer.from_pretrained(path.parent, **given)
            split_words(tokenizer, reader)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except Exception as error:  # readers of a foreign format may raise anything
            raise CheckpointError(
                f"{path}: transformers cannot read it: {one_line(error)}"
            ) from None
        _check_weights(
            model, {*report["missing_keys"]}, surplus | {*report["unexpected_keys"]}, path
        )
        check_finite(
            {name: parameter.detach() for name, parameter in model.named_parameters()}, str(path)
        )
        model.hf_quantizer = None  # the weights are plain now
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(place)
        name_origin(place, origin or str(path))
        tokenizer.save_pretrained(place)
        _drop_tokens_beyond(place / "tokenizer.json", model.get_input_embeddings().num_embeddings)
    return f"{type(model).__name__}, of {', '.join(sorted(kinds))} weights as {str(chosen).removeprefix('torch.')}"


@contextmanager
def _read_once(path: Path) -> Iterator[Any]:
    """Return gguf's reader of a file, which transformers gets too: it reads a file three times, for many seconds each.

    The table of names, which it makes for each module of the net, is made once as well.
    """
    import gguf

    own = gguf.GGUFReader, gguf.get_tensor_name_map
    reader = open_gguf(path)
    gguf.GGUFReader, gguf.get_tensor_name_map = lambda path: reader, cache(own[1])
    try:
        yield reader
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = own


def _check_weights(model: Any, missing: set[str], surplus: set[str], path: Path) -> None:
    """Raise CheckpointError for weights that are not in the file, and for tensors of the file that have no place.

    Of the biases that a net may have, a layer can lack some: they are set to 0.
    """
    if any(getattr(model.config, setting, False) for setting in BIASES):
        for name in [name for name in missing if name.endswith("_proj.bias")]:
            torch.nn.init.zeros_(model.get_parameter(name))
            missing.remove(name)
    if getattr(model.config, "rope_parameters", None):
        surplus -= ROPE_TENSORS  # they are in the configuration
    for what, names in (
        ("weights are missing", missing),
        ("the net has no place for weights", surplus),
    ):
        if names:
            raise CheckpointError(f"{path}: {what}, {min(names)} among {len(names)}")


def open_gguf(path: Path) -> Any:
    """Return gguf's reader of a file.

    Raises ValueError if the file declares more than it has, or very much metadata: the reader alone believes it.
    """
    import gguf

    size = path.stat().st_size

    class Bounded(gguf.GGUFReader):
        left = _MOST_READS

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **options: Any) -> Any:
            self.left -= 1
            if offset + int(count) * np.dtype(dtype).itemsize > size or self.left < 0:
                asked = int(count) * np.dtype(dtype).itemsize
                raise ValueError(
                    f"it declares {asked} bytes at offset {offset}, of a file of {size}"
                )
            return super()._get(offset, dtype, count, *order, **options)

        def _get_field_parts(self, offset: int, kind: int) -> Any:
            if int(kind) == gguf.GGUFValueType.ARRAY:
                count = int(self._get(offset + 4, np.uint64)[0])
                self.left -= count
                if self.left < 0:
                    raise ValueError(f"it declares an array of {count} values at offset {offset}")
            return super()._get_field_parts(offset, kind)

    return Bounded(path)


def _check_net(config: Any, arch: str, tensors: list[Any], hf: Any) -> set[str]:
    """Return the names of the tensors that have no place in the net that the metadata describes.

    Raises ValueError if it has more numbers than the tensors of the file.
    """
    from transformers import modeling_gguf_pytorch_utils as reading

    if config.num_hidden_layers > len(tensors):
        raise ValueError(
            f"it declares {config.num_hidden_layers} layers, and holds {len(tensors)} tensors"
        )
    with torch.device("meta"):
        net = hf.AutoModelForCausalLM.from_config(config)
    wanted = net.num_parameters()
    if wanted > 2 * (
        held := sum(int(tensor.n_elements) for tensor in tensors)
    ):  # twice: its tables may be shared
        raise ValueError(f"it declares a net of {wanted:,} parameters, and holds {held:,} numbers")
    if arch in quick_readers():
        return set()  # transformers reports these names itself
    process = reading.TENSOR_PROCESSORS.get(arch, reading.TensorProcessor)(config=config.to_dict())
    places = reading.get_gguf_hf_weights_map(net, process)
    names = {tensor.name for tensor in tensors}
    return {
        name for name in names if name not in places and name.removesuffix(".weight") not in places
    }


def _drop_tokens_beyond(path: Path, vocab_size: int) -> None:
    """Remove the default special tokens of a tokenizer class for which the model has no ids."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < vocab_size]
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")


# Keys of an architecture, and the settings of config.json that say the same: the first that the net has is set.
SETTINGS = {
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": (
        "layer_norm_eps",
        "layer_norm_epsilon",
        "norm_eps",
        "norm_epsilon",
    ),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attention.value_length": ("head_dim",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_weights_norm": ("norm_topk_prob",),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "use_parallel_residual": ("use_parallel_residual",),
    "vocab_size": ("vocab_size",),
}
# Keys of an architecture of which transformers' net has one value, which is not among its settings.
FIXED: dict[str, Callable[[Any], Container[Any]]] = {
    "attention.causal": lambda config: (True,),
    "attention.key_length": lambda config: (config.hidden_size // config.num_attention_heads,),
    "attention.sliding_window_pattern": lambda config: (
        [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()],
        False,
    ),
    "attention.value_length": lambda config: (config.hidden_size // config.num_attention_heads,),
    "tensor_data_layout": lambda config: ("Meta AI original pth", "jploski"),  # of llama and falcon
}
BIASES = {  # settings, and the tensors that a file has if they are on
    "attention_bias": r"\.attn_(q|k|v|output)\.bias$",
    "mlp_bias": r"\.ffn_(gate|up|down)\.bias$",
}
WITHOUT_EFFECT = {
    "pooling_type",  # of vectors: `encode --pool` says it
    "decoder_start_token_id",  # of models that also encode
}
ORIGINAL = "original_max_position_embeddings"
ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}

# Notes on the file, by those who make files; the reader itself handles the alignment of tensors.
NOTES = ("GGUF.", "general.", "quantize.", "mradermacher.")
# Of a tokenizer, what transformers reads, and what changes no id of a text: more ends and marks, further templates.
TOKENIZER = re.compile(
    r"tokenizer\.(chat_template.*|ggml\.((bos|cls|eom|eos|eot|fim_\w+|mask|middle|padding|prefix|sep|seperator|suffix"
    r"|unknown)_token_id|add_(bos|eos|sep)_token|add_space_prefix|merges|model|pre|scores|token_type|token_type_count"
    r"|tokens))"
)
MODEL, PRE, PREFIX = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.add_space_prefix"
# Ways to split words (PRE) that transformers does not know, and takes for that of GPT-2: those that are the same, and
# those that also split digits from each other.
AS_GPT_2 = {None, "gpt-2", "gigachat", "jais", "mpt", "olmo", "phi-2", "trillion"}
DIGITS_APART = {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}


def value_of(field: Any) -> Any:
    """Return the value of a field of gguf's reader: a number, a text, or a list of several."""
    text = field.types[-1] == 8
    values = [
        bytes(field.parts[i]).decode() if text else field.parts[i][0].item() for i in field.data
    ]
    return values if len(field.types) > 1 and len({*values}) != 1 else values[0]


def complete(config: Any, reader: Any, read: Container[str]) -> Any:
    """Return the configuration that transformers makes of a file, with what it leaves out.

    `read` are the keys of the architecture that it `reads`. Raises CheckpointError for a key that says what the net
    cannot have, and for an unknown one.
    """
    arch = value_of(reader.fields["general.architecture"])
    rope: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for key, field in reader.fields.items():
        name = key.removeprefix(f"{arch}.")
        if key.startswith(NOTES) or TOKENIZER.fullmatch(key) or name in WITHOUT_EFFECT:
            continue
        value, own = value_of(field), name != key
        setting = next(
            (setting for setting in SETTINGS.get(name, ()) if own and hasattr(config, setting)),
            None,
        )
        if own and name.startswith("rope.") and name != "rope.dimension_sections":
            rope[name] = value
        elif own and name in read:
            continue
        elif setting:
            if (
                value != (getattr(config, setting) or 0)
                and changes.setdefault(setting, value) != value
            ):
                raise _refusal(key, value, config)
        elif own and name in FIXED:
            if value not in FIXED[name](config):
                raise _refusal(key, value, config)
        elif value and (key, value) != ("split.count", 1):
            raise _refusal(key, value, config)
    for setting, pattern in BIASES.items():
        if getattr(config, setting, None) is False and any(
            re.search(pattern, each.name) for each in reader.tensors
        ):
            changes[setting] = True
    head_dim = changes.get("head_dim") or getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    if hasattr(config, "query_pre_attn_scalar"):  # Gemma's: not in the file, but known of a size
        of_27b = config.num_hidden_layers in (46, 62)
        changes["query_pre_attn_scalar"] = (
            config.hidden_size // config.num_attention_heads if of_27b else head_dim
        )
    if getattr(config, "rope_parameters", None):
        factors = {
            each.name: np.array(each.data) for each in reader.tensors if each.name in ROPE_TENSORS
        }
        changes |= _rotation(rope, factors, config, head_dim)
    for name, value in rope.items():
        if value:
            raise _refusal(f"{arch}.{name}", value, config)
    completed = type(config).from_dict(config.to_dict() | changes)
    for setting, value in changes.items():
        if setting != "rope_parameters" and getattr(completed, setting) != value:
            raise _refusal(setting, value, config)
    return completed


def _refusal(what: str, value: Any, config: Any) -> CheckpointError:
    said = f"{what} = {value}"
    return CheckpointError(
        f"{said if len(said) < 200 else what}: {type(config).__name__} has no such setting"
    )


def reads(path: Path, arch: str) -> set[str]:
    """Return the keys of the architecture `arch` that transformers reads from a file."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    makers = quick_readers()
    if arch not in makers:
        mapping = GGUF_CONFIG_MAPPING.get(arch) or GGUF_CONFIG_MAPPING.get(
            re.sub("moe|-", "_moe", arch), {}
        )
        return {key for key, setting in mapping.items() if setting}

    asked: set[str] = set()

    class Noting(UserDict[str, Any]):
        """Metadata that notes which keys are asked for."""

        def __getitem__(self, key: str) -> Any:
            asked.add(key.removeprefix(f"{arch}."))
            return self.data[key]

    from transformers.integrations.gguf import read_gguf_metadata

    metadata, names = read_gguf_metadata(str(path))
    makers[arch](Noting(metadata), names)
    return asked


def quick_readers() -> dict[str, Callable[..., dict[str, Any]]]:
    """Return the functions of transformers' newer reader that make the configuration of an architecture."""
    return _newer("gguf_config_mapping", "GGUF_CONFIG_ARCHS")


def _newer(module: str, name: str) -> dict[str, Any]:
    """Return a table that only newer versions of transformers have; empty with others."""
    package = "transformers.integrations.gguf"
    there = find_spec(package) and find_spec(f"{package}.{module}")
    return dict(getattr(import_module(f"{package}.{module}"), name)) if there else {}


def _rotation(
    rope: dict[str, Any], factors: dict[str, np.ndarray], config: Any, head_dim: int
) -> dict[str, Any]:
    """Return the settings that the keys `rope` and the tensors `factors` of a file say; takes these keys out of it.

    Of layers with a sliding window, only the base is their own.
    """
    ropes = deepcopy(config.rope_parameters)
    full = ropes.get("full_attention", ropes)
    full["rope_theta"] = rope.pop("rope.freq_base", full["rope_theta"])
    if "sliding_attention" in ropes and "rope.freq_base_swa" in rope:
        ropes["sliding_attention"]["rope_theta"] = rope.pop("rope.freq_base_swa")
    turned = rope.get("rope.dimension_count", 0)
    if turned == int(head_dim * full.get("partial_rotary_factor", 1)) or turned == getattr(
        config, "rotary_dim", None
    ):
        del rope["rope.dimension_count"]
    elif turned and "partial_rotary_factor" in full:
        full["partial_rotary_factor"] = rope.pop("rope.dimension_count") / head_dim
    full |= _scaling(rope, factors, full["rope_theta"], config.max_position_embeddings)
    original = full.get(ORIGINAL)
    beside = (
        {ORIGINAL: original} if original and hasattr(config, ORIGINAL) else {}
    )  # Phi-3 has it here, too
    return {"rope_parameters": ropes, **beside}


def _scaling(
    rope: dict[str, Any], factors: dict[str, np.ndarray], theta: float, context: int
) -> dict[str, Any]:
    """Return how rotary positions are scaled, as `rope_parameters` has it; takes the keys that say it out of `rope`."""
    said = {key[13:]: rope.pop(key) for key in [*rope] if key.startswith("rope.scaling.")}
    old = rope.pop("rope.scale_linear", 0)
    kind, factor = said.pop("type", "linear"), said.pop("factor", 0) or old or 1
    original, attention = said.pop("original_context_length", 0), said.pop("attn_factor", 1) or 1
    fast, slow = said.pop("yarn_beta_fast", 32.0), said.pop("yarn_beta_slow", 1.0)
    mixed, own = said.pop("yarn_ext_factor", -1), said.pop("yarn_attn_factor", 1)
    said.pop("finetuned", None)  # the model was trained so: nothing to compute
    factor = 1 if kind == "none" else factor
    plain = (
        mixed in ((-1, 1) if kind == "yarn" else (-1, 0)) and own == 1 and not any(said.values())
    )
    if plain and factor == 1 and factors.keys() == ROPE_TENSORS - {"rope_freqs.weight"}:
        lists = {
            f"{each}_factor": factors[f"rope_factors_{each}.weight"].tolist()
            for each in ("long", "short")
        }
        return {"rope_type": "longrope", "attention_factor": attention, **lists} | {
            ORIGINAL: original or context
        }
    if plain and factor == attention == 1 and factors.keys() == {"rope_freqs.weight"}:
        return _llama3(factors["rope_freqs.weight"], theta, original or 8192)
    if plain and kind == "yarn" and factor > 1 and not factors:
        scaled = {
            "attention_factor": attention * (1 + 0.1 * math.log(factor)),
            "beta_fast": fast,
            "beta_slow": slow,
        }
        return {"rope_type": "yarn", "factor": factor, **scaled, ORIGINAL: original or context}
    if plain and kind in ("none", "linear", "yarn") and attention == 1 and not factors:
        return {"rope_type": "linear", "factor": factor} if factor != 1 else {}
    what = f"rope.scaling ({kind}, factor {factor:g}, attn_factor {attention:g}, {', '.join([*said, *factors])})"
    raise CheckpointError(f"{what}: transformers has no such rotation")


def _llama3(factors: np.ndarray, theta: float, original: int) -> dict[str, Any]:
    """Return the scaling of Llama 3 whose wavelengths are `factors`, (head_dim / 2,), times the unscaled ones.

    The file has no more than these. What it is made of is found again, with Llama's own settings where they fit: a pair
    that turns more than `high` times in the original context stays as it is, one that turns less than `low` times is
    slowed down by `most`, and between them the share that is kept is linear.
    """
    turns = original * theta ** (-np.arange(len(factors)) / len(factors)) / (2 * math.pi)
    most = float(factors.max())
    if most == 1:
        return {}
    kept = (1 / factors.astype(np.float64) - 1 / most) / (1 - 1 / most)
    between = (kept > 1e-6) & (kept < 1 - 1e-6)
    limits = [(1.0, 4.0)]
    if between.sum() > 1:
        slope, start = np.polyfit(turns[between], kept[between], 1)
        limits.append((float(-start / slope), float((1 - start) / slope)))
    for low, high in limits:
        share = np.clip((turns - low) / (high - low), 0, 1)
        if np.abs(((1 - share) / most + share) * factors - 1).max() <= 1e-6:
            found = {"factor": most, "low_freq_factor": low, "high_freq_factor": high}
            return {"rope_type": "llama3", **found, ORIGINAL: original}
    raise CheckpointError(
        "rope_freqs.weight: these factors are no scaling of Llama 3, the one that is known here"
    )


def split_words(tokenizer: Any, reader: Any) -> None:
    """Make a tokenizer of transformers split texts as the file says, in place.

    Raises CheckpointError for a way that is not known.
    """
    said = {
        key: value_of(reader.fields[key]) for key in (MODEL, PRE, PREFIX) if key in reader.fields
    }
    words, pre = tokenizer.backend_tokenizer, said.get(PRE)
    if said.get(MODEL) == "gpt2":
        known = _newer("gguf_tokenizer_mapping", "GGUF_PRE_TOKENIZER_SPLITS") or {"qwen2"}
        if pre in DIGITS_APART:
            each = [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
            words.pre_tokenizer = pre_tokenizers.Sequence(each)
        elif pre not in AS_GPT_2 | {*known}:
            raise CheckpointError(
                f"{PRE} = {pre}: its way to split words is not known to this transformers"
            )
    elif said.get(MODEL) == "llama" and (wanted := said.get(PREFIX)) is not None:
        first = tokenizer.convert_ids_to_tokens(words.encode("a", add_special_tokens=False).ids[0])
        if first.startswith("\u2581") != wanted:
            raise CheckpointError(
                f"{PREFIX} = {wanted}: not so in the tokenizer that transformers makes of it"
            )
