"""Proves that a row of `score -o` is what `score` says of each token: means, the gain, its error and the share of many;
and that a run that is killed and resumed writes the bytes of one that was not."""

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
import torch
from builders import MadeInputs, make_document, scores, tiny_net
from processes import contents

from longnet_cli.basics.errors import ConfigError, DataError, NoTokensError
from longnet_cli.data.documents import Document
from longnet_cli.data.manifest import LeftOut, read_manifest
from longnet_cli.jobs.options import ScoreOptions
from longnet_cli.jobs.row_jobs import ModelFacts, Output, Telling, run
from longnet_cli.jobs.scoring.measures import GAIN_BLOCK, Clusters
from longnet_cli.jobs.scoring.scoring import Scorer
from longnet_cli.nets.longnet import LongNet
from longnet_cli.running.reader import Reader

BOS = 256
OPTIONS, FACTS = ScoreOptions(context=(400, 16)), ModelFacts(BOS)


@pytest.fixture(scope="module")
def model() -> LongNet:
    net = tiny_net().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)  # so that some tokens gain more than 2 nats
    return net


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
    left_out, inputs = LeftOut(lambda document, error: None), MadeInputs((), keep=keep, made=documents)
    run(Scorer(Reader(model), OPTIONS, FACTS), inputs, Output(place, 150, resume=resume), Telling(left_out))
    return left_out


def nats(model: LongNet, document: Document, context: int) -> np.ndarray:
    """Of each token, float64 of the float32 that scoring tells token by token."""
    found: list[np.ndarray] = []
    list(
        scores(model, [document], bos=BOS, context=context, on_tokens=lambda d, s, i, logprobs: found.append(-logprobs))
    )
    return np.concatenate(found).astype(float)


@pytest.mark.parametrize("chunk", [None, 7])
def test_a_row_is_what_the_tokens_say(model: LongNet, chunk: int | None) -> None:
    documents = [make_document(length, str(length)) for length in (1, 300, 0, 1000, 128)]
    table = rows(model, documents, chunk=chunk)
    assert table.schema == Scorer(Reader(model), OPTIONS).schema
    assert table["doc_id"].to_pylist() == ["1", "300", "0", "1000", "128"]
    shares = []
    for document, row in zip(documents, table.to_pylist(), strict=True):
        n = len(document)
        assert (row["n_tokens"], row["n_bytes"]) == (n, n)
        if not n:
            assert {row[name] for name in ("ppl_16", "bpb_400", "gain", "gain_se", "gain_share")} == {None}
            continue
        short, long = nats(model, document, 16), nats(model, document, 400)
        gained = short - long
        expected = [short.sum(), long.sum(), np.exp(long.mean()), gained.mean(), (gained > 2).mean()]
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


def test_one_context_has_no_gain(model: LongNet) -> None:
    table = rows(model, [make_document(50)], ScoreOptions())
    assert table.column_names == ["doc_id", "n_tokens", "n_bytes", "nll_sum", "ppl", "bpb"]


def test_clusters_of_many_are_those_of_each() -> None:
    values = np.random.default_rng(0).normal(5, 1, (100, 3))
    one, many = Clusters(3), Clusters(3)
    for row in values:
        one.add(row)
    for part in np.split(values, [1, 1, 30]):
        many.extend(part)
    assert many.documents == 100
    np.testing.assert_allclose(many.spread, one.spread)
    np.testing.assert_allclose(many.spread, 99 * np.cov(values.T))


def test_a_resumed_folder_has_the_same_bytes(model: LongNet, tmp_path: Path) -> None:
    documents = [make_document(length, str(length)) for length in (100, 0, 0, 300, 20, 500, 0, 30)]
    bad = Document("bad", np.array([999]), 1, "bad.txt", limit=257)
    documents[3:3] = [bad]

    def stopping() -> list[Document]:
        yield from documents[:6]
        raise DataError("stop")

    assert write(model, tmp_path / "whole", documents).skipped == 1
    with pytest.raises(DataError, match="stop"):
        write(model, tmp_path / "cut", stopping())
    assert 0 < read_manifest(tmp_path / "cut").totals["documents"] < len(documents)
    assert write(model, tmp_path / "cut", documents, resume=True).skipped == 1
    assert write(model, tmp_path / "cut", [], resume=True).skipped == 1  # it is finished, and its manifest says so
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")
    manifest = read_manifest(tmp_path / "whole")
    assert (manifest.totals["skipped"], manifest.totals["documents"], manifest.totals["rows"]) == (1, 8, 8)
    assert not manifest.settings.keys() & {"by_position", "last"}  # what was not chosen


def test_nothing_to_score_is_said_at_the_end(model: LongNet, tmp_path: Path) -> None:
    with pytest.raises(NoTokensError):
        write(model, tmp_path / "out", [make_document(0)])


def test_kept_columns_stand_behind_the_rows_of_a_resumed_folder_too(model: LongNet, tmp_path: Path) -> None:
    kept = [pa.field("tags", pa.list_(pa.string()))]
    values: list[list[str] | None] = [["a"], None, ["b", "c"], [], ["d"]]
    documents = [make_document(length, str(length)) for length in (100, 0, 300, 20, 200)]
    for document, value in zip(documents, values, strict=True):
        document.kept = {"tags": pa.scalar(value, kept[0].type)}
    table = rows(model, documents, kept=kept)
    job = Scorer(Reader(model), OPTIONS, FACTS)
    job.kept_fields = kept
    assert table.schema == job.schema
    assert table["tags"].to_pylist() == values

    def stopping() -> Iterator[Document]:
        yield from documents[:4]
        raise DataError("stop")

    write(model, tmp_path / "whole", documents, ("tags",))
    with pytest.raises(DataError, match="stop"):
        write(model, tmp_path / "cut", stopping(), ("tags",))
    text = copy(documents[0])
    text.kept = {"tags": pa.scalar("a")}
    for keep, first in ((), documents[0]), (("tags",), text):
        with pytest.raises(ConfigError, match="keep"):
            write(model, tmp_path / "cut", [first, *documents[1:]], keep, resume=True)
    write(model, tmp_path / "cut", documents, ("tags",), resume=True)
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")
    shards = [pa.ipc.open_file(path).read_all() for path in sorted((tmp_path / "cut").glob("gains-*.arrow"))]
    assert len(shards) > 1
    assert pa.concat_tables(shards)["tags"].to_pylist() == values


def test_a_kept_value_of_another_type_and_a_name_that_is_taken_are_refused(model: LongNet, tmp_path: Path) -> None:
    documents = [make_document(30, "a"), make_document(40, "b")]
    for document, value in zip(documents, (1, "one"), strict=True):
        document.kept = {"year": pa.scalar(value)}
    with pytest.raises(DataError, match=r"b\.txt: 'year' is string, and int64 in the first document"):
        rows(model, documents, kept=[pa.field("year", pa.int64())])
    with pytest.raises(ConfigError, match="--keep gain: the output has a column of this name"):
        rows(model, [], kept=[pa.field("gain", pa.float64())])
