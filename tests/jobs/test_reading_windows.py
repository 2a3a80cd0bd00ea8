"""Documents of any length through a model with a window: a plain loop over windows, in fp64, gives the same vectors."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pytest
import torch
from files import write_lines
from processes import refused

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")

import transformers as hf
from sentence_models import save_model, word_pieces

from longnet_cli import embed, encode_batches
from longnet_cli.data.documents.text_pieces import cut
from longnet_cli.jobs.pooling import windows_of

# not importorskip: importing it takes five seconds, which only the worker that runs these tests needs to spend
pytestmark = pytest.mark.skipif(
    not find_spec("sentence_transformers"),
    reason="not installed: pip install '.[sentence-transformers]'",
)

PROMPT = "query: "
OPENING, CLOSING = [2], [3]
LEAD = [*OPENING, *word_pieces().encode("query:", add_special_tokens=False).ids]


def model_of_windows(pool: str, factory: pytest.TempPathFactory) -> Path:
    folder = factory.mktemp(pool) / "model"
    return save_model(folder, prompts={"document": PROMPT}, window=20, pool=pool)


@pytest.fixture(scope="module")
def mean_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of_windows("mean", tmp_path_factory)


@pytest.fixture(scope="module")
def cls_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of_windows("cls", tmp_path_factory)


@pytest.mark.parametrize("unit", ["sentence", "paragraph"])
def test_a_unit_is_a_window_where_a_pooling_takes_one_state(cls_model, unit):
    """Each has the vector of its text alone. What is longer than a window is cut."""
    text = (
        "The net reads. The document makes an vector, long!\n\nWith the window: is the token in an net? "
        * 3
    )
    how: dict[str, Any] = {"model": str(cls_model), "prefix": "none"}
    rows = encode_batches([text], span=unit, **how)
    pieces = [text[row["char_start"] : row["char_end"]] for row in rows.to_pylist()]
    if unit == "sentence":
        assert pieces == [piece.strip() for piece in cut([text], "sentence")]
    else:
        assert rows["n_tokens"].to_pylist() == [12, 18, 5, 18, 5, 11]
    np.testing.assert_allclose(
        embed(pieces, **how), np.stack(rows["embedding"].to_numpy()), atol=1e-6
    )


def plain_loop(
    folder: Path, ids: list[int], room: int, stride: int, span: int | None, cls: bool
) -> np.ndarray:
    """Return the vectors of a document, token by token and window by window."""
    net = hf.AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    n, spans = len(ids), span or len(ids)
    if cls and span:
        room = stride = span
    starts = [0]
    while starts[-1] + room < n:
        starts.append(starts[-1] + stride)
    windows = []
    for start in starts:
        read = [*LEAD, *ids[start : start + room], *CLOSING]
        with torch.no_grad():
            windows.append(net(torch.tensor([read])).last_hidden_state[0])
    if cls:
        sizes = [min(room, n - start) for start in starts]
        first = [hidden[0] for hidden in windows]
        mean = sum(s * x for s, x in zip(sizes, first, strict=True)) / sum(sizes)
        rows = first if span else [mean]
    else:
        groups: list[list[torch.Tensor]] = [[] for _ in range(0, n, spans)]
        groups[0] += windows[0][: len(LEAD)]
        for token in range(n):
            best, of = -1.0, None
            for index, start in enumerate(starts):
                if start <= token < start + room:
                    left = math.inf if index == 0 else token - start
                    right = math.inf if index == len(starts) - 1 else start + room - 1 - token
                    if min(left, right) > best:
                        best, of = min(left, right), windows[index][len(LEAD) + token - start]
            groups[token // spans].append(of)
        groups[-1] += windows[-1][-len(CLOSING) :]
        rows = [torch.stack(group).mean(0) for group in groups]
    return torch.nn.functional.normalize(torch.stack(list(rows)), dim=-1).numpy()


def documents(lengths: list[int]) -> list[list[int]]:
    chance = np.random.default_rng(0)
    return [chance.integers(5, 60, n).tolist() for n in lengths]


LENGTHS = [1, 2, 15, 16, 17, 18, 31, 32, 33, 47, 48, 49, 100]  # a window of 20 leaves a document 16


@pytest.mark.parametrize("cls", [False, True], ids=["mean", "cls"])
@pytest.mark.parametrize(
    ("context", "stride", "span"),
    [
        (None, None, None),
        (None, 9, None),
        (None, 3, 7),
        (32, None, 10),
        (None, None, 16),
        (None, 16, 1),
        (5, None, None),
    ],
)
def test_it_is_a_plain_loop_over_windows(mean_model, cls_model, context, stride, span, cls):
    folder = cls_model if cls else mean_model
    room = (context or 20) - len(LEAD) - len(CLOSING)
    read = documents(LENGTHS)
    table = pa.table({"doc_id": [str(i) for i in range(len(read))], "input_ids": read})
    if cls and span:
        stride = None  # each span is a window
    found = encode_batches(
        table, model=str(folder), context=context, stride=stride, span=span, chunk=64
    )
    for index, ids in enumerate(read):
        mine = found.filter(pa.compute.equal(found["doc_id"], str(index)))
        wanted = plain_loop(folder, ids, room, stride or room, span, cls)
        assert np.abs(np.array(mine["embedding"].to_pylist()) - wanted).max() < 1e-6
        edges = [*range(0, len(ids), span or len(ids)), len(ids)]
        assert mine["start"].to_pylist() == edges[:-1]
        assert mine["end"].to_pylist() == edges[1:]
        assert mine["span"].to_pylist() == list(range(len(edges) - 1))
    metadata = found.schema.metadata
    assert metadata[b"longnet.context"] == str(context or 20).encode()
    assert metadata[b"longnet.stride"] == str(span if cls and span else stride or room).encode()
    assert metadata[b"longnet.prompt"] == PROMPT.encode()
    # the Normalize at the end is told by the next one
    assert metadata[b"longnet.modules"] == b"Pooling"
    assert metadata[b"longnet.normalized"] == b"true"


@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("stride", [1, 3, 5, 8])
def test_every_token_is_in_one_place(size, stride):
    for tokens in range(1, 40) if stride <= size else ():
        windows = list(windows_of(tokens, size, stride))
        taken = [token for *_, wanted, end in windows for token in range(wanted, end)]
        assert taken == list(range(tokens))
        for start, stop, wanted, wanted_stop in windows:
            assert start <= wanted < wanted_stop <= stop <= start + size
        assert [start for start, *_ in windows] == [i * stride for i in range(len(windows))]
        assert windows[-1][1] == tokens
        assert all(start + size < tokens for start, *_ in windows[:-1])


def test_the_dry_run_counts_windows(mean_model, tmp_path, run_longnet):
    (tmp_path / "a.txt").write_text(" ".join(["net"] * 100))
    options = ["encode", tmp_path / "a.txt", "--model", mean_model, "--dry-run", "--format", "json"]
    counts = [json.loads(run_longnet(*options, *more).stdout) for more in ([], ["--stride", "8"])]
    # windows of 16 tokens of the document, with a prompt of 2 and 2 special ones; the last one is padded
    assert [each["tokens"] for each in counts] == [100, 100]
    assert counts[0]["tokens_read"] == 7 * 20
    assert counts[1]["tokens_read"] > 2 * 100


REFUSED = [
    ("--context 1000", "at most"),
    ("--context 4", "no room for a document"),
    ("--stride 17", "a window holds 16"),
    ("--span 17 -m CLS", "a window, which holds 16"),
    ("--bos [CLS]", "leave out --bos"),
    ("--context 100 -m longnet-tiny", "in one piece, not in windows"),
    ("--keep char_start", "char_start: the output has a column of this name"),
    ("--pool mean+mode", "there is no pooling 'mode'"),
    ("--sp 2", "a Hugging Face model reads a document in one process"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(words, said, mean_model, cls_model, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{"text": "the net", "char_start": 3}])
    command = ["encode", path, "-m", mean_model, "-o", tmp_path / "x.arrow"]
    error = refused(*command, *words.replace("CLS", str(cls_model), "-m" in words).split())
    assert said in str(error)
    assert error.exit_code == 2
