"""What the README shows is run: every `sh` block in one shell, in order, and the Python blocks; recipes parse and load.

pytest tests/test_readme.py
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.presets import list_models, preset_dir
from longnet_cli.training.recipe import load_recipe, tomllib

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that the README's commands name, and nothing else of the checkout; a small Llama is somebody's own."""
    hf = pytest.importorskip("transformers")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = hf.LlamaConfig(**sizes, num_attention_heads=4, bos_token_id=256, eos_token_id=256)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "my-llama")
    Tokenizer.bytes().save(tmp_path / "my-llama/tokenizer.json")
    return tmp_path


def test_shell_commands(checkout: Path, command_env: dict[str, str], longnet: Path) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    assert len(commands) >= 21
    python = f'PATH="{longnet.parent}:$PATH"; python() {{ "{sys.executable}" "$@"; }}'
    script = "\n".join(["set -euo pipefail", python, *commands])
    done = subprocess.run(
        ["bash", "-c", script], cwd=checkout, env=command_env, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_python_blocks(checkout: Path, command_env: dict[str, str]) -> None:
    script = "\n".join(blocks("python"))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=checkout, env=command_env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "dilated_attention" in (checkout / "my-dilated-llama/config.json").read_text(encoding="utf-8")


def test_toml_block() -> None:
    (block,) = blocks("toml")
    mix = load_recipe("longnet-tiny", {"model.vocab_size": 257, "data": tomllib.loads(block)["data"]}).data.sources
    assert [source.weight for source in mix] == [7, 3]


def test_every_shipped_recipe_loads() -> None:
    recipes = sorted(preset_dir().glob("*.toml"))
    assert recipes
    for path in recipes:
        assert load_recipe(path.stem, {"model.vocab_size": 4096}).model.num_parameters() > 0


def test_every_shipped_model_has_a_card_and_is_small() -> None:
    for name in list_models():
        folder = preset_dir() / name
        assert (folder / "README.md").exists()
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 8 << 20
