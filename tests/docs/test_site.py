"""The site has every command and every option, and its links lead to files; `make docs` builds it without a warning."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer
from places import ROOT, imported

from longnet_cli.cli.app import app

hooks = imported(ROOT / "docs/hooks.py")


def test_every_option_is_in_the_reference():
    sections = dict(
        re.findall(r"^## longnet (.+)\n((?:(?!## ).*\n)*)", hooks.options(), re.MULTILINE)
    )
    group: Any = typer.main.get_command(app)
    commands = {
        **group.commands,
        **{f"data {name}": each for name, each in group.commands["data"].commands.items()},
    }
    del commands["data"]
    assert list(sections) == list(commands)
    for name, command in commands.items():
        for parameter in command.params:
            for written in (*parameter.opts, *parameter.secondary_opts):
                if parameter.param_type_name == "option":
                    assert re.search(rf"`[^`]*{written}\b", sections[name]), (name, written)
    assert (
        "| `--context SIZE,...` | Score the text in separate windows of this length."
        in sections["score"]
    )
    assert "| the whole document |" in sections["score"]


LINKS = """
index.md docs/ranks.md#weights ranks.md#weights
index.md models/README.md models/index.md
finding.md ../models/longnet-tiny/README.md models/longnet-tiny.md
models/longnet-tiny.md ../../docs/finding.md ../finding.md
models/longnet-tiny.md ../longnet-tiny.toml longnet-tiny.toml
measurements/results.md ../recall.png ../recall.png
finding.md https://arxiv.org/x https://arxiv.org/x
"""


@pytest.mark.parametrize("row", LINKS.strip().splitlines())
def test_links_lead_to_the_same_file(row):
    """A row is a page, a link of its source, and the link of the site."""
    uri, link, found = row.split()
    assert (
        hooks.moved(f"see [this]({link}), or ![that]({link})", uri)
        == f"see [this]({found}), or ![that]({found})"
    )
    assert (ROOT / hooks.path_of(uri)).is_file()


def test_the_name_of_a_file_becomes_its_title():
    assert (
        hooks.moved("([docs/ranks.md](docs/ranks.md#weights))", "index.md")
        == "([Many processes](ranks.md#weights))"
    )


def test_the_menu_has_each_page_once_and_the_search_needs_no_network():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    entries = re.findall(r"^ +- (.+): (\S+\.md)$", text, re.MULTILINE)
    assert (
        [len({*each}) for each in zip(*entries, strict=True)]
        == [len(entries)] * 2
        == [text.count(".md")] * 2
    )
    assert re.search(r"^  - offline$", text, re.MULTILINE)
    assert "  polyfills: [iframe-worker.js]" in text  # otherwise the plugin loads it
    assert (ROOT / "docs/iframe-worker.js").is_file()


def test_parameters_of_a_docstring_are_a_list():
    pytest.importorskip("griffe")
    text = "Do it.\n\nfar: keys\n    from outside\nk, v: (B, N)\nThen so.\nRaises: x\n"
    assert imported(ROOT / "docs/docstrings.py").listed(text) == (
        "Do it.\n\n- **far**: keys\n    from outside\n- **k, v**: (B, N)\n\nThen so.\nRaises: x"
    )


def test_long_code_in_a_text_may_break():
    short, long = "<code>window:1Ki,sinks=4</code>", f"<code>{'key, ' * 9}</code>"
    html = f"<td>{short}{long}</td>"
    assert hooks.on_page_content(html, None, None, None) == html.replace(
        long, long.replace("<code>", '<code class="long">')
    )


def test_commands_fit_the_page():
    """At 1,280 pixels, a line of code has room for 129 characters."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "models").rglob("*.md")]
    lines = [
        (page.name, line)
        for page in pages
        for line in page.read_text(encoding="utf-8").splitlines()
    ]
    assert not [
        (name, line)
        for name, line in lines
        if re.match(r" *(longnet|python) .{122,}|  --.{126,}", line)
    ]
