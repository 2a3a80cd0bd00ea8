"""A JSON file that says what a folder is: its version and facts, and size and SHA-256 of every other file in it.

Checkpoints of a run and states of a stream have one. Its own SHA-256 is in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longnet_cli.atomic import file_sha256, write_file
from longnet_cli.configuration import parse, read_text
from longnet_cli.errors import CheckpointError


def write_manifest(path: Path, version: int, facts: Mapping[str, Any]) -> None:
    """Write the manifest of the folder that it is in, and flush the folder. Raises OSError and LongNetError."""
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(path.parent.iterdir())
        if file != path
    }
    state = json.loads(json.dumps({"version": version, **facts, "files": files}))
    data = {"state": state, "sha256": hashlib.sha256(_canonical(state)).hexdigest()}
    write_file(path, json.dumps(data, indent=1).encode())  # also flushes the folder


def read_manifest(path: Path, version: int) -> dict[str, Any]:
    """Return version, facts and files. Raises CheckpointError if they are not what was written, OSError if missing."""
    try:
        data = parse(read_text(path))
        state, digest = data["state"], data["sha256"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path.name} was changed or damaged after it was written") from None
    if hashlib.sha256(_canonical(state)).hexdigest() != digest:
        raise CheckpointError(f"{path.name} was changed or damaged after it was written")
    if state.get("version") != version:
        raise CheckpointError(f"{path.name} has version {state.get('version')}, not {version}")
    return state


def find_damage(path: Path, version: int) -> str | None:
    """Compare the files of a manifest with their sizes and SHA-256; return what is wrong, or None."""
    try:
        for name, known in read_manifest(path, version)["files"].items():
            size = (path.parent / name).stat().st_size
            if size != known["bytes"]:
                return f"{name} has {size:,} bytes of {known['bytes']:,}"
            if file_sha256(path.parent / name) != known["sha256"]:
                return f"the SHA-256 of {name} is not the one it was saved with"
    except OSError as error:
        return f"{Path(error.filename or path.parent).name}: {error.strerror}"
    except CheckpointError as error:
        return str(error)
    return None


def _canonical(state: Any) -> bytes:
    return json.dumps(state, sort_keys=True).encode()
