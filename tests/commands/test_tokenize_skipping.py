"""`tokenize --skip-bad` leaves out what cannot be read, says so, and writes everything else as if that were all."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import contents

from longnet_cli.data import formats
from longnet_cli.data import inputs as inputs_module
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.manifest import LeftOut, read_manifest
from longnet_cli.jobs.tokenizing import tokenize

ROWS = [{"id": f"r{index}", "text": f"text {index} " * 50} for index in range(8)]
ERRORS = [
    "missing.txt: no such file or folder",
    "bad.txt.gz: the gzip data is damaged or truncated (",
    "rows.jsonl, line 4: not JSON: ",
    "rows.jsonl, line 6: 'text' is null",
    "rows.parquet, row 1: the value is null",
]
TOTALS = "13 documents, 5.66k tokens, 1.00 bytes per token, vocabulary 257 -> "


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Good and bad ones; the folder `good` has the good ones alone, under the same names."""
    (tmp_path / "good").mkdir()
    found = [json.dumps(row) + "\n" for row in ROWS]
    (tmp_path / "good/rows.jsonl").write_text("".join(found))
    found[3:3], found[5:5] = ['{"id": "x", "text": \n'], ['{"id": "y", "text": null}\n']
    assert (found[3][-2:], json.loads(found[5])["text"]) == (" \n", None)
    (tmp_path / "rows.jsonl").write_text("".join(found))
    packed = bytearray(gzip.compress(b"unreadable " * 1000))
    packed[-8] ^= 1  # its checksum
    (tmp_path / "bad.txt.gz").write_bytes(packed)
    for folder, rows in ((tmp_path / "good", [0, 1, 2, 3]), (tmp_path, [0, None, 1, 2, 3])):
        table = [{"id": f"p{row}", "text": None if row is None else f"row {row} " * 100} for row in rows]
        pq.write_table(pa.Table.from_pylist(table), folder / "rows.parquet")
        (folder / "last.txt").write_text("the last " * 50)
    return ["missing.txt", "bad.txt.gz", "rows.jsonl", "rows.parquet", "last.txt"]


@pytest.mark.parametrize("output", ["out", "out.arrow", "out.parquet", "out.jsonl", "-"])
def test_the_rest_is_written_as_if_it_were_all(tmp_path, run_longnet, inputs, output):
    command = ["tokenize", "--eos", "-o", output] + ["--shard-tokens", "1000"] * (output == "out")
    done = run_longnet(*command, *inputs, "--skip-bad", text=False)
    good = run_longnet(*command, *inputs[2:], cwd=tmp_path / "good", text=False)
    assert (done.returncode, good.returncode, done.stdout) == (6, 0, good.stdout)
    said = done.stderr.decode().splitlines()
    assert [line.partition(error)[0] for line, error in zip(said, ERRORS, strict=False)] == [
        "longnet: note: left out: "
    ] * len(ERRORS)
    place = {"-": "stdout", "out": "out (5 shards)"}.get(output, output)
    assert said[len(ERRORS) :] == [f"{TOTALS}{place}; 3 documents and 2 files left out"]
    assert good.stderr.decode() == f"{TOTALS}{place}\n"
    if output == "out":
        shards, wanted = contents(tmp_path / "out"), contents(tmp_path / "good/out")
        assert shards.pop("_manifest.arrow") != wanted.pop("_manifest.arrow")  # in the number of what is left out
        assert shards == wanted
        totals = read_manifest(tmp_path / "good/out").totals
        assert read_manifest(tmp_path / "out").totals == {**totals, "skipped": 5, "skipped_files": 2}
    elif output != "-":
        assert (tmp_path / output).read_bytes() == (tmp_path / "good" / output).read_bytes()


def test_a_trained_tokenizer_has_not_seen_what_is_left_out(tmp_path, run_longnet, inputs):
    command = ["tokenize", "--train-vocab", "280", "-q", "-o", "out.arrow"]
    done = run_longnet(*command, *inputs, "--skip-bad")
    assert (done.returncode, done.stderr) == (6, "")
    assert run_longnet(*command, *inputs[2:], cwd=tmp_path / "good").returncode == 0
    for name in ("out.arrow", "out.arrow.tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "good" / name).read_bytes()


def test_a_run_that_fails_goes_on_without_what_is_bad_and_says_all_again(tmp_path, run_longnet, inputs):
    command = ["tokenize", "last.txt", *inputs[2:4], "--shard-tokens", "400", "-o"]
    failed = run_longnet(*command, "out")
    assert (failed.returncode, "line 4: not JSON" in failed.stderr) == (3, True)
    assert (tmp_path / "out/shard-00000.arrow").exists()  # of what is before it
    resumed = run_longnet(*command, "out", "--resume", "--skip-bad")
    whole = run_longnet(*command, "whole", "--skip-bad")
    assert (resumed.returncode, whole.returncode) == (6, 6)
    assert resumed.stderr.replace("-> out", "-> whole") == whole.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("packed", [False, True])
def test_of_a_long_text_that_ends_badly_nothing_is_written(tmp_path, monkeypatch, packed):
    """What is bad is behind what would have been written by then."""
    for module, name, size in ((formats, "TEXT_PART", 1000), (inputs_module, "SPOOLED_PART", 700)):
        monkeypatch.setattr(module, name, size)
    text = "".join(f"wörd {index}\r\n" for index in range(3000))
    (tmp_path / "long.txt").write_bytes(text.encode())
    (tmp_path / "short.txt").write_text("short")
    bad = tmp_path / "bad.txt"
    bad.write_bytes(gzip.compress(text.encode() * 50)[:-300] if packed else text.encode() + b"\xff")
    skipped: list[str] = []
    texts = [tmp_path / "long.txt", tmp_path / "short.txt"]
    found = tokenize(
        Inputs([bad, *texts], skip_bad=True),
        tmp_path / "out",
        left_out=LeftOut(lambda text, error: skipped.append(str(error))),
    )
    good = tokenize(Inputs(texts), tmp_path / "good")
    assert found.documents == good.documents == 2
    assert (tmp_path / "out/shard-00000.arrow").read_bytes() == (tmp_path / "good/shard-00000.arrow").read_bytes()
    assert [line.partition(": ")[0] for line in skipped] == [str(bad)]
    (whole,) = Inputs([tmp_path / "long.txt"], skip_bad=True).texts()
    assert "".join(whole.parts) == text
