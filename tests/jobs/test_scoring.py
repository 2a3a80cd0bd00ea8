"""Every token is scored once, whatever the context, the batching and the company a document is in.

That the sums are those of plain forwards is in test_measures.py."""

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from builders import Scored, make_document, scores, tiny_net

from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.jobs.scoring.measures import Score
from longnet_cli.jobs.scoring.token_logprobs import logprob_schema, write_token_logprobs
from longnet_cli.nets.longnet import LongNet

BOS = 256
CHUNK = 4000  # tokens of a forward in tests that need several


@pytest.fixture(scope="module")
def model() -> LongNet:
    return tiny_net().eval()


def only(scores: list[Scored]) -> Score:
    assert len(scores) == 1
    return scores[0].score


@pytest.mark.parametrize("context", [None, 64])
def test_company_and_order_do_not_matter(model: LongNet, context: int | None) -> None:
    """Ragged documents over several forwards, one of them longer than a batch, an empty one in between."""
    lengths = [5, 300, 0, CHUNK + 100, 1, 77, 64, 3000, 3000, 2]
    documents = [make_document(length, str(index)) for index, length in enumerate(lengths)]
    seen: list[int] = []
    together = list(scores(model, documents, bos=BOS, context=context, chunk=CHUNK, on_progress=seen.append))
    assert [row.doc_id for row in together] == [document.doc_id for document in documents]
    assert [row.score.n_tokens for row in together] == lengths
    assert sum(seen) == sum(lengths)
    for document, row in zip(documents, together, strict=True):
        if len(document.tokens) and len(document.tokens) < 1000:
            alone = only(list(scores(model, [document], bos=BOS, context=context)))
            assert row.score.nll_sum == pytest.approx(alone.nll_sum, rel=1e-6)
    total = sum((row.score for row in together), Score(0.0, 0, 0))
    assert total.n_tokens == total.n_bytes == sum(lengths)
    assert total.nll_sum == pytest.approx(sum(row.score.nll_sum for row in together))


def test_token_logprobs_are_written_in_order_and_add_up(model: LongNet, tmp_path: Path) -> None:
    documents = [make_document(length, str(length)) for length in (300, 0, 5)]
    with write_token_logprobs(tmp_path / "tokens.parquet") as on_tokens:
        rows = list(scores(model, documents, bos=BOS, chunk=128, on_tokens=on_tokens))
    table = pq.read_table(tmp_path / "tokens.parquet")
    assert table.schema.equals(logprob_schema())
    keys = ["doc_id", "part", "start"]
    assert [tuple(row.values()) for row in table.select(keys).to_pylist()] == [
        *(("300", part, 128 * part) for part in range(3)),
        ("5", 0, 0),
    ]
    ids, logprobs = table["input_ids"].to_pylist(), table["logprobs"].to_pylist()
    assert [i for row in ids for i in row] == [*documents[0].tokens.tolist(), *documents[2].tokens.tolist()]
    assert -sum(sum(row) for row in logprobs[:3]) == pytest.approx(rows[0].score.nll_sum, rel=1e-5)
    assert {*table["char_start"].to_pylist(), *table["char_end"].to_pylist()} == {None}  # ids are of no text


@pytest.mark.parametrize(("chunk", "bos", "context"), [(1, BOS, None), (7, None, None), (64, None, 99), (129, BOS, 99)])
def test_log_probabilities_are_those_of_the_logits(
    tmp_path: Path, chunk: int, bos: int | None, context: int | None
) -> None:
    """Of each token and of the likeliest ones, beside which are the same ids and log-probabilities as without them."""
    model = tiny_net().double().eval()
    documents = [make_document(length, str(length)) for length in (130, 3)]
    for name, top in (("plain", False), ("top", True)):
        with write_token_logprobs(tmp_path / f"{name}.parquet", top=top) as on_tokens:
            list(scores(model, documents, bos=bos, context=context, chunk=chunk, on_tokens=on_tokens, top=top))
    plain, table = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("plain", "top"))
    assert table.select(plain.schema.names).equals(plain)
    assert table.schema.equals(logprob_schema(top=True))
    for document in documents:
        first = bos is None  # which nothing predicts
        read = torch.tensor([[*([] if first else [bos]), *document.tokens[:-1].tolist()]])
        with torch.no_grad():
            logits = torch.cat([model.logits(model(part))[0] for part in read.split(context or 130, 1)])
        rows = [row for row in table.to_pylist() if row["doc_id"] == document.doc_id]
        keys = ("input_ids", "logprobs", "top_ids", "top_logprobs")
        ids, logprobs, top_ids, top_logprobs = (np.concatenate([row[key] for row in rows]) for key in keys)
        starts = np.cumsum([first, *(len(row["input_ids"]) for row in rows)])
        assert [row["start"] for row in rows] == starts[:-1].tolist()
        assert (ids.tolist(), top_ids.tolist()) == (document.tokens[first:].tolist(), logits.argmax(-1).tolist())
        of_tokens = logits.log_softmax(-1)[torch.arange(len(ids)), torch.from_numpy(ids)]
        np.testing.assert_allclose(logprobs, of_tokens, rtol=1e-6)
        np.testing.assert_allclose(top_logprobs, logits.log_softmax(-1).amax(-1), rtol=1e-6)


def test_a_long_document_is_handed_out_at_once(model: LongNet) -> None:
    """Before the next one is even read: the row of an hour's work must not wait for the next hour's."""
    read: list[str] = []

    def documents():
        for name in "ab":
            read.append(name)
            yield make_document(CHUNK, name)

    assert next(scores(model, documents(), bos=BOS, context=64, chunk=CHUNK)).doc_id == "a"
    assert read == ["a"]


def test_an_empty_document_is_no_error_but_nothing_at_all_is(model: LongNet) -> None:
    empty, full = make_document(0), make_document(3)
    first, _ = scores(model, [empty, full], bos=BOS)
    assert first.score.as_dict() == {"nll_sum": 0.0, "n_tokens": 0, "n_bytes": 0, "ppl": None, "bpb": None}
    with pytest.raises(DataError, match="no token could be scored"):
        list(scores(model, [empty], bos=BOS))
    with pytest.raises(DataError, match="no token could be scored"):
        list(scores(model, [make_document(1)], bos=None))


def test_leaves_no_inference_mode_behind(model: LongNet) -> None:
    for _ in scores(model, [make_document(3)], bos=BOS):
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("change", "message"), [({"causal": False, "position": "rope"}, "bidirectional"), ({"vocab_size": 0}, "vocabulary")]
)
def test_a_model_that_cannot_score(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):  # at the call, not at the first document
        scores(tiny_net(**change), [], bos=BOS)


def test_score_arithmetic() -> None:
    one, other = Score(2.0, 2, 4), Score(3.0, 1, 1)
    assert one + other == Score(5.0, 3, 5)
    assert one + Score(1.0, 1, None) == Score(3.0, 3, None)
    assert Score(1e6, 1, 1).ppl is None  # past a float
    assert Score(2 * math.log(2), 2, 4).bpb == pytest.approx(0.5)
