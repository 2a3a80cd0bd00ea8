"""Embedding models give the vectors of `SentenceTransformer.encode_document`, or are refused by name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("sentence_transformers", reason="not installed: pip install 'longnet-cli[sentence-transformers]'")

from sentence_models import WORDS, byte_level, save_model, sentence_pieces, word_pieces
from sentence_transformers import SentenceTransformer

from longnet_cli import encode_batches
from longnet_cli.basics.errors import LongNetError

ODD = ["[SEP] Caf\u00e9, \u6f22 A", "the\n\n net ", " of", "a\u0301 DOCUMENT [MASK]?", "</s> in <end> to"]


def texts(number: int, longest: int, seed: int = 0) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(1, longest))) for _ in range(number)] + ODD


def vectors(folder: Path, documents: list[str], **options: Any) -> np.ndarray:
    table = pa.table({"doc_id": [str(i) for i in range(len(documents))], "text": documents})
    found = encode_batches(table, model=str(folder), **options)
    assert found["doc_id"].to_pylist() == table["doc_id"].to_pylist()
    return np.array(found["embedding"].to_pylist(), np.float32)


def difference(folder: Path, documents: list[str], **options: Any) -> float:
    """Return the largest difference from the library's vectors."""
    theirs = SentenceTransformer(str(folder), device="cpu").encode_document(documents, batch_size=5)
    ours = vectors(folder, documents, **options)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


POOLS = [
    "mean",
    "cls",
    "max",
    "mean_sqrt_len_tokens",
    "weightedmean",
    "lasttoken",
    ("max", "cls"),
    ("cls", "weightedmean", "mean"),
]


@pytest.mark.parametrize("older", [False, True], ids=["layout6", "older"])
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_every_pooling_in_both_layouts(pool: Any, older: bool, tmp_path: Path) -> None:
    after = () if pool == "max" else ("normalize",)
    if older and not isinstance(pool, str):
        pool = tuple(sorted(pool))  # older folders have no order of their own
    folder = save_model(tmp_path / "model", pool=pool, after=after, older=older)
    assert difference(folder, texts(12, 20)) < 1e-5
    if pool != "mean":  # the choice is not without effect
        assert np.abs(vectors(folder, texts(3, 20)) - vectors(folder, texts(3, 20), pool="mean")[:, :1]).max() > 1e-3


NETS = {
    "bert": word_pieces,
    "distilbert": word_pieces,
    "xlm-roberta": sentence_pieces,
    "mpnet": sentence_pieces,
    "modernbert": byte_level,
    "gemma3": byte_level,
    "qwen3": byte_level,
}


@pytest.mark.parametrize("prompt", ["", "query: "])
@pytest.mark.parametrize("kind", NETS)
def test_architectures(kind: str, prompt: str, tmp_path: Path) -> None:
    pool = "lasttoken" if kind == "qwen3" else "mean"
    folder = save_model(tmp_path / "model", kind, NETS[kind](), pool=pool, prompts={"document": prompt}, window=None)
    assert difference(folder, texts(12, 10)) < 1e-5


CASES: dict[str, dict[str, Any]] = {
    "dense": {"after": ("dense", "normalize")},
    "gelu, residual of another size": {"after": ("dense-gelu-residual",)},
    "residual of one size, layer norm": {"after": ("dense-same-residual", "norm", "normalize", "dense")},
    "prompt": {"prompts": {"document": "passage: ", "query": "query: "}},
    "prompt not pooled": {"prompts": {"document": "passage: "}, "include_prompt": False},
    "prompt not pooled, cls": {"prompts": {"document": "passage: "}, "include_prompt": False, "pool": "cls"},
    "prompt not pooled, weighted": {"prompts": {"document": "the: "}, "include_prompt": False, "pool": "weightedmean"},
    "prompt of null": {"prompts": {"document": None}},
    "no lower case": {"words": word_pieces(lowercase=False)},
    "lower case by the older key": {"words": word_pieces(lowercase=False), "older": True},
    "prompt without a space": {"prompts": {"document": "query:"}, "kind": "modernbert", "words": byte_level()},
    "prompt of pieces not pooled": {
        "prompts": {"document": "query: "}, "include_prompt": False, "kind": "xlm-roberta", "words": sentence_pieces(),
    },
    "byte-level prompt not pooled": {
        "prompts": {"document": "query: "}, "include_prompt": False, "kind": "modernbert", "words": byte_level(True),
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_a_folder_says(case: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", **CASES[case])
    assert difference(folder, texts(12, 12)) < 1e-5


@pytest.mark.parametrize("names", [("passage",), ("corpus", "x"), ("x",)])
def test_a_prompt_that_the_library_does_not_read(names: tuple[str, ...], tmp_path: Path, run_longnet: Any) -> None:
    folder = save_model(tmp_path / "model", prompts=dict.fromkeys(names, "query: "))
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "default_prompt_name": names[-1]}))
    documents = texts(5, 12)
    assert difference(folder, documents) < 1e-5
    assert np.abs(vectors(folder, documents, prefix="query: ") - vectors(folder, documents)).max() > 1e-3
    (tmp_path / "a.txt").write_text("the net reads")
    found = run_longnet("encode", tmp_path / "a.txt", "--model", folder, "-o", tmp_path / "v.arrow")
    assert "the prompt 'query: ' is not read, as in encode_document" in found.stderr


def test_truncated_vectors_and_overrides(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncate_dim": 7}))
    documents = texts(5, 12)
    assert difference(folder, documents) < 1e-5
    assert not np.allclose(np.linalg.norm(vectors(folder, documents), axis=1), 1, atol=1e-3)
    assert np.allclose(np.linalg.norm(vectors(folder, documents, normalize=True), axis=1), 1)
    plain = save_model(tmp_path / "plain", after=("normalize",))
    assert not np.allclose(np.linalg.norm(vectors(plain, documents, normalize=False), axis=1), 1, atol=1e-3)


def test_token_ids_are_read_as_the_text_and_specials_around_them_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    ids = [word_pieces().encode(text, add_special_tokens=False).ids for text in texts(4, 12)[:4]]
    table = pa.table({"doc_id": [str(i) for i in range(4)], "input_ids": ids})
    found = encode_batches(table, model=str(folder))
    assert "char_start" not in found.schema.names
    ours = np.array(found["embedding"].to_pylist(), np.float32)
    assert np.abs(ours - vectors(folder, texts(4, 12)[:4])).max() < 1e-6
    framed = pa.table({"doc_id": ["x"], "input_ids": [[2, *ids[0], 3]]})
    with pytest.raises(LongNetError, match="stand around the document"):
        encode_batches(framed, model=str(folder))


def edit(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    found = json.loads(path.read_text())
    if file == "modules.json":
        found.append({"idx": 9, "name": "9", "path": "9_X", **values})
    else:
        found |= values
    path.write_text(json.dumps(found))


REFUSED = {
    "WordWeights": ("modules.json", {"type": "sentence_transformers.models.WordWeights"}),
    "custom_st.Transformer": ("modules.json", {"type": "custom_st.Transformer"}),
    "cross attention": ("1_Pooling/config.json", {"pooling_mode": "cross attention"}),
    "fill-mask": ("sentence_bert_config.json", {"transformer_task": "fill-mask"}),
    "sentence_embedding": ("sentence_bert_config.json", {"module_output_name": "sentence_embedding"}),
    "pooler_output": (
        "sentence_bert_config.json",
        {"modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}}},
    ),
    "message": ("sentence_bert_config.json", {"modality_config": {"message": {"method": "forward"}}}),
    "processing_kwargs": ("sentence_bert_config.json", {"processing_kwargs": {"text": {"max_length": 3}}}),
    "config_kwargs": ("sentence_bert_config.json", {"config_kwargs": {"hidden_act": "relu"}}),
    "token_weights": ("2_Dense/config.json", {"module_input_name": "token_weights"}),
    "torch.nn.modules.activation.PReLU": (
        "2_Dense/config.json",
        {"activation_function": "torch.nn.modules.activation.PReLU"},
    ),
    "os.system": ("2_Dense/config.json", {"activation_function": "os.system"}),
    "CrossEncoder": ("config_sentence_transformers.json", {"model_type": "CrossEncoder"}),
    "no text: 3": ("config_sentence_transformers.json", {"prompts": {"document": 3}}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", after=("dense", "normalize"))
    file, values = REFUSED[name]
    edit(folder, file, **values)
    with pytest.raises(LongNetError) as caught:
        vectors(folder, ["the net"])
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_weights_and_other_sizes(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", after=("dense", "normalize"))
    with pytest.raises(LongNetError, match="leave out --pool"):
        vectors(folder, ["the net"], pool="mean+max")
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(LongNetError, match="pickled weights are never read"):
        vectors(folder, ["a net"], device="cpu")
