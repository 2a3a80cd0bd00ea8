"""Conversion of a GGUF file, the format of llama.cpp, to an ordinary Hugging Face model folder. Needs the extra `gguf`.

transformers reads the file and undoes its quantization. The new folder loads anywhere, without GGUF.
"""

from __future__ import annotations

import io
import json
import struct
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from longnet_cli.basics.atomic import whole_folder
from longnet_cli.basics.errors import CheckpointError, ConfigError
from longnet_cli.hub.model_names import name_origin
from longnet_cli.nets.weights import check_finite

_NEEDED = ("transformers", "gguf", "accelerate")
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # types that are not quantized

_MOST_VALUES = 1 << 22  # in arrays of metadata: words of a vocabulary, and merges. Gemma 3 has 1.3 million
_MOST_DEPTH = 8  # of arrays in arrays
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value of each other type


def convert_gguf(path: Path, folder: Path, dtype: torch.dtype | None = None, origin: str | None = None) -> str:
    """Write the model and the tokenizer of a GGUF file to a new folder: safetensors and JSON, whole or not at all.

    `dtype` is the type of the weights. None keeps the file's type, or takes bfloat16 if the weights are quantized.
    `origin` names the file in config.json, if it is on a hub.
    Returns a description such as `LlamaForCausalLM, of F32, Q4_1 weights as bfloat16`. Raises ConfigError if a library
    is missing or the folder is in use, CheckpointError for a file that transformers cannot read.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ConfigError(f"{path}: GGUF needs {', '.join(missing)}: pip install 'longnet-cli[gguf]'")
    import gguf
    import transformers as hf

    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    with whole_folder(folder) as place:
        try:
            check_counts(path)
            tensors = gguf.GGUFReader(path).tensors
            kinds = {tensor.tensor_type.name for tensor in tensors}
            wide = max(kinds & {"F16", "BF16"}, default="F32")
            chosen = dtype or (_PLAIN[wide] if kinds <= _PLAIN.keys() else torch.bfloat16)
            given = {"gguf_file": path.name, "local_files_only": True}
            _check_net(hf.AutoConfig.from_pretrained(path.parent, **given), tensors, hf)
            with redirect_stderr(io.StringIO()):  # hides a progress bar that no option turns off
                model, report = hf.AutoModelForCausalLM.from_pretrained(
                    path.parent, dtype=chosen, output_loading_info=True, **given
                )
            tokenizer = hf.AutoTokenizer.from_pretrained(path.parent, **given)
        except Exception as error:  # readers of a foreign format may raise anything
            raise CheckpointError(f"{path}: transformers cannot read it: {' '.join(str(error).split())}") from None
        if names := sorted(report["missing_keys"]):
            raise CheckpointError(f"{path}: weights are missing, {names[0]} among {len(names)}")
        check_finite({name: parameter.detach() for name, parameter in model.named_parameters()}, str(path))
        model.hf_quantizer = None  # the weights are plain now
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(place)
        name_origin(place, origin or str(path))
        tokenizer.save_pretrained(place)
        _drop_tokens_beyond(place / "tokenizer.json", model.get_input_embeddings().num_embeddings)
    return f"{type(model).__name__}, of {', '.join(sorted(kinds))} weights as {str(chosen).removeprefix('torch.')}"


def check_counts(path: Path) -> None:
    """Raise ValueError if the metadata of a GGUF file declares more than the file has: readers believe the counts."""
    with path.open("rb") as file:
        size, left, order = path.stat().st_size, _MOST_VALUES, "<"

        def number(kind: str) -> int:
            data = file.read(struct.calcsize(order + kind))
            if len(data) < struct.calcsize(order + kind):
                raise ValueError(f"it ends in its metadata, at offset {file.tell()}")
            return int(struct.unpack(order + kind, data)[0])

        def skip(count: int) -> None:
            if count > size - file.tell():
                raise ValueError(f"it declares {count} bytes at offset {file.tell()}, of a file of {size}")
            file.seek(count, io.SEEK_CUR)

        def value(kind: int, depth: int = 0) -> None:
            nonlocal left
            if depth > _MOST_DEPTH or kind not in (_STRING, _ARRAY, *_SIZES):
                what = f"an unknown type, {kind}" if depth <= _MOST_DEPTH else f"arrays in {depth} arrays"
                raise ValueError(f"its metadata has {what}, at offset {file.tell()}")
            if kind == _STRING:
                skip(number("Q"))
            elif kind != _ARRAY:
                skip(_SIZES[kind])
            else:
                inner, count = number("I"), number("Q")
                left -= count
                if count > size or left < 0:
                    raise ValueError(f"it declares an array of {count} values at offset {file.tell()}")
                if inner in _SIZES:
                    skip(count * _SIZES[inner])
                else:
                    for _ in range(count):
                        value(inner, depth + 1)

        file.seek(4)
        if number("I") & 0xFFFF == 0:  # a version of two bytes at the other end
            order = ">"
        tensors, keys = number("Q"), number("Q")
        if tensors + keys > size:
            raise ValueError(f"it declares {tensors} tensors and {keys} keys, of a file of {size} bytes")
        for _ in range(keys):
            skip(number("Q"))
            value(number("I"))


def _check_net(config: Any, tensors: list[Any], hf: Any) -> None:
    """Raise ValueError if the net that the metadata describes has more numbers than the tensors of the file."""
    if config.num_hidden_layers > len(tensors):
        raise ValueError(f"it declares {config.num_hidden_layers} layers, and holds {len(tensors)} tensors")
    with torch.device("meta"):
        wanted = hf.AutoModelForCausalLM.from_config(config).num_parameters()
    if wanted > 2 * (held := sum(int(tensor.n_elements) for tensor in tensors)):  # twice: its tables may be shared
        raise ValueError(f"it declares a net of {wanted:,} parameters, and holds {held:,} numbers")


def _drop_tokens_beyond(path: Path, vocab_size: int) -> None:
    """Remove the default special tokens of a tokenizer class for which the model has no ids."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < vocab_size]
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")
