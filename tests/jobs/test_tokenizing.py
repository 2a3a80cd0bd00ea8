"""Proves that what `tokenize` writes, `Inputs` reads back: the same documents, tokens and byte counts.

Items read in one thread and worked on in another stay in order; `--skip-bad` leaves out what cannot be read, and that
alone.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
import tokenizers
from files import read, write_file
from processes import contents
from tokenizers import decoders, models, pre_tokenizers, trainers

from longnet_cli.basics.errors import ConfigError
from longnet_cli.basics.events import Events, LeftOut
from longnet_cli.basics.sizes import format_count
from longnet_cli.data.documents import input_documents as inputs_module
from longnet_cli.data.documents import tokenizer as tokenizer_module
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.tokenizer import END_OF_TEXT, Tokenizer
from longnet_cli.data.files import opening as formats
from longnet_cli.data.files.manifest import read_manifest
from longnet_cli.hub.model_names import model_path
from longnet_cli.jobs import tokenizing
from longnet_cli.jobs.tokenizing import overlapped, tokenize
from longnet_cli.running.ranks.dealing import portions

TEXTS = {"a.txt": "hello wörld", "b.txt": "漢字 and more " * 30, "c.txt": "x\n"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_bytes(text.encode())
    return folder


def documents(place: Path, tokenizer: Tokenizer) -> dict[str, str]:
    found = list(Inputs([place], tokenizer).documents())
    assert [document.n_bytes for document in found] == [
        len(tokenizer.decode(d.tokens).encode()) for d in found
    ]
    return {document.doc_id: tokenizer.decode(document.tokens) for document in found}


@pytest.mark.parametrize("output", ["shards", "one.arrow", "one.parquet"])
@pytest.mark.parametrize("train_vocab", [None, 280])
def test_written_is_read(corpus, tmp_path, output, train_vocab):
    progress = []
    result = tokenize(
        Inputs([corpus]),
        tmp_path / output,
        train_vocab=train_vocab,
        events=Events(progress=lambda size, **counts: progress.append((size, counts))),
    )
    assert documents(tmp_path / output, result.tokenizer) == TEXTS
    size = sum(len(text.encode()) for text in TEXTS.values())
    assert (result.documents, result.bytes) == (3, size)
    assert Inputs([corpus]).num_bytes() == sum(more for more, _ in progress) == size
    assert output == "shards" or Inputs([corpus, tmp_path / output]).num_bytes() is None
    assert progress[-1][1] == {"documents": 3, "tokens": format_count(result.tokens)}
    saved = tmp_path / (output if output == "shards" else f"{output}.tokenizer.json")
    assert Tokenizer.load(saved).sha256 == result.tokenizer.sha256
    assert all(shard.exists() for shard in result.shards)


def test_a_vocabulary_is_that_of_whole_texts_however_long(tmp_path, run_longnet):
    """In a process with a limit of time: what waits for a lock of the library ends by a kill alone."""
    words, random = ["the net ", "reads, ", "x1", "wörld\n", "漢字", "it's"], Random(0)
    texts = ["".join(random.choices(words, k=50_000)) for _ in "ab"]
    for name, text in zip("ab", texts, strict=True):
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
    run_longnet("tokenize a.txt b.txt --train-vocab 400 -o out", timeout=60, code=0)
    whole, byte_level = tokenizers.Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    whole.pre_tokenizer, whole.decoder = byte_level(add_prefix_space=False), decoders.ByteLevel()
    options = {"special_tokens": [END_OF_TEXT], "initial_alphabet": byte_level.alphabet()}
    whole.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, **options))
    parts = [[text[i : i + 999] for i in range(0, len(text), 999)] for text in texts]
    for found in (Tokenizer.load(tmp_path / "out"), Tokenizer.train(parts, 400)):
        assert found.sha256 == Tokenizer(whole).sha256


def test_shards_end_at_documents_and_batches_cut_rows(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "BATCH_BYTES", 100)
    result = tokenize(Inputs([corpus]), tmp_path / "out", shard_tokens=100)
    assert [shard.name for shard in result.shards] == ["shard-00000.arrow", "shard-00001.arrow"]
    reader = ipc.open_file(result.shards[0])
    batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
    # what fits a batch is never cut
    assert [batch.num_rows for batch in batches] == [1] * len(batches)
    assert max(batch.column("input_ids").flatten().nbytes for batch in batches) == 100
    table = reader.read_all()
    assert table["doc_id"].to_pylist() == ["a.txt"] + ["b.txt"] * (len(batches) - 1)
    assert table["part"].to_pylist() == [0, *range(len(batches) - 1)]
    assert documents(tmp_path / "out", result.tokenizer) == TEXTS
    assert reader.schema.metadata[b"longnet.tokenizer_sha256"].decode() == result.tokenizer.sha256


def test_kept_columns_are_in_every_row_of_a_document(tmp_path, monkeypatch):
    """With their types, in shards that resume; a document of several rows has them in each."""
    monkeypatch.setattr(tokenizing, "BATCH_BYTES", 64)
    columns = {"id": [7, 8, 9], "text": ["one", "two " * 50, ""], "n": [[1], None, [2, 3]]}
    inputs = Inputs([write_file(tmp_path / "in.arrow", pa.table(columns))], keep=("n", "id"))
    for place in ("out", "out.parquet"):
        result = tokenize(inputs, tmp_path / place, shard_tokens=20)
        found = [document.kept for document in read(tmp_path / place, keep=("n", "id"))]
        assert [kept["n"].as_py() for kept in found] == columns["n"]
        assert [kept["id"] for kept in found] == [pa.scalar(number) for number in (7, 8, 9)]
    rows = pq.read_table(result.shards[0]).to_pylist()
    ids = [7, *[8] * (len(rows) - 2), 9]
    assert [(row["doc_id"], row["id"]) for row in rows] == [(str(n), n) for n in ids]
    assert len(rows) > 4
    with pytest.raises(
        ConfigError, match=r"keep was \['n: list<item: int64>', 'id: int64'\] and is now None"
    ):
        tokenize(Inputs(inputs.names), tmp_path / "out", shard_tokens=20, resume=True)
    write_file(tmp_path / "in.arrow", pa.table(columns).rename_columns(["id", "text", "part"]))
    with pytest.raises(ConfigError, match="--keep part: the output has a column of this name"):
        tokenize(Inputs(inputs.names, keep=("part",)), tmp_path / "other")


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_a_manifest_has_the_tokenizer_once(corpus, tmp_path, suffix):
    tokenizer = tokenize(
        Inputs([corpus]), tmp_path / "out", train_vocab=280, shard_format=suffix
    ).tokenizer
    size = len(read_manifest(tmp_path / "out").to_json())
    assert size > len(tokenizer.to_json()) > 5000
    assert (tmp_path / f"out/_manifest.{suffix}").stat().st_size < size + 4000


def test_documents_of_one_name_stay_apart(tmp_path):
    table = pa.table({"text": ["one", "two"], "doc_id": ["0", "1"]})
    for name in ("a.arrow", "b.arrow"):
        with ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table.slice(0 if name == "b.arrow" else 1))
            writer.write_table(table.slice(0, 1))
    result = tokenize(Inputs([tmp_path / "a.arrow", tmp_path / "b.arrow"]), tmp_path / "out.arrow")
    found = documents(tmp_path / "out.arrow", result.tokenizer)
    assert result.documents == 5
    assert list(found.values())[:2] == ["two", "one"]
    assert "0#1" in found


def test_what_is_in_finished_shards_is_not_tokenized_again(corpus, tmp_path, monkeypatch):
    place, options = tmp_path / "whole", {"shard_tokens": 1, "train_vocab": 300, "eos": True}
    whole = tokenize(Inputs([corpus]), place, **options)
    seen: list[str] = []
    encode = Tokenizer.encode_pieces
    monkeypatch.setattr(
        Tokenizer, "encode_pieces", lambda self, texts: (seen.extend(texts), encode(self, texts))[1]
    )
    manifest, expected = read_manifest(place), contents(place)
    shards = manifest.shards
    # as if killed after so many shards, one more having just got its name; and after all
    for finished in range(5):
        if finished < 4:
            (place / "_manifest.arrow").unlink()
            manifest.shards = shards[:finished]
            (place / "_unfinished.json").write_text(manifest.to_json())
            for shard in shards[finished + 1 :]:
                (place / shard["name"]).unlink()
        seen.clear()
        again = tokenize(Inputs([corpus]), place, resume=True, **options)
        assert seen == list(TEXTS.values())[finished:]
        for name in ("documents", "tokens", "bytes"):
            assert getattr(again, name) == getattr(whole, name)
        assert contents(place) == expected


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ("shard_tokens", {"shard_tokens": 21}),
        ("eos", {"eos": True}),
        ("column", {}),
        ("train_vocab", {"train_vocab": 300}),
        ("inputs", {}),
    ],
)
def test_other_inputs_or_options_are_not_resumed(corpus, tmp_path, changed, options):
    tokenize(Inputs([corpus]), tmp_path / "out", shard_tokens=20)
    if changed == "inputs":
        (corpus / "c.txt").write_text("longer than before")
    expected = contents(tmp_path / "out")
    inputs = Inputs([corpus], column="body" if changed == "column" else None)
    with pytest.raises(ConfigError, match=f"cannot resume: {changed} was "):
        tokenize(inputs, tmp_path / "out", resume=True, **{"shard_tokens": 20} | options)
    assert contents(tmp_path / "out") == expected


def test_eos_ends_every_document_also_an_empty_one(tmp_path):
    table = pa.table({"text": ["one", "", "two"]})
    write_file(tmp_path / "in.arrow", table)
    for eos in (False, True):
        tokenize(Inputs([tmp_path / "in.arrow"]), tmp_path / f"{eos}.arrow", eos=eos)
        ids = ipc.open_file(tmp_path / f"{eos}.arrow").read_all()["input_ids"].to_pylist()
        assert ids == [[*text.encode()] + [256] * eos for text in ("one", "", "two")]
    for eos in (10, "10", "Ċ"):  # as byte-level tokenizers write a newline
        tokenize(Inputs([tmp_path / "in.arrow"]), tmp_path / "line.arrow", eos=eos)
        written = ipc.open_file(tmp_path / "line.arrow").read_all()
        assert written["input_ids"].to_pylist() == [
            [*text.encode(), 10] for text in ("one", "", "two")
        ]
        assert written.schema.metadata[b"longnet.eos_id"] == b"10"


def test_parts_of_long_texts_and_any_grouping_give_the_same_ids(tmp_path, monkeypatch):
    """One text of several groups, between short ones: the ids are those of the tokenizer for each text alone."""
    words = Tokenizer.load(model_path("longnet-tiny"))
    source = Path(tokenizing.__file__).read_text() * 40
    short = [source[start : start + 999] for start in range(0, 9000, 999)]
    texts = [source[:100], source, "", *short, source[1:]]
    inputs = Inputs([write_file(tmp_path / "in.arrow", pa.table({"text": texts}))])
    monkeypatch.setattr(tokenizer_module, "GROUP", 1 << 17)
    shards = []
    sizes = [(1, 1 << 12), (5000, 1 << 12), (1 << 22, 1 << 12), (1 << 22, 1 << 24)]
    for index, (group, batch) in enumerate(sizes):
        monkeypatch.setattr(tokenizing, "TEXT_CHARS", group)
        monkeypatch.setattr(tokenizing, "BATCH_BYTES", batch)
        tokenize(inputs, tmp_path / str(index), tokenizer=words, shard_tokens=3000)
        found = read(tmp_path / str(index), tokenizer=words)
        for document, text in zip(found, texts, strict=True):
            assert np.array_equal(document.tokens, words.encode(text))
        shards.append(contents(tmp_path / str(index)))
    assert shards[0] == shards[1] == shards[2]  # groups are no part of the result


def test_a_used_folder_is_refused_and_an_empty_one_taken(corpus, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    tokenize(Inputs([corpus]), tmp_path / "empty")
    monkeypatch.setattr(Tokenizer, "train", None)  # which may take long, so this is said before
    with pytest.raises(ConfigError, match="-o is empty"):
        tokenize(Inputs([corpus]), "")
    with pytest.raises(ConfigError, match="holds a finished data set"):
        tokenize(Inputs([corpus]), tmp_path / "empty", train_vocab=300)
    for resume in (False, True):
        for place in (corpus, corpus / "a.txt"):
            with pytest.raises(ConfigError, match="not an empty folder"):
                tokenize(Inputs([corpus]), place, train_vocab=300, resume=resume)


def groups(items: Iterator[int], work=list) -> Iterator[list[int]]:
    return overlapped(portions(items, 5, length_of=lambda item: 0), work)


def test_all_items_come_once_in_order_and_the_reader_is_one_group_ahead():
    read = []
    items = (read.append(item) or item for item in range(1000))
    for index, group in enumerate(groups(items)):
        assert group == list(range(5 * index, 5 * index + 5))
        assert len(read) <= 5 * index + 10


def test_a_slow_producer_does_not_keep_items_waiting():
    found = groups(iter([0, None, 1, None, None, 2]))
    assert [next(found), next(found), next(found)] == [[0], [1], [2]]
    arrived = threading.Event()

    def items() -> Iterator[int]:
        yield from (0, None)
        assert arrived.wait(30)  # the first item must be worked on before the second is there
        yield 1

    found = groups(items(), lambda group: arrived.set() or group)
    assert [*found] == [[0], [1]]


def test_a_failure_of_the_work_ends_the_reading():
    def work(group):
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        list(groups(itertools.repeat(0), work))


def test_an_interruption_waits_for_the_work_that_has_begun_and_for_no_more():
    begun, done = threading.Event(), []

    def work(group):
        begun.set()
        time.sleep(0.1)
        done.append(group)
        return group

    def items() -> Iterator[int]:
        yield from range(8)
        assert begun.wait(30)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(groups(items(), work))
    assert done == [[0, 1, 2, 3, 4]]


def test_an_interruption_between_any_two_lines_is_what_the_caller_sees():
    """A handler that raises inside threading.Condition leaves its lock in the wrong state, once in 150 times here."""

    class Interruption(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interruption

    def run(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        # not for ever: Python drops what is raised in a garbage collection
        list(groups(itertools.repeat(0, 100_000)))

    seen, chance, before = 0, random.Random(0), signal.signal(signal.SIGALRM, interrupt)
    switched = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(1500):
            try:
                run(chance.uniform(0.0001, 0.003))
            except Interruption:
                seen += 1
    finally:
        sys.setswitchinterval(switched)
        signal.signal(signal.SIGALRM, before)
    assert seen > 1400


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
        table = [
            {"id": f"p{row}", "text": None if row is None else f"row {row} " * 100} for row in rows
        ]
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
    assert said[len(ERRORS) :] == [
        f"{TOTALS}{place}",
        "longnet: note: 3 documents and 2 files left out",
    ]
    assert good.stderr.decode() == f"{TOTALS}{place}\n"
    if output == "out":
        shards, wanted = contents(tmp_path / "out"), contents(tmp_path / "good/out")
        # in the number of what is left out
        assert shards.pop("_manifest.arrow") != wanted.pop("_manifest.arrow")
        assert shards == wanted
        totals = read_manifest(tmp_path / "good/out").totals
        assert read_manifest(tmp_path / "out").totals == {
            **totals,
            "skipped": 5,
            "skipped_files": 2,
        }
    elif output != "-":
        assert (tmp_path / output).read_bytes() == (tmp_path / "good" / output).read_bytes()


def test_a_trained_tokenizer_has_not_seen_what_is_left_out(tmp_path, run_longnet, inputs):
    command = ["tokenize", "--train-vocab", "280", "-q", "-o", "out.arrow"]
    done = run_longnet(*command, *inputs, "--skip-bad")
    assert (done.returncode, done.stderr) == (6, "")
    assert run_longnet(*command, *inputs[2:], cwd=tmp_path / "good").returncode == 0
    for name in ("out.arrow", "out.arrow.tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "good" / name).read_bytes()


def test_a_run_that_fails_goes_on_without_what_is_bad_and_says_all_again(
    tmp_path, run_longnet, inputs
):
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
        events=Events(left_out=LeftOut(lambda text, error: skipped.append(str(error)))),
    )
    good = tokenize(Inputs(texts), tmp_path / "good")
    assert found.documents == good.documents == 2
    assert (tmp_path / "out/shard-00000.arrow").read_bytes() == (
        tmp_path / "good/shard-00000.arrow"
    ).read_bytes()
    assert [line.partition(": ")[0] for line in skipped] == [str(bad)]
    (whole,) = Inputs([tmp_path / "long.txt"], skip_bad=True).texts()
    assert "".join(whole.parts) == text
