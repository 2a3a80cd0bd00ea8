"""Every module, class and function that a docstring puts in backticks, as `module.name` or `Class.name`, exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from places import ROOT

PACKAGE = ROOT / "longnet_cli"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
QUOTED = re.compile(r"`((?:\w+/)*\w+\.[\w.]*\w)(?:\([^`]*\))?`", re.ASCII)
# Tables of a recipe and of metadata, columns, files, and what other packages have.
OTHERS = {"data", "longnet", "model", "optimizer", "recipe", "train", "config", "doc", "row", "a", "NAME"}
OTHERS |= {"gigapath", "tokenizers", "torch"}


def docstrings() -> Iterator[tuple[str, str]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield f"{path.relative_to(PACKAGE)}:{getattr(node, 'name', 1)}", ast.get_docstring(node) or ""


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


CLASSES = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
BASES = {node.name: [base.id for base in node.bases if isinstance(base, ast.Name)] for node in CLASSES}
MEMBERS: dict[str, set[str]] = {}  # of classes, by name in small letters: `pattern.sinks` is Pattern's
for of_class in CLASSES:
    MEMBERS.setdefault(of_class.name.strip("_").lower(), set()).update(defined(of_class))
for name, bases in BASES.items():
    for base in bases:
        MEMBERS[name.strip("_").lower()] |= MEMBERS.get(base.strip("_").lower(), set())
PUBLIC = {
    node.name for tree in TREES.values() for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)
}


def is_dead(name: str) -> bool:
    """Return whether `name` means code of this package that does not exist. Of other names, nothing is known."""
    if name.endswith(".py"):
        return not ((ROOT / name).exists() or any(f"/{path}".endswith(f"/{name}") for path in TREES))
    *places, last = name.removeprefix("longnet_cli.").replace("/", ".").split(".")
    if not places or places[0] in OTHERS:
        return False
    known = [MEMBERS[place.lower()] for place in places[-1:] if place.lower() in MEMBERS]
    known += [
        defined(tree) | {x.stem for x in path.parent.iterdir() if path.stem == "__init__"}
        for path, tree in TREES.items()
        if ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__").endswith(".".join(places))
    ]
    return not any(last in names for names in known) and (bool(known) or last in PUBLIC)


def test_named_code_exists() -> None:
    assert [(where, name) for where, text in docstrings() for name in QUOTED.findall(text) if is_dead(name)] == []


def test_a_name_that_is_gone_is_seen() -> None:
    assert all(map(is_dead, ("pattern.lanes", "measures.Bigrams", "attention/no_module.py")))
    assert not any(map(is_dead, ("spans.Layout", "Pattern.window", "attention/spans.py", "config.json", "torch.save")))
