"""The commands that a page shows, run in order in one shell, as its reader types them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from places import ROOT

EXAMPLES = ("dna.toml", "nearest.py", "small.toml", "tiles.py")  # all would be as many minutes


def copy_checkout(folder: Path) -> Path:
    """Copy the files that the pages' commands name into a folder, and return it."""
    (folder / "examples").mkdir()
    for name in EXAMPLES:
        shutil.copy(ROOT / "examples" / name, folder / "examples")
    shutil.copy(ROOT / "README.md", folder)
    shutil.copytree(ROOT / "docs", folder / "docs")
    return folder


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run_blocks(
    page: Path, languages: tuple[str, ...], folder: Path, programs: Path, env: dict[str, str]
) -> str:
    """Run the blocks of a page in order, and return what they print.

    `programs` is the folder of the program `longnet`. A command that fails ends the run, and the test.
    """
    lines = ["set -euo pipefail", f"PATH={programs}:$PATH"]
    text = page.read_text(encoding="utf-8")
    for language, block in re.findall(
        r"^```(sh|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    ):
        if language not in languages:
            continue
        lines.append(block if language == "sh" else f"python -c \"$(cat <<'END'\n{block}END\n)\"")
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout
