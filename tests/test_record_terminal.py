"""The script that records a terminal: every line comes in its time, broken as a terminal breaks it.

pytest tests/test_record_terminal.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples/record_terminal.py"


def record(output: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, SCRIPT, "-o", output, *words], capture_output=True, check=False)


def test_a_terminal_is_recorded(tmp_path: Path) -> None:
    """Bold is bold, a long line goes on in the next, a wait is as long as it was, or as the longest that is shown."""
    script = r'test -t 1; printf "\033[1mone\033[0m two\n"; sleep 0.2; echo 0123456789abcde; sleep 2; echo last'
    done = record(tmp_path / "x.svg", "--columns", "10", "--longest", "0.5", "bash", "-ec", script)
    assert (done.returncode, done.stdout) == (0, b"")
    svg = (tmp_path / "x.svg").read_text()
    ET.fromstring(svg)
    lines = [
        (text.replace("&#160;", " "), float(delay))
        for delay, text in re.findall(r'<text [^>]*animation-delay: ([\d.]+)s"[^>]*>([^<\n]+)', svg)
    ]
    assert [text for text, _ in lines] == ["one", " two", "0123456789", "abcde", "last"]
    one, two, first, second, last = (delay for _, delay in lines)
    assert one == two < 0.5
    assert first == second
    assert 0.19 <= first - one <= 0.5
    assert abs(last - first - 0.5) < 0.02
    assert re.search(r"font-weight: bold", svg)
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")  # nothing from the network


def test_a_command_that_fails_is_not_recorded(tmp_path: Path) -> None:
    done = record(tmp_path / "x.svg", "bash", "-c", "exit 3")
    assert done.returncode == 1
    assert b"bash ended with exit code 3: nothing was written" in done.stderr
    assert not (tmp_path / "x.svg").exists()
