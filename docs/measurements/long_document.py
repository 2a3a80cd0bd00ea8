"""Join one long document of packages that longnet-tiny was not trained on, and show its perplexity in ten parts.

    pip download --no-deps --only-binary :all: -d wheels ansible-core==2.19.14 django==5.2.8 nltk==3.10.4 \\
      sphinx==8.2.3 sqlalchemy==2.1.9 twisted==25.5.0
    python docs/measurements/long_document.py join 1e7 longnet.txt wheels/*.whl
    OMP_NUM_THREADS=1 /usr/bin/time -v longnet score longnet.txt --dtype bf16 --token-logprobs tokens.arrow
    python docs/measurements/long_document.py parts tokens.arrow

None of these packages was installed where longnet-tiny was trained. `join` takes the Python sources of the wheels, each
file under a comment with its name, up to so many tokens of longnet-tiny. It prints a line of JSON: `tokens`, `bytes`,
`files`, `packages` and the `sha256` of the document, which for 1e7 is ee3e588cd123... `time` shows the seconds and the
peak memory. `parts` prints a line of JSON per tenth of the document: `start` and `stop` in tokens, and `ppl`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from by_recall import documents

from longnet_cli.basics.errors import LongNetError
from longnet_cli.basics.sizes import parse_size
from longnet_cli.data.documents.tokenizer import Tokenizer

PARTS = 10


def sources(wheels: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the name of a wheel's package and the text of each of its sources, in the order of their names."""
    for path in sorted(map(Path, wheels), key=lambda path: path.name):
        archive = zipfile.ZipFile(path)
        for name in sorted(name for name in archive.namelist() if name.endswith(".py")):
            try:
                text = archive.read(name).decode()
            except UnicodeDecodeError:
                continue
            if text.strip():
                yield path.name.partition("-")[0], f"# {name}\n{text.rstrip()}\n\n"


def join(tokens: int, output: Path, wheels: Sequence[str]) -> dict[str, Any]:
    """Write a document of `tokens`, to the end of the file that reaches them. Raises LongNetError for too few."""
    words, count, packages, texts = Tokenizer.load("longnet-tiny"), 0, set[str](), list[str]()
    for package, text in sources(wheels):
        texts.append(text)
        packages.add(package)
        count += len(words.encode(text))
        if count >= tokens:
            break
    else:
        raise LongNetError(f"the wheels have {count:,} tokens, fewer than {tokens:,}: name more")
    document = "".join(texts).encode()
    output.write_bytes(document)
    sizes = {
        "tokens": count,
        "bytes": len(document),
        "files": len(texts),
        "packages": sorted(packages),
    }
    return {**sizes, "sha256": hashlib.sha256(document).hexdigest()}


def parts(file: str) -> Iterator[dict[str, Any]]:
    """Yield the perplexity of each tenth of the first document of a file of `score --token-logprobs`."""
    _, _, logprobs = next(documents(file))
    edges = np.linspace(0, len(logprobs), PARTS + 1).astype(int).tolist()
    for start, stop in pairwise(edges):
        yield {
            "start": start,
            "stop": stop,
            "ppl": math.exp(-float(logprobs[start:stop].astype(float).mean())),
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_join = commands.add_parser("join")
    of_join.add_argument("tokens", type=parse_size)
    of_join.add_argument("output", type=Path)
    of_join.add_argument("wheels", nargs="+")
    commands.add_parser("parts").add_argument("file")
    args = parser.parse_args()
    try:
        rows = (
            parts(args.file)
            if args.command == "parts"
            else [join(args.tokens, args.output, args.wheels)]
        )
        print(*map(json.dumps, rows), sep="\n")
    except LongNetError as error:
        parser.exit(3, f"long_document: {error}\n")
