"""Make edited copies of Python files, and see whether an encoder ranks each copy nearest to its original.

    python examples/near_duplicates.py make pairs FILE.py ... (or @LIST)
    longnet encode pairs --model ./encoder -o vectors.arrow
    python examples/near_duplicates.py rank vectors.arrow

`make` writes three files for each file that parses: the file itself, a copy in which all names that it binds are
replaced with names from other files (`.renamed`), and a copy without a third of its lines, drawn at random (`.cut`).
`rank` prints how many copies of each kind are nearest to their own original, among all originals, and lists the others.
"""

from __future__ import annotations

import ast
import builtins
import io
import keyword
import random
import sys
import tokenize
from pathlib import Path

from nearest import cosines, read_vectors

KINDS = ("original", "renamed", "cut")


def bound_names(source: str) -> list[str]:
    """Return the names that a module binds, sorted: functions, classes, arguments and variables, but not imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
    return sorted(names - set(dir(builtins)) - {"self", "cls"} - {name for name in names if name.startswith("__")})


def renamed(source: str, names: dict[str, str]) -> str:
    """Return the source with each token that is one of `names` replaced."""
    lines = io.StringIO(source).readlines()  # lines as `tokenize` counts them; splitlines cuts at form feeds too
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    for token in reversed(tokens):  # from the end, so that earlier places stay valid
        if token.type == tokenize.NAME and token.string in names and not keyword.iskeyword(token.string):
            (row, start), (_, stop) = token.start, token.end
            line = lines[row - 1]
            lines[row - 1] = line[:start] + names[token.string] + line[stop:]
    return "".join(lines)


def cut(source: str, draw: random.Random) -> str:
    """Return the source without a random third of its lines."""
    lines = source.splitlines(keepends=True)
    kept = sorted(draw.sample(range(len(lines)), len(lines) - len(lines) // 3))
    return "".join(lines[i] for i in kept)


def make(folder: str, *files: str) -> None:
    """Write the three files of each source into a folder."""
    paths = [
        Path(line) for name in files for line in (Path(name[1:]).read_text().split() if name[0] == "@" else [name])
    ]
    output, draw, sources = Path(folder), random.Random(0), {}
    output.mkdir(parents=True)
    for path in sorted(paths):
        try:
            source = path.read_text(encoding="utf-8")
            sources["__".join(path.with_suffix("").parts[-2:])] = source, bound_names(source)
        except SyntaxError:
            continue
    if len(sources) < 2:
        sys.exit(f"{len(sources)} Python files: two are needed, whose names are exchanged")
    for stem, (source, names) in sources.items():
        pool = sorted({name for other, (_, theirs) in sources.items() if other != stem for name in theirs})
        new = draw.sample(pool, len(names)) if len(pool) >= len(names) else draw.choices(pool, k=len(names))
        texts = source, renamed(source, dict(zip(names, new, strict=True))), cut(source, draw)
        for kind, text in zip(KINDS, texts, strict=True):
            (output / f"{stem}.{kind}.py").write_text(text, encoding="utf-8")
    print(f"{output}: {len(sources)} files, each in {len(KINDS)} versions", file=sys.stderr)


def rank(source: str) -> None:
    """Print how many edited copies are nearest to their own original, among all originals."""
    names, vectors = read_vectors(source)
    stems, kinds = zip(*(Path(name).name.rsplit(".", 2)[:2] for name in names), strict=True)
    originals = [row for row, kind in enumerate(kinds) if kind == "original"]
    nearest = [originals[i] for i in cosines(vectors)[:, originals].argmax(1)]
    for kind in KINDS[1:]:
        mine = [row for row in range(len(names)) if kinds[row] == kind]
        missed = [row for row in mine if stems[nearest[row]] != stems[row]]
        print(f"{kind:<8} {len(mine) - len(missed)} of {len(mine)} copies have their original as nearest")
        for row in missed:
            print(f"         {Path(names[row]).name}: {Path(names[nearest[row]]).name}")


if __name__ == "__main__":
    {"make": make, "rank": rank}[sys.argv[1]](*sys.argv[2:])
