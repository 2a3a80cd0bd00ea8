"""The corpus of the shipped model: lists of readable files, split by a hash that no machine changes.

pytest tests/test_examples.py
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_standard_library_is_split_by_the_hash_of_a_path(tmp_path: Path) -> None:
    script = ROOT / "examples/stdlib_corpus.py"
    subprocess.run([sys.executable, script, tmp_path / "lists"], check=True, capture_output=True)
    train = (tmp_path / "lists/train.txt").read_text().splitlines()
    held_out = (tmp_path / "lists/held_out.txt").read_text().splitlines()
    assert len(train) > 10 * len(held_out) > 0
    assert not set(train) & set(held_out)
    assert all(Path(path).stat().st_size >= 512 for path in train + held_out)
    spec = importlib.util.spec_from_file_location("stdlib_corpus", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # the files that the demo scores, whatever Python runs it
    for name in ("ast.py", "calendar.py", "pydoc.py", "random.py", "sysconfig.py", "json/encoder.py", "http/server.py"):
        assert module.is_held_out(name)
    assert not module.is_held_out("json/decoder.py")
