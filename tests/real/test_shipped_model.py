"""The model that ships, on texts of the size that people have: in chunks."""

from __future__ import annotations

import math

from real_files import score
from safetensors.torch import load_file


def test_a_long_text_in_chunks_is_the_text_at_once(run, half_megabyte):
    whole = score(run, half_megabyte, "--pattern", "window:1Ki", "--chunk", "64Ki", mib=2500)
    chunks = score(run, half_megabyte, "--pattern", "window:1Ki", "--chunk", "1000", mib=700)
    assert math.isclose(whole["nll_sum"], chunks["nll_sum"], rel_tol=1e-6)


def test_the_rest_of_the_commands(run, half_megabyte, tmp_path):
    run("convert longnet-tiny -o half --dtype bf16 -q", mib=900)
    assert load_file(tmp_path / "half/model.safetensors")
    bench = run("bench --seq 2Ki,8Ki --repeats 1 --format jsonl", mib=2500)
    assert {row["status"] for row in bench.rows} == {"ok"}
    words = ["--context", "256", "--last", "20k", "--token-logprobs", "tokens.arrow", "-q"]
    run("score", half_megabyte, *words, mib=900)
    run("plot", "tokens.arrow", "-o", "page.html", mib=500)
    assert (tmp_path / "page.html").read_text().startswith("<!")
