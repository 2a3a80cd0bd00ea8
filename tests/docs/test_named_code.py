"""Names of code: what docstrings put in backticks, as `module.name` or `Class.name`, exists; no file and no class has
the name of another; public ones come from their stable places, without torch until one is used, and docs/ uses them.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from places import ROOT, imported

import longnet_cli

PACKAGE = ROOT / "longnet_cli"
QUOTED = re.compile(r"`((?:\w+/)*\w+\.[\w.]*\w)(?:\([^`]*\))?`", re.ASCII)
# Tables of a recipe and of metadata, columns, files, and what other packages have.
OTHERS = {
    "data",
    "longnet",
    "model",
    "optimizer",
    "recipe",
    "train",
    "config",
    "doc",
    "row",
    "a",
    "NAME",
}
OTHERS |= {"gigapath", "tokenizers", "torch"}


@cache
def trees() -> dict[Path, ast.Module]:
    """Return the syntax tree of each file of the package."""
    return {
        path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))
    }


def docstrings() -> Iterator[tuple[str, str]]:
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield (
                    f"{path.relative_to(PACKAGE)}:{getattr(node, 'name', 1)}",
                    ast.get_docstring(node) or "",
                )


def defined(tree: ast.AST) -> set[str]:
    """Return the names that a module or a class binds anywhere in it, attributes among them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


@cache
def members() -> dict[str, set[str]]:
    """Return the names of each class and its bases, by its name in small letters: `pattern.sinks` is Pattern's."""
    classes = [
        node
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    names: dict[str, set[str]] = {}
    for node in classes:
        names.setdefault(node.name.strip("_").lower(), set()).update(defined(node))
    for node in classes:
        for base in node.bases:
            if isinstance(base, ast.Name):
                names[node.name.strip("_").lower()] |= names.get(base.id.strip("_").lower(), set())
    return names


@cache
def public() -> set[str]:
    return {
        node.name
        for tree in trees().values()
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }


def is_dead(name: str) -> bool:
    """Return whether `name` means code of this package that does not exist. Of other names, nothing is known."""
    if name.endswith(".py"):
        return not (
            (ROOT / name).exists() or any(f"/{path}".endswith(f"/{name}") for path in trees())
        )
    *places, last = name.removeprefix("longnet_cli.").replace("/", ".").split(".")
    if not places or places[0] in OTHERS:
        return False
    known = [members()[place.lower()] for place in places[-1:] if place.lower() in members()]
    known += [
        defined(tree) | {x.stem for x in path.parent.iterdir() if path.stem == "__init__"}
        for path, tree in trees().items()
        if ".".join(path.relative_to(ROOT).with_suffix("").parts)
        .removesuffix(".__init__")
        .endswith(".".join(places))
    ]
    return not any(last in names for names in known) and (bool(known) or last in public())


def test_named_code_exists():
    assert [
        (where, name)
        for where, text in docstrings()
        for name in QUOTED.findall(text)
        if is_dead(name)
    ] == []


def test_a_name_that_is_gone_is_seen():
    assert all(map(is_dead, ("pattern.lanes", "measures.Bigrams", "attention/no_module.py")))
    assert not any(
        map(
            is_dead,
            ("spans.Lanes", "Pattern.window", "attention/spans.py", "config.json", "torch.save"),
        )
    )


def test_the_map_names_what_is_in_its_files():
    """A row of the map in CONTRIBUTING.md names files; the other names in its second cell are defined in them."""
    _, _, table = (ROOT / "CONTRIBUTING.md").read_text().partition("| to change | look at |")
    rows = [line.split(" | ")[1] for line in table.splitlines() if line.count(" | ") == 2]
    sources = [*trees(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    assert len(rows) > 60
    for cell in rows:
        files = re.findall(r"`([\w/]+\.py)`", cell)
        names = {*re.findall(r"`(\w+)`", cell)}
        named = [
            ast.parse(path.read_text(encoding="utf-8"))
            for path in sources
            if any(f"/{path}".endswith(f"/{file}") for file in files)
        ]
        in_files = {name for tree in named for name in defined(tree)}
        assert names <= in_files, cell


COMMANDS = PACKAGE / "cli"  # a command's file has the command's name


def test_no_name_stands_twice():
    places: dict[str, set[str]] = defaultdict(set)
    for file in PACKAGE.rglob("*.py"):
        where = str(file.relative_to(PACKAGE))
        if not file.stem.startswith("__") and file.parent != COMMANDS:
            places[f"file {file.stem}"].add(where)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[f"class {node.name.strip('_')}"].add(f"{where}:{node.lineno}")
    assert {name: sorted(found) for name, found in places.items() if len(found) > 1} == {}


INTEGRATIONS = ("longnet_cli.integrations.transformers", "longnet_cli.integrations.gigapath")
STABLE = ("longnet_cli", "longnet_cli.attention", *INTEGRATIONS)


def test_every_public_name_is_what_type_checkers_see():
    seen = {}
    for node in ast.walk(ast.parse(Path(longnet_cli.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("longnet_cli"):
            seen |= {alias.name: node.module for alias in node.names}
    assert sorted(seen) == longnet_cli.__all__
    assert {*seen} <= {*dir(longnet_cli)}
    for name, module in seen.items():
        assert getattr(longnet_cli, name) is getattr(importlib.import_module(module), name)


def test_importing_the_package_loads_no_torch():
    program = (
        "import sys, longnet_cli; longnet_cli.Pattern; "
        "sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_the_reference_lists_the_public_names():
    reference = imported(ROOT / "docs/hooks.py").REFERENCE
    listed = [name for part in reference.values() for name in part.get("longnet_cli", ())]
    assert sorted(listed) == longnet_cli.__all__


def test_docs_import_from_stable_places():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    used = [
        (page.name, place)
        for page in pages
        for place in re.findall(r"^\s*from (longnet_cli\S*) import", page.read_text(), re.M)
    ]
    assert len(used) > 10
    assert [each for each in used if each[1] not in STABLE] == []
