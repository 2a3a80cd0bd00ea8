"""Documents that a model does not read: refused before work starts where their lengths are known, or left out and
counted; and what goes before each document.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from builders import tiny_llama
from tokenizers.processors import TemplateProcessing

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")

import transformers as hf
from processes import invoke, total

from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.models.folder import ModelFolder

LIMIT = 64  # tokens that the model was trained on, with the one before each document


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(
        tmp_path_factory.mktemp("llama"),
        vocab_size=260,
        max_position_embeddings=LIMIT,
        bos_token_id=7,
    )


def table(*lengths: int, column: str = "input_ids") -> pa.Table:
    ids = pa.array([[i % 97 for i in range(n)] for n in lengths], pa.large_list(pa.int32()))
    return pa.table({column: ids, "doc_id": [f"{n}-{i}" for i, n in enumerate(lengths)]})


def test_dense_to_the_trained_length_and_refused_beyond(llama, tmp_path):
    """The numbers are the model's own; one token more is refused but for a choice that the line names."""
    (tmp_path / "fits.txt").write_text("x" * LIMIT)
    own = hf.LlamaForCausalLM.from_pretrained(llama)
    ids = torch.tensor([[7, *b"x" * LIMIT]])
    expected = torch.nn.functional.cross_entropy(
        own(ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum"
    ).item()
    assert total(tmp_path / "fits.txt", "-m", llama)["nll_sum"] == pytest.approx(expected, rel=1e-5)

    long = tmp_path / "long.txt"
    long.write_text("x" * (LIMIT + 1))
    for choice in (
        ["--context", 64, "--stride", 32],
        ["--pattern", "window:32,sinks=4"],
        ["--pattern", "dense"],
    ):
        assert total(long, "-m", llama, *choice)["n_tokens"] == 65


def test_finding_is_a_choice_for_a_model_that_can_see_its_keys(tmp_path):
    llama = tiny_llama(
        tmp_path / "llama", vocab_size=260, max_position_embeddings=3072, bos_token_id=7
    )
    long = tmp_path / "long.txt"
    long.write_text("x" * 3073)
    for words in (["score", long], ["generate", "--input", long, "--max-tokens", 1]):
        assert "--pattern finding (finds what was read long ago) or" in str(
            invoke(*words, "-m", llama).exception
        )
    assert total(long, "-m", llama, "--pattern", "finding")["n_tokens"] == 3073


def test_a_window_that_reaches_farther_than_the_model_was_trained_is_named(llama, tmp_path):
    (tmp_path / "long.txt").write_text("x" * 100)
    words = (
        "it reaches 66 tokens back, and the model was trained on 64: window:32,sinks=4 stays within"
    )
    for pattern, named in (
        ("window:33,sinks=4", True),
        ("window:32,sinks=4", False),
        ("dense", False),
    ):
        assert (
            words
            in invoke("score", tmp_path / "long.txt", "-m", llama, "--pattern", pattern).stderr
        ) is named
    done = invoke("score", tmp_path / "long.txt", "-m", llama, "--pattern", "window:32,chosen=2x16")
    assert words.replace("66", "96") in done.stderr
    assert done.exit_code == 0


def test_bad_documents_are_left_out_and_counted(llama, tmp_path):
    """Too long, or with an id that the model does not have."""
    good, bad = table(5, 60), tmp_path / "bad.parquet"
    rows = pa.concat_tables([good.slice(0, 1), table(70), good.slice(1)])
    more = pa.table(
        {
            "input_ids": pa.array([[1, 300], []], pa.large_list(pa.int32())),
            "doc_id": ["id", "empty"],
        }
    )
    pq.write_table(pa.concat_tables([rows, more]), bad)
    pq.write_table(good, tmp_path / "good.parquet")

    found, expected = (
        total(bad, "-m", llama, "--skip-bad", code=6),
        total(tmp_path / "good.parquet", "-m", llama),
    )
    assert (found["n_skipped"], expected["n_skipped"]) == (2, 0)
    assert found["n_docs"] == expected["n_docs"] == 2
    assert found["nll_sum"] == pytest.approx(expected["nll_sum"], rel=1e-6)
    said = invoke("score", bad, "-m", llama, "--skip-bad").stderr.splitlines()
    assert said[1:] == [
        f"longnet: note: left out: {bad}, row 1: 70 tokens, and the model was trained on 64",
        f"longnet: note: left out: {bad}, row 3, offset 1: token id 300 does not fit a vocabulary of 260",
        "longnet: note: 2 documents left out",
    ]


def with_template(*before: str) -> Tokenizer:
    inner = tokenizers.Tokenizer.from_str(Tokenizer.bytes().to_json())
    inner.add_special_tokens(["<s>", "[gMASK]", "</s>"])
    pairs = [(name, inner.token_to_id(name)) for name in {*before, "</s>"}]
    inner.post_processor = TemplateProcessing(single=[*before, "$A", "</s>"], special_tokens=pairs)
    return Tokenizer(inner)


def test_what_goes_before_a_document(tmp_path):
    """The template's ids, else `add_bos_token`, else the configuration's id, else the end of text; or `--bos`."""

    def found(
        words: Tokenizer | None, config: dict, settings: dict, bos: str | None = None
    ) -> object:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return ModelFolder(tmp_path).bos(words, bos)

    bare, says = Tokenizer.bytes(), {"add_bos_token": True, "bos_token": {"content": "<s>"}}
    assert found(with_template("<s>"), {"bos_token_id": 9}, {}) == 257
    assert found(with_template("[gMASK]", "<s>"), {"bos_token_id": 9}, {}) == (258, 257)
    assert found(with_template(), {"bos_token_id": 9}, says) == 257
    assert found(with_template(), {"bos_token_id": 9}, says | {"add_bos_token": False}) == 9
    assert found(None, {"bos_token_id": 9}, says) == 9
    assert found(bare, {}, {}) == 256
    assert found(bare, {"bos_token_id": 9}, {}, "none") is None
    assert found(bare, {"bos_token_id": 9}, {}, "65") == 65
    assert found(bare, {"bos_token_id": 9}, {}, "<|endoftext|>") == 256
    with pytest.raises(ConfigError, match="--bos <s>: the tokenizer has no such token"):
        found(bare, {}, {}, "<s>")
    assert ModelFolder(tmp_path.parent).bos(bare) == 256  # a LongNet's


def test_the_ids_before_a_document_are_read_and_not_scored(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Branches merge.")
    own = hf.LlamaForCausalLM.from_pretrained(llama)

    def nats(*before: int) -> float:
        ids = torch.tensor([[*before, *text.read_bytes()]])
        logits = own(ids[:, :-1]).logits[0]
        first = max(len(before), 1)
        return torch.nn.functional.cross_entropy(
            logits[first - 1 :], ids[0, first:], reduction="sum"
        ).item()

    assert total(text, "-m", llama)["nll_sum"] == pytest.approx(nats(7), rel=1e-5)
    assert total(text, "-m", llama, "--bos", "<|endoftext|>")["nll_sum"] == pytest.approx(
        nats(256), rel=1e-5
    )
    none = total(text, "-m", llama, "--bos", "none")
    assert none["n_tokens"] == len(text.read_bytes()) - 1
    assert none["nll_sum"] == pytest.approx(nats(), rel=1e-5)
    with_template("[gMASK]", "<s>").save(tmp_path / "tokenizer.json")
    several = ["--tokenizer", tmp_path / "tokenizer.json", "--tokenizer-differs"]
    found = total(text, "-m", llama, *several)
    assert found["n_tokens"] == len(text.read_bytes())
    assert found["nll_sum"] == pytest.approx(nats(258, 257), rel=1e-5)
    assert (
        total(text, "-m", llama, *several, "--context", 4, "--stride", 2)["n_tokens"]
        == found["n_tokens"]
    )
