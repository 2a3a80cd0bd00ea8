"""Draw what comes from stdin, the output of a terminal of 127 columns, as an SVG: `make docs/demo.svg` calls it."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

console = Console(record=True, width=127, file=io.StringIO(), force_terminal=True)
for line in sys.stdin:
    console.print(Text.from_ansi(line.rstrip()), overflow="fold")
svg = console.export_svg(title="make demo", unique_id="terminal")
# without rich's rules that load fonts from the network
Path(sys.argv[1]).write_text(re.sub(r"\n *@font-face \{.*?\}", "", svg, flags=re.DOTALL), encoding="utf-8")
