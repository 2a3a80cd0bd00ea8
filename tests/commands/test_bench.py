"""Proves the command `longnet bench`: its formats, and what it tells on stderr."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from processes import invoke
from typer.testing import Result

from longnet_cli.basics.errors import ConfigError

CONTRACT = {
    "op", "impl", "direction", "seq", "status", "seconds", "tokens_per_second", "flops_per_second",
    "peak_rss_bytes", "cache_bytes",
}  # fmt: skip
SHAPE = {"heads", "head_dim", "batch", "causal", "dtype", "device", "kernel", "pattern"}
TINY = ["--heads", "2", "--head-dim", "8", "--repeats", "1", "--device", "cpu", "--pattern", "16/1,32/2"]

Bench = Callable[..., Result]


@pytest.fixture
def bench() -> Bench:
    """The command in this process, where torch is loaded already."""
    return lambda *args: invoke("bench", *TINY, *args)


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_rows_have_every_key_of_the_contract(bench: Bench) -> None:
    result = bench("--seq", "48,64", "--direction", "forward,backward", "--format", "jsonl", "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    rows = rows_of(result.stdout)
    assert len(rows) == 8
    assert all(row.keys() >= CONTRACT | SHAPE for row in rows)
    assert [(row["impl"], row["direction"], row["seq"], row["status"]) for row in rows[:3]] == [
        ("dilated", "forward", 48, "ok"), ("dense", "forward", 48, "ok"), ("dilated", "backward", 48, "ok")
    ]  # fmt: skip


def test_markdown_is_a_table_and_the_ratios_follow_on_stderr(bench: Bench) -> None:
    result = bench("--seq", "64")
    head, rule, *rows = result.stdout.splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")][:4] == ["impl", "direction", "seq", "seconds"]
    assert {len(line) for line in (head, rule, *rows)} == {79}  # it fits a terminal
    assert "attention, forward" in result.stderr.splitlines()[0]
    assert set(rule) == set("|-: ")
    assert len(rows) == 2
    assert "dilated is " in result.stderr
    assert result.stderr.rstrip().endswith("x dense at 64, forward")
    assert "torch" in result.stderr.splitlines()[0]
    assert "kernel cpu_flash" in result.stderr.splitlines()[0]


def test_skipped_and_stopped_rows_give_their_reason(bench: Bench) -> None:
    result = bench("--seq", "64,1e12", "--bidirectional", "--impl", "dilated", "--format", "jsonl")
    assert [row["status"] for row in rows_of(result.stdout)] == ["ok", "skipped"]
    assert "dilated forward at 1000000000000: skipped, needs " in result.stderr
    result = bench("--seq", "64", "--max-time", "0", "--format", "jsonl")
    assert [row["status"] for row in rows_of(result.stdout)] == ["stopped", "stopped"]
    assert result.exit_code == 0


def test_flex_attention_needs_a_compiler(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = bench("--seq", "64", "--impl", "flex")
    assert isinstance(result.exception, ConfigError)
    assert "needs a C++ compiler, and there is no no-such-compiler" in str(result.exception)
