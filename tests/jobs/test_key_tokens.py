"""Key tokens by a judge's two files: their nats, at every context, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import make_document, tiny_net
from conftest import RunLongnet

from longnet_cli.data.documents import Document
from longnet_cli.jobs.scoring.key_tokens import Judge
from longnet_cli.jobs.scoring.measures import Total
from longnet_cli.jobs.scoring.scoring import score
from longnet_cli.jobs.scoring.token_logprobs import write_token_logprobs

DOCUMENTS = [make_document(length, name) for length, name in ((70, "a"), (0, "b"), (1, "c"), (301, "d"))]


def judged(folder: Path, documents: list[Document], first: int, last: int | None) -> dict[str, np.ndarray]:
    """Write a judge's files, of which one has other rows and is of another format. Return who is a key token."""
    draw, keys = np.random.default_rng(0), {}
    with (
        write_token_logprobs(folder / "short.arrow") as on_short,
        write_token_logprobs(folder / "long.parquet") as on_long,
    ):
        for document in documents:
            begin = max(first, len(document) - (last or len(document)))
            ids = document.tokens[begin:]
            short, long = -draw.exponential(3, (2, len(ids))).astype(np.float32)
            for size, logprobs, write in ((7, short, on_short), (100, long, on_long)):
                for at in range(0, len(ids), size):
                    write(document, begin + at, ids[at : at + size], logprobs[at : at + size])
            keys[document.doc_id] = (long - short > 2) & (long > -2)
    return keys


@pytest.mark.parametrize(("bos", "last"), [(256, None), (None, None), (256, 30)])
def test_the_nats_of_key_tokens(bos: int | None, last: int | None, tmp_path: Path) -> None:
    documents = [document for document in DOCUMENTS if len(document) >= 70] if last else DOCUMENTS
    keys = judged(tmp_path, documents, first=0 if bos else 1, last=last)
    model = tiny_net().eval()
    options: dict = {"bos": bos, "last": last}
    nats = {}
    for context in (8, 40):
        of_all: dict[str, list[np.ndarray]] = {document.doc_id: [] for document in DOCUMENTS}
        on_tokens = lambda document, _start, _ids, logprobs: of_all[document.doc_id].append(-logprobs)  # noqa: E731, B023
        list(score(model, documents, context=context, on_tokens=on_tokens, **options))
        nats[context] = {name: np.concatenate([*parts, np.empty(0)]) for name, parts in of_all.items()}
    files = [str(tmp_path / name) for name in ("short.arrow", "long.parquet")]
    total = Total([8, 40])
    for found in score(model, documents, context=(8, 40), judge=Judge(files, None), **options):
        total.add(found)
        mine = keys[found.doc_id]
        assert found.key is not None
        assert found.key.n_tokens == mine.sum()
        assert found.key.nll_sum == pytest.approx(nats[found.context][found.doc_id][mine].sum(), rel=1e-6)
    short, long = (row["key_tokens"] for row in total.as_dicts())
    number, tokens = sum(map(np.count_nonzero, keys.values())), sum(map(len, keys.values()))
    assert 10 < short["n_tokens"] == long["n_tokens"] == number
    assert long["share"] == number / tokens
    of_keys = sum(nats[40][name][mine].sum() for name, mine in keys.items())
    assert long["ppl"] == pytest.approx(np.exp(of_keys / number), rel=1e-6)
    assert long["ppl_ratio"] == pytest.approx(long["ppl"] / short["ppl"])
    assert long["ppl_se"] > 0


@pytest.mark.ci
def test_a_judge_on_the_command_line(run_longnet: RunLongnet, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("def one(two, three):\n    return two + three\n\n\n" * 8)
    (tmp_path / "b.txt").write_text("one two three four five six\n" * 8)
    both = ["score", "a.txt", "b.txt"]
    for name, context in (("short.arrow", "4"), ("long.parquet", "512")):
        assert run_longnet(*both, "--context", context, "--token-logprobs", name).returncode == 0
    asked = [*both, "--key-tokens", "short.arrow,long.parquet"]
    found = json.loads(run_longnet(*asked, "--format", "json").stdout)
    key = found["total"]["key_tokens"]
    assert key["n_tokens"] == sum(each["key_n_tokens"] for each in found["documents"]) > 50
    assert key["ppl"] < found["total"]["ppl"]
    text = run_longnet(*asked).stdout
    assert f"\n  key tokens    share          ppl       +-   ppl of all\n{key['n_tokens']:>12} " in text

    table = pq.read_table(tmp_path / "long.parquet")
    for name, change in (("other", {b"longnet.tokenizer_sha256": b"0"}), ("two", {b"longnet.model": b"another"})):
        pq.write_table(table.replace_schema_metadata(table.schema.metadata | change), tmp_path / f"{name}.parquet")
    ids = pa.array([[*row[:-1], 5] for row in table["input_ids"].to_pylist()], table.schema.field("input_ids").type)
    pq.write_table(table.set_column(3, table.schema.field("input_ids"), ids), tmp_path / "ids.parquet")
    for files, words, code, said in (
        ("short.arrow,other.parquet", both, 2, "other.parquet is of another tokenizer than the model that is scored"),
        (
            "short.arrow,two.parquet",
            both,
            2,
            "short.arrow is of model longnet-tiny and two.parquet of another: a judge",
        ),
        ("short.arrow", both, 2, "--key-tokens needs two files"),
        ("short.arrow,a.txt", both, 3, "a.txt: not a file of log-probabilities"),
        ("short.arrow,ids.parquet", both, 3, "ids.parquet: token "),
        ("short.arrow,long.parquet", ["score", "b.txt"], 3, "where b.txt has tokens from 0 to "),
        ("short.arrow,long.parquet", ["score", "a.txt"], 3, "more documents than are scored, the next is 'b.txt'"),
        ("short.arrow,long.parquet", [*both, "--dp", "2"], 2, "--key-tokens is for one group of ranks"),
        ("short.arrow,long.parquet", [*both, "-o", "x.arrow"], 2, "--key-tokens is for scores that are printed"),
        ("short.arrow,s.arrow", [*both, "--token-logprobs", "short.arrow"], 2, "short.arrow"),
    ):
        done = run_longnet(*words, "--key-tokens", files, "-q")
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        assert said in done.stderr


def test_a_row_that_is_no_row(tmp_path: Path) -> None:
    rows = {"doc_id": ["a"], "part": [0], "start": [0], "input_ids": [[1, 2]], "logprobs": [[-1.0]]}
    pq.write_table(pa.table(rows), tmp_path / "bad.parquet")
    document = Document("a", np.array([1, 2], np.int32), 2, "a.txt")
    with pytest.raises(Exception, match=r"bad.parquet, row 0: not a row of log-probabilities: as many log-prob"):
        Judge([str(tmp_path / "bad.parquet")] * 2, None).keys(document, 0, 2)
