"""The commands of docs/clients.md, in order, in an empty folder; they need the extras `lm-eval` and others."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'longnet-cli[lm-eval]'")
pytest.importorskip("sentence_transformers", reason="not installed: pip install 'longnet-cli[sentence-transformers]'")


@pytest.mark.slow
def test_every_block_runs(tmp_path: Path, command_env: dict[str, str], longnet: Path) -> None:
    text = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    (tmp_path / "README.md").write_text("What score reads.\n", encoding="utf-8")
    python = f'PATH="{longnet.parent}:$PATH"; python() {{ "{sys.executable}" "$@"; }}; set -euo pipefail\n'
    env = command_env | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    for language, code in blocks:
        command = ["bash", "-c", python + code] if language == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, code + done.stderr
        assert "lm_eval" not in code or "bits_per_byte" in done.stdout
