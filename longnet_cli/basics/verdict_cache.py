"""Answers about a model that cost time to find, kept for the next run in the user's cache folder.

    remembered({"trial": "chunks", "config": "3f2a..."}, find)

Each answer is a file, CACHE/longnet/verdicts/DIGEST.json, and CACHE is $XDG_CACHE_HOME or ~/.cache. The digest is of
what was asked and of the versions of the libraries, so a new version asks again. All files may be removed at any time.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .atomic import write_file
from .configuration import parse, read_text
from .digests import json_sha256
from .errors import LongNetError
from .finite_json import to_json

_LIBRARIES = ("longnet-cli", "torch", "transformers")


def remembered(asked: Mapping[str, Any], find: Callable[[], Any]) -> Any:
    """Return what `find` returns, a JSON value, or what it returned for the same `asked` and versions before.

    A file that cannot be read, or that answers something else, is found again; a folder that cannot be written keeps
    nothing.
    """
    question = {**asked, "versions": {name: _version(name) for name in _LIBRARIES}}
    path = cache_folder() / "verdicts" / f"{json_sha256(question)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        answer = parse(read_text(path))
        if answer["asked"] == question:
            return answer["found"]
    verdict = find()
    with suppress(LongNetError, OSError):
        write_file(path, to_json({"asked": question, "found": verdict}, indent=1).encode() + b"\n")
    return verdict


def cache_folder() -> Path:
    """Return the folder of our own files in the user's cache, which need not exist."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "longnet")
    except RuntimeError:  # a user without a home, who has no cache
        return Path(os.devnull)


@cache
def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
