"""Proves that sizes, lists of sizes and devices are read as documented, and that typer shows our sentence if not."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet_cli.cli.options import parse_device, parse_size, parse_sizes

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


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1000", 1000),
        ("1_000_000", 10**6),
        ("1e9", 10**9),
        ("1E+9", 10**9),
        ("1.5e3", 1500),
        ("32k", 32_000),
        ("32K", 32_000),
        ("1.5M", 1_500_000),
        (".5k", 500),
        ("2G", 2 * 10**9),
        ("64Ki", 65_536),
        ("64ki", 65_536),
        ("1.5Mi", 3 * 2**19),
        ("1Gi", 2**30),
        ("1Ti", 2**40),
        (" 8k ", 8000),
        ("9223372036854775807", 2**63 - 1),
        (4096, 4096),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "abc", "8kb", "1e", "1__0", "_1", "0x10", "1,5", "inf", "nan", "٣", "1e-3"])
def test_what_is_no_size_gets_an_example(text):
    with pytest.raises(ValueError, match=r"is not a size: write 1000000, .* or 64Ki"):
        parse_size(text)


@pytest.mark.parametrize("text", ["-1", "-8k"])
def test_negative_sizes_are_refused(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "0k", "1e99", "9223372036854775808"])
def test_sizes_out_of_range(text):
    with pytest.raises(ValueError, match="is out of range"):
        parse_size(text)


@pytest.mark.parametrize("text", ["1.5", "1.0001k", "0.5"])
def test_a_part_of_a_token_is_refused(text):
    with pytest.raises(ValueError, match="is not a whole number"):
        parse_size(text)


@given(st.integers(1, 2**63 - 1))
def test_every_way_to_write_an_integer_reads_back(size):
    assert parse_size(str(size)) == parse_size(f"{size:_}") == parse_size(size) == size


@given(st.integers(1, 9000), st.integers(0, 4))
def test_letters_are_powers(number, power):
    assert parse_size(f"{number}{['', 'k', 'M', 'G', 'T'][power]}") == number * 1000**power
    assert parse_size(f"{number}{['', 'Ki', 'Mi', 'Gi', 'Ti'][power]}") == number * 1024**power


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_value_error(text):
    try:
        size = parse_size(text)
    except ValueError:
        return
    assert size >= 1


def test_lists_keep_their_order():
    assert parse_sizes("8k,32k,1e6") == [8000, 32_000, 1_000_000]
    assert parse_sizes("64Ki") == [65_536]
    assert parse_sizes("2, 1, 2") == [2, 1, 2]


@pytest.mark.parametrize("text", ["", ",", "8k,", "8k,,32k", "8k;32k"])
def test_lists_with_holes_are_refused(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_sizes(text)


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
