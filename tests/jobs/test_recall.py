"""Distances to the last occurrence of a bigram, and losses by them, are those of a search through the document."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from builders import tiny_net
from hypothesis import given
from hypothesis import strategies as st

from longnet_cli.data.documents import Document
from longnet_cli.jobs.scoring import measures as recall
from longnet_cli.jobs.scoring.measures import Bigrams, ByRecall, DocumentScore, Score, Total
from longnet_cli.jobs.scoring.scoring import score

BOS = 6


def as_document(ids: list[int], name: str = "a") -> Document:
    return Document(name, np.array(ids, dtype=np.int64), len(ids), f"{name}.txt")


def last_said(ids: list[int]) -> list[int]:
    """The definition: for each id after the first, tokens since its bigram, 0 for a new one."""
    bigrams = [tuple(ids[i - 1 : i + 1]) for i in range(1, len(ids))]
    return [next((d for d in range(1, i + 1) if bigrams[i - d] == bigram), 0) for i, bigram in enumerate(bigrams)]


@given(data=st.data())
def test_distances_are_those_of_a_search(data: st.DataObject) -> None:
    """Whatever is asked at a time, read at a time, and passed over."""
    top = data.draw(st.sampled_from([1, 3, 40, 2**31]))
    pool = data.draw(st.lists(st.integers(0, top - 1), min_size=1, max_size=8))
    ids = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=120))
    edges = sorted(data.draw(st.lists(st.integers(1, len(ids)), max_size=12)))
    block = data.draw(st.integers(1, 40))
    bigrams = Bigrams(as_document(ids))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall, "BLOCK", block)
        for start, stop in zip(edges[:-1:2], edges[1::2], strict=False):
            assert bigrams.distances(start, stop).tolist() == last_said(ids)[start - 1 : stop - 1]
        bigrams.distances(len(ids), len(ids))
    known = [int(key) for keys, _ in bigrams.tables for key in keys]
    assert len(known) == len(set(known)) == len({*pairwise(ids)})  # 16 bytes for each, once
    assert len(bigrams.tables) <= len(known).bit_length()


@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize(
    ("context", "stride", "last"), [(None, None, None), ([8, 30], 5, None), ([16, 30], None, 20), (10, 3, 33)]
)
def test_losses_are_those_of_single_tokens(
    bos: int | None, context: int | list[int] | None, stride: int | None, last: int | None
) -> None:
    """Of counted tokens only, whose bigrams were seen anywhere before in the document; the chunk changes nothing."""
    model = tiny_net(vocab_size=7, num_layers=1, segment_lengths=(20, 40)).double().eval()
    draw = np.random.default_rng(0)
    documents = [as_document(draw.integers(0, 6, length).tolist(), str(length)) for length in (150, 0, 3, 75)]
    options = {"bos": bos, "stride": stride, "last": last, "count_bytes": len, "dtype": "fp32"}
    contexts = context if isinstance(context, list) else [context]
    together = [
        list(score(model, documents, context=contexts, by_recall=True, chunk=chunk, **options)) for chunk in (7, 999)
    ]
    for index, each in enumerate(contexts):
        expected = {document.doc_id: np.zeros((65, 2)) for document in documents}

        def count(document: Document, start: int, ids: np.ndarray, logprobs: np.ndarray, into: dict = expected) -> None:
            read = document.tokens.tolist() if bos is None else [bos, *document.tokens.tolist()]
            distances = [0, *last_said(read)][-len(document) :][start : start + len(ids)]
            for distance, logprob in zip(distances, logprobs, strict=True):
                into[document.doc_id][distance.bit_length()] += -logprob, 1

        list(score(model, documents, context=each, on_tokens=count, **options))
        for rows in together:
            assert len(rows) == len(contexts) * (2 if last else 4)
            for row in rows[index :: len(contexts)]:
                assert row.context == each
                assert row.by_recall.table == pytest.approx(expected[row.doc_id], rel=1e-6)
        assert expected["150"][4:, 1].any()


def test_rows_have_the_errors_of_their_documents() -> None:
    """Each row is a ratio over the documents that have tokens in it, and contexts are compared in it."""
    draw = np.random.default_rng(0)
    total, tables = Total([512, 8192]), []
    for name in range(30):
        short, long = ByRecall(), ByRecall()
        distances = draw.integers(0, 6, draw.integers(0, 9)) if name else np.array([0, 2**40 - 1, 2**40])
        nll = draw.normal(2, 0.5, len(distances))
        short.add(distances, nll)
        long.add(distances, nll * 0.9)
        tables.append((short.table, long.table))
        for context, by_recall in ((512, short), (8192, long)):
            found = Score(float(by_recall.table[:, 0].sum()), len(nll), 1)
            total.add(DocumentScore(str(name), "", found, context, None, by_recall))
    first, second = (each["by_recall"] for each in total.as_dicts())
    assert [(row["from"], row["to"]) for row in first] == [
        *((None, None), (1, 1), (2, 3), (4, 7)),
        *((2**39, 2**40 - 1), (2**40, 2**41 - 1)),
    ]
    for row, other in zip(first, second, strict=True):
        place = 0 if row["from"] is None else row["from"].bit_length()
        x, y, z = np.array([(a[place, 0], a[place, 1], b[place, 0]) for a, b in tables if a[place, 1]]).T
        n = len(y)
        assert (row["n_docs"], row["n_tokens"]) == (other["n_docs"], other["n_tokens"]) == (n, y.sum())
        assert row["nll"] == pytest.approx(x.sum() / y.sum())
        assert other["ppl_ratio"] == pytest.approx(math.exp(-0.1 * row["nll"]))
        if n < 2:
            assert (row["nll_se"], other["nll_se"], other["ppl_ratio_se"]) == (None, None, None)
            continue
        for error, nats in (
            (row["nll_se"], x),
            (other["nll_se"], z),
            (other["ppl_ratio_se"] / other["ppl_ratio"], z - x),
        ):
            squares = ((nats - nats.sum() / y.sum() * y) ** 2).sum()
            assert error == pytest.approx(math.sqrt(n / (n - 1) * squares) / y.sum())
    assert "ppl_ratio" not in first[0]
