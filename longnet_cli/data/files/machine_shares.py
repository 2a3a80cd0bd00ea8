"""Shares of an input, each for one of many machines, and the folder of their outputs, which is read as one data set."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from heapq import heapreplace
from posixpath import basename, dirname
from typing import Any, NamedTuple

from longnet_cli.basics.configuration import without_keys
from longnet_cli.basics.errors import DataError

from .manifest import MANIFESTS, Manifest, differing, parse_manifest


class Share(NamedTuple):
    """Share `number` of `count`, written `2/4`.

    It is a share of the files (`Inputs.files` takes it) or, where there are fewer files than shares, of the documents
    (`DocumentPass` takes it).
    """

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

        def largest_first(index: int) -> tuple[int, str]:
            name, size = files[index]
            return -size, name

        loads = [(0, 0, number) for number in range(1, self.count + 1)]  # bytes, files, share
        mine: list[int] = []
        for index in sorted(range(len(files)), key=largest_first):
            _, size = files[index]
            held_bytes, held_files, number = loads[0]
            heapreplace(loads, (held_bytes + size, held_files + 1, number))
            if number == self.number:
                mine.append(index)
        return sorted(mine)


MAY_DIFFER = ("share", "chunk", "kernel")  # settings that are a machine's own


# `read(name, size)` returns the first `size` bytes of a file, or all bytes if `size` is None.
Read = Callable[[str, int | None], bytes]


def shards_of_shares(folder: str, names: Sequence[str], read: Read) -> list[str] | None:
    """Return the shards of a folder of shares, in the order of the shares; None for another folder.

    Each folder in it holds what one share has written. `names` and `read` are those of `choose_files`. Raises DataError
    for a share that is missing, unfinished or there twice, and for folders that are no shares of one run.
    """
    manifests = _manifests_below(names, read)
    first = next((below for below in manifests if "share" in manifests[below].settings), None)
    if first is None:
        return None
    run = manifests[first].settings
    count = Share.parse(run["share"]).count
    folders: dict[int, str] = {}
    for below, manifest in manifests.items():
        _check_same_run(f"{folder}/{below}", manifest.settings, run, f"{folder}/{first}")
        share = Share.parse(manifest.settings["share"])
        if not manifest.finished:
            raise DataError(
                f"{folder}/{below}: share {share} did not end: finish it with its command and --resume"
            )
        earlier = folders.setdefault(share.number, below)
        if earlier != below:
            raise DataError(f"{folder}: share {share} is in {earlier} and {below}")
    shards: list[str] = []
    for number in range(1, count + 1):
        if number not in folders:
            raise DataError(f"{folder}: share {number}/{count} is missing")
        below = folders[number]
        shards += [f"{below}/{shard['name']}" for shard in manifests[below].shards]
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


def folders_with(names: Sequence[str], *files: str) -> set[str]:
    """Return the folders below the outermost that hold one of these files."""
    return {dirname(name) for name in names if basename(name) in files} - {""}


def _manifests_below(names: Sequence[str], read: Read) -> dict[str, Manifest]:
    """Return the manifest of each folder that has one, without settings if it is damaged."""
    manifests: dict[str, Manifest] = {}
    for name in MANIFESTS:
        for below in sorted(folders_with(names, name) - manifests.keys()):
            if "/" in below:
                continue
            try:
                manifests[below] = parse_manifest(name, read(f"{below}/{name}", None))
            except ValueError:
                manifests[below] = Manifest({})
    return dict(sorted(manifests.items()))


def _check_same_run(
    folder: str,
    settings: dict[str, Any],
    run: dict[str, Any],
    run_folder: str,
) -> None:
    """Raise DataError unless a folder of these settings has a share of the run that another folder has a share of."""
    beside = f"beside share {run['share']} in {run_folder}"
    if "share" not in settings:
        raise DataError(f"{folder} is no share, {beside}: name the folders to read")
    if Share.parse(settings["share"]).count != Share.parse(run["share"]).count:
        raise DataError(f"{folder} is share {settings['share']}, {beside}: name one run")
    for name in differing(without_keys(run, MAY_DIFFER), without_keys(settings, MAY_DIFFER)):
        raise DataError(
            f"{folder}: {name} is {settings.get(name)!r}, {beside}, where it is {run.get(name)!r}: "
            "the shares of one run have the same inputs and options"
        )
