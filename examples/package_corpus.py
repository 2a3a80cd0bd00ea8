"""Write the Python sources of installed packages as long documents: a corpus of long text that every machine has.

    python examples/package_corpus.py runs/packages
    longnet tokenize runs/packages/train.jsonl -o runs/packages/tokens --tokenizer longnet-tiny

A document is about 300 kB: the files of neighbouring folders of one package, one after the other, each under a comment
with its path. The hash of a package's name decides whether the whole package is held out; one in sixteen is. Packages
and versions depend on the environment: the ids in `train.jsonl` and `held_out.jsonl` name the packages.

    pip download --no-deps --only-binary :all: -d wheels django twisted
    python examples/package_corpus.py runs/packages wheels/*.whl

With wheels, it only writes `wheels.jsonl`: from the middle of each package, one document of 86 kB, 25,000 to 30,000
tokens.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

DOCUMENT_BYTES = 300_000
WHEEL_BYTES = 86_000  # of a document of a wheel
SMALLEST_PACKAGE = 20_000  # bytes; a smaller one makes no long document
# Left out: they hold copies of other packages and of the standard library
COPIES = (
    "pip",
    "setuptools",
)


def is_held_out(package: str) -> bool:
    """Return whether a package (`numpy`) is kept from training."""
    return hashlib.sha256(package.encode()).digest()[0] % 16 == 0


def package_files(package: Path) -> Iterator[tuple[str, str]]:
    """Yield (path inside site-packages, text) of a package's UTF-8 sources, folder by folder."""
    for path in sorted(package.rglob("*.py"), key=lambda path: (path.parent.parts, path.name)):
        try:
            yield path.relative_to(package.parent).as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def documents(package: Path, least: int = DOCUMENT_BYTES) -> Iterator[tuple[str, str]]:
    """Yield (id, text) of documents of at least so many bytes; the last one may be shorter."""
    parts: list[str] = []
    size, first = 0, ""
    for name, text in package_files(package):
        if text.strip():
            first = first or name
            parts.append(f"# {name}\n{text.rstrip()}\n\n")
            size += len(parts[-1])
        if size >= least:
            yield first, "".join(parts)
            parts, size, first = [], 0, ""
    if parts:
        yield first, "".join(parts)


def packages() -> list[Path]:
    """Return the folders of installed packages with enough source, sorted by name."""
    site = Path(sysconfig.get_path("purelib"))
    folders = (path for path in sorted(site.iterdir()) if path.is_dir() and path.name not in COPIES)
    return [path for path in folders if source_bytes(path) >= SMALLEST_PACKAGE]


def source_bytes(package: Path) -> int:
    """Return the size of a package's sources."""
    return sum(path.stat().st_size for path in package.rglob("*.py"))


def wheel_document(wheel: str) -> tuple[str, str]:
    """Return (id, text) of a document of WHEEL_BYTES from the middle of a wheel's largest package."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        found = [*documents(max(Path(folder).iterdir(), key=source_bytes), WHEEL_BYTES)]
    doc_id, text = found[(len(found) - 1) // 2]
    return doc_id, text[:WHEEL_BYTES]


def main(folder: str, *wheels: str) -> None:
    output = Path(folder)
    output.mkdir(parents=True, exist_ok=True)
    if wheels:
        rows = [
            json.dumps({"id": doc_id, "text": text}) + "\n"
            for doc_id, text in map(wheel_document, wheels)
        ]
        (output / "wheels.jsonl").write_text("".join(rows), encoding="utf-8")
        return
    for name, held_out in (("train.jsonl", False), ("held_out.jsonl", True)):
        count = size = 0
        with (output / name).open("w", encoding="utf-8") as file:
            for package in (
                package for package in packages() if is_held_out(package.name) is held_out
            ):
                for doc_id, text in documents(package):
                    file.write(json.dumps({"id": doc_id, "text": text}) + "\n")
                    count, size = count + 1, size + len(text)
        print(f"{output / name}: {count} documents, {size / 1e6:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python examples/package_corpus.py FOLDER [WHEEL...]")
    main(*sys.argv[1:])
