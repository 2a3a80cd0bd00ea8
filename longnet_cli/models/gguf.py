"""Conversion of a GGUF file, the format of llama.cpp, to an ordinary Hugging Face model folder. Needs the extra `gguf`.

transformers reads the file and undoes its quantization. The new folder loads anywhere, without GGUF.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longnet_cli.basics.atomic import whole_folder
from longnet_cli.basics.errors import CheckpointError, ConfigError, one_line
from longnet_cli.hub.model_names import name_origin
from longnet_cli.models import gguf_metadata
from longnet_cli.nets.weights import check_finite

_NEEDED = ("transformers", "gguf", "accelerate")
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # types that are not quantized

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
        raise ConfigError(f"{path}: GGUF needs {', '.join(missing)}: pip install 'longnet-cli[gguf]'")
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
            arch = gguf_metadata.value_of(reader.fields["general.architecture"])
            config = gguf_metadata.complete(config, reader, gguf_metadata.reads(path, arch))
            surplus = _check_net(config, arch, tensors, hf)
            with redirect_stderr(_Bar(on_percent)):  # no option turns the library's bar off
                model, report = hf.AutoModelForCausalLM.from_pretrained(
                    path.parent, config=config, dtype=chosen, output_loading_info=True, **given
                )
            tokenizer = hf.AutoTokenizer.from_pretrained(path.parent, **given)
            gguf_metadata.split_words(tokenizer, reader)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except Exception as error:  # readers of a foreign format may raise anything
            raise CheckpointError(f"{path}: transformers cannot read it: {one_line(error)}") from None
        _check_weights(model, {*report["missing_keys"]}, surplus | {*report["unexpected_keys"]}, path)
        check_finite({name: parameter.detach() for name, parameter in model.named_parameters()}, str(path))
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
    if any(getattr(model.config, setting, False) for setting in gguf_metadata.BIASES):
        for name in [name for name in missing if name.endswith("_proj.bias")]:
            torch.nn.init.zeros_(model.get_parameter(name))
            missing.remove(name)
    if getattr(model.config, "rope_parameters", None):
        surplus -= gguf_metadata.ROPE_TENSORS  # they are in the configuration
    for what, names in (("weights are missing", missing), ("the net has no place for weights", surplus)):
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
                raise ValueError(f"it declares {asked} bytes at offset {offset}, of a file of {size}")
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
        raise ValueError(f"it declares {config.num_hidden_layers} layers, and holds {len(tensors)} tensors")
    with torch.device("meta"):
        net = hf.AutoModelForCausalLM.from_config(config)
    wanted = net.num_parameters()
    if wanted > 2 * (held := sum(int(tensor.n_elements) for tensor in tensors)):  # twice: its tables may be shared
        raise ValueError(f"it declares a net of {wanted:,} parameters, and holds {held:,} numbers")
    if arch in gguf_metadata.quick_readers():
        return set()  # transformers reports these names itself
    process = reading.TENSOR_PROCESSORS.get(arch, reading.TensorProcessor)(config=config.to_dict())
    places = reading.get_gguf_hf_weights_map(net, process)
    names = {tensor.name for tensor in tensors}
    return {name for name in names if name not in places and name.removesuffix(".weight") not in places}


def _drop_tokens_beyond(path: Path, vocab_size: int) -> None:
    """Remove the default special tokens of a tokenizer class for which the model has no ids."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < vocab_size]
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False), encoding="utf-8")
