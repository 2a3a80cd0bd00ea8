"""Conversion of a GGUF file, the format of llama.cpp, to an ordinary Hugging Face model folder. Needs the extra `gguf`.

transformers reads the file and undoes its quantization. It reads some keys of the metadata and drops the others, such
as the scaling of rotary positions. So this module knows three ARCHITECTURES, with the keys and the tensors that a file
of each may have. A file of another architecture is refused by name, and so is one with a tensor that is not known, with
a key that is not known unless its value is 0 or empty, or with a value that transformers' net cannot have.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers

from longnet_cli.basics.atomic import whole_folder
from longnet_cli.basics.errors import CheckpointError, ConfigError, extra, one_line
from longnet_cli.basics.model_files import CONFIG
from longnet_cli.hub.model_names import name_origin
from longnet_cli.nets.weights import check_finite, refuse_differences

_NEEDED = ("transformers", "gguf", "accelerate")
_PLAIN = {  # types that are not quantized
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MOST_READS = 1 << 23  # of metadata: a word of a vocabulary takes three. Gemma 3 takes 3.4 million

# The architectures, and the tensors that a layer of each has beside those of LAYER.
NO_MORE = r"(?!)"  # matches no name
ARCHITECTURES = {"llama": NO_MORE, "qwen2": r"attn_[qkv]\.bias", "qwen3": r"attn_[qk]_norm\.weight"}
LAYER = r"(attn_(norm|q|k|v|output)|ffn_(norm|gate|up|down))\.weight"
WHOLE = r"(token_embd|output|output_norm|rope_freqs)\.weight"
# Keys after the name of the architecture, and the settings of config.json that say the same.
SETTINGS = {
    ".attention.head_count": "num_attention_heads",
    ".attention.head_count_kv": "num_key_value_heads",
    ".attention.key_length": "head_dim",
    ".attention.layer_norm_rms_epsilon": "rms_norm_eps",
    ".attention.value_length": "head_dim",
    ".block_count": "num_hidden_layers",
    ".context_length": "max_position_embeddings",
    ".embedding_length": "hidden_size",
    ".feed_forward_length": "intermediate_size",
    ".rope.dimension_count": "head_dim",
    ".vocab_size": "vocab_size",
}
BASE = ".rope.freq_base"
KIND = ".rope.scaling.type"
FACTOR = ".rope.scaling.factor"
ORIGINAL = ".rope.scaling.original_context_length"
# Keys without effect on a net, and the values of further keys that say what the net is anyway.
WITHOUT_EFFECT = {".pooling_type", ".rope.scaling.finetuned"}
PLAIN_VALUES = {
    ".attention.causal": (True,),
    ".tensor_data_layout": ("Meta AI original pth",),
    "split.count": (0, 1),
}
# Notes on the file, by those who make files; the reader itself handles the alignment of tensors.
NOTES = ("GGUF.", "general.", "quantize.", "mradermacher.")
# Of a tokenizer, what transformers reads, and what changes no id of a text: more ends and marks, further templates.
TOKENIZER = re.compile(
    r"tokenizer\.(chat_template.*|ggml\.((bos|cls|eom|eos|eot|fim_\w+|mask|middle|padding|prefix|sep|seperator|suffix"
    r"|unknown)_token_id|add_(bos|eos|sep)_token|add_space_prefix|merges|model|pre|scores|token_type|token_type_count"
    r"|tokens))"
)
MODEL = "tokenizer.ggml.model"
PRE = "tokenizer.ggml.pre"
PREFIX = "tokenizer.ggml.add_space_prefix"


class _Bar(io.StringIO):
    """A file for a progress bar of tqdm to write to. `progress` gets how many more percent are done."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        super().__init__()
        self.progress = progress
        self.percent = 0

    def write(self, text: str) -> int:
        if percent := re.search(r"(\d+)%\|", text):
            self.progress(int(percent[1]) - self.percent)
            self.percent = int(percent[1])
        return len(text)


def convert_gguf(
    path: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    origin: str = "",
    progress: Callable[[int], None] = lambda more: None,
) -> str:
    """Write the model and the tokenizer of a GGUF file to a new folder: safetensors and JSON, whole or not at all.

    `dtype` is the type of the weights. None keeps the file's type, or takes bfloat16 if the weights are quantized.
    `origin` names the file in config.json, if it is on a hub. `progress` gets how many more percent are unpacked.
    Returns a description such as `LlamaForCausalLM, of F32, Q4_1 weights as bfloat16`. Raises ConfigError if a library
    is missing or the folder is in use, CheckpointError for a file that cannot be converted.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ConfigError(f"{path}: GGUF needs {', '.join(missing)}: {extra('gguf')}")
    import transformers as hf

    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    with whole_folder(folder, CONFIG, new=True) as place, ExitStack() as stack:
        try:
            reader = stack.enter_context(_read_once(path))
            progress(0)
            types = {tensor.tensor_type.name for tensor in reader.tensors}
            # F16 if there are both
            half = max(types & {"F16", "BF16"}, default="F32")
            dtype = dtype or (_PLAIN[half] if types <= _PLAIN.keys() else torch.bfloat16)
            source = {"gguf_file": path.name, "local_files_only": True}
            arch = architecture(reader)
            config = complete(hf.AutoConfig.from_pretrained(path.parent, **source), reader, arch)
            _check_size(config, reader.tensors, hf)
            with redirect_stderr(_Bar(progress)):  # no option turns the library's bar off
                model, report = hf.AutoModelForCausalLM.from_pretrained(
                    path.parent,
                    config=config,
                    dtype=dtype,
                    output_loading_info=True,
                    **source,
                )
            tokenizer = hf.AutoTokenizer.from_pretrained(path.parent, **source)
            split_words(tokenizer, reader)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except Exception as error:  # readers of a foreign format may raise anything
            raise CheckpointError(
                f"{path}: transformers cannot read it: {one_line(error)}"
            ) from None
        refuse_differences(str(path), report["missing_keys"], ())
        check_finite(dict(model.named_parameters()), str(path))
        model.hf_quantizer = None  # the weights are plain now
        vars(model.config).pop("quantization_config", None)
        model.save_pretrained(place)
        name_origin(place, origin)
        tokenizer.save_pretrained(place)
        _drop_tokens_beyond(place / "tokenizer.json", model.get_input_embeddings().num_embeddings)
    name_of_dtype = str(dtype).removeprefix("torch.")
    return f"{type(model).__name__}, of {', '.join(sorted(types))} weights as {name_of_dtype}"


@contextmanager
def _read_once(path: Path) -> Iterator[Any]:
    """Return gguf's reader of a file, which transformers gets too: it reads a file three times, for many seconds each.

    The table of names, which it makes for each module of the net, is made once as well.
    """
    import gguf

    reader_class = gguf.GGUFReader
    get_names = gguf.get_tensor_name_map
    reader = open_gguf(path)
    gguf.GGUFReader = lambda path: reader
    gguf.get_tensor_name_map = cache(get_names)
    try:
        yield reader
    finally:
        gguf.GGUFReader = reader_class
        gguf.get_tensor_name_map = get_names


def open_gguf(path: Path) -> Any:
    """Return gguf's reader of a file.

    Raises ValueError if the file declares more than it has, or very much metadata: the reader alone believes it.
    """
    import gguf

    size = path.stat().st_size

    class Bounded(gguf.GGUFReader):
        reads_left = _MOST_READS

        def _get(
            self,
            offset: int,
            dtype: Any,
            count: int = 1,
            *order: Any,
            **options: Any,
        ) -> Any:
            self.reads_left -= 1
            declared = int(count) * np.dtype(dtype).itemsize
            if offset + declared > size or self.reads_left < 0:
                raise ValueError(
                    f"it declares {declared} bytes at offset {offset}, of a file of {size}"
                )
            return super()._get(offset, dtype, count, *order, **options)

        def _get_field_parts(self, offset: int, kind: int) -> Any:
            if int(kind) == gguf.GGUFValueType.ARRAY:
                count = int(self._get(offset + 4, np.uint64)[0])
                self.reads_left -= count
                if self.reads_left < 0:
                    raise ValueError(f"it declares an array of {count} values at offset {offset}")
            return super()._get_field_parts(offset, kind)

    return Bounded(path)


def _check_size(config: Any, tensors: list[Any], hf: Any) -> None:
    """Raise ValueError if the net that the metadata describes has many more numbers than the tensors of the file."""
    layers = config.num_hidden_layers
    if layers > len(tensors):
        raise ValueError(f"it declares {layers} layers, and holds {len(tensors)} tensors")
    with torch.device("meta"):
        declared = hf.AutoModelForCausalLM.from_config(config).num_parameters()
    held = sum(int(tensor.n_elements) for tensor in tensors)
    if declared > 2 * held:  # twice: its tables may be shared
        raise ValueError(
            f"it declares a net of {declared:,} parameters, and holds {held:,} numbers"
        )


def _drop_tokens_beyond(path: Path, vocab_size: int) -> None:
    """Remove the default special tokens of a tokenizer class for which the model has no ids."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < vocab_size]
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")


def value_of(field: Any) -> Any:
    """Return the value of a field of gguf's reader: a number, a text, or a list of several that are not all equal."""
    if field.types[-1] == 8:
        values = [bytes(field.parts[index]).decode() for index in field.data]
    else:
        values = [field.parts[index][0].item() for index in field.data]
    return values if len(field.types) > 1 and len({*values}) != 1 else values[0]


def architecture(reader: Any) -> str:
    """Return the architecture of a file. Raises CheckpointError for one that is not among ARCHITECTURES."""
    arch = str(value_of(reader.fields["general.architecture"]))
    if arch not in ARCHITECTURES:
        names = ", ".join(ARCHITECTURES)
        raise CheckpointError(
            f"general.architecture = {arch}: of GGUF files, {names} are read: name a folder of safetensors"
        )
    return arch


def complete(config: Any, reader: Any, arch: str) -> Any:
    """Return the configuration that transformers makes of a file, with what it leaves out.

    Raises CheckpointError for a key or a tensor that the architecture does not have, and for a value that its net
    cannot have.
    """
    rotation: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for key, field in reader.fields.items():
        name = key.removeprefix(arch)
        if key.startswith(NOTES) or TOKENIZER.fullmatch(key) or name in WITHOUT_EFFECT:
            continue
        value = value_of(field)
        if name in SETTINGS:
            if changes.setdefault(SETTINGS[name], value) != value:
                raise _refusal(key, value, config)
        elif value and name in (BASE, KIND, FACTOR, ORIGINAL):
            rotation[name] = value
        elif value not in PLAIN_VALUES.get(name, (0, "")):
            raise _refusal(key, value, config)
    factors = _check_tensors(reader.tensors, arch, changes.get("num_hidden_layers"))
    positions = {"rope_parameters": _rotation(rotation, factors, config)}
    completed = type(config).from_dict(config.to_dict() | changes | positions)
    for setting, value in changes.items():
        if getattr(completed, setting) != value:
            raise _refusal(setting, value, config)
    return completed


def _refusal(what: str, value: Any, config: Any) -> CheckpointError:
    return CheckpointError(f"{what} = {value!s:.100}: {type(config).__name__} has no such setting")


def _check_tensors(tensors: list[Any], arch: str, num_layers: Any) -> np.ndarray | None:
    """Return the factors of rotary positions among the tensors, (head_dim / 2,), or None without them.

    Raises CheckpointError for a tensor that has no place in a net of this architecture and number of layers.
    """
    factors = None
    for tensor in tensors:
        layer = re.fullmatch(rf"blk\.(\d+)\.({LAYER}|{ARCHITECTURES[arch]})", tensor.name)
        has_place = int(layer[1]) < num_layers if layer else re.fullmatch(WHOLE, tensor.name)
        if not has_place:
            raise CheckpointError(f"{tensor.name}: the net has no place for this tensor")
        if tensor.name == "rope_freqs.weight":
            factors = np.array(tensor.data)
    return factors


def _rotation(rotation: dict[str, Any], factors: np.ndarray | None, config: Any) -> dict[str, Any]:
    """Return what the keys of the `rotation` and the `factors` of a file say, as `rope_parameters` of transformers."""
    theta = rotation.get(BASE, 10000.0)
    kind = rotation.get(KIND, "linear")
    factor = rotation.get(FACTOR, 1)
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(f"rope.scaling.type = {kind}: transformers has no such rotation")
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if factors is not None:
        if factor != 1:
            raise CheckpointError(
                "rope_freqs.weight: the file has another scaling of positions too"
            )
        return rope | _llama3(factors, theta, rotation.get(ORIGINAL, 8192))
    if kind == "none" or factor == 1:
        return rope
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        trained = rotation.get(ORIGINAL, config.max_position_embeddings)
        rope["original_max_position_embeddings"] = trained
    return rope


def _llama3(factors: np.ndarray, theta: float, original: int) -> dict[str, Any]:
    """Return the scaling of Llama 3 whose wavelengths are `factors`, (head_dim / 2,), times the unscaled ones.

    A pair that turns more than 4 times in the original context stays as it is, one that turns less than once is slowed
    down by the largest factor, and between them the share that is kept is linear. A file with other limits is refused.
    """
    low = 1.0
    high = 4.0
    pairs = len(factors)
    slowest = float(factors.max())
    frequencies = theta ** (-np.arange(pairs) / pairs)
    turns = original * frequencies / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - share) / slowest + share)
    if np.abs(expected / factors - 1).max() > 1e-6:
        raise CheckpointError(
            "rope_freqs.weight: these factors are no scaling of Llama 3, the one that is known here"
        )
    if slowest <= 1:
        return {}
    return {
        "rope_type": "llama3",
        "factor": slowest,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def split_words(tokenizer: Any, reader: Any) -> None:
    """Make a tokenizer of transformers split texts as the file says, in place.

    Raises CheckpointError for a way that is not known.
    """
    fields = {
        key: value_of(reader.fields[key]) for key in (MODEL, PRE, PREFIX) if key in reader.fields
    }
    inner = tokenizer.backend_tokenizer
    pre = fields.get(PRE)
    if fields.get(MODEL) == "gpt2":
        if pre == "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
            inner.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
        elif pre not in {None, "gpt-2", *_known_splits()}:
            raise CheckpointError(
                f"{PRE} = {pre}: its way to split words is not known to this transformers"
            )
    if fields.get(MODEL) == "llama":
        first_id = inner.encode("a", add_special_tokens=False).ids[0]
        has_prefix = tokenizer.convert_ids_to_tokens(first_id).startswith("\u2581")
        if fields.get(PREFIX, has_prefix) != has_prefix:
            raise CheckpointError(
                f"{PREFIX} = {fields[PREFIX]}: not so in the tokenizer that transformers makes of it"
            )


def _known_splits() -> set[str]:
    """Return the values of PRE that transformers knows. Its older versions have no table of them."""
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping
    except ImportError:
        return {"qwen2"}
    return {*gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS}
