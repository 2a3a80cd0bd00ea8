"""Proves that public names come from their stable places, without torch until one is used, and that docs/ uses them."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

from places import ROOT, imported

import longnet_cli

INTEGRATIONS = ("longnet_cli.integrations.transformers", "longnet_cli.integrations.gigapath")
STABLE = ("longnet_cli", "longnet_cli.attention", *INTEGRATIONS)


def test_every_public_name_is_what_type_checkers_see() -> None:
    seen = {}
    for node in ast.walk(ast.parse(Path(longnet_cli.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("longnet_cli"):
            seen |= {alias.name: node.module for alias in node.names}
    assert sorted(seen) == longnet_cli.__all__
    assert {*seen} <= {*dir(longnet_cli)}
    for name, module in seen.items():
        assert getattr(longnet_cli, name) is getattr(importlib.import_module(module), name)


def test_importing_the_package_loads_no_torch() -> None:
    program = (
        "import sys, longnet_cli; longnet_cli.Pattern; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_the_reference_lists_the_public_names() -> None:
    reference = imported(ROOT / "docs/hooks.py").REFERENCE
    listed = [name for part in reference.values() for name in part.get("longnet_cli", ())]
    assert sorted([*listed, "plotting"]) == longnet_cli.__all__


def test_docs_import_from_stable_places() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    used = [
        (page.name, place)
        for page in pages
        for place in re.findall(r"^\s*from (longnet_cli\S*) import", page.read_text(), re.M)
    ]
    assert len(used) > 10
    assert [each for each in used if each[1] not in STABLE] == []
