"""Manifests that say what a folder is: JSON of a version and facts, sealed by a digest of its own.

That of a checkpoint of a run or a state of a stream also has the size and SHA-256 of every other file in the folder.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .atomic import flush, write_file
from .configuration import parse, read_text
from .digests import file_sha256, json_sha256
from .errors import CheckpointError


def seal(version: int, content: Mapping[str, Any]) -> str:
    """Return a manifest: JSON of its version and content, which ends with a digest of both."""
    sealed = json.loads(json.dumps({"version": version, **content}))  # as it will be read back
    return json.dumps({**sealed, "digest": json_sha256(sealed)}, indent=1) + "\n"


def unseal(text: str, version: int) -> dict[str, Any]:
    """Return the content of what `seal` has made. Raises ValueError if it was changed, or is of another version."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        content = parse(text)
        if content.pop("digest") == json_sha256(content) and content.pop("version") == version:
            return content
    raise ValueError(
        f"it was changed or damaged after it was written, or is not of version {version}"
    )


def write_sealed(path: Path, version: int, facts: Mapping[str, Any], names: Iterable[str]) -> None:
    """Flush the files of these names, then write the manifest beside them: a folder that has it is whole.

    Raises OSError and LongNetError.
    """
    files = {}
    for name in sorted(names):
        file = path.with_name(name)
        flush(file)
        files[name] = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    write_file(path, seal(version, {**facts, "files": files}).encode())  # also flushes the folder
    flush(path.parent.parent)  # which the folder may be new in


def read_sealed(path: Path, version: int) -> dict[str, Any]:
    """Return facts and files. Raises CheckpointError if they are not what was written, OSError if missing.

    The files are beside the manifest: no name of one leads elsewhere.
    """
    try:
        state = unseal(read_text(path), version)
        if not all(map(_is_file_of, state["files"].items())):
            raise ValueError("it lists what is no file beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name}: {error}") from None
    return state


def _is_file_of(item: tuple[str, Any]) -> bool:
    """Return whether an item of a manifest's files has a plain name, a size and a digest."""
    name, facts = item
    plain = name not in ("", ".", "..") and "/" not in name and "\0" not in name
    return plain and type(facts["bytes"]) is int and isinstance(facts["sha256"], str)


def find_mismatch(path: Path, version: int) -> str | None:
    """Compare the files of a manifest with their sizes and SHA-256; return what is wrong, or None."""
    try:
        for name, facts in read_sealed(path, version)["files"].items():
            file = path.with_name(name)
            size = file.stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size:,} bytes of {facts['bytes']:,}"
            if file_sha256(file) != facts["sha256"]:
                return f"the SHA-256 of {name} is not the one it was saved with"
    except OSError as error:
        return f"{Path(error.filename or path.parent).name}: {error.strerror}"
    except CheckpointError as error:
        return str(error)
    return None
