"""The model that ships, on texts of the size that people have: in chunks, by two processes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from real_files import Run, score
from safetensors.torch import load_file


def test_a_long_text_in_chunks_is_the_text_at_once(run: Run, half_megabyte: Path) -> None:
    whole = score(run, half_megabyte, "--pattern", "window:1Ki", "--chunk", "64Ki", mib=2500)
    chunks = score(run, half_megabyte, "--pattern", "window:1Ki", "--chunk", "1000", mib=700)
    assert math.isclose(whole["nll_sum"], chunks["nll_sum"], rel_tol=1e-6)


def test_two_processes_score_what_one_does(run: Run, library: list[Path]) -> None:
    words = ("score", *library[:12], "--last", "2k", "--format", "json", "-q")
    one, two = (json.loads(run(*words, *ranks, mib=700).stdout) for ranks in ((), ("--dp", 2)))
    losses = [{row["doc_id"]: row["nll_sum"] for row in told["documents"]} for told in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert two["total"]["n_tokens"] == one["total"]["n_tokens"]


def test_a_saved_state_of_a_long_prompt_continues_as_one_run(
    run: Run, book: str, tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text(book[:100_000], encoding="utf-8")
    more = ("--max-tokens", 12, "--format", "jsonl", "-q")
    one = run("generate --input prompt.txt", *more, mib=1500).rows[0]
    run("generate --input prompt.txt --save-state state -q", mib=1500)
    assert run("generate --state state", *more, mib=900).rows[0]["tokens"] == one["tokens"]


def test_the_rest_of_the_commands(run: Run, half_megabyte: Path, tmp_path: Path) -> None:
    run("convert longnet-tiny -o half --dtype bf16 -q", mib=900)
    assert load_file(tmp_path / "half/model.safetensors")
    bench = run("bench --seq 2Ki,8Ki --repeats 1 --format jsonl", mib=2500)
    assert {row["status"] for row in bench.rows} == {"ok"}
    (tmp_path / "bench.jsonl").write_text(bench.stdout)
    words = ["--context", "64,256", "--last", "20k", "--format", "json", "-q"]
    (tmp_path / "score.json").write_text(run("score", half_megabyte, *words, mib=900).stdout)
    for name in ("bench.jsonl", "score.json"):
        run("plot", name, "-o", "picture.svg", mib=500)
        assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
