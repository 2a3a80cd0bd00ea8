"""Options are read as documented.

`--pattern`, and `pattern` in recipes: taken, recorded, and refused by name.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

import pytest
import typer
from builders import SIZES
from places import ROOT
from typer.testing import CliRunner

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import ConfigError
from longnet_cli.cli.app import app
from longnet_cli.cli.command import Command, Excludes, Needs, check_pairs, takes_options
from longnet_cli.cli.options import INPUT, Mesh, bare_or, inputs_argument, parse_device, quiet_flag
from longnet_cli.data.outputs.output_paths import OUTPUT_SUFFIXES
from longnet_cli.jobs.plotting.runs import PICTURES
from longnet_cli.jobs.training.recipe import load_recipe
from longnet_cli.nets.config import parse_config
from longnet_cli.nets.weights import load_config

COMMANDS = [
    *["tokenize", "convert", "train", "plot", "score", "encode", "generate", "bench"],
    "data inspect",
]


@pytest.mark.parametrize("text", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_devices(text):
    assert parse_device(text) == text


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:x", "cpu:0"])
def test_what_is_no_device(text):
    with pytest.raises(ValueError, match="write auto, cpu, cuda or cuda:1"):
        parse_device(text)


def command_of(name: str) -> Any:
    found: Any = typer.main.get_command(app)
    for word in name.split():
        found = found.commands[word]
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_readable_in_80_columns(name):
    done = CliRunner().invoke(
        app, [*name.split(), "--help"], env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
    )
    lines = done.output.splitlines()
    text = " ".join(done.output.replace("│", " ").split())
    assert done.exit_code == 0
    assert len(lines) < 170
    assert max(map(len, lines)) <= 80
    assert "…" not in text  # no name is cut
    assert not re.search("<[a-z]|x>=", text)  # no `<bool>`, no `<list[str]>`, no range
    assert "─ Options" not in text  # each has a panel
    assert text.count("32k is 32000, 32Ki is 32768.") == ("SIZE" in text)
    sentences = re.findall(r"[A-Z][^.]{9,}[.] ", text)
    assert sorted(set(sentences)) == sorted(sentences), "a sentence twice"


@pytest.mark.parametrize("name", [*COMMANDS, "ask", "pattern"])
def test_the_short_help_fits_a_screen(name):
    """What the command does, an example, and its arguments and options: 12 at most, or all if they are as few."""
    output = CliRunner().invoke(app, [*name.split(), "-h"]).output
    lines = output.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"Usage: longnet {name} [OPTIONS]")
    assert lines[-1].startswith(f"All options: longnet {name} --help")
    options = [line for line in lines if line.startswith("-")]
    assert 2 <= len(options) <= 12
    assert output.count("Example: longnet ") == 1
    assert "*)" not in output  # a footnote would stand elsewhere


def test_the_help_of_all_fits_a_screen():
    output = CliRunner().invoke(app, ["-h"], env={"COLUMNS": "80"}).output
    assert len(output.strip().splitlines()) <= 40


@pytest.mark.ci
def test_examples_of_the_help_run(run_longnet, tmp_path):
    """As they stand, beside the documentation and the examples of this checkout, and a model of `make demo`."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    from sentence_models import save_model

    save_model(tmp_path / "minilm")
    for folder in ("docs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    # tokenize is before train
    texts = [command_of(name).help for name in (*COMMANDS, "ask", "pattern")]
    examples = re.findall(r"^Example: longnet (.*)", "\n".join(texts), re.MULTILINE)
    assert len(examples) == len(texts)
    for words in map(shlex.split, examples):
        fast = {
            "train": ["--steps", "2", "--seq-len", "64"],
            "generate": ["-n", "2"],
            "score": ["--last", "9"],
        }
        run_longnet(*words, *fast.get(words[0], []), code=0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --resume -h", "Usage: longnet train [OPTIONS] [RECIPE]"),
        ("score none.txt -qh", "All options: longnet score --help"),
        ("score --context -h", "'-h' is not a size"),
        ("generate --stop -h --state none x", "longnet: error: none"),
        ("score -- -h", "-h: no such file"),
        ("data inspect -h", "Usage: longnet data inspect"),
        ("data -h", "inspect"),
        ("help score", "--tokenizer-differs"),
    ],
)
def test_the_short_help_is_asked_for_outside_of_values(run_longnet, words, said):
    done = run_longnet(*words.split())
    assert said in done.stdout + done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_each_default_is_shown_once_however_often_help_is_asked_for(name):
    wide = {"COLUMNS": "300", "NO_COLOR": "1"}
    for _ in range(2):
        lines = CliRunner().invoke(app, [*name.split(), "--help"], env=wide).output.splitlines()
        assert max(line.count("(default: ") for line in lines) <= 1
        for shared, default in (("--device", "auto"), ("--model", "longnet-tiny")):
            for row in lines:
                if re.search(rf"│ {shared} ", row):
                    assert f"(default: {default})" in row or name == "bench"


def test_an_option_of_several_commands_takes_the_same_values():
    metavars: dict[str, set[str]] = {}
    for name in COMMANDS:
        for each in command_of(name).params:
            metavars.setdefault(each.opts[0], set()).add(str(each.metavar).strip("[]"))
    for name in [
        "--eos",
        "--column",
        "--tokenizer",
        "--model",
        "--device",
        "--nproc",
        "--chunk",
        "--pattern",
    ]:
        assert len(metavars[name]) == 1, name
    assert metavars["--dtype"] == {"auto|fp32|bf16|fp16", "auto|fp32|bf16"}  # training has no fp16


def parse(*args: str) -> Any:
    """What a command with INPUT and an option whose value may be left out gets, or the ConfigError."""
    small, got = typer.Typer(), []

    def show(options: Small) -> None:
        got.append((options.inputs, bare_or(options.end, True)))

    small.command(cls=Command)(takes_options(show))
    failed = CliRunner().invoke(small, args).exception
    return got[0] if got else failed


@dataclass(frozen=True, kw_only=True)
class Small:
    """INPUT, an option whose value may be left out, and a group of options."""

    inputs: list[str] = inputs_argument()
    end: str | None = INPUT.option("--end [TOKEN]", "End here.")
    quiet: bool = quiet_flag()
    mesh: Mesh = Mesh()


def test_a_pair_of_options_is_refused_also_across_groups():
    pairs = [
        Needs("--quiet", "--end|--sp", "hides it", "--end"),
        Excludes("-q", "--dp", "is for one process"),
    ]
    both = {"quiet": True, "mesh": Mesh(sp=1, dp=1)}
    for options in ({}, {"end": "x"}, {"quiet": True, "end": "x"}, both):
        check_pairs(pairs, Small(inputs=["a"], **options))
    with pytest.raises(ConfigError, match=r"^--quiet hides it: give --end$"):
        check_pairs(pairs, Small(inputs=["a"], quiet=True))
    with pytest.raises(ConfigError, match=r"^-q is for one process: leave out --dp$"):
        check_pairs(pairs, Small(inputs=["a"], quiet=True, end="x", mesh=Mesh(dp=2)))


@pytest.mark.parametrize("words", ["ask a.txt why?", "bench", "generate x", "tokenize a -o b"])
def test_commands_of_one_process_are_refused_under_torchrun(words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = CliRunner().invoke(app, shlex.split(words)).exception
    assert str(refused).startswith(f"{words.split()[0]} is for one process, and torchrun")


def test_the_value_of_an_option_may_be_left_out():
    assert parse("a") == (["a"], None)
    assert parse("a", "--end") == (["a"], True)
    assert parse("--end", "-q", "a") == parse("a", "--end", "--quiet") == (["a"], True)
    assert parse("--end", "-") == (["-"], True)
    assert parse("--end", "--", "a") == (["a"], True)
    assert parse("a", "--end", "x") == parse("--end=x", "a") == (["a"], "x")
    assert parse("a", "--", "--end") == (["a", "--end"], None)
    error = parse("--end", "a")
    assert (type(error), str(error)) == (
        ConfigError,
        "--end took 'a' as its value, and no INPUT is left: write --end last",
    )
    assert "--end is empty" in str(parse("a", "--end", ""))


def test_the_page_of_formats_lists_every_form():
    page = (ROOT / "docs/formats.md").read_text()
    lines = dict(
        re.findall(r"^\| `([a-z ]+)` \|(.*)", page.partition("\n| `-o` |")[0], re.MULTILINE)
    )
    group: Any = typer.main.get_command(app)
    commands = {**group.commands, "data inspect": group.commands["data"].commands["inspect"]}
    del commands["data"]
    for name, command in commands.items():
        kinds = next((option.metavar for option in command.params if "--format" in option.opts), "")
        assert re.findall(r"`([a-z]+)`", lines.pop(name).partition(" | ")[0]) == kinds.split(
            "|"
        ) * bool(kinds)
    assert not lines
    assert [
        suffix for suffix in (*OUTPUT_SUFFIXES, *PICTURES) if f"`NAME{suffix}`" not in page
    ] == []


ALONE = """
score --context 64,8Ki --token-logprobs x.arrow => log-probabilities of tokens need one context
score --context 64,8Ki --token-logprobs x.arrow --dry-run => log-probabilities of tokens need one
score --stride 5 => a stride of 5 tokens needs a context
encode -o x.arrow --pool middle => there is no pooling 'middle'
generate --temperature -1 => temperature must be 0 or more
generate --state state --pattern window:2Ki => state: it was saved with the pattern window:1Ki, and
generate --state choosing --pattern window:1Ki => choosing: it was saved with the pattern window:1Ki,chosen=32x32, and
"""


def test_what_options_alone_decide_is_refused_before_torch_is_loaded(tmp_path, run_python):
    (tmp_path / "text.txt").write_text("text")
    for name, pattern in (
        ("state", "window:1Ki"),
        ("choosing", "window:1Ki,chosen=32x32"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"longnet.pattern": pattern}))
    script = """
import json, sys
from longnet_cli.cli.app import main
for words in json.loads(sys.argv[1]):
    command, *options = words.split()
    sys.argv = ["longnet", command, "text.txt", *options]
    try:
        main()
    except SystemExit as stop:
        print(stop.code, "torch" in sys.modules)
"""
    rows = [row.split(" => ") for row in ALONE.strip().splitlines()]
    done = run_python("-c", script, json.dumps([words for words, _ in rows]))
    assert done.stdout.splitlines() == ["2 False"] * len(rows)
    for line, (_, said) in zip(done.stderr.splitlines(), rows, strict=True):
        assert line.startswith(f"longnet: error: {said}")


SHAPE = {**SIZES, "position": "rope"}
STAGES = {"train.stages": [{"seq_len": 64, "steps": 1}]}


def test_recipes_say_patterns_too():
    recipe = {**{f"model.{key}": value for key, value in SHAPE.items()}, **STAGES}
    found = load_recipe(None, {**recipe, "model.pattern": "geometric:64,base=16"})
    assert found.model.pattern == Pattern((16, 32, 64), (1, 2, 4))
    assert parse_config(found.model.model_dump(), "saved") == found.model
    with pytest.raises(
        ConfigError, match="model: pattern says the whole pattern: leave out segment_lengths"
    ):
        load_recipe(None, {**recipe, "model.pattern": "16/1", "model.segment_lengths": [8]})


def test_inputs_take_the_place_of_the_recipes_mix():
    assert load_recipe("longnet-tiny", {"model.vocab_size": 257}).data.mix
    found = load_recipe("longnet-tiny", {"model.vocab_size": 257, "data.train": ["mine"]})
    assert [source.inputs for source in found.data.sources] == [["mine"]]


def test_a_configuration_with_another_pattern(model):
    assert load_config(model, Pattern((4,), (2,), "grouped")).pattern == Pattern(
        (4,), (2,), "grouped"
    )
    with pytest.raises(ConfigError, match='pattern needs a text, as "window:1Ki", got 7'):
        parse_config({**SHAPE, "pattern": 7}, "x")
