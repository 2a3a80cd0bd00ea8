"""What the README and docs/ show is run: `sh` blocks in order, Python and TOML blocks too.
Commands in other blocks take too long to run: their options are looked up.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer.main
from builders import tiny_llama
from places import ROOT

from longnet_cli.cli.app import app
from longnet_cli.hub.model_names import list_models, preset_dir
from longnet_cli.jobs.training.recipe import (
    DataRecipe,
    LoraRecipe,
    OptimizerRecipe,
    ParallelRecipe,
    ScheduleRecipe,
    TrainRecipe,
    load_recipe,
    tomllib,
)
from longnet_cli.nets.config import LongNetConfig

TESTED_ELSEWHERE = {"clients.md", "vectors.md"}  # by slow tests of their own: they need what the tests do not install
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "models").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that the pages' commands name, and nothing else of the checkout; a small Llama is somebody's own."""
    (tmp_path / "examples").mkdir()
    for name in ("dna.toml", "nearest.py", "small.toml", "tiles.py"):  # all would be as many minutes
        shutil.copy(ROOT / "examples" / name, tmp_path / "examples")
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    tiny_llama(tmp_path / "my-llama")
    return tmp_path


@pytest.mark.ci
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "sh") and page.name not in TESTED_ELSEWHERE],
    ids=lambda page: page.stem,
)
def test_shell_commands(page: Path, checkout: Path, command_env: dict[str, str], longnet: Path) -> None:
    commands = [line for block in blocks(page, "sh") for line in block.splitlines() if line.strip()]
    script = "\n".join(["set -euo pipefail", f'PATH="{longnet.parent}:$PATH"', *commands])
    done = subprocess.run(
        ["bash", "-c", script], cwd=checkout, env=command_env, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def shown_commands(page: Path) -> list[list[str]]:
    """The words of every `longnet` command in a code block or between backticks, options of others' tools left out."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?: {4})?(?:[A-Z_]+=\S+ )*(?:.*\| )?(longnet [a-z].*)$", text, re.MULTILINE)
    found = []
    for line in [*lines, *re.findall(r"`(longnet [a-z][^`\n]*)`", text)]:
        words = shlex.split(re.split(r" (?:\||>|2>|&&|#) ?", line)[0], comments=True)
        found.append(words[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_options_of_commands_exist(page: Path) -> None:
    for words in shown_commands(page):
        command: click.Command = typer.main.get_command(app)
        rest = list(words)
        while hasattr(command, "commands"):
            name = rest.pop(0)
            assert name in command.commands, f"{page.name}: longnet {' '.join(words)}"
            command = command.commands[name]
        names = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for word in rest:
            if word.startswith("-") and word != "-":
                assert word.partition("=")[0] in names | {"--help"}, f"{page.name}: longnet {' '.join(words)}"


@pytest.mark.slow
def test_blocks_of_vectors(checkout: Path, command_env: dict[str, str], longnet: Path) -> None:
    """What docs/vectors.md shows is run, in order."""
    text = (ROOT / "docs/vectors.md").read_text(encoding="utf-8")
    shell = f'PATH="{longnet.parent}:$PATH"; python() {{ "{sys.executable}" "$@"; }}'
    lines = ["set -euo pipefail", shell]
    for language, block in re.findall(r"^```(sh|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        lines.append(block if language == "sh" else f"python - <<'END'\n{block}END")
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=checkout,
        env=command_env,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    neighbours = [line.split() for line in done.stdout.splitlines()]
    assert len(neighbours) == 6
    assert all(line[0].split("-")[0] == line[1].split("-")[0] == line[3].split("-")[0] for line in neighbours)


@pytest.mark.ci
def test_python_blocks(checkout: Path, command_env: dict[str, str], python: Path) -> None:
    script = "\n".join(blocks(ROOT / "README.md", "python"))
    done = subprocess.run(
        [python, "-c", script], cwd=checkout, env=command_env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "dilated_attention" in (checkout / "my-dilated-llama/config.json").read_text(encoding="utf-8")


def test_toml_block() -> None:
    (block,) = blocks(ROOT / "docs/training.md", "toml")
    mix = load_recipe("longnet-tiny", {"model.vocab_size": 257, "data": tomllib.loads(block)["data"]}).data.sources
    assert [source.weight for source in mix] == [7, 3]


def test_every_key_of_a_recipe_is_explained() -> None:
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    tables = (
        DataRecipe,
        OptimizerRecipe,
        ScheduleRecipe,
        TrainRecipe,
        ParallelRecipe,
        LoraRecipe,
        LongNetConfig,
    )
    for table in tables:
        for key in table.model_fields:
            assert re.search(rf"`(lora\.)?{key}`", page), f"{table.__name__}.{key}"


def test_links_lead_somewhere() -> None:
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_docstrings_start_with_the_thing_itself() -> None:
    """ "Return the rows ...", "A shard of ...": a reader of a list of them sees at once which one it is."""
    for path in [*(ROOT / "longnet_cli").rglob("*.py"), *(ROOT / "examples").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                assert not re.match(r"(What|Whether|That|Which|Where|How|Who|When)\b", text), f"{path}: {text[:60]}"


def test_every_shipped_model_has_a_card_and_is_small() -> None:
    for name in list_models():
        folder = preset_dir() / name
        assert (folder / "README.md").exists()
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 8 << 20


@pytest.mark.parametrize(
    ("extra", "needed"), [("hf", {"accelerate"}), ("sentence-transformers", {"accelerate", "datasets"})]
)
def test_extras_bring_what_their_page_trains_with(extra: str, needed: set[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert needed <= {line.partition(">")[0] for line in extras[extra]}
