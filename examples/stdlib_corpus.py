"""List the Python standard library's sources for training and for held-out scoring: a corpus every machine has.

    python examples/stdlib_corpus.py runs/stdlib
    longnet tokenize @runs/stdlib/train.txt -o runs/stdlib/tokens --train-vocab 4096

The hash of a file's path inside the library decides whether it is held out; one in twenty is. These are the same files
on every machine and for every Python that has them. Files that are not UTF-8 text or hold test data are left out.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from pathlib import Path

LEFT_OUT = (
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3/tests/data",
    "test/encoded_modules",
    "test/tokenizedata",
)


def is_held_out(name: str) -> bool:
    """Return True if the file at this path inside the library (`json/decoder.py`) is kept from training."""
    return hashlib.sha256(name.encode()).digest()[0] % 20 == 0


def stdlib_files() -> dict[str, Path]:
    """Return {path inside the library: file}, sorted, of UTF-8 files of at least 512 bytes."""
    library = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if any(part in name for part in LEFT_OUT) or path.stat().st_size < 512:
            continue
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found[name] = path
    return found


def main(folder: str) -> None:
    output = Path(folder)
    output.mkdir(parents=True, exist_ok=True)
    for list_name, held_out in (("train.txt", False), ("held_out.txt", True)):
        paths = [path for name, path in stdlib_files().items() if is_held_out(name) is held_out]
        (output / list_name).write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
        size = sum(path.stat().st_size for path in paths)
        print(f"{output / list_name}: {len(paths)} files, {size / 1e6:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
