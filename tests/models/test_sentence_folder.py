"""Embedding models give the vectors of `SentenceTransformer.encode_document`, or are refused by name."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")

from files import write_file
from processes import invoke
from sentence_models import WORDS, byte_level, save_model, sentence_pieces, word_pieces

from longnet_cli import encode_batches
from longnet_cli.basics.errors import CheckpointError, LongNetError
from longnet_cli.basics.model_files import PROMPTS
from longnet_cli.data.documents.text_pieces import PIECE
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.models.folder import ModelFolder
from longnet_cli.models.hf.sentence_folder import plain_model, read_sentence_model
from longnet_cli.nets.net import Net
from longnet_cli.nets.weights import model_digest

# not importorskip: importing it takes five seconds, which only the worker that runs these tests needs to spend
pytestmark = pytest.mark.skipif(
    not find_spec("sentence_transformers"),
    reason="not installed: pip install '.[sentence-transformers]'",
)

ODD = [
    "[SEP] Caf\u00e9, \u6f22 A",
    "the\n\n net ",
    " of",
    "a\u0301 DOCUMENT [MASK]?",
    "</s> in <end> to",
]


def texts(number: int, longest: int, seed: int = 0) -> list[str]:
    chosen = random.Random(seed)
    return [
        " ".join(chosen.choices(WORDS, k=chosen.randint(1, longest))) for _ in range(number)
    ] + ODD


def vectors(folder: Path, documents: list[str], **options: Any) -> np.ndarray:
    table = pa.table({"doc_id": [str(i) for i in range(len(documents))], "text": documents})
    found = encode_batches(table, model=str(folder), **options)
    assert found["doc_id"].to_pylist() == table["doc_id"].to_pylist()
    return np.array(found["embedding"].to_pylist(), np.float32)


def difference(folder: Path, documents: list[str], **options: Any) -> float:
    """Return the largest difference from the library's vectors."""
    from sentence_transformers import SentenceTransformer

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
def test_every_pooling_in_both_layouts(pool, older, tmp_path):
    after = () if pool == "max" else ("normalize",)
    if older and not isinstance(pool, str):
        pool = tuple(sorted(pool))  # older folders have no order of their own
    folder = save_model(tmp_path / "model", pool=pool, after=after, older=older)
    assert difference(folder, texts(12, 20)) < 1e-5
    if pool != "mean":  # the choice is not without effect
        assert (
            np.abs(
                vectors(folder, texts(3, 20)) - vectors(folder, texts(3, 20), pool="mean")[:, :1]
            ).max()
            > 1e-3
        )


NETS = {
    "bert": word_pieces,
    "distilbert": word_pieces,
    "xlm-roberta": sentence_pieces,
    "mpnet": sentence_pieces,
    "modernbert": byte_level,
    "gemma3": byte_level,
    "qwen3": byte_level,
}


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:.*no pattern is given")
@pytest.mark.parametrize("prompt", ["", "query: "])
@pytest.mark.parametrize("kind", NETS)
def test_architectures(kind, prompt, tmp_path):
    pool = "lasttoken" if kind == "qwen3" else "mean"
    folder = save_model(
        tmp_path / "model", kind, NETS[kind](), pool=pool, prompts={"document": prompt}, window=None
    )
    assert difference(folder, texts(12, 10)) < 1e-5


CASES: dict[str, dict[str, Any]] = {
    "dense": {"after": ("dense", "normalize")},
    "a pooling named twice": {"pool": ("mean", "mean"), "after": ()},
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


@pytest.mark.ci
@pytest.mark.parametrize("case", CASES)
def test_what_a_folder_says(case, tmp_path):
    folder = save_model(tmp_path / "model", **CASES[case])
    assert difference(folder, texts(12, 12)) < 1e-5


def test_every_activation(tmp_path):
    folder = save_model(tmp_path / "model", after=("dense",))
    found = []
    for kind in (
        "linear.Identity",
        *(f"activation.{name}" for name in ("Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")),
    ):
        edit(folder, "2_Dense/config.json", activation_function=f"torch.nn.modules.{kind}")
        copy = shutil.copytree(folder, tmp_path / kind)  # a process reads a folder once
        assert difference(copy, texts(3, 12)) < 1e-5
        found.append(vectors(copy, texts(3, 12)))
    for index, one in enumerate(found):
        assert all(np.abs(one - other).max() > 1e-3 for other in found[:index])


@pytest.mark.ci
@pytest.mark.parametrize("names", [("passage",), ("corpus", "x"), ("x",)])
def test_a_prompt_that_the_library_does_not_read(names, tmp_path, run_longnet):
    folder = save_model(tmp_path / "model", prompts=dict.fromkeys(names, "query: "))
    edit(folder, SETTINGS, default_prompt_name=names[-1])
    documents = texts(5, 12)
    with pytest.warns(UserWarning, match="the prompt 'query: ' is not read"):
        assert difference(folder, documents) < 1e-5
    assert (
        np.abs(vectors(folder, documents, prefix="query: ") - vectors(folder, documents)).max()
        > 1e-3
    )
    (tmp_path / "a.txt").write_text("the net reads")
    found = run_longnet(f"encode {tmp_path}/a.txt --model {folder} -o {tmp_path}/v.arrow")
    assert "the prompt 'query: ' is not read, as in encode_document" in found.stderr


def test_truncated_vectors_and_overrides(tmp_path):
    folder = save_model(tmp_path / "model")
    edit(folder, SETTINGS, truncate_dim=7)
    documents = texts(5, 12)
    assert difference(folder, documents) < 1e-5
    assert not np.allclose(np.linalg.norm(vectors(folder, documents), axis=1), 1, atol=1e-3)
    assert np.allclose(np.linalg.norm(vectors(folder, documents, normalize=True), axis=1), 1)
    plain = save_model(tmp_path / "plain", after=("normalize",))
    assert not np.allclose(
        np.linalg.norm(vectors(plain, documents, normalize=False), axis=1), 1, atol=1e-3
    )


def test_token_ids_are_read_as_the_text_and_specials_around_them_refused(tmp_path):
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


def rewrite(folder: Path, change: Callable[[str], str | None], **added: torch.Tensor) -> None:
    """Rename weights; None leaves one out."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: weights[old].clone() for old in weights if (name := change(old))}
    save_file(kept | added, folder / "model.safetensors", {"format": "pt"})


def move_inside(folder: Path) -> None:
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in [
        x for x in folder.iterdir() if x.is_file() and x.name not in ("modules.json", PROMPTS)
    ]:
        path.rename(inner / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = inner.name
    (folder / "modules.json").write_text(json.dumps(modules))


QWEN = {"kind": "qwen3", "words": byte_level(), "pool": "lasttoken", "window": None}
AS_PUBLISHED: dict[str, tuple[dict[str, Any], Callable[[Path], Any]]] = {
    "no pooler": (
        {},
        lambda folder: rewrite(folder, lambda name: None if "pooler" in name else name),
    ),
    "no architectures": ({}, lambda folder: edit(folder, "config.json", architectures=None)),
    "an architecture of its own": (
        {},
        lambda folder: edit(folder, "config.json", architectures=["Contriever"]),
    ),
    "a head that is named": (
        {},
        lambda folder: edit(folder, "config.json", architectures=["BertForMaskedLM"]),
    ),
    "a head that is there": (
        {},
        lambda folder: rewrite(folder, "bert.{}".format, **{"cls.x": torch.zeros(3)}),
    ),
    "no lm_head": (
        QWEN,
        lambda folder: edit(
            folder, "config.json", architectures=["Qwen3ForCausalLM"], tie_word_embeddings=False
        ),
    ),
    "code beside a known type": (
        {},
        lambda folder: edit(folder, "config.json", auto_map={"AutoModel": "mine.Mine"}),
    ),
    "a Transformer in a folder": ({}, move_inside),
    "a surplus weight": ({}, lambda folder: rewrite(folder, str, extra=torch.ones(2))),
}


@pytest.mark.filterwarnings("ignore:.*no pattern is given")
@pytest.mark.parametrize("what", AS_PUBLISHED)
def test_folders_as_others_publish_them(what, tmp_path, monkeypatch):
    """The class is that of AutoModel; heads and poolers are nothing that the vectors are made of."""
    options, change = AS_PUBLISHED[what]
    folder = save_model(tmp_path / "model", **options)
    change(folder)
    assert difference(folder, texts(4, 12)) < 1e-5
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    # nothing in it is random
    assert model_digest(*nets("../model")) == model_digest(*nets(str(folder)))


def nets(name: str) -> list[Net]:
    return [ModelFolder.find(name, embeds=True).load(device=torch.device("cpu")).net]


def test_a_body_that_is_not_whole_is_refused(tmp_path):
    folder = save_model(tmp_path / "model")
    rewrite(folder, lambda name: None if name == "encoder.layer.1.output.dense.bias" else name)
    with pytest.raises(
        CheckpointError, match=r"missing tensor encoder\.layer\.1\.output\.dense\.bias"
    ):
        vectors(folder, ["the net"])


def edit(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    found = json.loads(path.read_text())
    if file == "modules.json":
        found.append({"idx": 9, "name": "9", "path": "9_X", **values})
    else:
        found |= values
    path.write_text(json.dumps(found))


SETTINGS, PLAIN = "config_sentence_transformers.json", "sentence_bert_config.json"
METHOD = {"method": "forward", "method_output_name": "pooler_output"}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("modules.json", {"type": "sentence_transformers.models.WordWeights"}, "WordWeights"),
    ("modules.json", {"type": "custom_st.Transformer"}, "custom_st.Transformer"),
    ("1_Pooling/config.json", {"pooling_mode": "cross attention"}, "cross attention"),
    (PLAIN, {"transformer_task": "fill-mask"}, "fill-mask"),
    (PLAIN, {"module_output_name": "sentence_embedding"}, "sentence_embedding"),
    (PLAIN, {"modality_config": {"text": METHOD}}, "pooler_output"),
    (PLAIN, {"modality_config": {"message": {"method": "forward"}}}, "message"),
    (PLAIN, {"processing_kwargs": {"text": {"max_length": 3}}}, "processing_kwargs"),
    (PLAIN, {"config_kwargs": {"hidden_act": "relu"}}, "config_kwargs"),
    ("2_Dense/config.json", {"module_input_name": "token_weights"}, "token_weights"),
    (
        "2_Dense/config.json",
        {"activation_function": "torch.nn.modules.activation.PReLU"},
        "activation.PReLU",
    ),
    ("2_Dense/config.json", {"activation_function": "os.system"}, "os.system"),
    (SETTINGS, {"model_type": "CrossEncoder"}, "CrossEncoder"),
    (SETTINGS, {"prompts": {"document": 3}}, "(got 3)"),
    # odd values
    ("1_Pooling/config.json", {"pooling_mode": 5}, ""),
    (SETTINGS, {"prompts": ["a"]}, ""),
    (SETTINGS, {"truncate_dim": 0}, ""),
    (PLAIN, {"modality_config": "text"}, ""),
    (PLAIN, {"max_seq_length": "8"}, ""),
    (PLAIN, {"model_kwargs": {"torch_dtype": "bfloat16"}}, ""),
    ("2_Dense/config.json", {"in_features": -1}, ""),
    ("2_Dense/config.json", {"out_features": 10**13}, ""),
    ("2_Dense/config.json", {"out_features": True}, ""),
    ("modules.json", {"type": "sentence_transformers.models.Normalize", "path": "../other"}, ""),
]


def test_what_is_not_computed_is_refused_by_name_in_one_line(tmp_path):
    whole = save_model(tmp_path / "model", after=("dense", "normalize"))
    for index, (file, values, said) in enumerate(REFUSED):
        folder = shutil.copytree(whole, tmp_path / str(index))
        edit(folder, file, **values)
        with pytest.raises(LongNetError) as caught:
            read_sentence_model(folder)
        assert caught.value.exit_code in (2, 4), values
        assert re.search(rf"{folder}.*{re.escape(said)}", str(caught.value))
        assert "\n" not in str(caught.value)
    edit(whole, PLAIN, modality_config="text")
    (whole / "modules.json").unlink()
    with pytest.raises(LongNetError, match="modality_config"):
        plain_model(whole)


def test_a_text_that_changes_the_prompts_tokens_is_left_out_alone(tmp_path):
    folder = save_model(tmp_path / "model", prompts={"document": "i"})
    # i + n is "in"
    table = pa.table(
        {"doc_id": [*"abcd"], "text": ["the net", "n the document", "of long", "an net"]}
    )
    with pytest.raises(LongNetError, match="joins the prompt 'i'"):
        encode_batches(table, model=str(folder))
    assert encode_batches(table, model=str(folder), skip_bad=True)["doc_id"].to_pylist() == [*"acd"]
    write_file(tmp_path / "texts.arrow", table)
    words = "encode", tmp_path / "texts.arrow", "--model", folder, "-o", tmp_path / "x.arrow"
    found = json.loads(invoke(*words, "--skip-bad", "--dry-run", "--format", "json", code=0).stdout)
    assert (found["documents"], found["left_out"]) == (3, 1)


def test_every_span_has_a_row_where_the_library_counts_a_token_as_the_prompts(
    tmp_path,
):
    words = byte_level(True)
    folder = save_model(
        tmp_path / "model",
        "modernbert",
        words,
        prompts={"document": "query: "},
        include_prompt=False,
    )
    table = pa.table({"doc_id": ["a", "b"], "text": ["the net reads", "of long"]})
    found = encode_batches(table, model=str(folder), span=1)
    for name in ("a", "b"):
        spans = [row["span"] for row in found.to_pylist() if row["doc_id"] == name]
        assert spans == list(range(len(spans)))
        assert spans


def test_a_tokenizer_beside_the_folder_is_read_as_the_folder_says(tmp_path, run_longnet):
    folder = save_model(tmp_path / "model", words=word_pieces(lowercase=False), older=True)
    wanted = vectors(folder, ["THE Net reads"])
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert (
        np.abs(
            vectors(folder, ["THE Net reads"], tokenizer=str(tmp_path / "tokenizer.json")) - wanted
        ).max()
        < 1e-6
    )
    (tmp_path / "a.txt").write_text("the net")
    done = run_longnet(f"encode {tmp_path}/a.txt --model {folder} -o {tmp_path}/v.arrow")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr


def test_what_has_no_effect_is_refused(tmp_path):
    cls = save_model(tmp_path / "cls", pool="cls")
    with pytest.raises(LongNetError, match="each span is a window"):
        vectors(cls, ["the net reads a document"], span=4, stride=2)
    cut = save_model(tmp_path / "cut")
    edit(cut, SETTINGS, truncate_dim=7)
    with pytest.raises(LongNetError, match="leave out --no-normalize"):
        vectors(cut, ["the net"], normalize=False)


def test_a_special_token_at_the_end_of_a_piece_is_not_cut():
    inner = byte_level()
    inner.normalizer = None
    words = Tokenizer(inner)
    words.splits_special = False
    text = "of " * (PIECE // 3 - 1) + "of <end> the net"
    places = [found.places for found in words.for_documents().encode_long([text])]
    ids = np.concatenate([found.ids for found in words.for_documents().encode_long([text])])
    inner.encode_special_tokens = False
    assert ids.tolist() == inner.encode(text, add_special_tokens=False).ids
    assert 2 in ids
    assert all(each is not None for each in places)


def test_missing_weights_and_other_sizes(tmp_path):
    folder = save_model(tmp_path / "model", after=("dense", "normalize"))
    with pytest.raises(LongNetError, match="leave out --pool"):
        vectors(folder, ["the net"], pool="mean+max")
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(LongNetError, match="pickled weights are never read"):
        vectors(folder, ["a net"], device="cpu")
