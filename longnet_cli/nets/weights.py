"""Weights on disk: a model directory of config.json, model.safetensors, tokenizer.json, and other libraries' files.

Saved tensors are checked: unchanged since they were saved, of a known type, finite, and as many as expected.

Of the other libraries, transformers reads keys of config.json and tokenizer_config.json; sentence-transformers reads
two small files. Their classes for a LongNet are in `models.hf.auto_longnet`; nothing here imports them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.attention.notation import format_pattern
from longnet_cli.attention.pattern import ceil_div
from longnet_cli.basics.atomic import whole_folder
from longnet_cli.basics.configuration import parse, read_text, without_keys, without_none
from longnet_cli.basics.digests import json_sha256
from longnet_cli.basics.errors import CheckpointError, ConfigError, first_line, one_line
from longnet_cli.basics.model_files import (
    CONFIG,
    CONFIG_SHA256,
    END_OF_TEXT,
    MODEL_TYPE,
    MODULES,
    TENSORS_SHA256,
    TOKENIZER,
    TOKENIZER_SHA256,
    TRANSFORMER_CONFIGS,
    WEIGHTS,
    refuse_unreadable,
)
from longnet_cli.hub.model_names import find_model
from longnet_cli.nets.config import LongNetConfig, NetConfig, parse_config
from longnet_cli.nets.net import Net

# The types that weights can have, and their names in a file of safetensors
TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_SMALL = 1 << 24  # parameters of a net that is built in no time, whatever its shapes


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order: its own memory if that is on the CPU and in this order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def tensor_digest(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Return the SHA-256, in hex, of the names, types, shapes and bytes of tensors, whatever their order in a file.

    With `dtype`, they are first cast to it. Each tensor is hashed by itself, on all CPU cores. Then the hashes are
    hashed in the order of the names.
    """

    def one(name: str) -> bytes:
        tensor = tensors[name].to(dtype)
        head = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()
        part = hashlib.sha256(head)
        part.update(tensor_bytes(tensor))
        return part.digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return hashlib.sha256(b"".join(pool.map(one, sorted(tensors)))).hexdigest()


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError that names the first tensor with NaN or infinite numbers."""
    for name, tensor in tensors.items():
        # one pass, no copy; NaN propagates
        if not tensor.numel():
            continue
        least, most = torch.aminmax(tensor.detach())
        if not (math.isfinite(least) and math.isfinite(most)):
            raise CheckpointError(
                f"{where}: {name} has numbers that are NaN or infinite: the model is damaged"
            )


NetT = TypeVar("NetT", bound=Net)


def save_pretrained(
    model: Net,
    directory: str | PathLike[str],
    tokenizer_json: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    eos: str = "",
    foreign: Mapping[str, Any] = {},
) -> None:
    """Write a model directory; `tokenizer_json` is the text of a `tokenizers` file.

    `eos` is the tokenizer's token that ends documents, by default `<|endoftext|>` if it has that. `foreign` holds keys
    of config.json for transformers, beside `foreign_keys`; `foreign_files` are those for other libraries.

    Every file is written under a temporary name, then renamed, config.json last: a directory that has one is
    complete. The metadata of model.safetensors has digests of the tensors, the configuration and the tokenizer.
    `state_dict` replaces the model's own, for a sharded model. Tied embeddings are one tensor. Raises LongNetError
    for a directory that cannot be written.
    """
    state = model.state_dict() if state_dict is None else state_dict
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    settings = json.loads(model.config.model_dump_json())
    tokenizer = json.loads(tokenizer_json or "{}")
    ids = _ids(tokenizer)
    if END_OF_TEXT in ids:
        eos = eos or END_OF_TEXT
    digests = {TENSORS_SHA256: tensor_digest(tensors), CONFIG_SHA256: json_sha256(settings)}
    keys = settings | foreign_keys(model.config, ids.get(eos)) | dict(foreign)
    data: dict[str, Any] = {CONFIG: keys}
    if tokenizer_json is not None:
        data |= foreign_files(eos)
        digests[TOKENIZER_SHA256] = json_sha256(tokenizer)
    with whole_folder(Path(directory), CONFIG) as place:
        for name, table in data.items():
            text = json.dumps(table, indent=2, ensure_ascii=False) + "\n"
            (place / name).write_text(text, encoding="utf-8")
        if tokenizer_json is not None:
            (place / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
        with (place / WEIGHTS).open("wb") as file:
            write_tensors(file, tensors, {"format": "pt", **digests})


def load_config(directory: str | PathLike[str], pattern: Pattern | None = None) -> LongNetConfig:
    """Return the configuration of a model directory, with another `pattern` if one is given.

    Raises CheckpointError (unreadable) or ConfigError (wrong, or a pattern that the net cannot have).
    """
    path = Path(directory) / CONFIG
    return parse_config(_own_config(path), str(path), pattern)


def load_pretrained(
    build: Callable[[LongNetConfig], NetT],
    name_or_dir: str | PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    *,
    pattern: Pattern | None = None,
    verify: bool = True,
) -> NetT:
    """Load a model, built by `build`, from its directory or by the name of one that ships; return it in eval mode.

    A string may also be the name of a model on a hub; a `Path` is always a folder. `dtype` is the dtype of the weights
    in memory, whatever they are stored in; None keeps the stored dtype. `pattern` replaces the model's own; the weights
    stay the same. If model.safetensors has the digests of `save_pretrained`, its tensors and config.json must be
    unchanged; `verify=False` skips this check. Raises CheckpointError of one line (a missing or damaged file, tensors
    missing, unexpected, of another shape, of integers, or not finite), ConfigError for a wrong config.json or an
    unknown name.
    """
    folder = find_model(name_or_dir).path if isinstance(name_or_dir, str) else Path(name_or_dir)
    settings = _own_config(folder / CONFIG)
    config = parse_config(settings, str(folder / CONFIG), pattern)
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder}: {WEIGHTS} is missing, or not a file")
    refuse_unreadable(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            saved = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            model = empty_net(build, config, stored, str(path))
            if verify:
                _check_unchanged(folder, saved, json_sha256(settings), stored)
            # a copy, not the mapped file, which another process might write to
            tensors = {
                name: tensor.to(device, dtype or tensor.dtype, copy=True)
                for name, tensor in stored.items()
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: damaged or not a safetensors file: {one_line(error)}"
        ) from None
    check_finite(tensors, str(path))
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _check_unchanged(
    folder: Path,
    saved: Mapping[str, str],
    config_sha256: str,
    stored: Mapping[str, Tensor],
) -> None:
    """Raise CheckpointError if the configuration or the tensors do not have the digests that were `saved`, if any."""
    if saved.get(CONFIG_SHA256, config_sha256) != config_sha256:
        raise CheckpointError(
            f"{folder / CONFIG}: not what the weights were saved with: put that back, or if the change is "
            "meant, save it from Python: LongNet.from_pretrained(folder, verify=False).save_pretrained(folder)"
        )
    if TENSORS_SHA256 in saved and saved[TENSORS_SHA256] != tensor_digest(stored):
        raise CheckpointError(
            f"{folder / WEIGHTS}: damaged: the digest of its tensors is not the one it was saved with"
        )


def model_digest(model: Net) -> str:
    """Return a SHA-256 of configuration and weights, 64 hex digits: equal for models that compute the same."""
    if model.digest:
        return model.digest
    digest = hashlib.sha256(model.config.model_dump_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def model_origin(
    model: Net,
    name: str | None,
    tokenizer_sha256: str | None,
    digests: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the metadata of a model's outputs, without unknown values.

    The keys are `longnet.model` (its name), `longnet.model_sha256` or those of other `digests`,
    `longnet.tokenizer_sha256` and `longnet.pattern`.
    """
    return without_none(
        {
            "longnet.model": name,
            **(digests or {"longnet.model_sha256": model_digest(model)}),
            "longnet.tokenizer_sha256": tokenizer_sha256,
            "longnet.pattern": format_pattern(model.config.pattern),
        }
    )


def empty_net(
    build: Callable[[LongNetConfig], NetT],
    config: LongNetConfig,
    tensors: Mapping[str, Tensor],
    where: str,
    name_of: Callable[[str], str] = str,
) -> NetT:
    """Build a net without memory, for these `tensors`, in which `name_of` gives the name of each of the net's own.

    Raises CheckpointError for tensors of another type than `TYPE_NAMES`, for missing and surplus names, and for other
    shapes than those that are needed; also for a configuration that needs far more numbers, before a net is built.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in TYPE_NAMES:
            kinds = ", ".join(map(str, TYPE_NAMES))
            raise CheckpointError(f"{where}: {name} is of type {tensor.dtype}: weights are {kinds}")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    size = config.num_parameters()
    if size > 2 * numbers + _SMALL:
        raise CheckpointError(
            f"{where}: it has {numbers:,} numbers, its configuration needs {size:,}"
        )
    with torch.device("meta"):
        model = build(config)
    needed = {name_of(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    both = needed.keys() & stored
    shapes = [(name, stored[name], needed[name]) for name in both if stored[name] != needed[name]]
    refuse_differences(where, needed.keys() - stored, stored.keys() - needed, shapes)
    return model


def refuse_differences(
    where: str,
    missing: Iterable[str],
    unexpected: Iterable[str],
    shapes: Iterable[tuple[str, Sequence[int], Sequence[int]]] = (),
) -> None:
    """Raise CheckpointError if tensors are missing, unexpected, or of other `shapes` (name, stored, needed)."""
    groups = {"missing": sorted(missing), "unexpected": sorted(unexpected)}
    problems = [list_names(what, names) for what, names in groups.items() if names]
    for name, stored, needed in sorted(shapes)[:3]:
        problems.append(f"{name} has shape {tuple(stored)}, and the net needs {tuple(needed)}")
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}")


def _own_config(path: Path) -> dict[str, Any]:
    """Return the keys of a config.json that define the net."""
    try:
        return own_keys(parse(read_text(path)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent}: not a model directory, {CONFIG} is missing"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: not JSON, not UTF-8
        raise CheckpointError(f"{path}: cannot be read: {first_line(error)}") from None


def list_names(what: str, names: Sequence[str]) -> str:
    """Return names for a message, such as `missing tensors a, b, c and 13 more`."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{what} {'tensor' if len(names) == 1 else 'tensors'} {shown}"


def write_tensors(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file: the size of a JSON header, the header, the bytes of the tensors.

    The library's own writer orders the metadata at random (its issue #584); here, equal models give equal files.
    """
    # so each is aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    kinds = TYPE_NAMES | {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8"}
    for name in names:
        tensor = tensors[name]
        start = end
        end += tensor.nbytes
        header[name] = {
            "dtype": kinds[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(ceil_div(len(text), 8) * 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(tensor_bytes(tensors[name]))


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file that its library has written, in place: see `write_tensors`."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        file.seek(8)
        file.write(
            json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        )


TOKENIZER_CONFIG = "tokenizer_config.json"
SENTENCES = TRANSFORMER_CONFIGS[0]

# Keys that transformers writes into config.json, or `longnet`, without effect on what a LongNet computes
TRANSFORMERS_KEYS = frozenset(
    {
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "experts_implementation",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def own_keys(data: Any) -> dict[str, Any]:
    """Return a LongNet's config.json without `TRANSFORMERS_KEYS`.

    Raises ConfigError for anything but keys and values, and for a configuration of another model.
    """
    if not isinstance(data, Mapping):
        raise ConfigError("keys and values are needed")
    if (kind := data.get("model_type", MODEL_TYPE)) != MODEL_TYPE:
        raise ConfigError(f"model_type {kind!r} is not that of a LongNet, {MODEL_TYPE!r}")
    return without_keys(data, TRANSFORMERS_KEYS)


def architecture(config: NetConfig) -> str:
    """Return the name of the class that reads the model in transformers."""
    if not config.vocab_size:
        return "LongNetModel"
    return "LongNetForCausalLM" if config.causal else "LongNetForMaskedLM"


def foreign_keys(config: NetConfig, eos_id: int | None) -> dict[str, Any]:
    """Return the keys of config.json for transformers: the class, the dtype, and the id that ends documents.

    Weights are read as float32, as the commands do, whatever dtype they are stored in.
    A net that is more than a LongNet has no keys, because transformers has no class for it.
    """
    if type(config) is not LongNetConfig:
        return {}
    keys: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architectures": [architecture(config)],
        "dtype": "float32",
    }
    return keys if eos_id is None else keys | {"bos_token_id": eos_id, "eos_token_id": eos_id}


def foreign_files(eos: str) -> dict[str, Any]:
    """Return the files that stand beside a tokenizer.json, name -> JSON data.

    `eos` is the token that ends documents, and so stands before each; empty for none.
    """
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    # a text is nothing but text: a special token in it is encoded as its characters
    options: dict[str, Any] = {"split_special_tokens": True}
    if eos:
        settings |= {"bos_token": eos, "eos_token": eos}
        options["pad_token"] = eos
    reading = {"text": {"method": "embed", "method_output_name": None}}
    module = "sentence_transformers.base.modules.transformer.Transformer"
    return {
        TOKENIZER_CONFIG: settings,
        SENTENCES: {
            "modality_config": reading,
            "module_output_name": "sentence_embedding",
            "processor_kwargs": options,
        },
        MODULES: [{"idx": 0, "name": "0", "path": "", "type": module}],
    }


def _ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Return the id of each token in the data of a tokenizer.json, added ones included; not the words of Unigram."""
    vocab = tokenizer.get("model", {}).get("vocab")
    ids = dict(vocab) if isinstance(vocab, dict) else {}
    for token in tokenizer.get("added_tokens", ()):
        ids[token["content"]] = token["id"]
    ids.pop("", None)  # nobody means a token of no characters
    return ids
