"""Proves that the same documents give the same tokens from every format and way in, and that damage is never silent.

Files are real files, and stdin is a real pipe into another process. Compressed inputs are what they unpack to, in
bounded memory.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import get_ident

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pytest
from files import (
    BYTES,
    FORMATS,
    IDS,
    TEXTS,
    pipe,
    read,
    token_table,
    tokens,
    write_file,
    write_lines,
    write_parquet,
    write_stream,
)

from longnet_cli.basics.errors import ConfigError, DataError, InputWarning, LongNetError
from longnet_cli.data.documents import column_documents as id_columns
from longnet_cli.data.documents import token_documents as documents_module
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.data.files.local_files import LocalFile
from longnet_cli.data.files.opened_inputs import Pipe, Table


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path, name, monkeypatch):
    """On a disk, compressed, and from a pipe; a thread of pyarrow that held a Python file at the end would abort."""
    threads = set()
    for kind, method in ((LocalFile, "read_at"), (Pipe, "read")):
        inner = getattr(kind, method)
        noting = lambda *args, inner=inner: threads.add(get_ident()) or inner(*args)  # noqa: E731
        monkeypatch.setattr(kind, method, noting)
    path = FORMATS[name](tmp_path)
    data, documents = path.read_bytes(), read(path, vocab_size=257)
    (tmp_path / "x.zst").write_bytes(pa.compress(data, "zstd", asbytes=True))
    assert tokens(documents) == tokens(read(tmp_path / "x.zst")) == IDS
    if name != "split texts":  # of stdin, each row of text without a part is a document
        assert pipe(data) == IDS
    assert threads == {get_ident()}
    assert [len(document) for document in documents] == [len(ids) for ids in IDS]
    assert [document.n_bytes for document in documents] == [len(text.encode()) for text in TEXTS]
    assert len({document.doc_id for document in documents}) == 3


def test_stdin_text_and_a_redirected_file(tmp_path):
    assert pipe(TEXTS[1].encode(), texts=True) == [TEXTS[1]]
    script = (
        "from longnet_cli.data.documents.input_documents import *\n"
        "document, *_ = Inputs(['-']).documents()\n"
        "print(document.doc_id, document.read().tolist(), type(document.parts[0].ids).__name__)"
    )
    with open(FORMATS["file"](tmp_path)) as file:
        done = subprocess.run(
            [sys.executable, "-c", script], stdin=file, capture_output=True, text=True, check=True
        )
    assert done.stdout == f"stdin:0 {IDS[0]} LocalIds\n"


def test_text_files_are_read_byte_for_byte(tmp_path):
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.txt").write_bytes(text.encode())
    documents = read(tmp_path)
    assert tokens(documents) == IDS
    assert [document.doc_id for document in documents] == ["0.txt", "1.txt", "2.txt"]
    (tmp_path / "crlf.txt").write_bytes("\ufeffa\r\nb".encode())
    assert next(iter(Inputs([tmp_path / "crlf.txt"]).texts())).text == "a\r\nb"  # a mark is no text
    (tmp_path / "empty.txt").write_bytes(b"\xef\xbb\xbf")
    assert [document.read().tolist() for document in read(tmp_path / "empty.txt")] == [[]]


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_file, write_stream])
def test_token_columns_are_views_of_the_file(tmp_path, write):
    path = write(
        tmp_path / "x.arrow", pa.table({"ids": [np.arange(1 << 20, dtype=np.int32)] * 4}), rows=1
    )
    before = pa.total_allocated_bytes()
    documents = read(path, tokenizer=None)
    assert pa.total_allocated_bytes() - before < 1 << 16
    window = documents[3].read(-2)
    assert (window.dtype, window.tolist()) == (np.int64, [(1 << 20) - 2, (1 << 20) - 1])
    window[:] = 0  # ours: the file is not changed, and nothing crashes
    assert documents[3].read(-1).tolist() == [(1 << 20) - 1]


def test_any_slice_of_a_document_in_parts_is_the_slice_of_the_whole(tmp_path):
    rows = [[1, 2, 3], [], [4], [], [5, 6], []]
    table = pa.table({"doc_id": ["a"] * 6, "ids": pa.array(rows, pa.list_(pa.int16()))})
    (document,) = read(write_file(tmp_path / "x.arrow", table, rows=2), tokenizer=None)
    for start in range(-8, 9):
        for stop in (*range(-8, 9), None):
            assert document.read(start, stop).tolist() == [1, 2, 3, 4, 5, 6][start:stop]


def test_a_document_of_a_program_can_be_pickled():
    document = pickle.loads(pickle.dumps(Document("a", np.array([1, -1]), BYTES, "here")))
    assert document.read(0, 1).tolist() == [1]
    with pytest.raises(DataError, match="here, offset 1: token id -1 is negative"):
        document.read()


def test_a_document_in_pieces_that_is_not_mapped_lives_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "SPOOL_BYTES", 16)
    monkeypatch.setattr("longnet_cli.data.files.opening.PARQUET_BATCH_BYTES", 16)
    for path, on_disk in (
        (FORMATS["split documents"](tmp_path), False),
        (FORMATS["split documents in parquet"](tmp_path), True),
        (FORMATS["flat parquet"](tmp_path), True),
    ):
        documents = read(path)
        assert tokens(documents) == IDS
        assert any(isinstance(part.ids, np.memmap) for part in documents[2].parts) == on_disk


def test_a_disk_without_room_for_a_document_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_module, "SPOOL_BYTES", 10)
    with open("/dev/full", "wb") as full:
        monkeypatch.setattr(documents_module.tempfile, "TemporaryFile", lambda: full)
        with pytest.raises(LongNetError, match="No space left on device; set TMPDIR"):
            read(FORMATS["split documents in parquet"](tmp_path))


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int32()), pa.large_list(pa.int32()), pa.list_(pa.int32(), 2)]
)
def test_slices_of_columns_keep_to_their_rows(kind):
    rows = [[1, 2], [3, 4], [5, 6], [7, 900]]
    batch = pa.record_batch({"ids": pa.array(rows, kind)}).slice(1, 2)
    table = Table("x", "x", batch.schema, lambda columns: iter([batch]))
    assert tokens(list(Inputs((), vocab_size=100).documents_of(table))) == rows[1:3]
    with pytest.raises(DataError, match="row 1, offset 1: token id 6"):
        tokens(list(Inputs((), vocab_size=6).documents_of(table)))


def test_blocks_do_not_show_in_a_flat_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(id_columns, "FLAT_STEP", 3)
    documents = read(FORMATS["flat column"](tmp_path))
    assert tokens(documents) == IDS
    assert [document.where.split(", ")[1] for document in documents] == ["row 1", "row 7", "row 23"]


# --- damage ----------------------------------------------------------------------------------------------------------


def test_an_end_marker_of_the_old_format_is_an_end(tmp_path):
    path = write_stream(tmp_path / "x.arrow", token_table(pa.list_(pa.int32())))
    path.write_bytes(path.read_bytes()[:-8] + bytes(4))
    assert tokens(read(path)) == IDS


def test_a_batch_that_ends_in_zeros_is_no_marker(tmp_path):
    path = write_stream(
        tmp_path / "x.arrow", pa.table({"ids": pa.array([[0] * 16], pa.list_(pa.int32()))})
    )
    data = path.read_bytes()[:-8]
    assert data.endswith(bytes(8))
    path.write_bytes(data)
    with pytest.raises(DataError, match="truncated after 1 batches"):
        read(path)


@pytest.mark.parametrize(
    "kind", [pa.dictionary(pa.int32(), pa.string()), pa.string_view(), pa.large_string()]
)
def test_doc_ids_of_every_kind_of_text_join_rows(tmp_path, kind):
    doc_ids = pa.array(["a", "a", "b"], kind)  # pyarrow 17 casts no text to a view
    path = write_file(tmp_path / "x.arrow", pa.table({"text": ["x", "y", "z"], "doc_id": doc_ids}))
    assert [document.doc_id for document in read(path)] == ["a", "b"]


# --- documents of parts, types, tokenizers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("doc_ids", "parts", "row"),
    [
        ("aab", [0, 1, 0], None),
        ("aa", [0, 2], 1),
        ("aa", [1, 0], 0),
        ("ab", [0, 1], 1),
        ("aa", [0, 0], 1),
    ],
)
def test_parts_must_be_consecutive(tmp_path, doc_ids, parts, row):
    table = pa.table({"doc_id": list(doc_ids), "part": parts, "ids": [[1]] * len(parts)})
    path = write_stream(tmp_path / "x.arrow", table, rows=1)
    if row is None:
        assert tokens(read(path)) == [[1, 1], [1]]
        return
    with pytest.raises(DataError, match=rf"x\.arrow, row {row}: part {parts[row]} of document"):
        read(path)


def test_a_bad_id_in_a_part_is_named_by_its_own_row(tmp_path):
    table = pa.table({"doc_id": ["a", "a"], "ids": [[1, 2], [3, 300]]})
    (document,) = read(write_file(tmp_path / "x.arrow", table))
    assert document.read(0, 3).tolist() == [1, 2, 3]
    with pytest.raises(DataError, match="row 1, offset 1: token id 300"):
        document.read(3)
    with pytest.raises(DataError, match="row 1, offset 1: token id 300"):
        _ = document.n_bytes


def test_inputs_of_different_types_are_an_error_that_names_both(tmp_path):
    one = write_file(tmp_path / "one.arrow", token_table(pa.list_(pa.int32())))
    two = write_stream(tmp_path / "two.arrow", token_table(pa.large_list(pa.int64())))
    same = write_parquet(tmp_path / "same.parquet", token_table(pa.large_list(pa.int32())))
    # JSON has one type of number
    lines = write_lines(tmp_path / "x.jsonl", [{"ids": ids} for ids in IDS])
    assert tokens(read(one, same, lines)) == IDS * 3
    with pytest.raises(
        DataError, match=r"two\.arrow: its tokens are int64 and those of .*one\.arrow are int32"
    ):
        read(one, two)


def test_the_eos_id_can_be_given(tmp_path):
    flat = pa.table({"ids": pa.array([1, 2, 256, 3, 2, 4], pa.uint16())}).replace_schema_metadata(
        {"longnet.eos_id": "3", "longnet.vocab_size": "257"}
    )
    path = write_file(tmp_path / "x.arrow", flat)
    assert tokens(read(path, eos_id=2)) == [[1], [256, 3], [4]]
    assert tokens(read(path)) == [[1, 2], [3, 2, 4]]
    assert tokens(read(path, tokenizer=None)) == [[1, 2, 256], [2, 4]]
    for eos_id in (257, 70_000):
        with pytest.raises(
            ConfigError,
            match=rf"x\.arrow: the end-of-text id {eos_id} .* does not fit a vocabulary of 257",
        ):
            read(path, tokenizer=None, eos_id=eos_id)
    bare = write_file(tmp_path / "bare.arrow", flat.replace_schema_metadata(None))
    # past what uint16 can hold
    assert tokens(read(bare, tokenizer=None, eos_id=70_000)) == [[1, 2, 256, 3, 2, 4]]
    with pytest.raises(ConfigError, match="does not fit a vocabulary of 257"):
        read(bare, eos_id=257)


def test_metadata_gives_the_vocabulary_when_nothing_else_does(tmp_path):
    for size, problem in (
        ("200", "token id 230 does not fit a vocabulary of 200"),
        ("2x", "not a number"),
        ("9" * 5000, r"'9{37}\.\.\.', not a number"),
    ):
        table = token_table(pa.list_(pa.int32())).replace_schema_metadata(
            {"longnet.vocab_size": size}
        )
        with pytest.raises(DataError, match=problem):
            tokens(read(write_file(tmp_path / "x.arrow", table), tokenizer=None))


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    def shard(name: str, sha: str) -> Path:
        table = token_table(pa.list_(pa.int32())).replace_schema_metadata(
            {"longnet.tokenizer_sha256": sha}
        )
        return write_file(tmp_path / name, table)

    assert tokens(read(shard("own.arrow", BYTES.sha256))) == IDS
    other = shard("other.arrow", "0123456789abcdef" * 4)
    assert tokens(read(other, tokenizer=None)) == IDS
    with pytest.raises(
        ConfigError, match=rf"other\.arrow.*by tokenizer 0123456789ab, .* {BYTES.sha256[:12]}: give"
    ):
        read(other)


TEXT = "one line of text, and another; wörld\n" * 300


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": partial(pa.compress, codec="zstd", asbytes=True),
}


@pytest.fixture(params=PACKERS)
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


def texts(path: Path) -> list[str]:
    return ["".join(text.parts) for text in Inputs([path]).texts()]


def test_text_json_lines_and_arrow_are_read_by_their_first_bytes(suffix, tmp_path):
    pack = PACKERS[suffix]
    lines = [TEXT, "two", "three"]
    json_lines = "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()
    table = pa.table({"text": lines})
    with ipc.new_stream(tmp_path / "stream", table.schema) as writer:
        writer.write_table(table)
    for name in (f"x{suffix}", "no-suffix"):  # a name says nothing
        (tmp_path / name).write_bytes(pack(TEXT.encode()))
        assert texts(tmp_path / name) == [TEXT]
        for data in (json_lines, (tmp_path / "stream").read_bytes()):
            (tmp_path / name).write_bytes(pack(data))
            assert texts(tmp_path / name) == lines
    # as `cat a.gz b.gz`
    (tmp_path / "twice").write_bytes(pack(TEXT.encode()[:100]) + pack(TEXT.encode()[100:]))
    assert texts(tmp_path / "twice") == [TEXT]
    (tmp_path / "mark").write_bytes(pack(b"\xef\xbb\xbfx"))
    assert texts(tmp_path / "mark") == ["x"]


def test_a_folder_of_compressed_files_is_read(suffix, tmp_path):
    pack = PACKERS[suffix]
    for name in (f"a.txt{suffix}", f"b.txt{suffix}", f"code.tar{suffix}"):
        (tmp_path / name).write_bytes(pack(b"text"))
    with pytest.warns(
        InputWarning, match=rf": 1 file is not read beside the 2 .*: code.tar{suffix}$"
    ):
        assert [source.name for source in Inputs([tmp_path]).all_files] == [
            f"a.txt{suffix}",
            f"b.txt{suffix}",
        ]
    (tmp_path / f"c.jsonl{suffix}").write_bytes(pack(b'{"text": "x"}\n'))
    with pytest.warns(
        InputWarning, match=rf": 3 files are not read beside c.jsonl{suffix}: a.txt{suffix} and 1 "
    ):
        assert [source.name for source in Inputs([tmp_path]).all_files] == [f"c.jsonl{suffix}"]


@pytest.mark.parametrize("keep", [(), ("id",)])
def test_rows_before_damage_are_read(suffix, tmp_path, keep, monkeypatch):
    """But for those of the last 4 KiB; zstd loses a larger block. They are as many, however fast they come."""
    lines = [
        json.dumps({"id": row, "text": random.Random(row).randbytes(200).hex()}) + "\n"
        for row in range(5000)
    ]
    data = PACKERS[suffix]("".join(lines).encode())
    (tmp_path / "x.jsonl").write_bytes(data[: len(data) * 9 // 10])
    *found, last = Inputs([tmp_path / "x.jsonl"], skip_bad=True, keep=keep).texts()
    assert "data is damaged or truncated" in str(last.error)
    assert [f'"text": "{text.text}"}}\n' for text in found] == [
        line.partition(", ")[2] for line in lines[: len(found)]
    ]
    lost = {".zst": 128 << 10}.get(suffix, 4 << 10) + (8 << 10)
    assert len(found) > 5000 * 0.9 - lost / len(lines[0])
    monkeypatch.setattr("longnet_cli.data.files.jsonlines.PATIENCE", -1)
    assert (
        len(list(Inputs([tmp_path / "x.jsonl"], skip_bad=True, keep=keep).texts()))
        == len(found) + 1
    )


def test_damage_is_one_line(suffix, tmp_path):
    packed, path = PACKERS[suffix](TEXT.encode()), tmp_path / "x"
    for data in (packed[:-3], packed[: len(packed) // 2], packed[:-12] + b"\0" * 12):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"x: the \w+ data is damaged or truncated") as caught:
            list(Inputs([path], BYTES).documents())
        assert "\n" not in str(caught.value)
    # only one skin is taken off: there are files that unpack to themselves
    path.write_bytes(PACKERS[suffix](packed))
    with pytest.raises(DataError, match="neither Arrow, Parquet nor UTF-8 text"):
        list(Inputs([path], BYTES).documents())


@pytest.mark.parametrize(("pack", "program"), [(bz2.compress, "bzip2"), (lzma.compress, "xz")])
def test_the_refusal_of_another_compression_says_what_unpacks_it(pack, program, tmp_path):
    (tmp_path / "packed").write_bytes(pack(TEXT.encode()))
    with pytest.raises(DataError, match=rf"packed: .*: unpack it first \({program} -d\)$"):
        texts(tmp_path / "packed")


def test_a_long_text_goes_through_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("longnet_cli.data.files.opening.TEXT_PART", 7)
    path = tmp_path / "x.txt"
    path.write_text("\ufeff" + TEXT)
    (text,) = Inputs([path]).texts()
    assert len(list(text.parts)) > 1000
    assert texts(path) == [TEXT]
    (document,) = Inputs([path], BYTES).documents()
    assert bytes(document.read().tolist()) == TEXT.encode()
    assert document.n_bytes == len(TEXT.encode())
    for bad, where in (
        (b"0123456789\xff", 10),
        (b"0123456789abc\0", 13),
        (b"abcdef\xc3x", 6),
        (b"abcdef\xc3", 6),
    ):
        path.write_bytes(bad)
        with pytest.raises(
            DataError, match=rf"x\.txt: neither .*: the byte at offset {where} is 0x"
        ):
            list(Inputs([path], BYTES).documents())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "jsonl"])
def test_a_megabyte_that_unpacks_to_a_gigabyte_streams(form, tmp_path):
    """In 3 GiB of data at most, most of which a program of Arrow reserves and does not use."""
    line, limit = b"some words, and some more of them.\n" * 1000, 3 << 30
    if form == "jsonl":
        line = json.dumps({"text": line.decode()}).encode() + b"\n"
    with gzip.open(tmp_path / "x.gz", "wb", compresslevel=9) as file:
        for _ in range((1 << 30) // len(line)):
            file.write(line)
    done = subprocess.run(
        [sys.executable, "-m", "longnet_cli", "data", "inspect", "x.gz", "--format", "json", "-q"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n_bytes"] >= 0.9 * (1 << 30)


@pytest.mark.parametrize("text", ["A", "ARROW", "ARROW1", "ARROW1 is how a file of Arrow begins"])
def test_a_text_may_begin_as_a_table_does(tmp_path, text):
    for name in ("x.txt", "x"):
        (tmp_path / name).write_text(text)
        assert tokens(read(tmp_path / name)) == [list(text.encode())]


def test_an_encrypted_column_is_refused_and_the_others_are_read(tmp_path):
    import pyarrow.parquet as pq

    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Plain(encryption.KmsClient):
        """A service that hands out each key as it is."""

        def __init__(self, config: object) -> None:
            encryption.KmsClient.__init__(self)

        def wrap_key(self, key: bytes, name: str) -> str:
            return key.hex()

    table = pa.table({"doc_id": ["a"], "text": ["some text"], "note": ["n"]})
    for column in ("text", "note"):
        configuration = encryption.EncryptionConfiguration(
            footer_key="f", column_keys={"k": [column]}, plaintext_footer=True
        )
        properties = encryption.CryptoFactory(Plain).file_encryption_properties(
            encryption.KmsConnectionConfig(), configuration
        )
        path = tmp_path / f"{column}.parquet"
        with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
            writer.write_table(table)
    assert tokens(read(tmp_path / "note.parquet")) == [list(b"some text")]
    with pytest.raises(DataError, match="encrypted Parquet is not read") as caught:
        read(tmp_path / "text.parquet")
    assert "damaged" not in str(caught.value)
