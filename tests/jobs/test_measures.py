"""Standard errors, context comparisons and losses by position are those of plain sums over single tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import make_document, scores, tiny_net

from longnet_cli.basics.errors import DataError
from longnet_cli.data.documents import Document
from longnet_cli.jobs.scoring.measures import ByPosition, Total
from longnet_cli.nets.longnet import LongNet

BOS = 256


@pytest.fixture(scope="module")
def model() -> LongNet:
    return tiny_net(segment_lengths=(20, 40)).double().eval()


def token_nll(model: LongNet, ids: np.ndarray) -> np.ndarray:
    """Nats of each of ids[1:], given those before it, from full logits."""
    tokens = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = model.logits(model(tokens[:, :-1]))
    return F.cross_entropy(logits[0], tokens[0, 1:], reduction="none").numpy()


def plain(model: LongNet, document: Document, bos: int | None, context: int, stride: int | None, last: int | None):
    """(nats, inputs seen) of each scored token: blocks of `stride`, each at the end of a window of `context`.

    Without a stride, windows of a whole document do not overlap, and the last one may be shorter.
    """
    ids = document.tokens if bos is None else np.concatenate(([bos], document.tokens))  # ids[i + 1] is the i-th target
    end, begin = len(ids) - 1, 0 if last is None else len(ids) - 1 - last
    nats, seen = [], []
    for block in range(begin, end, stride or context):
        stop = min(block + (stride or context), end)
        start = block if stride is None and last is None else max(0, stop - context)
        found = token_nll(model, ids[start : stop + 1])[block - start :]
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
def test_windows_are_plain_forwards(
    model: LongNet, bos: int | None, chunk: int, contexts: tuple[int, ...], stride: int | None, last: int | None
) -> None:
    documents = [make_document(length) for length in (95, 131, 4)]
    found = list(
        scores(
            model, documents, bos=bos, context=contexts, stride=stride, last=last, by_position=True, chunk=chunk,
            count_bytes=len, dtype="fp32",
        )
    )  # fmt: skip
    longest = [d for d in documents if last is None or len(d) > 50]
    assert [(each.doc_id, each.context) for each in found] == [(d.doc_id, c) for d in longest for c in contexts]
    for each, (document, context) in zip(found, [(d, c) for d in longest for c in contexts], strict=True):
        nats, seen = plain(model, document, bos, context, stride, last)
        assert each.score.n_tokens == len(nats) == (last or len(document) - (bos is None))
        assert each.score.nll_sum == pytest.approx(nats.sum(), rel=1e-7)
        assert each.score.n_bytes == (last or (len(document) if bos is not None else None))
        if stride:
            assert min(seen[min(context, len(seen)) :], default=context) > context - stride
        for row in each.tables["by_position"]:
            chosen = (seen >= row["from"]) & (seen <= row["to"])
            assert [row["n_tokens"], row["nll"]] == pytest.approx([chosen.sum(), nats[chosen].mean()], rel=1e-6)
        for row in each.tables["by_segment_position"]:
            chosen = ((seen - 1) % 20 >= row["from"]) & ((seen - 1) % 20 <= row["to"])
            assert [row["n_tokens"], row["nll"]] == pytest.approx([chosen.sum(), nats[chosen].mean()], rel=1e-6)
        assert all(sum(row["n_tokens"] for row in table) == len(nats) for table in each.tables.values())


def test_ranges_of_positions() -> None:
    table = ByPosition(20)
    table.add(0, np.ones(3))
    table.add(19, np.full(2, 5.0))
    assert table.as_dict() == {
        "by_position": [
            {"from": 1, "to": 1, "n_tokens": 1, "nll": 1.0},
            {"from": 2, "to": 3, "n_tokens": 2, "nll": 1.0},
            {"from": 16, "to": 31, "n_tokens": 2, "nll": 5.0},
        ],
        "by_segment_position": [
            {"from": 0, "to": 2, "n_tokens": 4, "nll": 2.0},
            {"from": 18, "to": 19, "n_tokens": 1, "nll": 5.0},
        ],
    }
    far = ByPosition(2048)
    far.add(2**40 - 1, np.ones(1))  # the last input before a power of two, past float32
    assert far.as_dict()["by_position"][0]["from"] == 2**40


@pytest.fixture
def sums() -> np.ndarray:
    """(200 documents; nats at two contexts, tokens, bytes), of very different lengths."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 3000, 200)
    nats = tokens * draw.normal(2.5, 0.4, 200)
    return np.stack([nats, nats * draw.normal(0.95, 0.02, 200), tokens, tokens * draw.integers(2, 5, 200)], 1)


def total_of(sums: np.ndarray) -> list[dict]:
    total = Total([512, 8192])
    for index, (*nats, tokens, n_bytes) in enumerate(sums):
        of_contexts = {f"nll_sum_{context}": float(nll) for context, nll in zip((512, 8192), nats, strict=True)}
        total.add({"doc_id": str(index), "n_tokens": int(tokens), "n_bytes": int(n_bytes), **of_contexts})
    return total.as_dicts()


def ratio_error(x: np.ndarray, y: np.ndarray) -> float:
    """The definition, by one document after the other."""
    ratio, n = x.sum() / y.sum(), len(x)
    return math.sqrt(n / (n - 1) * sum((a - ratio * b) ** 2 for a, b in zip(x, y, strict=True))) / y.sum()


def test_standard_errors_are_those_of_clusters(sums: np.ndarray) -> None:
    first, second = total_of(sums)
    short, long, tokens, n_bytes = sums.T
    for row, nats in ((first, short), (second, long)):
        assert row["n_docs"] == 200
        assert row["ppl_se"] == pytest.approx(row["ppl"] * ratio_error(nats, tokens))
        assert row["bpb_se"] == pytest.approx(ratio_error(nats / math.log(2), n_bytes))
    assert "ppl_ratio" not in first
    assert second["ppl_ratio"] == pytest.approx(second["ppl"] / first["ppl"])
    assert second["ppl_ratio_se"] == pytest.approx(second["ppl_ratio"] * ratio_error(long - short, tokens))
    # the comparison is much sharper than its sides: that is what it is for
    assert second["ppl_ratio_se"] / second["ppl_ratio"] < 0.5 * second["ppl_se"] / second["ppl"]


def test_rows_by_position_have_standard_errors() -> None:
    draw = np.random.default_rng(1)
    total, rows = Total([8]), []
    for length in draw.integers(3, 20, 40):  # none comes into the second segment
        nats = draw.normal(3, 1, length)
        table = ByPosition(20)
        table.add(0, nats)
        rows.append([(nats[7:15].sum(), len(nats[7:15])), (nats[:3].sum(), 3)])
        total.add({"n_tokens": len(nats), "n_bytes": None, "nll_sum": float(nats.sum()), **table.as_dict()})
    (found,) = total.as_dicts()
    for row, (x, y) in (
        (found["by_position"][3], np.array([first for first, _ in rows]).T),
        (found["by_segment_position"][0], np.array([second for _, second in rows]).T),
    ):
        x, y = x[y > 0], y[y > 0]
        assert (row["n_docs"], row["n_tokens"]) == (len(y), y.sum())
        assert row["nll"] == pytest.approx(x.sum() / y.sum())
        assert row["nll_se"] == pytest.approx(ratio_error(x, y))
    assert (found["by_position"][3]["from"], found["by_segment_position"][0]["to"]) == (8, 2)


def test_few_and_empty_documents(sums: np.ndarray) -> None:
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


def test_no_document_is_long_enough(model: LongNet) -> None:
    """Each of its last 20 tokens is to have seen more than 64 - 10: 74 tokens are needed."""
    cut = {"bos": BOS, "context": [16, 64], "stride": 10, "last": 20, "dtype": "fp32"}
    with pytest.raises(DataError, match="no document has 74 tokens"):
        list(scores(model, [make_document(73)], **cut))
    assert len(list(scores(model, [make_document(74)], **cut))) == 2
