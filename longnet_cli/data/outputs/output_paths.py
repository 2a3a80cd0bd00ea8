"""The names of outputs: a file, a folder of shards or `-`, and what they may replace."""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.files.input_files import InputFiles

# Names of one file, the last of vectors; any other name is a folder
OUTPUT_SUFFIXES = (".arrow", ".feather", ".parquet", ".jsonl", ".npy")
# Endings of files. Any other ending, as in run.v2, may be a folder's.
_FILE_SUFFIX = re.compile(
    r"\.(csv|tsv|txt|json|ndjson|npz|pt|pth|bin|safetensors|h5|hdf5|pkl|pickle|gz|bz2|xz|zst|zip|tar|tgz|7z|ipc|pq|orc"
    r"|avro|lance|db|sqlite3?|duckdb|xlsx?|html|md|ya?ml|toml|xml|log|arrow|feather|parquet|jsonl|npy)",
    re.IGNORECASE,
)


def name_of_output(output: str | Path) -> str:
    """Return what messages call an output: its path, or stdout for `-`."""
    return "stdout" if str(output) == "-" else str(output)


def is_folder(output: str | Path, *, resume: bool = False) -> bool:
    """Return whether an output names a folder of shards, and not `-`, a file (by its suffix), a pipe or a device.

    Raises ConfigError for an empty name, for an address in a store, for the name of a file of another kind, and where
    something else than a folder is to `resume`.
    """
    name = str(output)
    if not name:  # such as an unset variable in a script
        raise ConfigError("-o is empty: name a folder or a file")
    if "://" in name:
        raise ConfigError(
            f"{output}: outputs are written to this machine's disks: name a folder, and copy it "
            "afterwards, for example with `aws s3 sync FOLDER s3://...`"
        )
    refuse_other_suffix("-o", output)
    path = Path(output)
    special = path.exists() and _identity(path) is None
    folder = name != "-" and not name.endswith(OUTPUT_SUFFIXES) and not special
    if resume and not folder:
        raise ConfigError(
            f"{output}: only a folder of shards can be resumed: a single file or stream has no parts"
        )
    return folder


def refuse_other_suffix(option: str, output: str | Path, vectors: bool = True) -> None:
    """Raise ConfigError if an output, of `vectors` or not, has the name of a kind of file that is not written.

    A file that exists has any name.
    """
    suffix = Path(output).suffix
    written = OUTPUT_SUFFIXES if vectors else OUTPUT_SUFFIXES[:-1]
    if _FILE_SUFFIX.fullmatch(suffix) and suffix not in written and not Path(output).exists():
        kinds = f"{', '.join(written[:-1])} or {written[-1]}"
        raise ConfigError(
            f"{option} {output}: {suffix} is not written: the name of a file ends in {kinds}"
        )


def refuse_overwriting(
    option: str,
    outputs: Sequence[str | Path],
    inputs: InputFiles | None = None,
    also: Iterable[str | Path | None] = (),
) -> None:
    """Raise ConfigError where writing to one of `outputs` would change or replace a file that the command reads.

    An output file must not be one of the inputs; an output folder must not contain one, at any depth; `-` is the file
    behind stdout. `also` are other files that are read, or model folders, whose own files count; None is ignored.
    `option` is the name of the output's option, for the message. Raises as `inputs` do.
    """
    identity = cache(_identity)
    existing = {identity(output): output for output in outputs}
    existing.pop(None, None)  # what is not there, and what keeps nothing
    for path in _read_files(inputs, also) if existing else ():
        folder = Path(os.path.realpath(path.parent))
        for place in (path, folder, *folder.parents):
            output = existing.get(identity(place))
            if output is not None:
                name = "stdout" if str(output) == "-" else f"{option} {output}"
                relation = "is" if place == path else "holds"
                raise ConfigError(
                    f"{name} {relation} {path}, which this command reads: name another output"
                )


def _read_files(inputs: InputFiles | None, also: Iterable[str | Path | None]) -> Iterator[Path]:
    if inputs:
        yield from (Path(str(name)[1:]) for name in inputs.names if str(name).startswith("@"))
        yield from filter(None, (file.local_path for file in inputs))
    for path in (Path(name) for name in also if name is not None):
        if path.is_dir():
            yield from filter(Path.is_file, path.iterdir())
        else:
            yield path


def _identity(path: str | Path) -> tuple[int, int] | None:
    """Return the identity of a file or folder; None if missing, and for pipes and devices, which keep nothing."""
    with suppress(OSError, ValueError):
        status = os.fstat(1) if str(path) == "-" else os.stat(path)
        if stat.S_IFMT(status.st_mode) in (stat.S_IFREG, stat.S_IFDIR):
            return status.st_dev, status.st_ino
    return None
