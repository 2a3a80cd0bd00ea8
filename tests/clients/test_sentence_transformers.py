"""A saved LongNet in the real sentence-transformers (extra `sentence-transformers`), against `encode`."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip(
    "sentence_transformers", reason="not installed: pip install '.[sentence-transformers]'"
)

import torch
from builders import tiny_model
from conftest import ROOT
from files import write_lines
from sentence_models import WORDS, save_model
from sentence_transformers import SentenceTransformer

import longnet_cli.integrations.transformers
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.hub.model_names import model_path
from longnet_cli.jobs.encoding import EncodeFacts, encode
from longnet_cli.jobs.job_options import EncodeOptions
from longnet_cli.models.folder import ModelFolder

assert longnet_cli.integrations.transformers  # which registers what SentenceTransformer opens
TEXTS = [
    "def f(x):\n    return x\n",
    "A text with <|endoftext|> written in it.",
    "long " * 400,
    "\u00e9\U0001f600",
]


def vectors(folder: Path, texts: list[str]) -> np.ndarray:
    """What `longnet encode` writes."""
    words = ModelFolder(folder).tokenizer()
    assert words is not None
    documents = [Document(str(i), words.encode(text), None, "test") for i, text in enumerate(texts)]
    rows = encode(
        ModelFolder(folder).net(), documents, EncodeOptions(), EncodeFacts(words.eos_id)
    ).read_all()
    return np.array(rows["embedding"].to_pylist(), np.float32)


def test_a_shipped_model_gives_the_vectors_of_encode():
    folder = model_path("longnet-tiny")
    model = SentenceTransformer(str(folder), device="cpu")
    found = model.encode(TEXTS, batch_size=3)
    assert found.shape == (len(TEXTS), 256)
    assert model.get_embedding_dimension() == 256
    assert np.abs(found - vectors(folder, TEXTS)).max() < 1e-6
    empty = model.encode(["", TEXTS[0]])
    assert np.abs(empty[1] - found[0]).max() < 1e-6
    assert np.isclose(np.linalg.norm(empty[0]), 1)


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_trained_and_saved_as_a_model_of_both(causal, tmp_path):
    shape = {"dim": 32, "num_heads": 4, "ffn_dim": 48, "segment_lengths": (16, 64)}
    tiny_model(tmp_path / "first", **shape, causal=causal, position="rope")
    model = SentenceTransformer(str(tmp_path / "first"), device="cpu")
    texts = TEXTS[:2]
    features = model.preprocess(texts)
    one, other = model(features)["sentence_embedding"]
    loss = one @ other
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert float(np.dot(*model.encode(texts))) < loss.item()
    model.save_pretrained(str(tmp_path / "second"))
    again = SentenceTransformer(str(tmp_path / "second"), device="cpu")
    assert np.array_equal(again.encode(texts), model.encode(texts))
    assert np.abs(vectors(tmp_path / "second", texts) - model.encode(texts)).max() < 1e-6


def test_the_benchmark_takes_the_mean_of_a_models_windows(tmp_path, run_python, python):
    # A window has eight tokens of a text, and two around them
    folder = save_model(tmp_path / "model", window=10)
    model = SentenceTransformer(str(folder), device="cpu")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 20)) for _ in range(16)]
    pairs = [*zip(texts[:8], texts[8:], strict=True)]
    rows = [{"task": "halves", "first": a, "second": b} for a, b in pairs]
    write_lines(tmp_path / "pairs.jsonl", rows)
    command = [ROOT / "examples/retrieval.py", "sentences", ".", "--model", "./model"]
    done = run_python(*command, "--read", "12", python=python)
    row = json.loads(done.stdout.splitlines()[0])
    parts = [[" ".join(text.split()[at : min(at + 8, 12)]) for at in (0, 8)] for text in texts]
    # eight tokens and four
    means = np.stack(
        [np.array([2, 1]) @ model.encode(two, normalize_embeddings=True) for two in parts]
    )
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    scores = means[:8] @ means[8:].T
    places = (scores >= scores.diagonal()[:, None]).sum(1)
    assert (row["n"], row["mrr"]) == (8, pytest.approx(float((1 / places).mean()), abs=1e-4))
