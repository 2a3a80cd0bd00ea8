"""What holds in all of the package: no file and no class has the name of another."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import longnet_cli

PACKAGE = Path(longnet_cli.__file__).parent
COMMANDS = PACKAGE / "cli"  # a command's file has the command's name


def test_no_name_stands_twice() -> None:
    places: dict[str, set[str]] = defaultdict(set)
    for file in PACKAGE.rglob("*.py"):
        where = str(file.relative_to(PACKAGE))
        if not file.stem.startswith("__") and file.parent != COMMANDS:
            places[f"file {file.stem}"].add(where)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[f"class {node.name.strip('_')}"].add(f"{where}:{node.lineno}")
    assert {name: sorted(found) for name, found in places.items() if len(found) > 1} == {}
