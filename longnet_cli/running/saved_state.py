"""The state of a `CausalStream` in a folder, whole or not there at all: all that later tokens need of those read.

    FOLDER/
        manifest.json         digests of model and tokenizer, pattern, dtype, tokens; size and SHA-256 of each piece
        piece-*.safetensors   keys and values by layer, and the token ids that name blocks

A new state of the same folder has pieces of other names. When they are on the disk, its manifest replaces the old one,
in one step. Then all pieces are removed that it does not list, also those that a killed save has left: who has mapped
them keeps them.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longnet_cli.basics.atomic import (
    is_temporary,
    locked_folder,
    missing_folders,
    remove_empty,
    writing,
)
from longnet_cli.basics.errors import CheckpointError, ConfigError, DataError, one_line
from longnet_cli.basics.sealed_manifests import find_mismatch, read_sealed, write_sealed
from longnet_cli.nets.net import Net
from longnet_cli.nets.weights import model_digest, model_origin, write_tensors

MANIFEST = "manifest.json"
PIECE = re.compile(r"piece-[0-9a-f]{8}-\d{5,}\.safetensors")
STATE_VERSION = 4
KIND = "longnet state"
READER = "reader_sha256"
FILE_BYTES = 1 << 26  # a file is full when it has as many

# What must be as it was when the state was saved: the key in the manifest, and how to say that it is not
_SAME = {
    "longnet.pattern": "it was saved{by} with the pattern {saved}, and this is {given}: name both (--model, --pattern)",
    "dtype": "it was saved in {saved}, and this run computes in {given} (--dtype)",
    "longnet.tokenizer_sha256": "it was saved with another tokenizer, of SHA-256 {saved:.12}..., not {given:.12}...",
    READER: "it was saved by another model{name}: its weights or its configuration differ",
}


def reader_facts(
    model: Net,
    name: str | None = None,
    tokenizer_sha256: str | None = None,
) -> dict[str, str]:
    """Return what a state notes of the model that has read it, without unknown values.

    `reader_sha256` is a digest of all that the state depends on: weights and configuration.
    """
    return model_origin(model, name, tokenizer_sha256, {READER: model_digest(model)})


def check_place(folder: Path) -> None:
    """Raise ConfigError for a folder that cannot be made, or that holds anything else than a state."""
    try:
        if new_folders := missing_folders(folder):
            folder.mkdir(parents=True)
            remove_empty(new_folders)
        elif _listed(folder) is None:  # a killed save may have left pieces without a manifest
            names = [name for name in os.listdir(folder) if not PIECE.fullmatch(name)]
            if not all(map(is_temporary, names)):
                raise ConfigError(f"{folder}: neither an empty folder nor a state: name a new one")
    except OSError as error:
        raise ConfigError(f"{folder}: a state cannot be saved here: {error.strerror}") from None


def _listed(folder: Path) -> set[str] | None:
    """Return the names of the pieces that the manifest of a state lists; None without such a manifest."""
    with suppress(CheckpointError, OSError):
        saved = read_sealed(folder / MANIFEST, STATE_VERSION)
        if saved.get("kind") == KIND:
            return {*saved["files"]}
    return None


def write_state(
    folder: Path,
    facts: Mapping[str, object],
    tensors: Iterable[tuple[str, Tensor]],
) -> int:
    """Write a state, in place of the one that the folder holds; return its bytes.

    Raises ConfigError for a folder that holds anything else or that another process writes to; LongNetError for a full
    disk or a failed write. The folder then holds what it held before.
    """
    check_place(folder)
    name_of_save = f"piece-{secrets.token_hex(4)}"
    with locked_folder(folder), writing(folder):
        sizes = {}
        try:
            for number, piece in enumerate(_pieces(tensors)):
                path = folder / f"{name_of_save}-{number:05}.safetensors"
                with path.open("wb") as file:
                    write_tensors(file, piece, {})
                sizes[path.name] = path.stat().st_size
            write_sealed(folder / MANIFEST, STATE_VERSION, {"kind": KIND, **facts}, sizes)
        finally:
            listed = _listed(folder) or ()
            for path in folder.iterdir():
                if PIECE.fullmatch(path.name) and path.name not in listed:
                    path.unlink()
    return sum(sizes.values())


def read_state(folder: Path, facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the facts of a state, and its tensors by name, which are mapped from its files.

    `facts` are those of the caller. Raises ConfigError for a folder without a state, and if they are not those of the
    state; DataError for a state that is not as it was written.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ConfigError(f"{folder}: no state, {MANIFEST} is missing")
    try:
        saved = read_sealed(path, STATE_VERSION)
        if saved.get("kind") != KIND:
            raise ConfigError(f"{folder}: no state, {MANIFEST} is of another kind")
        model = saved.get("longnet.model")
        names = {"name": f", {model}", "by": f" by {model}"} if model else {"name": "", "by": ""}
        for key, why in _SAME.items():
            at_saving = saved.get(key)
            now = facts.get(key)
            if at_saving and now and at_saving != now:
                raise ConfigError(f"{folder}: {why.format(saved=at_saving, given=now, **names)}")
        if damage := find_mismatch(path, STATE_VERSION):
            raise CheckpointError(damage)
        tensors: dict[str, Tensor] = {}
        for name in saved["files"]:
            with safe_open(folder / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (CheckpointError, OSError, SafetensorError) as error:
        raise DataError(f"{folder}: a damaged state: {one_line(error)}") from None
    return saved, tensors


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in a state."""
    return str(dtype).removeprefix("torch.")


def _pieces(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of one file after the other."""
    piece: dict[str, Tensor] = {}
    for name, tensor in tensors:
        piece[name] = tensor
        if sum(x.nbytes for x in piece.values()) >= FILE_BYTES:
            yield piece
            piece = {}
    if piece:
        yield piece
