"""The data files of a folder, local or in a store: the shards of a data set in its order, or every text."""

import json
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from itertools import filterfalse
from os.path import commonprefix
from pathlib import PurePosixPath
from posixpath import dirname

from longnet_cli.basics.errors import ConfigError, DataError, InputWarning

from .file_kinds import (
    HDF5_SUFFIXES,
    JSON_SUFFIXES,
    PACKED_KINDS,
    PACKED_SUFFIXES,
    SHARD_SUFFIXES,
    bare_name,
    is_named_text,
    sniff,
)
from .machine_shares import (
    Read,
    check_shares_below,
    folders_with,
    refuse_missing,
    shards_of_shares,
)
from .manifest import MANIFESTS, UNFINISHED, manifest_in, parse_manifest

# The words by which Hugging Face knows a split in the name of a file
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation")

MOST_NAMED = 20  # kinds of files that are not read


def choose_files(folder: str, names: Sequence[str], read: Read) -> list[str]:
    """Choose the files to read below a folder: the shards of a data set in its order, otherwise every text.

    A warning names the other files. Files without an order of their own are sorted naturally. A data set or a run that
    `longnet` wrote below the folder is skipped if there are other files, because it may be the output that is being
    written. `names` are relative paths.
    Raises DataError for a folder without readable files, a missing shard and an unfinished or damaged data set,
    ConfigError for a data set of several splits, also by the names of its files.
    """
    if (shards := _shards_of_data_set(folder, names, read)) is not None:
        return shards
    data_sets = folders_with(names, *MANIFESTS)
    for parent in sorted({*map(dirname, data_sets)} - {""}):
        check_shares_below(folder, parent, names, read)
    if "dataset_dict.json" in names:
        raise _several(folder, sorted({name.split("/")[0] for name in names if "/" in name}))
    files = sorted(filterfalse(is_hidden, names), key=natural_order)
    runs = folders_with(names, "recipe.json") & folders_with(names, "metrics.jsonl")
    written = tuple(f"{below}/" for below in data_sets | runs)
    files = [file for file in files if not file.startswith(written)] or files
    chosen = _shards_among(files)
    _refuse_splits(folder, chosen)
    chosen = chosen or _texts_among(files, read)
    if not chosen:
        raise DataError(
            f"{folder}: the folder holds nothing readable (Arrow, Parquet, JSON Lines, text or HDF5 files)"
        )
    _tell_unread(folder, files, chosen)
    return chosen


def _shards_among(files: Sequence[str]) -> list[str]:
    """Return the files of tables, otherwise those of JSON Lines; those in subfolders only if there are no others."""
    for suffixes in (SHARD_SUFFIXES, JSON_SUFFIXES):
        if shards := _ending(files, suffixes):
            return [shard for shard in shards if "/" not in shard] or shards
    return []


def _texts_among(files: Sequence[str], read: Read) -> list[str]:
    """Return the texts or, where all of these are empty, the HDF5 files."""
    texts: dict[str, bytes] = {}  # with their first byte
    for file in files:
        head = read(file, 8192)
        if _looks_like_text(file, head):
            texts[file] = head[:1]
    if any(texts.values()):
        return [*texts]
    return _ending(files, HDF5_SUFFIXES) or [*texts]


def _ending(files: Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    """Return the files whose names have one of these endings, also before that of a compression."""
    return [file for file in files if bare_name(file).endswith(suffixes)]


def _shards_of_data_set(folder: str, names: Sequence[str], read: Read) -> list[str] | None:
    """Return the shards of a folder that is one data set, by its index; None for another folder.

    The folders of all shares of a run are one data set. The arguments and the errors are those of `choose_files`.
    """

    # `datasets.save_to_disk` writes this index, and may leave caches beside the shards
    index: str | None = "state.json"
    shards = _data_files(read("state.json", None)) if "state.json" in names else []
    if not shards:
        index = manifest_in(names)
        if index is None:
            return shards_of_shares(folder, names, read)
        if index == UNFINISHED:
            raise DataError(
                f"{folder}: the run that wrote this data did not end: finish it with its command and --resume"
            )
        try:
            manifest = parse_manifest(index, read(index, None))
        except ValueError:
            raise DataError(f"{folder}/{index}: changed or damaged after it was written") from None
        shards = [shard["name"] for shard in manifest.shards]
    refuse_missing(folder, shards, names, f"{folder}/{index}")
    return shards


def _data_files(state: bytes) -> list[str]:
    """Return the shards that a state.json lists; none if it is that of another program."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        return [str(file["filename"]) for file in json.loads(state)["_data_files"]]
    return []


def _tell_unread(folder: str, files: Sequence[str], chosen: Sequence[str]) -> None:
    """Warn of the files beside the `chosen` ones, by their names."""
    alike: dict[str, list[str]] = {}  # by their suffix
    for file in sorted({*files} - {*chosen}, key=natural_order):
        alike.setdefault(PurePosixPath(bare_name(file)).suffix, []).append(file)
    if not alike:
        return
    examples = []
    for first, *others in alike.values():
        more = f" and {len(others)} like it" if others else ""
        examples.append(f"{first}{more}")
    if len(examples) > MOST_NAMED:
        examples[MOST_NAMED:] = ["..."]
    beside = f"the {len(chosen)} files like {chosen[0]}" if len(chosen) > 1 else chosen[0]
    count = sum(map(len, alike.values()))
    what = f"{count} files are" if count > 1 else "1 file is"
    sentence = f"{what} not read beside {beside}: {', '.join(examples)}"
    warnings.warn(f"{folder}: {sentence}", InputWarning, stacklevel=2)


def _refuse_splits(folder: str, shards: Sequence[str]) -> None:
    """Raise ConfigError if the names of shards say that they are several splits, as in a folder from a hub."""
    shards_of = defaultdict[str, list[str]](list)
    for shard in shards:
        top, _, name = shard.rpartition("/")
        stem = bare_name(name).rpartition(".")[0]
        words = [*filter(None, re.split(r"[-_. 0-9]+|of", stem))]
        named = [word for word in (*words[:1], *words[-1:], top.lower()) if word in _SPLITS]
        if named:
            shards_of[_SPLITS[named[0]]].append(shard)
    if len(shards_of) > 1:
        raise _several(folder, [_glob(shards_of[split]) for split in sorted(shards_of)])


def _glob(names: Sequence[str]) -> str:
    """Return a glob for files that are all of one split."""
    start = commonprefix(names)  # noqa: RUF071 (of characters)
    ending = names[0].rpartition("/")[2].rpartition(".")[2]
    return names[0] if len(names) == 1 else f"{start.rstrip('0123456789')}*.{ending}"


def _several(folder: str, splits: Sequence[str]) -> ConfigError:
    one = ", ".join(f"{folder}/{split}" for split in splits)
    return ConfigError(f"{folder} holds several splits of a data set: name one of {one}")


def is_hidden(path: str) -> bool:
    """Return whether a file or folder is skipped, because its name or that of a folder around it says so."""
    return re.search(r"(^|/)(\.|__pycache__(/|\Z))", path) is not None


def _looks_like_text(name: str, head: bytes) -> bool:
    """Return whether a file found in a folder is worth opening: an image is not, and an empty file is an empty text.

    A compressed file is worth opening if its suffix names the compression, and it is not an archive of many files. A
    file whose suffix names a kind of text is opened, whatever it holds.
    """
    kind = sniff(head)
    if kind in PACKED_KINDS:
        return name.lower().endswith(PACKED_SUFFIXES) and not bare_name(name).endswith(".tar")
    return is_named_text(name) or b"\0" not in head or kind not in ("text", "hdf5")


def natural_order(name: str) -> list[str | int]:
    """Return a sort key that puts part-2 before part-10."""
    parts: list[str | int] = [*re.split(r"([0-9]+)", name)]
    parts[1::2] = map(int, parts[1::2])
    return parts
