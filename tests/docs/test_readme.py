"""What docs/ shows is run: `sh` blocks in order, Python and TOML blocks too. tests/real/test_pages.py runs the README.
Commands in other blocks take too long to run: their options are looked up.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
import typer.main
from builders import tiny_llama
from page_blocks import blocks, copy_checkout, run_blocks
from places import ROOT
from processes import invoke

from longnet_cli.attention.notation import PATTERN_FIELDS
from longnet_cli.cli.app import app
from longnet_cli.data.documents.tokenizer import Tokenizer
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

# Pages whose Python blocks run as they are, where a package is installed
COMPLETE = {
    "ask": "transformers", "patterns": "torch", "score": "polars",
    "embeddings": "sentence_transformers",
}  # fmt: skip
# By slow tests of their own, as they need what the tests do not install; by tests/real/test_pages.py, with real models
TESTED_ELSEWHERE = {"clients.md", "vectors.md", "README.md", "start.md"}
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "models").rglob("*.md")),
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that the pages' commands name, and a tiny model where `make demo` leaves SmolLM2."""
    tiny_llama(tmp_path / "smollm2")
    return copy_checkout(tmp_path)


RunBlocks = Callable[[Path, tuple[str, ...]], str]


@pytest.fixture
def run_page(checkout: Path, command_env: dict[str, str], longnet: Path) -> RunBlocks:
    """Runs the blocks of a page in order, and returns what they print; each command is a fork, which starts at once."""

    def run(page: Path, languages: tuple[str, ...]) -> str:
        if "./minilm" in page.read_text(encoding="utf-8"):
            from sentence_models import save_model

            save_model(checkout / "minilm")
        return run_blocks(page, languages, checkout, longnet.parent, command_env)

    return run


def has_blocks_to_run(page: Path) -> bool:
    shown = blocks(page, "sh") or (page.stem in COMPLETE and blocks(page, "python"))
    return bool(shown) and page.name not in TESTED_ELSEWHERE


@pytest.mark.ci
@pytest.mark.parametrize("page", [*filter(has_blocks_to_run, PAGES)], ids=lambda page: page.stem)
def test_blocks_run(page, checkout, run_page):
    runs_python = page.stem in COMPLETE and find_spec(COMPLETE[page.stem]) is not None
    printed = run_page(page, ("sh", "python") if runs_python else ("sh",))
    if page.stem == "embeddings" and runs_python:
        assert printed.startswith("A run that was killed goes on. ")


def shown_commands(page: Path) -> list[list[str]]:
    """The words of every `longnet` command in a code block or between backticks, options of others' tools left out."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(
        r"^(?: {4})?(?:[A-Z_]+=\S+ )*(?:.*\| )?(longnet [a-z].*)$", text, re.MULTILINE
    )
    found = []
    lines += [
        f"longnet {words}"
        for words in re.findall(r"torchrun .* -m longnet_cli ([a-z].*)$", text, re.MULTILINE)
    ]
    for line in [*lines, *re.findall(r"`(longnet [a-z][^`\n]*)`", text)]:
        words = shlex.split(re.split(r" (?:\||>|2>|&&|#) ?", line)[0], comments=True)
        found.append(words[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_options_of_commands_exist(page):
    for words in shown_commands(page):
        command: click.Command = typer.main.get_command(app)
        rest = list(words)
        while hasattr(command, "commands"):
            name = rest.pop(0)
            assert name in command.commands, f"{page.name}: longnet {' '.join(words)}"
            command = command.commands[name]
        names = {
            name
            for parameter in command.params
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        for word in rest:
            if word.startswith("-") and word != "-":
                assert word.partition("=")[0] in names | {"--help"}, (
                    f"{page.name}: longnet {' '.join(words)}"
                )


def test_the_manifest_is_read_as_the_page_on_data_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    invoke("tokenize", ROOT / "README.md", "--tokenizer", "bytes", "-o", "tokens", code=0)
    exec(blocks(ROOT / "docs/data.md", "python")[1], {})
    assert json.loads(capsys.readouterr().out)["totals"]["documents"] == 1
    assert Tokenizer.load("tokenizer.json").sha256 == Tokenizer.bytes().sha256


@pytest.mark.slow
def test_blocks_of_clients(checkout, run_page, command_env):
    for package in ("lm_eval", "sentence_transformers"):
        pytest.importorskip(package)
    command_env |= {"HF_HOME": str(checkout / "hf"), "HF_HUB_OFFLINE": "1"}
    assert "bits_per_byte" in run_page(ROOT / "docs/clients.md", ("sh", "python"))


@pytest.mark.slow
def test_blocks_of_vectors(run_page):
    """What docs/vectors.md shows is run, in order."""
    printed = run_page(ROOT / "docs/vectors.md", ("sh", "python"))
    neighbours = [line.split() for line in printed.splitlines()]
    assert len(neighbours) == 6
    assert all(
        line[0].split("-")[0] == line[1].split("-")[0] == line[3].split("-")[0]
        for line in neighbours
    )


def test_toml_blocks(tmp_path):
    """The first one is a whole recipe, the other one changes its data."""
    whole, mixed = blocks(ROOT / "docs/training.md", "toml")
    (tmp_path / "recipe.toml").write_text(whole, encoding="utf-8")
    recipe = load_recipe(str(tmp_path / "recipe.toml"), {"model.vocab_size": 257})
    assert [stage.seq_len for stage in recipe.train.stages] == [1024, 8192]
    mix = load_recipe(
        "longnet-tiny", {"model.vocab_size": 257, "data": tomllib.loads(mixed)["data"]}
    ).data.sources
    assert [source.weight for source in mix] == [7, 3]


def test_the_page_of_keys_is_what_train_recipe_prints(tmp_path):
    """It explains every key, and it is a recipe itself, with the defaults of an empty one."""
    printed = invoke("train", "--recipe").stdout
    assert blocks(ROOT / "docs/recipes.md", "toml") == [printed]
    explained = re.findall(r"^# .*[.)]\n(?:# )?(\w+) = ", printed, re.MULTILINE)
    tables = (DataRecipe, OptimizerRecipe, ScheduleRecipe, TrainRecipe, ParallelRecipe, LoraRecipe)
    for table in (*tables, LongNetConfig):
        assert {*table.model_fields} - {*PATTERN_FIELDS} <= {*explained}, table.__name__
    (tmp_path / "recipe.toml").write_text(printed, encoding="utf-8")
    recipe = load_recipe(str(tmp_path / "recipe.toml"), {})
    assert (recipe.data, recipe.optimizer) == (DataRecipe(), OptimizerRecipe())
    assert (recipe.schedule, recipe.parallel) == (ScheduleRecipe(), ParallelRecipe())


def test_links_lead_somewhere():
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_docstrings_start_with_the_thing_itself():
    """ "Return the rows ...", "A shard of ...": a reader of a list of them sees at once which one it is."""
    for path in [*(ROOT / "longnet_cli").rglob("*.py"), *(ROOT / "examples").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                assert not re.match(r"(What|Whether|That|Which|Where|How|Who|When)\b", text), (
                    f"{path}: {text[:60]}"
                )


def test_every_shipped_model_has_a_card_and_is_small():
    for name in list_models():
        folder = preset_dir() / name
        assert (folder / "README.md").exists()
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 8 << 20


@pytest.mark.parametrize(
    ("extra", "needed"),
    [("hf", {"accelerate"}), ("sentence-transformers", {"accelerate", "datasets"})],
)
def test_extras_bring_what_their_page_trains_with(extra, needed):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert needed <= {line.partition(">")[0] for line in extras[extra]}
