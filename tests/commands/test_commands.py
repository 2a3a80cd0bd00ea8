"""Proves `score` and `encode` as a person and a script meet them: real processes, pipes, exit codes.

Whatever goes wrong is one line on stderr and the documented exit code; whatever goes right keeps stdout for
results. `bench` has its formats, and tells what it does on stderr.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from builders import scores, tiny_model
from conftest import RunLongnet
from places import ROOT
from processes import invoke
from typer.testing import Result

from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.nets.longnet import LongNet

SCORE_KEYS = {"nll_sum", "n_tokens", "n_bytes", "ppl", "bpb"}
TEXTS = {"a.txt": "Call me Ishmael.", "b.txt": "Some years ago\nnever mind how long precisely\n", "c.txt": "é"}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


# --- score -----------------------------------------------------------------------------------------------


def test_score_compares_contexts(run_longnet: RunLongnet, model: Path, texts: Path) -> None:
    command = ["score", texts, "--model", model, "--context", "4,8", "--device", "cpu", "--by-position"]
    as_json = run_longnet(*command, "--format", "json")
    as_text = run_longnet(*command, "--last", "6", "--stride", "3")
    assert (as_json.returncode, as_json.stderr) == (0, "")
    value = json.loads(as_json.stdout)
    assert value["totals"][1] == value["total"]
    assert [row["context"] for row in value["totals"]] == [4, 8]
    assert [row["doc_id"] for row in value["documents"]] == [*TEXTS]
    assert all({"nll_sum_4", "ppl_8", "by_position_4", "gain"} <= {*row} for row in value["documents"])
    assert {row["n_tokens"] for row in value["totals"]} == {63}
    assert value["total"].keys() >= {"ppl_se", "bpb_se", "ppl_ratio", "ppl_ratio_se", "n_docs", "by_position"}
    assert value["total"]["bos"] == [256]
    header, *rows = as_text.stdout.splitlines()
    assert header.split() == ["tokens", "ppl", "bpb", "context", "document"]
    assert [row.split()[-1] for row in rows[:6]] == ["a.txt", "a.txt", "b.txt", "b.txt", "total", "total"]
    assert rows[4].split()[0] == "12"  # the last six tokens of the two that are long enough
    assert "+- is a standard error, clustered by document (2 documents)" in rows
    assert "tokens seen" in as_text.stdout


def test_score_formats_agree_with_the_library(run_longnet: RunLongnet, model: Path, texts: Path) -> None:
    tokenizer = Tokenizer.load(model)
    documents = Inputs([texts], tokenizer).documents()
    expected = list(scores(LongNet.from_pretrained(model), documents, bos=tokenizer.eos_id, context=8))
    arguments = ["score", "--ppl", texts, "--model", model, "--context", "8", "--device", "cpu", "--format"]
    as_json, as_lines, as_text = (run_longnet(*arguments, format) for format in ("json", "jsonl", "text"))
    assert [(done.returncode, done.stderr) for done in (as_json, as_lines, as_text)] == [(0, "")] * 3

    value = json.loads(as_json.stdout)
    assert value["total"].keys() >= SCORE_KEYS
    assert [row["doc_id"] for row in value["documents"]] == list(TEXTS)
    for row, wanted in zip(value["documents"], expected, strict=True):
        assert row.keys() >= SCORE_KEYS | {"doc_id"}
        assert row["nll_sum"] == pytest.approx(wanted.score.nll_sum, rel=1e-6)
        assert row["n_bytes"] == len(TEXTS[row["doc_id"]].encode())
    assert value["total"]["n_tokens"] == 63
    assert value["total"]["nll_sum"] == pytest.approx(sum(row["nll_sum"] for row in value["documents"]))

    lines = [{"kind": "document", **row} for row in value["documents"]] + [{"kind": "total", **value["total"]}]
    assert [*map(json.loads, as_lines.stdout.splitlines())] == lines

    header, *lines, last = as_text.stdout.splitlines()
    assert (header.split(), last) == (["tokens", "ppl", "bpb", "document"], f"model {model}")
    assert [line.split()[-1] for line in lines] == [*TEXTS, "total"]
    assert len({line.index(line.split()[-1]) for line in [header, *lines]}) == 1  # straight columns
    assert lines[-1].split() == ["63", *(f"{value['total'][name]:.3f}" for name in ("ppl", "bpb")), "total"]


def test_text_that_does_not_suit_the_default_model_is_noted(run_longnet: RunLongnet, tmp_path: Path) -> None:
    """Over the first 4,096 tokens, so not if code comes first; and never for a model that is named."""
    shutil.copy(ROOT / "README.md", tmp_path / "prose.txt")
    (tmp_path / "code.py").write_text(Path(__file__).read_text() * 2)
    tiny_model(tmp_path / "own")
    for command in (["score"], ["encode", "-o", "v.npy"]):
        for inputs, noted in (
            (["prose.txt"], True),
            (["code.py", "prose.txt"], False),
            (["prose.txt", "-mlongnet-tiny"], False),
            (["prose.txt", "-m./own"], False),
        ):
            done = run_longnet(*command, *inputs, code=0)
            assert ("longnet-tiny, the default model, takes" in done.stderr) == noted, (command, inputs)
    vectors = np.load(tmp_path / "v.npy")
    assert (vectors.shape, vectors.dtype) == ((1, 16), np.float32)


# --- encode ----------------------------------------------------------------------------------------------


def test_encode_without_output_streams_and_to_a_name_writes_parquet(
    run_longnet: RunLongnet, model: Path, texts: Path, tmp_path: Path
) -> None:
    common = ["encode", texts, "--model", model]
    options = ["-o", "out.parquet", "--pool", "last", "--no-normalize", "--embedding-dtype", "float16"]
    streamed, written = (run_longnet(*command, text=False) for command in (common, [*common, *options]))
    counts = f"{len(TEXTS)} vectors of {sum(map(len, map(str.encode, TEXTS.values())))} tokens"
    assert (streamed.returncode, streamed.stderr.decode()) == (0, f"{counts} -> stdout\n")
    assert ipc.open_stream(streamed.stdout).read_all()["doc_id"].to_pylist() == list(TEXTS)

    assert (written.returncode, written.stdout, written.stderr.decode()) == (0, b"", f"{counts} -> out.parquet\n")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), 16)
    assert table.schema.metadata[b"longnet.model"] == str(model).encode()
    assert table.schema.metadata[b"longnet.pooling"] == b"last"
    assert table.schema.metadata[b"longnet.normalized"] == b"false"
    assert table.schema.metadata[b"longnet.tokenizer_sha256"] == Tokenizer.bytes().sha256.encode()


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
