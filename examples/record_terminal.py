"""Record a command in a terminal, as an SVG that plays its output line by line, and ends with all of it.

    python examples/record_terminal.py -o docs/demo.svg --title "make demo" bash examples/demo.sh

Lines appear at the command's own times, but no wait is longer than `--longest` seconds. The SVG loads nothing from the
network.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

from rich.console import Console
from rich.text import Text

# Like rich's own template, but without fonts from the network. A line is hidden until its time comes.
TEMPLATE = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
@keyframes appear {{ from {{ visibility: hidden; }} }}
.{unique_id}-matrix text {{ animation: appear 1ms both; }}
@media (prefers-reduced-motion) {{ .{unique_id}-matrix text {{ animation: none; }} }}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def record(command: list[str], columns: int) -> tuple[list[tuple[str, float]], int]:
    """Run a command in a terminal. Return its lines, each with the seconds until it came, and the exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns)}
    lines, rest, began = [], b"", time.monotonic()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            sys.stderr.buffer.write(piece)
            sys.stderr.buffer.flush()
            *whole, rest = (rest + piece).split(b"\n")
            lines += [(line.decode("utf-8", "replace").rstrip("\r"), time.monotonic() - began) for line in whole]
    os.close(ours)
    if rest:
        lines.append((rest.decode("utf-8", "replace"), time.monotonic() - began))
    return lines, process.returncode


def to_svg(lines: list[tuple[str, float]], columns: int, title: str, longest: float) -> str:
    """Return the SVG of some lines with their times, where no wait takes longer than `longest` seconds."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    delays, shown, before = [], 0.0, 0.0
    for line, when in lines:
        shown, before = shown + min(when - before, longest), when
        text = Text.from_ansi(line)
        for row in text.divide(range(columns, len(text), columns)):  # as a terminal breaks lines, not at words
            console.print(row, no_wrap=True, crop=False)
            delays.append(shown)
    svg = console.export_svg(title=title, code_format=TEMPLATE, unique_id="terminal")

    def later(match: re.Match[str]) -> str:
        row = int(match[1])
        return f'{match[0]} style="animation-delay: {delays[row] if row < len(delays) else shown:.2f}s"'

    return re.sub(r'clip-path="url\(#terminal-line-(\d+)\)"', later, svg)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", required=True, help="write the SVG to this file")
    parser.add_argument("--title", help="the title of the window (default: the command)")
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--longest", type=float, default=1.5, help="seconds of the longest wait that is shown")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command and its words")
    args = parser.parse_args()
    if not args.command:
        parser.error("there is no command to record")
    lines, code = record(args.command, args.columns)
    if code:
        sys.exit(f"{args.command[0]} ended with exit code {code}: nothing was written")
    with open(args.output, "w", encoding="utf-8") as file:
        file.write(to_svg(lines, args.columns, args.title or " ".join(args.command), args.longest))


if __name__ == "__main__":
    main()
