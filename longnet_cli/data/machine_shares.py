"""Shares of an input, each for one of many machines, and the folder of their outputs, which is read as one data set."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from heapq import heapreplace
from typing import Any, NamedTuple

from longnet_cli.basics.errors import DataError

from .manifest import FINISHED, UNFINISHED, Manifest, parse_manifest


class Share(NamedTuple):
    """Share `number` of `count`, written `2/4`."""

    number: int
    count: int  # type: ignore[assignment]

    @classmethod
    def parse(cls, text: str) -> Share:
        """Return the share that a text such as `2/4` names. Raises ValueError for another text."""
        numbers = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        share = cls(int(numbers[1]), int(numbers[2])) if numbers else cls(0, 0)
        if not 1 <= share.number <= share.count:
            raise ValueError(f"'{text}' is no share: write I/N, with I from 1 to N, such as 2/4")
        return share

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def has_document(self, index: int) -> bool:
        """Return whether this share has a document, by its index among all documents."""
        return index % self.count == self.number - 1

    def of_files(self, files: Sequence[tuple[str, int]]) -> list[int]:
        """Return the indices of the files of this share, in order, from the name and the bytes of each file.

        The largest file comes first, and each goes to the share that has the fewest bytes so far. Of files of one
        size, the first by its name comes first.
        """
        order = sorted(range(len(files)), key=lambda index: (-files[index][1], files[index][0]))
        loads = [(0, 0, number) for number in range(1, self.count + 1)]  # bytes, files, share
        taken: list[int] = []
        for index in order:
            size, held, number = loads[0]
            heapreplace(loads, (size + files[index][1], held + 1, number))
            if number == self.number:
                taken.append(index)
        return sorted(taken)


MAY_DIFFER = ("share", "chunk", "kernel")  # settings that are a machine's own


# `read(name, size)` returns the first `size` bytes of a file, or all bytes if `size` is None.
Read = Callable[[str, int | None], bytes]


def shards_of_shares(folder: str, names: Sequence[str], read: Read) -> list[str] | None:
    """Return the shards of a folder of shares, in the order of the shares; None for another folder.

    Each folder in it holds what one share has written. `names` and `read` are those of `choose_files`. Raises DataError
    for a share that is missing, unfinished or there twice, and for folders that are no shares of one run.
    """
    manifests = _manifests_below(names)
    contents = {below: _content(name, read) for below, name in manifests.items()}
    first = next((below for below in contents if "share" in contents[below].settings), None)
    if first is None:
        return None
    settings = contents[first].settings
    count = Share.parse(settings["share"]).count
    folders: dict[int, str] = {}
    for below, manifest in contents.items():
        share = _share_beside(folder, below, manifest.settings, first, settings)
        if share.number in folders:
            raise DataError(f"{folder}: share {share} is in {folders[share.number]} and {below}")
        if not manifest.finished:
            raise DataError(
                f"{folder}/{below}: share {share} did not end: finish it with its command and --resume"
            )
        folders[share.number] = below
    shards: list[str] = []
    for number in range(1, count + 1):
        if number not in folders:
            raise DataError(f"{folder}: share {number}/{count} is missing")
        below = folders[number]
        shards += [f"{below}/{shard['name']}" for shard in contents[below].shards]
    refuse_missing(folder, shards, names, "the manifest beside it")
    return shards


def refuse_missing(folder: str, shards: Sequence[str], names: Sequence[str], index: str) -> None:
    """Raise DataError for a shard that an index lists and that is not among the names."""
    present = {*names}
    for shard in shards:
        if shard not in present:
            raise DataError(f"{folder}/{shard}: no such file, but {index} lists it")


def check_shares_below(folder: str, parent: str, names: Sequence[str], read: Read) -> None:
    """Raise DataError if the folder `parent`, somewhere below `folder`, is one of shares and not whole."""
    start = f"{parent}/"
    inside = [name.removeprefix(start) for name in names if name.startswith(start)]
    shards_of_shares(f"{folder}/{parent}", inside, lambda name, size: read(start + name, size))


def _manifests_below(names: Sequence[str]) -> dict[str, str]:
    """Return the name of the manifest of each folder that has one; that of an unfinished run counts first."""
    manifests: dict[str, str] = {}
    for name in sorted(names):
        below, _, file = name.rpartition("/")
        if not below or "/" in below:
            continue
        if file == UNFINISHED or (file in FINISHED and below not in manifests):
            manifests[below] = name
    return manifests


def _content(name: str, read: Read) -> Manifest:
    """Return a manifest; one without settings in place of one that is damaged."""
    try:
        return parse_manifest(name, read(name, None))
    except ValueError:
        return Manifest({})


def _share_beside(
    folder: str,
    below: str,
    settings: dict[str, Any],
    first: str,
    first_settings: dict[str, Any],
) -> Share:
    """Return the share in the folder `below`. Raises DataError unless it is of the same run as the first one."""
    beside = f"beside share {first_settings['share']} in {folder}/{first}"
    if "share" not in settings:
        raise DataError(f"{folder}/{below} is no share, {beside}: name the folders to read")
    share = Share.parse(settings["share"])
    if share.count != Share.parse(first_settings["share"]).count:
        raise DataError(f"{folder}/{below} is share {share}, {beside}: name one run")
    for name in {**first_settings, **settings}:
        if name not in MAY_DIFFER and settings.get(name) != first_settings.get(name):
            raise DataError(
                f"{folder}/{below}: {name} is {settings.get(name)!r}, {beside}, where it is "
                f"{first_settings.get(name)!r}: the shares of one run have the same inputs and options"
            )
    return share
