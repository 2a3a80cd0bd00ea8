"""Weights on disk: a model directory (config.json, model.safetensors, tokenizer.json) and torchscale's state dicts."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longnet_cli.configuration import digest, parse, read_text
from longnet_cli.errors import CheckpointError
from longnet_cli.model.config import LongNetConfig, parse_config
from longnet_cli.model.integrity import check_finite, check_header, tensor_digest
from longnet_cli.model.positions import XPOS_GAMMA
from longnet_cli.presets import CONFIG_SHA256, TENSORS_SHA256, TOKENIZER_SHA256, find_model

if TYPE_CHECKING:
    from longnet_cli.attention import Pattern
    from longnet_cli.model.longnet import LongNet
    from longnet_cli.model.net import Net

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"

TORCHSCALE_LAYER = {
    "self_attn_layer_norm": "attention_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.inner_attn_ln": "attention.inner_norm",
    "self_attn.out_proj": "attention.out",
    "final_layer_norm": "ffn_norm",
    "ffn.fc1": "ffn.fc1",
    "ffn.ffn_layernorm": "ffn.inner_norm",
    "ffn.fc2": "ffn.fc2",
}
TORCHSCALE_TOP = {"embed_tokens": "embedding", "layer_norm": "final_norm", "output_projection": "output"}
TORCHSCALE_PREFIX = re.compile(r"(model|decoder|encoder)\.")
TORCHSCALE_IGNORED = re.compile(r"(.*\.)?(xpos\.scale|version)")  # buffers that the configuration determines


def save_pretrained(
    model: LongNet,
    directory: str | PathLike[str],
    tokenizer_json: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model directory; `tokenizer_json` is the text of a `tokenizers` file.

    Every file is written under a temporary name, then renamed, config.json last: a directory that has one is
    complete. Digests of the tensors and of the other files are in the metadata of model.safetensors.
    `state_dict` replaces the model's own where that is sharded. Tied embeddings are one tensor. Raises CheckpointError
    where the directory cannot be written.
    """
    folder = Path(directory)
    state = model.state_dict() if state_dict is None else state_dict
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    settings = model.config.model_dump(mode="json")
    digests = {TENSORS_SHA256: tensor_digest(tensors), CONFIG_SHA256: digest(settings)}
    if tokenizer_json is not None:
        digests[TOKENIZER_SHA256] = digest(json.loads(tokenizer_json))
    names = [WEIGHTS, *([TOKENIZER] if tokenizer_json is not None else []), CONFIG]
    partial = {name: folder / f".{name}.{os.getpid()}.tmp" for name in names}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial[WEIGHTS], metadata={"format": "pt", **digests})
        _sort_metadata(partial[WEIGHTS])
        if tokenizer_json is not None:
            partial[TOKENIZER].write_text(tokenizer_json, encoding="utf-8")
        partial[CONFIG].write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(partial[CONFIG], partial[WEIGHTS])  # safetensors lets nobody else read what it writes
        for name in names:
            _flush(partial[name])
            os.replace(partial[name], folder / name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot write the model: {_one_line(error)}") from None
    finally:
        for path in partial.values():
            with suppress(OSError):  # renamed by now, or never made
                path.unlink()


def load_config(directory: str | PathLike[str], pattern: Pattern | None = None) -> LongNetConfig:
    """The configuration of a model directory, with another `pattern` if one is given.

    Raises CheckpointError (unreadable) or ConfigError (wrong, or a pattern that the net cannot have).
    """
    path = Path(directory) / CONFIG
    return parse_config(_read_config(path), str(path), pattern)


def load_pretrained(
    name_or_dir: str | PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    pattern: Pattern | None = None,
    verify: bool = True,
) -> LongNet:
    """A model from its directory, or by the name of one that ships, in eval mode; `dtype` None keeps the stored one.

    A string without a slash is a name, never a folder; a `Path` is always a folder. `pattern` takes the place of the
    model's own: the weights do not depend on it, what the net computes does. Where model.safetensors has the
    digests of `save_pretrained`, its tensors and config.json must be what was saved; `verify=False` takes them as they
    are. Raises CheckpointError of one line (a missing or damaged file, tensors missing, unexpected, of another shape,
    of integers, or not finite), ConfigError for a wrong config.json or an unknown name.
    """
    folder = _resolve(name_or_dir)
    config = load_config(folder, pattern)
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder}: {WEIGHTS} is {'not a file' if path.exists() else 'missing'}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            saved = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            check_header(config, {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}, str(path))
            model = _empty(config, {n: tuple(s.get_shape()) for n, s in slices.items()}, str(path))
            stored = {name: file.get_tensor(name) for name in slices}
            if verify and saved.get(CONFIG_SHA256, known := digest(_read_config(folder / CONFIG))) != known:
                raise CheckpointError(
                    f"{folder / CONFIG}: not what the weights were saved with: put that back, or if the change is "
                    "meant, save it from Python: load_pretrained(folder, verify=False).save_pretrained(folder)"
                )
            if verify and TENSORS_SHA256 in saved and saved[TENSORS_SHA256] != tensor_digest(stored):
                raise CheckpointError(f"{path}: damaged: the digest of its tensors is not the one it was saved with")
            # a copy, not the mapped file, which another process might write to
            tensors = {name: tensor.to(device, dtype or tensor.dtype, copy=True) for name, tensor in stored.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file: {_one_line(error)}") from None
    check_finite(tensors, str(path))
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def fingerprint(model: Net) -> str:
    """A digest of configuration and weights, 16 hex digits: equal for models that compute the same."""
    digest = hashlib.sha256(model.config.model_dump_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def from_torchscale(state_dict: Mapping[str, Tensor], config: LongNetConfig) -> LongNet:
    """A float32 LongNet with the weights of torchscale's LongNetDecoder or LongNetEncoder.

    Keys may all have a `model.`, `decoder.` or `encoder.` prefix. A net without embedding also takes the encoder out of
    a larger model, such as GigaPath's slide encoder with `LongNetConfig.gigapath()`: only keys that begin with
    `encoder.` count then. The weights were trained with head_offsets="grouped", an encoder's mostly with
    padding="zero_key": `config` has to say so. Raises CheckpointError naming the first key that is missing, has no
    place here or another shape, or an output projection that is not the embedding though `config.tie_embeddings` says
    so.
    """
    state = {k: t for k, t in state_dict.items() if not TORCHSCALE_IGNORED.fullmatch(k)}
    if not config.vocab_size:
        state = {k: t for k, t in state.items() if k.startswith("encoder.")} or state
    state = _without_prefix(state)
    places = {theirs: _from_torchscale_key(theirs) for theirs in state}
    if unknown := [theirs for theirs, ours in places.items() if ours is None]:
        raise CheckpointError(f"torchscale weights: {_names('unexpected', unknown)}")
    tensors = {ours: state[theirs].detach().to(torch.float32) for theirs, ours in places.items() if ours is not None}
    if config.tie_embeddings and config.vocab_size:
        output = tensors.pop("output.weight", None)
        embedding = tensors.get("embedding.weight")
        if output is not None and embedding is not None and not torch.equal(output, embedding):
            raise CheckpointError(
                "torchscale weights: output_projection.weight is not embed_tokens.weight; set tie_embeddings=false"
            )
    # our own copy: training the net must not change the caller's dict
    return _build(config, {name: tensor.clone() for name, tensor in tensors.items()}, "torchscale weights").eval()


def to_torchscale(model: LongNet) -> dict[str, Tensor]:
    """The state dict of torchscale's LongNetDecoder or LongNetEncoder for this net: what `from_torchscale` takes.

    Without prefix, sharing the model's memory. All that a strict load asks for is there: the output projection also
    where it is tied to the embedding, and xPos's buffers. A state dict says nothing of how it is used: torchscale
    computes it with head_offsets="grouped", a bidirectional net with padding="zero_key", and has no position="rope".
    """
    config = model.config
    layer = {ours: theirs for theirs, ours in TORCHSCALE_LAYER.items()}
    top = {ours: theirs for theirs, ours in TORCHSCALE_TOP.items()}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if module.startswith("layers."):
            _, number, inner = module.split(".", 2)
            state[f"layers.{number}.{layer[inner]}.{leaf}"] = tensor
        else:
            state[f"{top[module]}.{leaf}"] = tensor
    if config.vocab_size and config.tie_embeddings:
        state["output_projection.weight"] = state["embed_tokens.weight"]
    if config.position == "xpos":
        size = config.head_dim
        scale = (torch.arange(0, size, 2) + XPOS_GAMMA * size) / ((1 + XPOS_GAMMA) * size)
        state |= {f"layers.{i}.self_attn.xpos.scale": scale.clone() for i in range(config.num_layers)}
    return state


def _from_torchscale_key(key: str) -> str | None:
    """Our name of one of torchscale's parameters (prefix removed), None where it has no place in this net."""
    module, _, leaf = key.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    if module in TORCHSCALE_TOP:
        return f"{TORCHSCALE_TOP[module]}.{leaf}"
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    if layer and layer[2] in TORCHSCALE_LAYER:
        return f"layers.{layer[1]}.{TORCHSCALE_LAYER[layer[2]]}.{leaf}"
    return None


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip prefixes that all keys share, as of a decoder inside a fairseq model (`model.decoder.`)."""
    while state:
        match = TORCHSCALE_PREFIX.match(next(iter(state)))
        if not match or not all(key.startswith(match[0]) for key in state):
            break
        state = {key.removeprefix(match[0]): tensor for key, tensor in state.items()}
    return state


def _build(config: LongNetConfig, tensors: dict[str, Tensor], where: str) -> LongNet:
    """A net that owns `tensors`, without ever drawing the random weights that they replace."""
    model = _empty(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, where)
    model.load_state_dict(tensors, assign=True)
    return model


def _empty(config: LongNetConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> LongNet:
    """A net without memory, for tensors of these names and shapes. Raises CheckpointError where they do not fit it."""
    from longnet_cli.model.longnet import LongNet

    with torch.device("meta"):
        model = LongNet(config)
    expected = model.state_dict()
    if missing := [name for name in expected if name not in shapes]:
        raise CheckpointError(f"{where}: {_names('missing', missing)}")
    if unexpected := [name for name in shapes if name not in expected]:
        raise CheckpointError(f"{where}: {_names('unexpected', unexpected)}")
    for name, found in shapes.items():
        if found != (needed := tuple(expected[name].shape)):
            raise CheckpointError(f"{where}: {name} has shape {found}, its configuration needs {needed}")
    return model


def _read_config(path: Path) -> Any:
    try:
        return parse(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: not a model directory, {CONFIG} is missing") from None
    except (OSError, ValueError) as error:  # ValueError: not JSON, not UTF-8
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be read: {_one_line(reason)}") from None


def _resolve(name_or_dir: str | PathLike[str]) -> Path:
    """A `Path` is a directory; a string is what a person types, where a bare name is that of a shipped model."""
    if not isinstance(name_or_dir, str):
        return Path(name_or_dir)
    return find_model(name_or_dir)


def _names(what: str, names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{what} {'tensor' if len(names) == 1 else 'tensors'} {shown}"


def _sort_metadata(path: Path) -> None:
    """Put the metadata's keys in order, in place: safetensors writes them in a random one, and equal models are equal
    files.
    """
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
