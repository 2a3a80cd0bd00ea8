"""Proves `score` and `encode` as a person and a script meet them: real processes, pipes, exit codes.

Whatever goes wrong is one line on stderr and the documented exit code; whatever goes right keeps stdout for results.
`bench` has its formats, and tells what it does on stderr. `longnet` is a good neighbour in a pipe: first results before
the input ends, memory that does not grow, and a clean end whoever ends it.
"""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from builders import tiny_model
from files import IDS, TEXTS, read, token_table, write_file, write_lines
from processes import invoke
from typer.testing import Result

from longnet_cli.data.documents.tokenizer import Tokenizer

# --- chains of commands ----------------------------------------------------------------------------------------------


@pytest.fixture
def shell(
    tmp_path: Path, command_env: dict[str, str], longnet: Path
) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a line of bash in which `longnet` is this checkout's."""

    def run(line: str, **options: Any) -> subprocess.CompletedProcess:
        script = f"set -o pipefail; PATH={longnet.parent}:$PATH; {line}"
        options = {"text": True, "timeout": 120, "stdin": subprocess.DEVNULL} | options
        return subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=command_env, capture_output=True, **options
        )

    return run


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for index, text in enumerate(TEXTS):
        (tmp_path / f"texts/{index}.txt").write_bytes(text.encode())
    return tmp_path / "texts"


@pytest.mark.parametrize("ranks", [[], ["--dp", "2"]])
def test_the_documents_before_a_bad_line_are_written_first(model, run_longnet, tmp_path, ranks):
    write_lines(
        tmp_path / "x.jsonl", [{"id": str(n), "text": n if n == 3 else "text"} for n in range(1, 5)]
    )
    done = run_longnet("score x.jsonl -m", model, "--format", "jsonl", *ranks)
    assert [json.loads(line)["doc_id"] for line in done.stdout.splitlines()] == ["1", "2"]
    assert (done.returncode, "x.jsonl, line 3: 'text' is not text" in done.stderr) == (3, True)


WAYS = {
    "a file": "longnet data inspect x.arrow",
    "redirected": "longnet data inspect - < x.arrow",
    "redirected, by name": "longnet data inspect /dev/stdin < x.arrow",
    "piped": "cat x.arrow | longnet data inspect -",
    "piped, by name": "cat x.arrow | longnet data inspect /dev/stdin",
    "substituted": "longnet data inspect <(cat x.arrow)",
    "listed": "longnet data inspect @list",
}


def test_every_way_in(shell, tmp_path):
    write_file(tmp_path / "x.arrow", token_table(pa.list_(pa.int32())))
    (tmp_path / "list").write_text("\nx.arrow\n")
    done = shell("; ".join(f"{line} --format json" for line in WAYS.values()))
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(part) for part in done.stdout.replace("}\n{", "}\n\0{").split("\0")]
    assert len(answers) == len(WAYS)
    assert (answers[0]["documents"], answers[0]["tokens"]) == (3, sum(map(len, IDS)))
    assert all(other == answers[0] for other in answers)


@pytest.mark.parametrize(
    ("form", "named"), [("lines", True), ("lines", False), ("begun lines", True), ("arrow", True)]
)
@pytest.mark.parametrize(
    ("command", "number"),
    [("score", signal.SIGINT), ("encode", signal.SIGTERM), ("tokenize", signal.SIGINT)],
)
def test_each_result_comes_before_the_next_row_and_a_signal_ends_the_wait(
    start, model, command, number, form, named
):
    """A row of text is a document: nothing waits for another name. Rows that came together are read together.

    Neither do blank lines make it wait, nor a part of the next line.
    """
    options = {"score": ["-m", model, "--format", "jsonl", "--keep", "n"], "encode": ["-m", model]}
    second = start(command, "-", *options.get(command, ["-o", "-"]), stdin=subprocess.PIPE)
    timer = threading.Timer(60, second.kill)  # lest the test wait for ever
    timer.start()
    row, names, results = {"text": "some words", "n": 1} | ({"id": "a"} if named else {}), [], None
    batch = pa.RecordBatch.from_pylist([row])
    stream = ipc.new_stream(second.stdin, batch.schema) if form == "arrow" else None
    line, begun = json.dumps(row).encode() + b"\n", 0
    for _ in range(3):
        if stream:
            stream.write_batch(batch)
        else:
            second.stdin.write(line[begun:])
        if form == "begun lines":
            begun = 9
            second.stdin.write(b"\r\n\n" + line[:begun])
        second.stdin.flush()
        if command == "score":
            names.append(json.loads(second.stdout.readline())["doc_id"])
        else:
            results = results or ipc.open_stream(second.stdout)
            names += results.read_next_batch()["doc_id"].to_pylist()
    assert names == (["a", "a#1", "a#2"] if named else ["stdin:0", "stdin:1", "stdin:2"])
    if results and not stream:
        second.stdin.write(line[begun:] + 19 * line)
        second.stdin.flush()
        assert len(results.read_next_batch()) == 19  # the last one may come alone
    second.send_signal(number)
    assert second.wait(20) == 128 + number
    timer.cancel()
    assert command == "tokenize" or second.stderr.read().startswith(b"stopped: ")
    # which would say that this was all
    assert not second.stdout.read().endswith(b"\xff\xff\xff\xff\0\0\0\0")


@pytest.mark.parametrize("command", ["score --format jsonl", "encode", "tokenize -o -"])
def test_a_reader_that_leaves_is_no_error_to_tell(shell, model, tmp_path, command):
    (tmp_path / "many.jsonl").write_text('{"text": "some words to read"}\n' * 20_000)
    where = "" if command.startswith("tokenize") else f"-m {model} --chunk 100"
    done = shell(f"longnet {command} many.jsonl {where} | head -c 100 > head")
    assert (done.returncode, done.stderr) == (141, "")
    assert (tmp_path / "head").stat().st_size == 100


@pytest.mark.parametrize("command", ["tokenize x.txt -o -", "encode x.txt -o -", "encode x.txt"])
def test_binary_is_not_written_to_a_terminal(command, command_env, longnet, tmp_path):
    terminal, stdout = pty.openpty()
    try:
        words = [longnet, *command.split()]
        done = subprocess.run(
            words, stdout=stdout, stderr=subprocess.PIPE, text=True, env=command_env, cwd=tmp_path
        )
    finally:
        os.close(stdout)
        os.close(terminal)
    assert done.returncode == 2
    assert "stdout is a terminal" in done.stderr
    assert done.stderr.count("\n") == 1


RESULTS_ON_STDOUT = "tokenize texts -o -", "score texts", "data inspect texts", "encode texts"


def test_a_closed_end_is_one_line(shell, texts):
    closed = (
        ("longnet data inspect - <&-", 3),
        *((f"longnet {line} >&-", 1) for line in RESULTS_ON_STDOUT),
    )
    for line, code in closed:
        done = shell(line)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1)
        assert " is closed" in done.stderr
    done = shell("longnet tokenize texts -o - 2>&- | longnet data inspect - --format json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["documents"] == 3


def test_a_command_of_the_shell_is_written_to_as_a_file(shell, texts, tmp_path):
    line = "longnet tokenize texts -o >(cat > copy.arrow; touch done) -q"
    done = shell(f"{line}; until [ -e done ]; do sleep 0.1; done")
    assert (done.returncode, done.stderr) == (0, "")
    assert [document.read().tolist() for document in read(tmp_path / "copy.arrow")] == IDS


# --- memory ----------------------------------------------------------------------------------------------------------

# Runs the command and writes the peak of its memory, in KiB: that of its own pages, not of what it was forked from.
MEASURED = """
import atexit, sys
peak = sys.argv.pop(1)
@atexit.register
def report():
    with open("/proc/self/status") as status, open(peak, "w") as out:
        out.write(next(line.split()[1] for line in status if line.startswith("VmHWM")))
from longnet_cli.cli.app import main
main()
"""

GENERATOR = """
import random, sys
chance = random.Random(0)
for index in range(int(sys.argv[1])):
    print('{"id": %d, "text": "%s"}' % (index, "".join(chance.choices("abc def", k=4000))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("last", ["score - --format jsonl", "encode - --span 10"])
def test_memory_of_a_chain_does_not_grow_with_its_input(shell, tmp_path, last):
    """Of 12 and of 48 million tokens. Of those `tokenize` holds at most some 10 million: see test_tokenizing.py."""
    tiny_model(tmp_path / "small", dim=8, num_layers=1, num_heads=1, ffn_dim=8)
    for name, program in (("documents.py", GENERATOR), ("measured.py", MEASURED)):
        (tmp_path / name).write_text(program)
    chain = f"$P measured.py 0 tokenize - -o - -q | $P measured.py 1 {last} -m ./small --chunk 16Ki -q | wc -c"
    found = []
    for documents in (3000, 12000):
        done = shell(f"P={sys.executable}; $P documents.py {documents} | {chain}", timeout=600)
        assert (done.returncode, done.stderr) == (0, "")
        found.append(
            [*(int((tmp_path / name).read_text()) >> 10 for name in "01"), int(done.stdout)]
        )
    print(f"peaks in MiB, and bytes that come out: {found}")
    (small, of_small, size), (large, of_large, four_times) = found
    assert 3.9 < four_times / size < 4.1
    assert of_large < of_small + 16
    assert max(small, large) < 180


SCORE_KEYS = {"nll_sum", "n_tokens", "n_bytes", "ppl", "bpb"}
PROSE = {
    "a.txt": "Call me Ishmael.",
    "b.txt": "Some years ago\nnever mind how long precisely\n",
    "c.txt": "é",
}


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in PROSE.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


# --- score -----------------------------------------------------------------------------------------------


def test_score_compares_contexts(run_longnet, model, prose):
    command = ["score --context 4,8 --device cpu --model", model, prose]
    as_json = run_longnet(*command, "--format", "json", code=0)
    assert as_json.stderr == ""
    value = json.loads(as_json.stdout)
    assert value["totals"][1] == value["total"]
    assert [row["context"] for row in value["totals"]] == [4, 8]
    assert [row["doc_id"] for row in value["documents"]] == [*PROSE]
    for row in value["documents"]:
        assert {"nll_sum_4", "ppl_8", "gain"} <= {*row}
    assert {row["n_tokens"] for row in value["totals"]} == {63}
    errors = {"ppl_se", "bpb_se", "ppl_ratio", "ppl_ratio_se"}
    assert value["total"].keys() >= errors | {"n_docs"}
    assert value["total"]["bos"] == [256]
    as_text = run_longnet(*command, "--last", "6", "--stride", "3", code=0)
    assert "longnet: note: 1 document too short" in as_text.stderr
    header, *rows = as_text.stdout.splitlines()
    assert header.split() == ["tokens", "ppl", "bpb", "context", "document"]
    names = ["a.txt", "a.txt", "b.txt", "b.txt", "total", "total"]
    assert [row.split()[-1] for row in rows[:6]] == names
    assert rows[4].split()[0] == "12"  # the last six tokens of the two that are long enough
    assert "+- is a standard error, clustered by document (2 documents)" in rows


def test_score_formats_agree(run_longnet, model, prose):
    words = ["score --ppl --context 8 --device cpu --model", model, prose, "--format"]
    done = [run_longnet(*words, format, code=0) for format in ("json", "jsonl", "text")]
    assert [each.stderr for each in done] == [""] * 3
    as_json, as_lines, as_text = (each.stdout for each in done)

    value = json.loads(as_json)
    assert value["total"].keys() >= SCORE_KEYS
    assert [row["doc_id"] for row in value["documents"]] == list(PROSE)
    for row in value["documents"]:
        assert row.keys() >= SCORE_KEYS | {"doc_id"}
        assert row["n_bytes"] == len(PROSE[row["doc_id"]].encode())
    assert value["total"]["n_tokens"] == 63
    nats = sum(row["nll_sum"] for row in value["documents"])
    assert value["total"]["nll_sum"] == pytest.approx(nats)

    lines = [{"kind": "document", **row} for row in value["documents"]]
    lines.append({"kind": "total", **value["total"]})
    assert [*map(json.loads, as_lines.splitlines())] == lines

    header, *lines, last = as_text.splitlines()
    assert (header.split(), last) == (["tokens", "ppl", "bpb", "document"], f"model {model}")
    assert [line.split()[-1] for line in lines] == [*PROSE, "total"]
    assert len({line.index(line.split()[-1]) for line in [header, *lines]}) == 1  # straight columns
    numbers = [f"{value['total'][name]:.3f}" for name in ("ppl", "bpb")]
    assert lines[-1].split() == ["63", *numbers, "total"]


def test_other_text_than_the_default_models_is_noted(run_longnet, tmp_path):
    """Where a file does not end in .py, and never for a model that is named."""
    (tmp_path / "prose.txt").write_text("Call me Ishmael.")
    (tmp_path / "code.py").write_text("x = 1\n" * 9)
    tiny_model(tmp_path / "own")
    for command in (["score"], ["encode", "-o", "v.npy"]):
        for inputs, noted in (
            (["prose.txt"], True),
            (["code.py", "prose.txt"], True),
            (["code.py"], False),
            (["prose.txt", "-mlongnet-tiny"], False),
            (["prose.txt", "-m./own"], False),
        ):
            done = run_longnet(*command, *inputs, code=0)
            line = "the default model, knows Python source: for other text, give --model"
            assert (line in done.stderr) == noted, (command, inputs)
    vectors = np.load(tmp_path / "v.npy")
    assert (vectors.shape, vectors.dtype) == ((1, 16), np.float32)


# --- encode ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["score -m {}", "encode -m {}", "tokenize"])
def test_rows_that_are_joined_are_noted(run_longnet, model, tmp_path, command):
    """Once a run, of all files; not of rows that are numbered, and not with --quiet."""
    for name in "ab":
        rows = [{"id": doc_id, "text": "words"} for doc_id in "xxyzzz"]
        write_lines(tmp_path / f"{name}.jsonl", rows)
    write_lines(tmp_path / "c.jsonl", [{"id": "x", "text": "words", "part": n} for n in range(3)])
    command = command.format(model)
    words = f"{command} a.jsonl b.jsonl c.jsonl -o out.jsonl"
    noted = "longnet: note: 10 rows became 4 documents: neighbouring rows of one name are joined"
    assert run_longnet(words).stderr.count(noted) == 1
    assert "joined" not in run_longnet(f"{words} -q").stderr
    assert "joined" not in run_longnet(f"{command} c.jsonl -o out.jsonl").stderr


def test_encode_without_output_streams_and_to_a_name_writes_parquet(
    run_longnet, model, prose, tmp_path
):
    command = ["encode --model", model, prose]
    options = [
        "-o",
        "out.parquet",
        "--pool",
        "last",
        "--no-normalize",
        "--embedding-dtype",
        "float16",
    ]
    streamed = run_longnet(*command, text=False, code=0)
    written = run_longnet(*command, *options, code=0)
    counts = f"3 vectors of {sum(len(text.encode()) for text in PROSE.values())} tokens"
    assert streamed.stderr.decode() == f"{counts} -> stdout\n"
    assert ipc.open_stream(streamed.stdout).read_all()["doc_id"].to_pylist() == list(PROSE)
    assert (written.stdout, written.stderr) == ("", f"{counts} -> out.parquet\n")
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.field("embedding").type == pa.list_(pa.float16(), 16)
    assert (
        schema.metadata.items()
        >= {
            b"longnet.model": str(model).encode(),
            b"longnet.pooling": b"last",
            b"longnet.normalized": b"false",
            b"longnet.tokenizer_sha256": Tokenizer.bytes().sha256.encode(),
        }.items()
    )


CONTRACT = {
    "op", "impl", "direction", "seq", "status", "seconds", "tokens_per_second", "flops_per_second",
    "peak_rss_bytes", "cache_bytes",
}  # fmt: skip
SHAPE = {"heads", "head_dim", "batch", "causal", "dtype", "device", "kernel", "pattern"}
TINY = "bench --heads 2 --head-dim 8 --repeats 1 --device cpu --pattern 16/1,32/2"

Bench = Callable[..., Result]


@pytest.fixture
def bench() -> Bench:
    """The command in this process, where torch is loaded already."""
    return lambda words: invoke(f"{TINY} {words}")


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_rows_have_every_key_of_the_contract(bench):
    result = bench("--seq 48,64 --direction forward,backward --format jsonl -q")
    assert (result.exit_code, result.stderr) == (0, "")
    rows = rows_of(result.stdout)
    assert len(rows) == 8
    assert all(row.keys() >= CONTRACT | SHAPE for row in rows)
    assert [(row["impl"], row["direction"], row["seq"], row["status"]) for row in rows[:3]] == [
        ("dilated", "forward", 48, "ok"), ("dense", "forward", 48, "ok"), ("dilated", "backward", 48, "ok")
    ]  # fmt: skip


def test_markdown_is_a_table_and_the_ratios_follow_on_stderr(bench):
    result = bench("--seq 64")
    head, rule, *rows = result.stdout.splitlines()
    assert head.replace("|", "").split()[:4] == ["impl", "direction", "seq", "seconds"]
    assert {len(line) for line in (head, rule, *rows)} == {79}  # it fits a terminal
    assert re.findall("[-:]+", rule) == ["-" * 8, "-" * 9, *["-" * 7 + ":"] * 5]
    assert len(rows) == 2
    assert all(
        re.fullmatch(r"\| de?n?i?l?\w+ +\| forward +\| +64 .*[ums]s .*iB \|", row) for row in rows
    )
    first, *_, last = result.stderr.splitlines()
    for said in ("attention, forward", "torch", "kernel cpu_flash"):
        assert said in first
    assert re.fullmatch("dilated is .*x dense at 64, forward", last)


def test_skipped_and_stopped_rows_give_their_reason(bench):
    result = bench("--seq 64,1e12 --bidirectional --impl dilated --format jsonl")
    assert [row["status"] for row in rows_of(result.stdout)] == ["ok", "skipped"]
    assert "dilated forward at 1000000000000: skipped, needs " in result.stderr
    result = bench("--seq 64 --max-time 0 --format jsonl")
    assert [row["status"] for row in rows_of(result.stdout)] == ["stopped", "stopped"]
    assert result.exit_code == 0


def test_score_by_a_column_gives_each_group_what_it_has_alone(run_longnet, tmp_path):
    model = tiny_model(tmp_path / "m")
    rows = [{"text": f"text {n} " * n, "source": "ab"[n % 2], "tags": [n]} for n in range(1, 7)]
    write_lines(tmp_path / "all.jsonl", rows)
    options = ["-m", model, "--format", "jsonl"]
    printed = run_longnet("score all.jsonl --by source", *options, code=0).stdout
    groups = [line for line in map(json.loads, printed.splitlines()) if line["kind"] == "group"]
    assert [(line["by"], line["group"], line["n_docs"]) for line in groups] == [
        ("source", "b", 3),
        ("source", "a", 3),
    ]
    for line in groups:
        alone = [row for row in rows if row["source"] == line["group"]]
        write_lines(tmp_path / "alone.jsonl", alone)
        total = json.loads(
            run_longnet("score alone.jsonl", *options, code=0).stdout.splitlines()[-1]
        )
        for key in ("nll_sum", "n_tokens", "ppl", "ppl_se", "bpb", "bpb_se"):
            assert line[key] == pytest.approx(total[key], rel=1e-5)
    one = run_longnet("score all.jsonl --by source --format json -m", model, code=0).stdout
    assert [group["group"] for group in json.loads(one)["groups"]] == ["b", "a"]
    text = run_longnet("score all.jsonl --by source -m", model, code=0).stdout
    assert "  source b (3 documents, ppl +- " in text
    refused = run_longnet("score all.jsonl --by tags -m", model)
    assert (refused.returncode, "--by tags: the column holds lists" in refused.stderr) == (3, True)
