"""Proves that what `tokenize` writes, `read_documents` reads back: the same documents, tokens and byte counts."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc as ipc
import pytest

from longnet_cli import tokenizing
from longnet_cli.data.sources import read_documents
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.errors import ConfigError, DataError
from longnet_cli.tokenizing import tokenize

TEXTS = {"a.txt": "hello wörld", "b.txt": "漢字 and more " * 30, "c.txt": "x\n"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_bytes(text.encode())
    return folder


def documents(place: Path, tokenizer: Tokenizer) -> dict[str, str]:
    found = list(read_documents([place], tokenizer))
    assert [document.n_bytes for document in found] == [len(tokenizer.decode(d.tokens).encode()) for d in found]
    return {document.doc_id: tokenizer.decode(document.tokens) for document in found}


@pytest.mark.parametrize("output", ["shards", "one.arrow", "one.parquet"])
@pytest.mark.parametrize("train_vocab", [None, 280])
def test_written_is_read(corpus, tmp_path, output, train_vocab):
    progress = []
    result = tokenize(
        [corpus], tmp_path / output, train_vocab=train_vocab, on_progress=lambda *done: progress.append(done)
    )
    assert documents(tmp_path / output, result.tokenizer) == TEXTS
    size = sum(len(text.encode()) for text in TEXTS.values())
    assert (result.documents, result.bytes) == (3, size)
    assert progress[-1] == (3, result.tokens, size)
    saved = tmp_path / (f"{output}/tokenizer.json" if output == "shards" else "one.tokenizer.json")
    assert Tokenizer.load(saved).sha256 == result.tokenizer.sha256
    assert all(shard.exists() for shard in result.shards)


def test_shards_end_at_documents_and_batches_cut_rows(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "BATCH_BYTES", 100)
    result = tokenize([corpus], tmp_path / "out", shard_tokens=100)
    assert [shard.name for shard in result.shards] == [f"shard-0000{index}.arrow" for index in range(3)]
    reader = ipc.open_file(result.shards[1])
    assert reader.num_record_batches > 5
    assert (
        max(reader.get_batch(i).column("input_ids").flatten().nbytes for i in range(reader.num_record_batches)) == 100
    )
    assert documents(tmp_path / "out", result.tokenizer) == TEXTS
    assert reader.schema.metadata[b"longnet.tokenizer_sha256"].decode() == result.tokenizer.sha256


def test_documents_of_one_name_stay_apart(tmp_path):
    table = pa.table({"text": ["one", "two"], "doc_id": ["0", "1"]})
    for name in ("a.arrow", "b.arrow"):
        with ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table.slice(0 if name == "b.arrow" else 1))
            writer.write_table(table.slice(0, 1))
    result = tokenize([tmp_path / "a.arrow", tmp_path / "b.arrow"], tmp_path / "out.arrow")
    found = documents(tmp_path / "out.arrow", result.tokenizer)
    assert result.documents == 5
    assert list(found.values())[:2] == ["two", "one"]
    assert "0#1" in found


def test_stdout_is_a_stream(corpus, tmp_path):
    script = f"from longnet_cli.tokenizing import tokenize; tokenize([{str(corpus)!r}], '-')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    (tmp_path / "stream.arrow").write_bytes(done.stdout)
    assert documents(tmp_path / "stream.arrow", Tokenizer.bytes()) == TEXTS


def test_a_failure_leaves_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "TEXT_CHARS", 1)  # so that shards are written before the failure
    (corpus / "z.txt").write_bytes(b"\xff bad")
    for output in ("out", "out.arrow"):
        with pytest.raises(DataError):
            tokenize([corpus], tmp_path / output, shard_tokens=1)
    assert os.listdir(tmp_path) == ["corpus"]


def test_a_used_folder_is_refused_and_an_empty_one_taken(corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    tokenize([corpus], tmp_path / "empty")
    with pytest.raises(ConfigError, match="not an empty folder"):
        tokenize([corpus], tmp_path / "empty")


def test_options_that_do_not_fit_together(corpus, tmp_path):
    with pytest.raises(ConfigError, match="stdin"):
        tokenize(["-"], tmp_path / "out", train_vocab=300)
    with pytest.raises(ConfigError, match="not both"):
        tokenize([corpus], tmp_path / "out", train_vocab=300, tokenizer=Tokenizer.bytes())
    with pytest.raises(ConfigError, match="shard_tokens"):
        tokenize([corpus], tmp_path / "out", shard_tokens=0)
    table = pa.table({"input_ids": [[1]]})
    with ipc.new_file(tmp_path / "ids.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ConfigError, match="input_ids"):
        tokenize([tmp_path / "ids.arrow"], tmp_path / "out")
