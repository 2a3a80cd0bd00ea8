"""The names of the files in a model's folder, and of what stands in them."""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from .configuration import parse, read_text
from .errors import CheckpointError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
# what transformers writes beside the shards of a large model
SHARDED = "model.safetensors.index.json"
GENERATION = "generation_config.json"
# files that may stand beside a tokenizer.json: they tell a library how to build the tokenizer and write a chat
BESIDE_TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# of sentence-transformers: the prompts, the list of modules, and names that the configuration of the first one has had
PROMPTS = "config_sentence_transformers.json"
MODULES = "modules.json"
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# all that is read beside config.json and the weights; a module has a folder, such as 1_Pooling
BESIDE_MODEL = (
    GENERATION,
    SHARDED,
    TOKENIZER,
    *BESIDE_TOKENIZER,
    MODULES,
    PROMPTS,
    *TRANSFORMER_CONFIGS,
    "[0-9]_*/*.json",
    "[0-9]_*/model.safetensors",
)
END_OF_TEXT = "<|endoftext|>"  # of the tokenizers that `longnet` makes
# `model_type` in config.json of a LongNet: the error of a library that does not know it shows nothing else of a folder
MODEL_TYPE = "longnet: import longnet_cli.integrations.transformers"

# Metadata keys of model.safetensors: digests of what was saved together. Other tools drop them when they save.
TENSORS_SHA256 = "longnet.tensors_sha256"
CONFIG_SHA256 = "longnet.config_sha256"
TOKENIZER_SHA256 = "longnet.tokenizer_sha256"


T = TypeVar("T", list[Any], dict[str, Any])


def read_or_empty(path: Path, kind: type[T]) -> T:
    """Return the list or the table in a JSON file; an empty one without a readable file, or for another value in it."""
    with suppress(OSError, ValueError):
        data = parse(read_text(path))
        if isinstance(data, kind):
            return data
    return kind()


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files with the weights of a model, as its index lists them."""
    if not (folder / WEIGHTS).exists():
        places = read_or_empty(folder / SHARDED, dict).get("weight_map")
        if isinstance(places, dict):
            return sorted({*map(str, places.values())})
    return [WEIGHTS]


def refuse_unreadable(path: Path) -> None:
    """Raise CheckpointError for a file that is there but may not be read, which a library would call damaged."""
    try:
        with suppress(FileNotFoundError):  # its reader knows what else would do
            path.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}") from error


def copy_files(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy those of the files with these names that are in the folder `source`."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def first_bytes(path: Path, size: int) -> bytes:
    """Return the first bytes of a file, at most `size`; none of what is no file, or cannot be read."""
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(size)
    return b""


def is_within(name: str) -> bool:
    """Return whether a file's name, which a hub or a folder's file says, stays below the folder."""
    return not (name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name)
