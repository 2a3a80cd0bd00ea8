"""Shows the parameters that a docstring explains, `name: what it is`, as a list on the site (mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any

import griffe

_PARAMETER = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): +(?=\S)")


class Parameters(griffe.Extension):
    """Makes a list of lines that begin with names and a colon; the lines that belong to them are indented."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = listed(obj.docstring.value)


def listed(text: str) -> str:
    """The Markdown of a docstring."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        begins, before = bool(_PARAMETER.match(line)), inside
        inside = begins or (inside and line.startswith("    "))
        if inside != before and lines and lines[-1]:
            lines.append("")
        lines.append(_PARAMETER.sub(r"- **\1**: ", line, count=1) if begins else line)
    return "\n".join(lines)
