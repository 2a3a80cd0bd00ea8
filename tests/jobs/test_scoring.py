"""Every token is scored once, whatever the context, the batching and the company a document is in.

A row of `score -o` is what `score` says of each token: means, the gain, its error and the share of many; a run that is
killed and resumed writes the bytes of one that was not. Standard errors, context comparisons and losses by position are
those of plain sums over single tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from builders import MadeInputs, make_document, scores, tiny_net
from processes import contents

from longnet_cli.basics.errors import ConfigError, DataError, NoTokensError
from longnet_cli.basics.events import Events, LeftOut
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.data.files.manifest import read_manifest
from longnet_cli.jobs.job_options import ScoreOptions
from longnet_cli.jobs.row_jobs import ModelFacts, Output, write_rows
from longnet_cli.jobs.scoring.measures import GAIN_BLOCK, Score, Total
from longnet_cli.jobs.scoring.scoring import Scorer
from longnet_cli.jobs.scoring.token_logprobs import logprob_schema, write_token_logprobs
from longnet_cli.nets.longnet import LongNet
from longnet_cli.running.reader import Reader

BOS = 256
CHUNK = 4000  # tokens of a forward in tests that need several


@pytest.fixture(scope="module")
def model() -> LongNet:
    net = tiny_net().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)  # so that some tokens gain more than 2 nats
    return net


@pytest.mark.parametrize(
    ("chunk", "bos", "context"), [(1, BOS, None), (7, None, None), (64, None, 99), (129, BOS, 99)]
)
def test_log_probabilities_are_those_of_the_logits(tmp_path, chunk, bos, context):
    """Of each token and of the likeliest ones, beside which are the same ids and log-probabilities as without them.

    The rows of a document are its parts, in order; an empty one has none.
    """
    model = tiny_net().double().eval()
    documents = [make_document(length, str(length)) for length in (130, 0, 3)]
    for name, top in (("plain", False), ("top", True)):
        with write_token_logprobs(tmp_path / f"{name}.parquet", top=top) as take:
            list(
                scores(
                    model,
                    documents,
                    bos=bos,
                    context=context,
                    chunk=chunk,
                    events=Events(logprobs=take),
                    top=top,
                )
            )
    plain, table = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("plain", "top"))
    assert table.select(plain.schema.names).equals(plain)
    assert plain.schema.equals(logprob_schema())
    assert table.schema.equals(logprob_schema(top=True))
    assert list(dict.fromkeys(table["doc_id"].to_pylist())) == ["130", "3"]
    for name in ("char_start", "char_end"):  # ids are of no text
        assert table[name].null_count == len(table)
    for document in documents[::2]:
        first = bos is None  # which nothing predicts
        read = torch.tensor([[*([] if first else [bos]), *document.tokens[:-1].tolist()]])
        with torch.no_grad():
            logits = torch.cat(
                [model.logits(model(part))[0] for part in read.split(context or 130, 1)]
            )
        rows = [row for row in table.to_pylist() if row["doc_id"] == document.doc_id]
        keys = ("input_ids", "logprobs", "top_ids", "top_logprobs")
        ids, logprobs, top_ids, top_logprobs = (
            np.concatenate([row[key] for row in rows]) for key in keys
        )
        starts = np.cumsum([first, *(len(row["input_ids"]) for row in rows)])
        assert [row["start"] for row in rows] == starts[:-1].tolist()
        assert [row["part"] for row in rows] == [*range(len(rows))]
        assert (ids.tolist(), top_ids.tolist()) == (
            document.tokens[first:].tolist(),
            logits.argmax(-1).tolist(),
        )
        of_tokens = logits.log_softmax(-1)[torch.arange(len(ids)), torch.from_numpy(ids)]
        np.testing.assert_allclose(logprobs, of_tokens, rtol=1e-6)
        np.testing.assert_allclose(top_logprobs, logits.log_softmax(-1).amax(-1), rtol=1e-6)


def test_a_long_document_is_handed_out_at_once(model):
    """Before the next one is even read: the row of an hour's work must not wait for the next hour's."""
    read: list[str] = []

    def documents():
        for name in "ab":
            read.append(name)
            yield make_document(CHUNK, name)

    assert next(scores(model, documents(), bos=BOS, context=64, chunk=CHUNK)).doc_id == "a"
    assert read == ["a"]


def test_an_empty_document_is_no_error_but_nothing_at_all_is(model):
    seen: list[int] = []
    documents = [make_document(0), make_document(3)]
    first, _ = scores(model, documents, bos=BOS, events=Events(progress=seen.append))
    assert first.score.as_dict() == {
        "nll_sum": 0.0,
        "n_tokens": 0,
        "n_bytes": 0,
        "ppl": None,
        "bpb": None,
    }
    assert sum(seen) == 3
    with pytest.raises(DataError, match="no token could be scored"):
        list(scores(model, [make_document(1)], bos=None))


def test_leaves_no_inference_mode_behind(model):
    for _ in scores(model, [make_document(3)], bos=BOS):
        assert not torch.is_inference_mode_enabled()


def test_a_model_that_cannot_score():
    with pytest.raises(ConfigError, match="vocabulary"):  # at the call, not at the first document
        scores(tiny_net(vocab_size=0), [], bos=BOS)


OPTIONS, FACTS = ScoreOptions(context=(400, 16)), ModelFacts(BOS)


def rows(
    model: LongNet,
    documents: Iterable[Document],
    options: ScoreOptions = OPTIONS,
    kept: Sequence[pa.Field] = (),
    chunk: int | None = None,
) -> pa.Table:
    job = Scorer(Reader(model, chunk=chunk), options, FACTS)
    job.kept_fields = kept
    return job.rows(documents).read_all()


def write(
    model: LongNet,
    place: Path,
    documents: Iterable[Document],
    keep: tuple[str, ...] = (),
    resume: bool = False,
) -> LeftOut:
    """A shard ends with the document that brings it to 150 tokens; bad documents are left out."""
    left_out = LeftOut(lambda document, error: None)
    job = Scorer(Reader(model, events=Events(left_out=left_out)), OPTIONS, FACTS)
    write_rows(job, MadeInputs((), keep=keep, made=documents), Output(place, 150, resume=resume))
    return left_out


def test_documents_too_short_are_counted_also_in_the_manifest(model, tmp_path):
    documents = [make_document(n, str(n)) for n in (3, 9, 12, 0)]
    for resume in (False, True):  # a finished folder gives its own count
        events = Events()
        job = Scorer(Reader(model, events=events), ScoreOptions(last=9), FACTS)
        write_rows(job, MadeInputs((), made=documents), Output(tmp_path / "out", resume=resume))
        assert (events.left_out.short, events.left_out.empty) == (1, 1)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert (manifest.totals["short"], manifest.totals["documents"]) == (1, 2)


def nats(model: LongNet, document: Document, context: int) -> np.ndarray:
    """Of each token, float64 of the float32 that scoring tells token by token."""
    found: list[np.ndarray] = []
    list(
        scores(
            model,
            [document],
            bos=BOS,
            context=context,
            events=Events(logprobs=lambda d, s, i, logprobs: found.append(-logprobs)),
        )
    )
    return np.concatenate(found).astype(float)


@pytest.mark.parametrize("chunk", [None, 7])
def test_a_row_is_what_the_tokens_say(model, chunk):
    documents = [make_document(length, str(length)) for length in (1, 300, 0, 1000, 128)]
    table = rows(model, documents, chunk=chunk)
    assert table.schema == Scorer(Reader(model), OPTIONS).schema
    assert table["doc_id"].to_pylist() == ["1", "300", "0", "1000", "128"]
    shares = []
    for document, row in zip(documents, table.to_pylist(), strict=True):
        n = len(document)
        assert (row["n_tokens"], row["n_bytes"]) == (n, n)
        if not n:
            assert {
                row[name] for name in ("ppl_16", "bpb_400", "gain", "gain_se", "gain_share")
            } == {None}
            continue
        short, long = nats(model, document, 16), nats(model, document, 400)
        gained = short - long
        expected = [
            short.sum(),
            long.sum(),
            np.exp(long.mean()),
            gained.mean(),
            (gained > 2).mean(),
        ]
        got = [row[name] for name in ("nll_sum_16", "nll_sum_400", "ppl_400", "gain", "gain_share")]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        shares.append(row["gain_share"])
        blocks = [gained[start : start + GAIN_BLOCK] for start in range(0, n, GAIN_BLOCK)]
        if len(blocks) < 2:
            assert row["gain_se"] is None
            continue
        residuals = [block.sum() - gained.mean() * len(block) for block in blocks]
        error = np.sqrt(len(blocks) / (len(blocks) - 1) * np.square(residuals).sum()) / n
        assert row["gain_se"] == pytest.approx(error, rel=1e-4)
    assert max(shares) > 0


def test_one_context_has_no_gain(model):
    table = rows(model, [make_document(50)], ScoreOptions())
    assert table.column_names == ["doc_id", "n_tokens", "n_bytes", "nll_sum", "ppl", "bpb"]


def test_a_resumed_folder_has_the_same_bytes(model, tmp_path):
    """Columns that are kept stand behind its rows, and what is bad is left out."""
    documents = [make_document(length, str(length)) for length in (100, 0, 0, 300, 20, 500, 0, 30)]
    documents[3:3] = [Document("bad", np.array([999]), 1, "bad.txt", limit=257)]
    values = [["a"], None, [], ["bad"], ["b", "c"], ["d"], [], None, ["e"]]
    tags = pa.field("tags", pa.list_(pa.string()))
    for document, value in zip(documents, values, strict=True):
        document.kept = {"tags": pa.scalar(value, tags.type)}

    def stopping() -> Iterator[Document]:
        yield from documents[:6]
        raise DataError("stop")

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert write(model, whole, documents, ("tags",)).skipped == 1
    with pytest.raises(DataError, match="stop"):
        write(model, cut, stopping(), ("tags",))
    assert 0 < read_manifest(cut).totals["documents"] < len(documents)
    text = copy(documents[0])
    text.kept = {"tags": pa.scalar("a")}
    for keep, first in ((), documents[0]), (("tags",), text):
        with pytest.raises(ConfigError, match="keep"):
            write(model, cut, [first, *documents[1:]], keep, resume=True)
    for again in (documents, documents[:1]):  # then it is finished, and its manifest says so
        assert write(model, cut, again, ("tags",), resume=True).skipped == 1
    assert contents(whole) == contents(cut)
    manifest = read_manifest(whole)
    assert manifest.totals.items() >= {"skipped": 1, "documents": 8, "rows": 8}.items()
    assert not manifest.settings.keys() & {"stride", "last"}  # what was not chosen
    shards = [pa.ipc.open_file(path).read_all() for path in sorted(cut.glob("gains-*.arrow"))]
    assert len(shards) > 1
    table = pa.concat_tables(shards)
    assert table["tags"].to_pylist() == values[:3] + values[4:]
    assert table.schema.names == [*rows(model, documents[:1]).schema.names, "tags"]


def test_nothing_to_score_is_said_at_the_end(model, tmp_path):
    with pytest.raises(NoTokensError):
        write(model, tmp_path / "out", [make_document(0)])


def test_a_kept_value_of_another_type_is_refused(model):
    documents = [make_document(30, "a"), make_document(40, "b")]
    for document, value in zip(documents, (1, "one"), strict=True):
        document.kept = {"year": pa.scalar(value)}
    with pytest.raises(
        DataError, match=r"b\.txt: 'year' is string, and int64 in the first document"
    ):
        rows(model, documents, kept=[pa.field("year", pa.int64())])


@pytest.fixture(scope="module")
def double() -> LongNet:
    return tiny_net(segment_lengths=(20, 40)).double().eval()


def token_nll(double: LongNet, ids: np.ndarray) -> np.ndarray:
    """Nats of each of ids[1:], given those before it, from full logits."""
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = double.logits(double(tokens[:, :-1]))
    return F.cross_entropy(logits[0], tokens[0, 1:], reduction="none").numpy()


def plain(
    double: LongNet,
    document: Document,
    bos: int | None,
    context: int,
    stride: int | None,
    last: int | None,
):
    """(nats, inputs seen) of each scored token: blocks of `stride`, each at the end of a window of `context`.

    Without a stride, windows of a whole document do not overlap, and the last one may be shorter.
    """
    # ids[i + 1] is the i-th target
    ids = document.tokens if bos is None else np.concatenate(([bos], document.tokens))
    end, begin = len(ids) - 1, 0 if last is None else len(ids) - 1 - last
    nats, seen = [], []
    for block in range(begin, end, stride or context):
        stop = min(block + (stride or context), end)
        start = block if stride is None and last is None else max(0, stop - context)
        found = token_nll(double, ids[start : stop + 1])[block - start :]
        nats += found.tolist()
        seen += range(block - start + 1, stop - start + 1)
    return np.array(nats), np.array(seen)


@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize("chunk", [16, 1000])
@pytest.mark.parametrize(
    ("contexts", "stride", "last"),
    [
        ((8, 30, 90), 8, None),
        ((16, 50), 5, 33),
        ((32, 40), None, 32),
        ((10,), None, 25),
        ((1, 49, 131, 999), None, None),
    ],
)
def test_windows_are_plain_forwards(double, bos, chunk, contexts, stride, last):
    documents = [make_document(length) for length in (95, 131, 4)]
    found = list(
        scores(
            double, documents, bos=bos, context=contexts, stride=stride, last=last, chunk=chunk,
            count_bytes=len, dtype="fp32",
        )
    )  # fmt: skip
    longest = [d for d in documents if last is None or len(d) > 50]
    assert [(each.doc_id, each.context) for each in found] == [
        (d.doc_id, c) for d in longest for c in contexts
    ]
    for each, (document, context) in zip(
        found, [(d, c) for d in longest for c in contexts], strict=True
    ):
        nats, seen = plain(double, document, bos, context, stride, last)
        assert each.score.n_tokens == len(nats) == (last or len(document) - (bos is None))
        assert each.score.nll_sum == pytest.approx(nats.sum(), rel=1e-7)
        assert each.score.n_bytes == (last or (len(document) if bos is not None else None))
        if stride:
            assert min(seen[min(context, len(seen)) :], default=context) > context - stride


@pytest.fixture
def sums() -> np.ndarray:
    """(200 documents; nats at two contexts, tokens, bytes), of very different lengths."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 3000, 200)
    nats = tokens * draw.normal(2.5, 0.4, 200)
    return np.stack(
        [nats, nats * draw.normal(0.95, 0.02, 200), tokens, tokens * draw.integers(2, 5, 200)], 1
    )


def total_of(sums: np.ndarray) -> list[dict]:
    total = Total([512, 8192])
    for index, (*nats, tokens, n_bytes) in enumerate(sums):
        of_contexts = {
            f"nll_sum_{context}": float(nll) for context, nll in zip((512, 8192), nats, strict=True)
        }
        total.add(
            {"doc_id": str(index), "n_tokens": int(tokens), "n_bytes": int(n_bytes), **of_contexts}
        )
    return total.as_dicts()


def ratio_error(x: np.ndarray, y: np.ndarray) -> float:
    """The definition, by one document after the other."""
    ratio, n = x.sum() / y.sum(), len(x)
    return (
        math.sqrt(n / (n - 1) * sum((a - ratio * b) ** 2 for a, b in zip(x, y, strict=True)))
        / y.sum()
    )


def test_standard_errors_are_those_of_clusters(sums):
    first, second = total_of(sums)
    short, long, tokens, n_bytes = sums.T
    for row, nats in ((first, short), (second, long)):
        assert row["n_docs"] == 200
        assert row["ppl_se"] == pytest.approx(row["ppl"] * ratio_error(nats, tokens))
        assert row["bpb_se"] == pytest.approx(ratio_error(nats / math.log(2), n_bytes))
    assert "ppl_ratio" not in first
    assert second["ppl_ratio"] == pytest.approx(second["ppl"] / first["ppl"])
    assert second["ppl_ratio_se"] == pytest.approx(
        second["ppl_ratio"] * ratio_error(long - short, tokens)
    )
    # the comparison is much sharper than its sides: that is what it is for
    assert second["ppl_ratio_se"] / second["ppl_ratio"] < 0.5 * second["ppl_se"] / second["ppl"]


def test_few_and_empty_documents(sums):
    empty = np.zeros((3, 4))
    assert total_of(np.concatenate((empty, sums)))[0] == total_of(sums)[0]
    (one, other) = total_of(sums[:1])
    assert (one["ppl_se"], one["bpb_se"], other["ppl_ratio_se"]) == (None, None, None)
    assert other["ppl_ratio"] is not None
    nothing, _ = total_of(empty)
    assert (nothing["ppl"], nothing["ppl_se"], nothing["n_docs"]) == (None, None, 0)
    total = Total([None])
    for _ in range(2):
        total.add({"n_tokens": 2, "n_bytes": None, "nll_sum": 5.0})
    (unknown,) = total.as_dicts()
    assert (unknown["bpb"], unknown["bpb_se"]) == (None, None)
    assert unknown["ppl_se"] == 0
    assert Score(1e6, 1, 1).ppl is None  # past a float


def test_no_document_is_long_enough(double):
    """Each of its last 20 tokens is to have seen more than 64 - 10: 74 tokens are needed."""
    cut = {"bos": BOS, "context": [16, 64], "stride": 10, "last": 20, "dtype": "fp32"}
    with pytest.raises(DataError, match="no document has 74 tokens"):
        list(scores(double, [make_document(73)], **cut))
    assert len(list(scores(double, [make_document(74)], **cut))) == 2
