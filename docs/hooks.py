"""Hooks of the site (mkdocs.yml): pages that lie beside docs/, the options of every command, the Python reference.

`longnet_cli` is read, not copied: options come from the Typer app, the reference from docstrings.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# Pages of the site that lie elsewhere in the checkout
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "models/README.md": "models/index.md",
    "models/longnet-tiny/README.md": "models/longnet-tiny.md",
}

# What a program may import, and the modules that keep these names
REFERENCE = {
    "Attention": {
        "longnet_cli": (
            "dilated_attention", "DilatedAttention", "KVCache", "far_keys", "FarKeys", "parse_pattern",
            "format_pattern", "Pattern",
        ),
    },
    "Models": {
        "longnet_cli": (
            "ModelFolder", "Net", "LongNet", "LongNetConfig", "SlideEncoder", "SlideConfig", "CausalStream",
            "open_stream", "backward_in_chunks", "from_torchscale",
        ),
        "longnet_cli.integrations.transformers": (
            "use_dilated_attention", "use_own_attention", "write_pattern", "LongNetCache",
        ),
        "longnet_cli.integrations.gigapath": ("create_model", "LongNetViT", "install"),
    },
    "Documents": {"longnet_cli": ("Inputs", "Document", "Tokenizer")},
    "Jobs": {
        "longnet_cli": (
            "tokenize", "train", "score", "ScoreOptions", "ModelFacts", "Score", "Total", "encode", "EncodeOptions",
            "EncodeFacts", "generate", "ask", "Answer", "embed", "encode_batches", "score_batches", "bench",
            "Settings", "Measurement", "inspect", "Events", "LeftOut",
        ),
    },
    "Errors": {
        "longnet_cli": (
            "LongNetError", "ConfigError", "DataError", "CheckpointError", "MemoryLimitError", "NotFiniteError",
        ),
    },
}  # fmt: skip

_LONG_CODE = re.compile(r"<code>([^<]{36,})</code>")
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FILE_NAME = re.compile(r"\[[\w./-]+\.md\](\(([^)\s#]+\.md)[^)]*\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that docs/ does not hold, and the files that pages link to."""
    from mkdocs.structure.files import File

    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, "reference/options.md", content=options()))
    files.append(File.generated(config, "reference/python.md", content=reference()))
    linked = {link for page in files.documentation_pages() for link in _linked(page)}
    for path in sorted(linked):
        if files.get_file_from_path(uri_of(path)) is None and (ROOT / path).is_file():
            files.append(File.generated(config, uri_of(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links to where files of the checkout are on the site."""
    return moved(markdown, page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Let long code in a text break, at its spaces: site.css keeps all other code on one line."""
    return _LONG_CODE.sub(r'<code class="long">\1</code>', html)


def uri_of(path: str) -> str:
    """Where a file of the checkout is on the site."""
    return PAGES.get(path) or path.removeprefix("docs/")


def path_of(uri: str) -> str:
    """Where a page of the site is in the checkout."""
    return next((path for path, page in PAGES.items() if page == uri), f"docs/{uri}")


def moved(markdown: str, uri: str) -> str:
    """The text of a page with links as they lead on the site, where it is `uri`. Names of files become titles."""
    folder = posixpath.dirname(path_of(uri))

    def name(match: re.Match[str]) -> str:
        title = (ROOT / folder / match[2]).read_text(encoding="utf-8").splitlines()[0]
        return f"[{title.lstrip('# ')}]{match[1]}"

    def lead(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        if ":" in link:  # https://
            return match[0]
        target = uri_of(posixpath.normpath(posixpath.join(folder, link)))
        return before + posixpath.relpath(target, posixpath.dirname(uri) or ".") + after

    return _LINK.sub(lead, _FILE_NAME.sub(name, markdown))


def _linked(page: Any) -> Iterator[str]:
    folder = posixpath.dirname(path_of(page.src_uri))
    for _, link, _ in _LINK.findall(page.content_string):
        if ":" not in link:
            yield posixpath.normpath(posixpath.join(folder, link))


def reference() -> str:
    """The page of the Python reference: what mkdocstrings fills in from docstrings."""
    lines = ["# Python", ""]
    for title, modules in REFERENCE.items():
        lines += [f"## {title}", ""]
        for module, names in modules.items():
            lines += [f"`from {module} import {', '.join(names)}`", ""]
            for name in names:
                lines += [f"::: {module}.{name}", ""]
    return "\n".join(lines)


# By hand: the tables of mkdocs-click 0.9 lack the options of typer 0.29, which has a click of its own. Its plain style
# and mkdocs-typer show the help as one block of text, without panels.
def options() -> str:
    """The page of all commands, with a table of options for each panel of their help."""
    import typer

    from longnet_cli.cli.app import app

    group: Any = typer.main.get_command(app)
    lines = ["# Options", "", *_text(group.help), *_text(group.epilog)]
    for path, command in _commands(group, ["longnet"]):
        lines += [f"## {path}", "", *_text(command.help)]
        panels: dict[str, list[Any]] = {}
        for parameter in command.params:
            if not getattr(parameter, "hidden", False):
                panels.setdefault(
                    getattr(parameter, "rich_help_panel", None) or "Arguments", []
                ).append(parameter)
        for panel, parameters in panels.items():
            lines += [
                f"**{panel}**",
                "",
                f"| {'argument' if panel == 'Arguments' else 'option'} | | default |",
                "|---|---|---|",
            ]
            lines += [_row(parameter) for parameter in parameters]
            lines.append("")
    return "\n".join(lines)


def _commands(group: Any, path: list[str]) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, [*path, name])
        else:
            yield " ".join([*path, name]), command


def _text(text: str | None) -> list[str]:
    """The paragraphs of a help text. One that begins with a star is a footnote, not a list."""
    return [
        line
        for paragraph in (text or "").split("\n\n")
        for line in (paragraph.replace("* ", r"\* ", 1), "")
    ]


def _row(parameter: Any) -> str:
    names = (
        [*parameter.opts, *parameter.secondary_opts]
        if parameter.param_type_name == "option"
        else []
    )
    value = (
        "" if getattr(parameter, "is_flag", False) else parameter.metavar or parameter.name.upper()
    )
    told = " ".join(filter(None, [", ".join(names), value]))
    help, _, default = (parameter.help or "").partition(" (default: ")
    if parameter.param_type_name == "argument" and parameter.required:
        default = "required)"
    return f"| `{told}` | {_cell(help)} | {_cell(default[:-1])} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "&#124;").replace("<", "&lt;")
