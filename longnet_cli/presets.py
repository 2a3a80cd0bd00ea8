"""The lookup of `--model`: a shipped model by its name, or a folder by its path."""

from __future__ import annotations

import os
from pathlib import Path

from longnet_cli.configuration import nearest, parse, read_text
from longnet_cli.errors import CheckpointError, ConfigError, refuse_web_address

MODEL_FILES = ("config.json", "model.safetensors")
SHARDED = "model.safetensors.index.json"  # what transformers writes beside the shards of a large model
PICKLED = "pytorch_model*.bin*"
MODEL_TYPE = "longnet"  # in config.json of a LongNet; older ones lack it

# Metadata keys of model.safetensors: digests of what was saved together. Other tools drop them when they save.
TENSORS_SHA256, CONFIG_SHA256 = "longnet.tensors_sha256", "longnet.config_sha256"
TOKENIZER_SHA256 = "longnet.tokenizer_sha256"


def preset_dir() -> Path:
    """Return the repository's `models/`: inside the package if installed from a wheel, beside it in a checkout."""
    shipped = Path(__file__).parent / "models"
    return shipped if shipped.is_dir() else Path(__file__).parents[1] / "models"


def list_models() -> list[str]:
    """Return the names of the shipped models with weights, sorted; recipes (`*.toml`) are not included."""
    return sorted(path.parent.name for path in preset_dir().glob("*/config.json"))


def find_model(name_or_path: str, *, files: bool = False) -> Path:
    """Return the folder of a model. A name is looked up among the shipped models only, never in the current folder.

    With `files` it may also be a GGUF file. Raises ConfigError for a name that is not shipped, CheckpointError for a
    path that holds no complete model.
    """
    refuse_web_address(name_or_path)
    if is_gguf(Path(name_or_path)):
        if files:
            return Path(name_or_path)
        raise CheckpointError(
            f"{name_or_path}: a GGUF file: make a folder of it, longnet convert {name_or_path} -o DIR"
        )
    if not _is_path(name_or_path):
        if name_or_path not in list_models():
            raise ConfigError(_unknown(name_or_path))
        return _complete(preset_dir() / name_or_path)
    return _complete(Path(name_or_path))


def is_gguf(path: Path) -> bool:
    """Return whether a model is a GGUF file, by its first bytes, rather than a folder."""
    try:
        with path.open("rb") as file:
            return path.is_file() and file.read(4) == b"GGUF"
    except OSError:
        return False


def model_metadata(folder: Path) -> dict[str, str]:
    """Return the metadata in the header of a model's model.safetensors; an empty dict if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    path = folder / "model.safetensors"
    try:
        if not path.is_file():
            return {}
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):  # loading the weights will report it
        return {}


def is_of_transformers(folder: Path) -> bool:
    """Return whether a model is a Hugging Face transformers model; False if its config.json cannot be read.

    A LongNet does not count, though transformers can open it. A GGUF file counts, since it is converted to one.
    """
    if folder.is_file():
        return is_gguf(folder)
    try:
        data = parse(read_text(folder / "config.json"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("model_type", data.get("architectures")) not in (None, MODEL_TYPE)


def _is_path(text: str) -> bool:
    return "/" in text or os.sep in text or text.endswith(".toml")


def _unknown(name: str) -> str:
    shipped = list_models()
    match = nearest(name, shipped)
    hint = f": did you mean '{match}'?" if match else "."
    if (preset_dir() / f"{name}.toml").is_file():
        hint = ": it is shipped as a recipe, without weights; `longnet train` makes them."
    return (
        f"unknown model '{name}'{hint} Shipped models: {', '.join(shipped) or 'none'}; "
        f"a path needs a slash, e.g. ./{name or 'my-run'}"
    )


def _complete(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; expected a model")
    for path in map(folder.joinpath, MODEL_FILES):
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: not a file: a folder, a pipe or a device")
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if (folder / SHARDED).is_file() and is_of_transformers(folder):
        missing = []
    if missing:
        if any(folder.glob(PICKLED)):
            raise CheckpointError(
                f"{folder}: pickled weights are never read, since a pickle can run code: save them as safetensors"
            )
        raise CheckpointError(f"{folder}: not a complete model, {' and '.join(missing)} missing")
    return folder
