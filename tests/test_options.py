"""Proves that options are read as documented, and that typer shows our sentence if not."""

import subprocess
import sys

import pytest

from longnet_cli.cli.options import parse_device

SCRIPT = """
import json, typer
from collections.abc import Sequence
from typing import Annotated
from longnet_cli.cli.app import run
from longnet_cli.cli.options import *

app = typer.Typer()

@app.command()
def show(
    inputs: Inputs,
    seq: Annotated[Sequence[int], sizes_option("--seq", help="Lengths.")] = (8192, 32768),
    chunk: Annotated[int, size_option("--chunk", help="Tokens.")] = 65536,
    limit: Annotated[int | None, size_option("--limit", help="Tokens.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    tokenizer: TokenizerOption = None,
    column: ColumnOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quiet: QuietOption = False,
) -> None:
    print(json.dumps(locals()))

run(app)
"""


@pytest.fixture
def show(tmp_path, command_env):
    """A command with every shared option, which prints what it was given."""

    def run(*args: str) -> subprocess.CompletedProcess:
        path = tmp_path / "show.py"
        path.write_text(SCRIPT)
        command = [sys.executable, path, *args]
        return subprocess.run(command, capture_output=True, text=True, env=command_env, check=False)

    return run


@pytest.mark.parametrize("text", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_devices(text):
    assert parse_device(text) == text


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:x", "cpu:0"])
def test_what_is_no_device(text):
    with pytest.raises(ValueError, match="write auto, cpu, cuda or cuda:1"):
        parse_device(text)


def test_a_command_gets_its_defaults_and_its_options(show):
    import json

    defaults = json.loads(show("in.arrow").stdout)
    assert defaults["inputs"] == ["in.arrow"]
    assert defaults["seq"] == [8192, 32768]
    assert (defaults["chunk"], defaults["limit"], defaults["device"], defaults["dtype"]) == (
        65536,
        None,
        "auto",
        "auto",
    )
    assert defaults["model"] == "longnet-tiny"

    given_ = json.loads(show("a", "-", "--seq", "8k,1e6", "--limit", "64Ki", "--dtype", "bf16", "-m", "./run").stdout)
    assert given_["inputs"] == ["a", "-"]
    assert (given_["seq"], given_["limit"], given_["dtype"], given_["model"]) == ([8000, 10**6], 65536, "bf16", "./run")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--seq", "8k,x"), "'x' is not a size"),
        (("--limit", "0"), "'0' is out of range"),
        (("--device", "gpu"), "'gpu' is not a device"),
        (("--dtype", "fp8"), "'--dtype'"),
        (("--sqe", "8k"), "--seq"),
    ],
)
def test_a_wrong_option_is_exit_2_and_our_own_sentence(show, args, sentence):
    result = show("in.arrow", *args)
    assert result.returncode == 2
    assert args[0] in result.stderr
    assert sentence in " ".join(result.stderr.replace("│", " ").split())


def test_help_explains_sizes(show):
    text = " ".join(show("--help").stdout.replace("│", " ").split())
    assert "32k is 32000, 32Ki is 32768." in text
    assert "auto|cpu|cuda[:i]" in text
