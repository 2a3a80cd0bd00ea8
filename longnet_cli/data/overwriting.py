"""Checks that no command destroys its input, or one of its outputs: a file under any other name is the same file."""

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.names import Sources

Identity = tuple[int, int]  # device and inode: the same for hard links, symbolic links and other spellings of a path


def refuse_overwriting(
    option: str,
    outputs: Sequence[str | Path],
    inputs: Sources | None = None,
    also: Iterable[str | Path | None] = (),
) -> None:
    """Raise ConfigError where writing to one of `outputs` would change or replace a file that the command reads.

    An output file must not be one of the inputs; an output folder must not contain one, at any depth; `-` is the file
    behind stdout. `also` are other files that are read, or model folders, whose own files count; None is ignored.
    `option` is the name of the output's option, for the message. Raises as `inputs` do.
    """
    places = {place: output for output in outputs if (place := _identity(output))}  # the outputs that exist
    if not places:
        return
    folders = {place for place, output in places.items() if str(output) != "-" and Path(output).is_dir()}
    for path in _read_files(inputs, also):
        identity = _identity(path)
        if identity not in places:
            identity = next(filter(folders.__contains__, _folders_of(os.path.realpath(path.parent))), None)
        if identity:
            output = places[identity]
            shown = "stdout" if str(output) == "-" else f"{option} {output}"
            what = f"holds {path}" if identity in folders else f"is {path}"
            raise ConfigError(f"{shown} {what}, which this command reads: name another output")


def refuse_one_place(outputs: Mapping[str, str | Path | None]) -> None:
    """Raise ConfigError where two options name one output, in whatever spelling: it could hold one of them only.

    `outputs` has the paths by their options; None is ignored.
    """
    places: dict[object, str] = {}
    for option, output in outputs.items():
        if output is not None:
            other = places.setdefault(_identity(output) or os.path.realpath(output), option)
            if other != option:
                raise ConfigError(f"{option} {output} is the output of {other} as well: name another")


def _read_files(inputs: Sources | None, also: Iterable[str | Path | None]) -> Iterator[Path]:
    if inputs:
        yield from (Path(str(name)[1:]) for name in inputs.names if str(name).startswith("@"))
        yield from (source.path for source in inputs if source.path and not source.filesystem)
    for path in also:
        if path is None:
            continue
        if Path(path).is_dir():
            yield from (entry for entry in Path(path).iterdir() if entry.is_file())
        else:
            yield Path(path)


def _identity(path: str | Path) -> Identity | None:
    """Return the identity of a file or folder; None if missing, and for pipes and devices, which keep nothing."""
    try:
        status = os.fstat(1) if str(path) == "-" else os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) else None


@lru_cache(maxsize=1024)
def _folders_of(folder: str) -> tuple[Identity | None, ...]:
    """Return the identities of a folder and of all folders around it."""
    return tuple(_identity(path) for path in (Path(folder), *Path(folder).parents))
