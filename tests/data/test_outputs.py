"""Proves that outputs appear whole or not at all, hold what the schema promises, and destroy nothing that is read."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
import torch
from builders import scores, tiny_net

from longnet_cli.basics.errors import CheckpointError, ConfigError, LongNetError, NotFiniteError
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.data.files.input_files import InputFiles
from longnet_cli.data.outputs.output_paths import is_folder, refuse_overwriting
from longnet_cli.data.outputs.row_writer import ShardWriter, token_batch, token_schema
from longnet_cli.jobs.encoding import EncodeFacts, encode
from longnet_cli.jobs.job_options import EncodeOptions
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.longnet import LongNet

SCHEMA = token_schema(vocab_size=257, eos_id=256, tokenizer_sha256="abc")
BATCH = token_batch(
    SCHEMA, ["a", "b", "c"], [0, 0, 1], [3, 3, 5], np.array([1, 2, 3, 4, 256], np.uint16)
)


def read(path: Path) -> pa.Table:
    if path.suffix == ".jsonl":
        return pa.Table.from_pylist(
            [json.loads(line) for line in path.read_text().splitlines()], SCHEMA
        )
    return pq.read_table(path) if path.suffix == ".parquet" else ipc.open_file(path).read_all()


@pytest.mark.parametrize("name", ["x.arrow", "x.parquet", "x.jsonl", "new/folder/x.feather"])
def test_batches_written_are_batches_read(tmp_path, name):
    with ShardWriter(tmp_path / name, SCHEMA) as writer:
        writer.write(BATCH)
        writer.write(BATCH)
    table = read(tmp_path / name)
    assert table["input_ids"].to_pylist() == [[1, 2, 3], [], [4, 256]] * 2
    assert table.schema.field("input_ids").type == pa.large_list(pa.uint16())
    assert not table.schema.field("input_ids").nullable
    assert table.schema.metadata[b"longnet.eos_id"] == b"256"
    assert (table["doc_id"].to_pylist(), table["part"].to_pylist()) == (
        ["a", "b", "c"] * 2,
        [0, 0, 1] * 2,
    )


def test_ids_are_uint16_only_where_the_vocabulary_fits():
    for vocab_size, kind in ((65_536, pa.uint16()), (65_537, pa.int32())):
        schema = token_schema(vocab_size=vocab_size, eos_id=None, tokenizer_sha256=None)
        assert schema.field("input_ids").type.value_type == kind
        assert set(schema.metadata) == {b"longnet.version", b"longnet.vocab_size"}


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16()])
def test_vectors_are_an_array_of_numpy(tmp_path, kind):
    values = np.arange(3 * 2000, dtype=kind.to_pandas_dtype()).reshape(-1, 3)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 3)
    batch = pa.record_batch(
        {"doc_id": [str(number) for number in range(2000)], "embedding": vectors}
    )
    with ShardWriter(tmp_path / "x.npy", batch.schema) as writer:
        for start in (0, 7, 1999):  # the header is as long for 1 row as for 2,000
            writer.write(batch[start : {0: 7, 7: 1999, 1999: 2000}[start]])
    found = np.load(tmp_path / "x.npy")
    assert (found.dtype, found.tobytes()) == (values.dtype, values.tobytes())


def test_json_lines_hold_lists_and_null_for_what_json_cannot_write(tmp_path):
    kind = pa.list_(pa.float32(), 2)
    values = pa.array([0.5, float("nan"), float("inf"), -1.0, 2.0, 3.0], pa.float32())
    batch = pa.record_batch(
        [pa.array(["é", "b", "\n"]), pa.FixedSizeListArray.from_arrays(values, type=kind)],
        ["id", "v"],
    )
    with ShardWriter(tmp_path / "x.jsonl", batch.schema) as writer:
        writer.write(batch)
        writer.write(batch.slice(2))
    assert (tmp_path / "x.jsonl").read_text() == (
        '{"id": "é", "v": [0.5, null]}\n{"id": "b", "v": [null, -1.0]}\n'
        + '{"id": "\\n", "v": [2.0, 3.0]}\n' * 2
    )


def test_a_place_that_cannot_be_written_is_a_config_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path, tmp_path / "file" / "x.arrow"):
        with pytest.raises(ConfigError, match="cannot write"), ShardWriter(path, SCHEMA):
            pass


@pytest.mark.parametrize("name", ["x.arrow", "x.parquet", "x.jsonl"])
@pytest.mark.parametrize("limit", [0, 100, 30_000])
def test_a_failed_write_is_one_line_and_leaves_nothing(tmp_path, name, limit):
    """Past the limit on file sizes a write fails as on a full disk: on opening, within a batch, or at the end."""
    ids = np.random.default_rng(0).integers(256, size=50_000).astype(np.uint16)
    batch = token_batch(SCHEMA, ["a"], [0], [len(ids)], ids)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        failed = pytest.raises(LongNetError, match=f"{name}: cannot write: File too large")
        with failed as failure, ShardWriter(tmp_path / name, SCHEMA) as writer:
            writer.write(batch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert failure.value.exit_code == 1
    assert os.listdir(tmp_path) == []


def test_only_a_name_without_the_ending_of_a_file_is_a_folder(tmp_path):
    for name in ("v", "run.v2", "2026-11-27", "a.b-c", "old.csv"):
        (tmp_path / "old.csv").mkdir(exist_ok=True)
        assert is_folder(tmp_path / name)
    for name in ("v.csv", "v.TXT", "v.PARQUET", "v.json", "v.jsonl.gz", "v.npz", "v.h5"):
        with pytest.raises(ConfigError, match="is not written"):
            is_folder(tmp_path / name)
    assert not is_folder(tmp_path / "v.parquet")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.arrow", "b.arrow", "folder/c.arrow", "model/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    os.link("a.arrow", "hard.arrow")
    Path("soft.arrow").symlink_to("a.arrow")
    Path("up").symlink_to(".")
    Path("list").write_text("b.arrow\nfolder\n")
    return tmp_path


@pytest.mark.parametrize(
    "output",
    ["a.arrow", "./a.arrow", "hard.arrow", "soft.arrow", "up/a.arrow", "folder/../a.arrow"],
)
@pytest.mark.parametrize(
    "inputs", [["a.arrow"], ["b.arrow", "a*.arrow"], ["file://{}/a.arrow"], ["soft.arrow"]]
)
def test_a_file_is_known_by_every_name(files, output, inputs):
    inputs = [item.format(files) for item in inputs]
    with pytest.raises(
        ConfigError, match=r"^-o .*arrow is .*arrow, which this command reads: name another output$"
    ):
        refuse_overwriting("-o", [output], InputFiles(inputs))
    refuse_overwriting("-o", ["b.arrow.new", "new"], InputFiles(inputs))


@pytest.mark.parametrize(
    ("output", "inputs", "also"),
    [
        ("folder/c.arrow", ["@list"], []),
        ("list", ["@list"], []),
        ("folder", ["@list"], []),
        ("up/folder", ["folder/c.arrow"], []),
        (".", ["folder"], []),
        ("model/config.json", ["a.arrow"], [Path("model")]),
        ("b.arrow", ["a.arrow"], [None, Path("b.arrow")]),
    ],
)
def test_lists_folders_and_models_count(files, output, inputs, also):
    with pytest.raises(
        ConfigError, match=r"^-o .* (is|holds) .*, which this command reads: name another output$"
    ):
        refuse_overwriting("-o", [output], InputFiles(inputs), also)


def test_what_is_not_read_may_be_replaced(files):
    refuse_overwriting("-o", ["b.arrow", "model", "new", "/dev/null", "-"], InputFiles(["a.arrow"]))
    refuse_overwriting("-o", ["folder"], InputFiles(["a.arrow", "model/config.json"]))


def small() -> LongNet:
    return tiny_net(vocab_size=300, segment_lengths=(8, 16), tie_embeddings=False).eval()


def test_the_tokenizer_of_a_model_is_asked_for_by_content(tmp_path):
    own, other = Tokenizer.train([["some text and more text"] * 9], 265), Tokenizer.bytes()
    small().save_pretrained(tmp_path, own.to_json())
    own.save(tmp_path / "copy.json")
    found = ModelFolder(tmp_path).tokenizer()
    assert found is not None
    assert found.sha256 == own.sha256
    assert ModelFolder(tmp_path).tokenizer(str(tmp_path / "copy.json"))
    with pytest.raises(
        ConfigError, match=r"bytes: not the tokenizer of the model .*--tokenizer-differs"
    ):
        ModelFolder(tmp_path).tokenizer("bytes")
    assert ModelFolder(tmp_path).tokenizer("bytes", differs=True).sha256 == other.sha256
    other.save(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="not the tokenizer that the model was saved with"):
        ModelFolder(tmp_path).tokenizer()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="is missing, which the model was saved with"):
        ModelFolder(tmp_path).tokenizer()
    with pytest.raises(ConfigError, match="not the tokenizer of the model"):
        ModelFolder(tmp_path).tokenizer("bytes")
    assert ModelFolder(tmp_path).tokenizer(str(tmp_path / "copy.json"))


@pytest.mark.parametrize("chunk", [4, 1000])
def test_numbers_that_are_not_finite_name_document_and_token(tmp_path, chunk):
    net = small()
    with torch.no_grad():
        net.embedding.weight[ord("z")] = torch.inf
    (tmp_path / "good.txt").write_text("good text")
    (tmp_path / "z.txt").write_text("twelve letters, then z is read")
    inputs, bos = [tmp_path / "good.txt", tmp_path / "z.txt"], Tokenizer.bytes().eos_id

    def documents() -> list:
        return list(Inputs(inputs, Tokenizer.bytes()).documents())

    net.embedding.weight.requires_grad_(False)
    with pytest.raises(
        NotFiniteError,
        match=r"z\.txt: document 'z.txt': the log-probability of token \d+ is not finite",
    ):
        list(scores(net, documents(), bos=bos, chunk=chunk))
    # the segment of 16 tokens with the z in it: what attention masks is multiplied by 0, and 0 times NaN is NaN
    with pytest.raises(
        NotFiniteError, match=r"document 'z.txt': the vector of tokens 15 to 19 is not finite"
    ):
        encode(net, documents(), EncodeOptions(span=5), EncodeFacts(bos), chunk=chunk).read_all()
    reader = encode(small(), documents(), EncodeOptions(span=5), EncodeFacts(bos), chunk=chunk)
    assert np.isfinite(reader.read_all()["embedding"].combine_chunks().flatten()).all()
