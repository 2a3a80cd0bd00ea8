"""Proves that the shares of an input have each document once, as in one run, and that their outputs are read as one.

A share is one of files, or of documents where there are fewer files. What is not all of one run is refused by name.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from builders import tiny_model
from files import write_rows

from longnet_cli.basics.errors import DataError, InputWarning
from longnet_cli.basics.events import LeftOut
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.data.files.machine_shares import Share
from longnet_cli.data.files.manifest import read_manifest
from longnet_cli.data.outputs.shards import ShardFolder

BYTES = Tokenizer.bytes()
JOBS = {
    "tokenize": "tokenize in --shard-tokens 60",
    "score": "score in -m ./model --shard-tokens 60",
    "encode": "encode in -m ./model --shard-rows 2",
}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of all shards that `longnet` reads in a folder, in its order."""
    tables = [pa.ipc.open_file(source.path).read_all() for source in Inputs([folder]).all_files]
    return pa.concat_tables(tables).to_pylist()


def check_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Compare rows in any order of documents: numbers to 1e-6, all else exactly."""

    def name(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["doc_id"], row.get("part") or 0, row.get("n_tokens")

    assert len(found) == len(expected)
    for one, other in zip(sorted(found, key=name), sorted(expected, key=name), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, float) or key == "embedding":
                np.testing.assert_allclose(value, other[key], rtol=1e-6, atol=1e-6)
            else:
                assert value == other[key], key


def test_the_largest_file_goes_to_the_lightest_share():
    files = [("b", 3), ("a", 3), ("c", 10), ("d", 4), ("e", 0), ("f", 0), ("g", 0)]
    shares = [Share(number, 3).of_files(files) for number in (1, 2, 3)]
    assert shares == [[2], [3, 4, 5, 6], [0, 1]]  # c; d and what is empty; a before b
    empty = [("a", 0), ("b", 0), ("c", 0), ("d", 0)]
    assert [Share(number, 3).of_files(empty) for number in (1, 2, 3)] == [[0, 3], [1], [2]]


@pytest.mark.parametrize(
    "text", ["0/2", "3/2", "1", "1/", "/2", "-1/2", "1/0", "1/2/3", "\u0661/2"]
)
def test_what_is_no_share_is_refused(text):
    with pytest.raises(ValueError, match="is no share: write I/N"):
        Share.parse(text)
    assert str(Share.parse("2/4")) == "2/4"


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("kind", ["files", "documents"])
def test_the_shares_together_are_one_run(run_longnet, tmp_path, job, kind):
    """Files in a folder; or the rows of two files, with an empty text and a name that repeats."""
    data, command = tmp_path / "in", JOBS[job]
    data.mkdir()
    tiny_model(tmp_path / "model")
    if kind == "files":
        for number in range(7):
            (data / f"{number}.txt").write_text(f"text {number} " * (number + 1))
    else:
        texts = ["text 0", "text 1", "", "text 3", "text 4", "text 5"]
        rows = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
        write_rows(data / "a.jsonl", rows)
        write_rows(data / "b.jsonl", [{"id": "5", "text": "again"}, {"id": "x", "text": "other"}])
    for number in (3, 1, 2):
        done = run_longnet(f"{command} --share {number}/3 -o out/{number} --resume", code=0)
        assert ("reads all of the input" in done.stderr) == (kind == "documents"), done.stderr
        assert read_manifest(tmp_path / f"out/{number}").settings["share"] == f"{number}/3"
    run_longnet(f"{command} -o whole", code=0)
    check_equal(rows_of(tmp_path / "out"), rows_of(tmp_path / "whole"))
    names = [source.name for source in Inputs([tmp_path / "out"]).all_files]
    assert names == sorted(names)
    assert {name[:2] for name in names} == {"1/", "2/", "3/"}
    if kind == "documents" and job != "score":  # names are made apart before shares are cut
        assert "5#1" in {row["doc_id"] for row in rows_of(tmp_path / "out")}
    if job == "tokenize":
        assert Tokenizer.load(tmp_path / "out").sha256 == BYTES.sha256
        run_longnet("score out -m ./model", code=0)


def test_a_share_of_files_reads_no_other_file(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("x" * (number + 1))
    (tmp_path / "3.txt").write_bytes(b"\xff\xff\xff")  # share 2, as the second of its size
    (tmp_path / "4.txt").symlink_to("nowhere")
    inputs = [tmp_path / f"{number}.txt" for number in range(4)]
    first, second = (Inputs(inputs, BYTES, share=Share(number, 2)) for number in (1, 2))
    assert [document.doc_id for document in first.documents()] == ["1.txt", "2.txt"]
    with pytest.raises(DataError, match=r"3\.txt: neither Arrow"):
        list(second.documents())
    shares = (
        replace(some, names=[*inputs, tmp_path / "4.txt"], skip_bad=True)
        for some in (first, second)
    )
    # the missing file is left out by the first share alone
    assert [len(list(share.documents())) for share in shares] == [3, 2]


def test_documents_keep_their_numbers_though_a_text_cannot_be_read_to_its_end(
    tmp_path, monkeypatch
):
    """The share that has the text sees its damage. The others do not, and count on from the same number."""
    monkeypatch.setattr("longnet_cli.data.files.opening.TEXT_PART", 4)
    (tmp_path / "a.txt").write_bytes(b"some text, then \xff and more")
    write_rows(tmp_path / "b.jsonl", [{"id": str(number), "text": "x"} for number in range(5)])
    names = [tmp_path / "a.txt", tmp_path / "missing.txt", tmp_path / "b.jsonl"]
    documents = []
    for number in (1, 2, 3):
        inputs = Inputs(names, BYTES, skip_bad=True, share=Share(number, 3))
        with pytest.warns(InputWarning, match=r"fewer files \(2\) than shares"):
            documents += inputs.documents()
    found = sorted(
        document.doc_id or Path(document.where.split(":")[0]).name for document in documents
    )
    assert found == ["0", "1", "2", "3", "4", "a.txt", "missing.txt"]


SETTINGS = {"inputs": "7 files", "pool": "mean", "chunk": 64}
SCHEMA = pa.schema([("text", pa.string())])


def write_share(folder: Path, share: str | None, ends: bool = True, **settings: Any) -> None:
    """A share of one row, its own name."""
    decisive = SETTINGS | ({"share": share} if share else {}) | settings
    writer = ShardFolder(folder, SCHEMA, settings=decisive, left_out=LeftOut())
    with nullcontext() if ends else pytest.raises(KeyboardInterrupt), writer:
        writer.write(pa.record_batch([pa.array([str(share)])], schema=SCHEMA), documents=1)
        if not ends:
            writer.end_shard()
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({}, None),
        ({"c": ("3/3", {"chunk": 8})}, None),  # a machine's own
        ({"b": None}, r"out: share 2/3 is missing"),
        ({"b": ("2/3", {"ends": False})}, r"out/b: share 2/3 did not end: .* --resume"),
        ({"b": ("2/4", {})}, r"out/b is share 2/4, beside share 1/3 in .*out/a: name one run"),
        ({"b": ("1/3", {})}, r"out: share 1/3 is in a and b"),
        ({"d": ("3/3", {})}, r"out: share 3/3 is in c and d"),
        ({"d": (None, {})}, r"out/d is no share, beside share 1/3 in .*out/a"),
        ({"c": ("3/3", {"pool": "last"})}, r"out/c: pool is 'last', beside .*, where it is 'mean'"),
        ({"c": ("3/3", {"inputs": "8 files"})}, r"out/c: inputs is '8 files', beside"),
    ],
)
def test_a_folder_of_shares_is_all_of_one_run_or_is_refused(tmp_path, changes, error):
    out = tmp_path / "out"
    shares = {"a": ("1/3", {}), "b": ("2/3", {}), "c": ("3/3", {})} | changes
    for name, written in shares.items():
        if written:
            write_share(out / name, written[0], **written[1])
    (out / "slurm-7.log").write_text("what a scheduler leaves")
    if error is None:
        assert [text.text for text in Inputs([out]).texts()] == ["1/3", "2/3", "3/3"]
        return
    for folder in (out, tmp_path):  # also from above
        with pytest.raises(DataError, match=error):
            list(Inputs([folder]).texts())


def test_a_shard_of_a_share_that_is_gone_is_named(tmp_path):
    for name in ("1", "2"):
        write_share(tmp_path / name, f"{name}/2")
    (tmp_path / "2/shard-00000.arrow").unlink()
    with pytest.raises(DataError, match=r"2/shard-00000\.arrow: no such file, but the manifest"):
        list(Inputs([tmp_path]).texts())


def test_another_share_is_refused_when_a_run_resumes(run_longnet, tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(4):
        (tmp_path / f"in/{number}.txt").write_text("text " * (number + 1))
    command = "tokenize in -o out --resume --share"
    run_longnet(f"{command} 1/2", code=0)
    done = run_longnet(f"{command} 2/2", code=2)
    assert "share was '1/2' and is now '2/2': give --share 1/2, or a new folder" in done.stderr


def test_a_total_is_that_of_its_share(run_longnet, tmp_path):
    tiny_model(tmp_path / "model")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    command = "score a.txt b.txt -m ./model --share 2/2"
    lines = run_longnet(command, code=0).stdout.splitlines()
    assert [line.split("  ")[-1] for line in lines[1:3]] == ["b.txt", "total of share 2/2"]
    total = json.loads(run_longnet(f"{command} --format json", code=0).stdout)["total"]
    assert (total["share"], total["n_docs"]) == ("2/2", 1)


def test_a_store_says_the_sizes_by_which_files_are_shared(tmp_path):
    """Of a folder behind a filesystem of pyarrow, as of the same local folder."""
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text("x" * (1 + number * number))
    uri = f"local{tmp_path.as_uri().removeprefix('file')}"
    for number in (1, 2):
        local = Inputs([tmp_path], share=Share(number, 2))
        remote = Inputs([uri], share=Share(number, 2))
        assert [source.name for source in remote.files] == [source.name for source in local.files]
        assert [source.size for source in remote.files] == [source.size for source in local.files]
