"""Proves that a document's vector is the pool of its own hidden states, whatever batch it is in, and that what comes
out is the Arrow table that DESIGN.md promises."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pytest
import torch
from builders import LEVELS, SIZES, MadeInputs, make_document, tiny_model, tiny_net, vectors
from files import write_lines
from processes import contents, invoke

from longnet_cli.basics.errors import ConfigError, DataError, MemoryLimitError
from longnet_cli.basics.events import Events, LeftOut
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.text_pieces import cut
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.data.files.manifest import read_manifest
from longnet_cli.jobs.batch_functions import encode_batches
from longnet_cli.jobs.encoding import EncodeFacts, Encoder, encode
from longnet_cli.jobs.job_options import POOLS, UNITS, EncodeOptions
from longnet_cli.jobs.pooling import SUMMED, Pooling, pool_together
from longnet_cli.jobs.row_jobs import Output, write_rows
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.weights import model_digest
from longnet_cli.running.ranks.ranks import Ranks
from longnet_cli.running.reader import Reader

BOS = 256
CONFIG = LongNetConfig(**SIZES, **LEVELS, position="rope")


@pytest.fixture(scope="module", params=["causal", "bidirectional"])
def model(request: pytest.FixtureRequest) -> LongNet:
    return tiny_net(position="rope", causal=request.param == "causal").eval()


def plain_states(model: LongNet, document: Document, bos: int | None = BOS) -> torch.Tensor:
    """The states of its tokens, from one forward over this document alone."""
    before = [bos] if model.config.causal and bos else []
    with torch.no_grad():
        return model(torch.tensor([before + document.tokens.tolist()]))[0, len(before) :].double()


PLAIN = {"mean": lambda x: x.mean(0), "last": lambda x: x[-1], "first": lambda x: x[0]}


@pytest.mark.parametrize(
    ("pool", "bos"), [("mean", BOS), ("last", BOS), ("first", BOS), ("mean", None)]
)
def test_ragged_documents_equal_each_alone(model, pool, bos):
    documents = [make_document(length, str(length)) for length in (5, 33, 1, 200, 32, 31, 64)]
    seen: list[int] = []
    options, facts = EncodeOptions(pool=pool, normalize=False), EncodeFacts(bos)
    table = encode(model, documents, options, facts, events=Events(progress=seen.append)).read_all()
    assert table["doc_id"].to_pylist() == [document.doc_id for document in documents]
    assert sum(seen) == sum(len(document.tokens) for document in documents)
    expected = [PLAIN[pool](plain_states(model, document, bos)) for document in documents]
    np.testing.assert_allclose(vectors(table), torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_ranks_share_poolings_that_add(model, pool):
    """Of a document that ranks share, each pools its own states, and zeros in place of the others'."""
    states, own = torch.randn(6, 4), torch.tensor([1.0, 0, 0, 1, 1, 0])[:, None]
    whole, *parts = (next(Pooling(make_document(6), [pool], [6]).add(part)).vector for part in
                     (states, states * own, states * (1 - own)))  # fmt: skip
    assert torch.allclose(sum(parts), whole) == (pool in SUMMED)
    if pool not in SUMMED:
        reader = Reader(model)
        reader.ranks = Ranks(world=2, sp=2)
        with pytest.raises(
            ConfigError, match=f"--pool {pool} of a document is not shared by ranks"
        ):
            Encoder(reader, EncodeOptions(pool=f"mean+{pool}"))


@pytest.mark.parametrize("pool", ["mean", "sqrt", "weighted", "weighted+mean"])
def test_whole_documents_are_pooled_together(pool):
    """To the same bits, also if they have a prefix that is not pooled, one that is, and an end."""
    around = {"skipped": 1, "before": 2, "after": 3}
    states = [torch.randn(n + 5, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 6, 15)]
    alone, together = (
        [
            Pooling(make_document(len(x) - 5), pool.split("+"), [len(x) - 5], **around)
            for x in states
        ]
        for _ in range(2)
    )
    assert [x.is_whole(hidden, 20) for x, hidden in zip(together, states, strict=True)] == [
        True
    ] * 3
    assert not together[2].is_whole(states[2][1:], 20)
    assert not together[2].is_whole(states[2], 19)
    assert not Pooling(make_document(15), pool.split("+"), range(5, 20, 5), **around).is_whole(
        states[2], 20
    )
    assert not Pooling(make_document(15), [*pool.split("+"), "last"], [15], **around).is_whole(
        states[2], 20
    )
    pool_together([*zip(together, states, strict=True)])
    for poolings in zip(alone, together, states, strict=True):
        one, other = (next(pooling.add(poolings[2])) for pooling in poolings[:2])
        assert torch.equal(one.vector, other.vector)
        assert (one.span, one.start, one.end) == (other.span, other.start, other.end)


def test_a_span_is_the_pool_of_its_own_tokens(model):
    document, options = make_document(25), EncodeOptions(span=10, normalize=False)
    table = encode(model, [document], options, EncodeFacts(BOS)).read_all()
    assert table.drop_columns(["embedding"]).to_pylist() == [
        {"doc_id": "a", "span": i, "start": 10 * i, "end": end, "n_tokens": end - 10 * i}
        for i, end in enumerate((10, 20, 25))
    ]
    expected = [part.mean(0) for part in plain_states(model, document).split(10)]
    np.testing.assert_allclose(vectors(table), torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_of_a_text_has_the_mean_of_its_tokens(unit):
    text = (
        "Der Fuchs! L\u00e4uft \u2014 weit. Wohin? \u6f22\u5b57\u3002\u6b21\u3002\n\nNobody knows: gone.   \n\n"
        * 12
    )
    tokens, rows = (
        encode_batches([text], span=span, normalize=False).to_pydict() for span in (1, unit)
    )
    places = zip(rows["char_start"], rows["char_end"], strict=True)
    assert [text[start:end].strip() for start, end in places] == [
        piece.strip() for piece in cut([text], unit)
    ]
    assert rows["start"] == [0, *rows["end"][:-1]]
    for start, end, vector in zip(rows["start"], rows["end"], rows["embedding"], strict=True):
        np.testing.assert_allclose(np.mean(tokens["embedding"][start:end], 0), vector, atol=1e-5)


def test_spans_go_out_while_the_rest_comes_in():
    """The first row of a causal document is there when its first chunk is read."""
    model = LongNet(CONFIG).eval()
    read: list[int] = []

    class Slow(Document):
        def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
            read.append(start)
            return super().read(start, stop)

    document = make_document(1000)
    slow = Slow(document.doc_id, document.tokens, None, "")
    assert (
        len(next(encode(model, [slow], EncodeOptions(span=50), EncodeFacts(None), chunk=100))) == 2
    )
    assert read == [0]


@pytest.mark.parametrize("embedding_dtype", ["float32", "float16"])
def test_schema_and_metadata_are_the_contract(model, embedding_dtype):
    options = EncodeOptions(pool="last", normalize=False, embedding_dtype=embedding_dtype)
    reader = encode(model, [make_document(5)], options, EncodeFacts(BOS, "tiny", "ab12"))
    number = pa.float32() if embedding_dtype == "float32" else pa.float16()
    fields = {
        "doc_id": pa.string(),
        "span": pa.int32(),
        "start": pa.int64(),
        "end": pa.int64(),
        "n_tokens": pa.int64(),
    }
    assert reader.schema.equals(pa.schema(fields | {"embedding": pa.list_(number, 16)}))
    assert reader.schema.metadata == {
        b"longnet.model": b"tiny",
        b"longnet.model_sha256": model_digest(model).encode(),
        b"longnet.pooling": b"last",
        b"longnet.normalized": b"false",
        b"longnet.tokenizer_sha256": b"ab12",
    }
    table = reader.read_all()
    table.validate(full=True)
    assert table.drop_columns(["embedding"]).to_pylist() == [
        {"doc_id": "a", "span": 0, "start": 0, "end": 5, "n_tokens": 5}
    ]


def test_an_empty_document_has_no_vector(model):
    """A zero vector would look like an answer."""
    documents = [make_document(5), make_document(0, "hollow"), make_document(7, "b")]
    events = Events()
    table = encode(model, documents, EncodeOptions(), EncodeFacts(BOS), events=events).read_all()
    assert table["doc_id"].to_pylist() == ["a", "b"]
    assert events.left_out.empty == 1


def test_a_model_without_vocabulary_reads_no_tokens():
    net = LongNet(CONFIG.model_copy(update={"vocab_size": 0}))
    with pytest.raises(
        ConfigError, match="the model reads vectors, and this document holds token ids"
    ):
        encode(net, [make_document(5, "a")], EncodeOptions(), EncodeFacts(None)).read_all()


# --- folders ---------------------------------------------------------------------------------------------------------

LENGTHS = (5, 33, 1, 200, 32, 31, 64, 7, 90, 2, 120, 3)
DOCUMENTS = [make_document(length, str(index)) for index, length in enumerate(LENGTHS)]


def write(
    model: LongNet, place: Path, documents: Iterable[Document] = DOCUMENTS, **options: Any
) -> Counter[str]:
    """Forwards of 70 tokens: some documents share one, and some are longer."""

    def take(kind: Any, given: dict[str, Any], *own: Any) -> Any:
        return kind(
            *own, **{each.name: given.pop(each.name) for each in fields(kind) if each.name in given}
        )

    given = {"bos": BOS, "chunk": 70, "shard_size": 3} | options
    inputs = given.pop("inputs", MadeInputs("x", made=documents))
    asked, facts, output = (
        take(EncodeOptions, given),
        take(EncodeFacts, given),
        take(Output, given, place),
    )
    return write_rows(Encoder(Reader(model, **given), asked, facts), inputs, output)


def stopped_at(index: int) -> Iterator[Document]:
    yield from DOCUMENTS[:index]
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("span", "groups"), [(None, "0,1,2 3,4,5 6,7,8 9,10,11"), (20, "0,1 2,3 4,5 6 7,8 9,10 11")]
)
def test_a_folder_holds_what_the_reader_gives(model, tmp_path, span, groups):
    """A shard ends with the document that brings it to 3 rows."""
    totals = write(model, tmp_path / "out", span=span)
    tables = shards_of(tmp_path / "out")
    table = pa.concat_tables(tables)
    expected = encode(model, DOCUMENTS, EncodeOptions(span=span), EncodeFacts(BOS)).read_all()
    assert table.schema.equals(expected.schema, check_metadata=True)
    assert table.drop_columns(["embedding"]) == expected.drop_columns(["embedding"])
    np.testing.assert_allclose(vectors(table), vectors(expected), atol=1e-5)
    names = [dict.fromkeys(found["doc_id"].to_pylist()) for found in tables]
    assert " ".join(map(",".join, names)) == groups
    assert dict(totals) == {"rows": len(table), "documents": len(LENGTHS), "tokens": sum(LENGTHS)}


def shards_of(folder: Path) -> list[pa.Table]:
    return [ipc.open_file(path).read_all() for path in sorted(folder.glob("vectors-*"))]


@pytest.mark.parametrize("span", [None, 20])
def test_a_folder_resumed_anywhere_has_the_same_bytes(model, tmp_path, span):
    write(model, tmp_path / "whole", span=span)
    for stop in (2, 4, 5, 9, 12):
        place, seen = tmp_path / str(stop), []
        with pytest.raises(KeyboardInterrupt):
            write(model, place, stopped_at(stop), span=span)
        half = read_manifest(place)
        write(model, place, span=span, resume=True, events=Events(progress=seen.append))
        assert contents(place) == contents(tmp_path / "whole")
        assert sum(seen) == sum(LENGTHS[half.totals["documents"] :])  # nothing is encoded twice
        assert half.totals["documents"] >= stop - 3


def test_an_earlier_run_may_name_the_pattern_otherwise(model, tmp_path):
    """As another version wrote it; the folder says one thing, and another pattern is refused."""
    write(model, tmp_path / "whole", pattern="geometric:64,base=16")
    with pytest.raises(KeyboardInterrupt):
        write(model, tmp_path / "cut", stopped_at(5), pattern="geometric:64,base=16")
    for other in ("16/1,64/4", "window:16"):
        with pytest.raises(ConfigError, match="cannot resume: pattern was 'geometric:64,base=16'"):
            write(model, tmp_path / "cut", pattern=other, resume=True)
    write(model, tmp_path / "cut", pattern="16/1,32/2,64/4", resume=True)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("span", [None, 20])
def test_neighbours_of_one_name_get_names_of_their_own(model, tmp_path, span):
    """Also on both sides of an empty document, of the edge of a shard and of a stop; but not the names of a column."""
    names = ["a", "a", "a", "a#2", "", "b", "", "b", "a"]

    def made() -> list[Document]:
        return [make_document(33 if name else 0, name) for name in names]

    def stopped() -> Iterator[Document]:
        yield from made()[:4]
        raise KeyboardInterrupt

    write(model, tmp_path / "whole", made(), span=span)
    with pytest.raises(KeyboardInterrupt):
        write(model, tmp_path / "out", stopped(), span=span)
    write(model, tmp_path / "out", made(), span=span, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    read = list(Inputs([tmp_path / "out"], vectors=True).documents())
    assert [vectors.doc_id for vectors in read] == ["a", "a#1", "a#2", "a#2#1", "b", "b#1", "a"]
    assert {len(vectors) for vectors in read} == {1 if span is None else 2}
    inputs = replace(MadeInputs("x", made=made()), id_column="id")
    write(model, tmp_path / "named", span=span, inputs=inputs)
    table = pa.concat_tables(shards_of(tmp_path / "named"))
    assert {*table["doc_id"].to_pylist()} == {*names} - {""}
    with pytest.raises(DataError, match=r"part 0 of document 'a' stands where part [12] should"):
        list(Inputs(sorted((tmp_path / "named").glob("vectors-*")), vectors=True).documents())


OTHER = [
    ("pool", {"pool": "last"}),
    ("normalize", {"normalize": False}),
    ("span", {"span": 9}),
    ("chunk", {"chunk": 71}),
    ("embedding_dtype", {"embedding_dtype": "float16"}),
    ("bos", {"bos": None}),
    ("shard_rows", {"shard_size": 4}),
    ("inputs", {"inputs": MadeInputs("y", made=DOCUMENTS)}),
    ("tokenizer_sha256", {"tokenizer_sha256": "ab"}),
    ("dtype", {"dtype": "bf16"}),
    ("model", {"model": tiny_net(position="rope").eval()}),
]


@pytest.mark.parametrize(("name", "options"), OTHER, ids=[name for name, _ in OTHER])
def test_a_folder_is_not_resumed_with_other_options(tmp_path, name, options):
    model = LongNet(CONFIG).eval()
    with pytest.raises(KeyboardInterrupt):
        write(model, tmp_path, stopped_at(7))
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"cannot resume: {name} was"):
        write(**{"model": model} | options, place=tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_a_default_chunk_is_that_of_the_run_before(tmp_path, monkeypatch):
    """On a GPU it depends on the memory that is free."""
    texts = write_lines(
        tmp_path / "x.jsonl", [{"id": str(n), "text": "ab " * n} for n in range(20)]
    )
    command = ["encode", texts, "-m", tiny_model(tmp_path / "model"), "--shard-rows", "4", "-o"]
    invoke(*command, tmp_path / "whole", "--chunk", "70")
    invoke(*command, tmp_path / "out", "--chunk", "70")
    for index in (3, 4):
        (tmp_path / f"out/vectors-0000{index}.arrow").unlink()
    manifest = read_manifest(tmp_path / "out")
    manifest.finished, manifest.shards = False, manifest.shards[:3]
    (tmp_path / "out/_manifest.arrow").unlink()
    (tmp_path / "out/_unfinished.json").write_text(manifest.to_json())
    monkeypatch.setattr("longnet_cli.running.reader.default_chunk", lambda *_: 40)
    assert invoke(*command, tmp_path / "out", "--resume").exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_empty_documents_are_counted_and_change_no_shard(model, tmp_path):
    write(model, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write(model, tmp_path / "out", chain([make_document(0, "hollow")], stopped_at(7)))
    write(
        model,
        tmp_path / "out",
        [make_document(0, "hollow"), *DOCUMENTS, make_document(0, "void")],
        resume=True,
    )
    found, whole = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert found.pop("_manifest.arrow") != whole.pop("_manifest.arrow")
    assert found == whole
    assert read_manifest(tmp_path / "out").totals["empty"] == 2


@pytest.mark.parametrize("skips", [False, True])
def test_a_document_is_told_before_any_of_it_is_read_and_a_refusal_is_not_skipped(model, skips):
    seen: list[str] = []

    class Noted(Document):
        def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
            seen.append("read")
            return super().read(start, stop)

    def refuse(document: Document, fraction: float | None) -> None:
        seen.append("told")
        raise MemoryLimitError("no room")

    left_out = LeftOut((lambda *_: seen.append("skipped")) if skips else None)
    job = Encoder(Reader(model, events=Events(document=refuse, left_out=left_out)))
    with pytest.raises(MemoryLimitError):
        list(job.sequences([Noted("a", np.arange(5), 5, "a")]))
    assert seen == ["told"]


def test_a_shard_ends_after_as_many_rows_as_were_asked_for_also_of_units(tmp_path):
    texts = write_lines(
        tmp_path / "x.jsonl", [{"id": str(n), "text": "One. Two. Three. " * 3} for n in range(4)]
    )
    command = ["encode", texts, "-m", tiny_model(tmp_path / "model"), "--span", "sentence"]
    assert invoke(*command, "--shard-rows", "9", "-o", tmp_path / "out").exit_code == 0
    assert [shard["rows"] for shard in read_manifest(tmp_path / "out").shards] == [9, 9, 9, 9]
