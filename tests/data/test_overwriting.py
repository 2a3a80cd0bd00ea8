"""Proves that no output option destroys what its command reads, under whatever name that is written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import scores, tiny_net

from longnet_cli.basics.errors import CheckpointError, ConfigError, NotFiniteError
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.names import Sources
from longnet_cli.data.outputs import refuse_one_place, refuse_overwriting
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.jobs.encoding import EncodeFacts, encode
from longnet_cli.jobs.options import EncodeOptions
from longnet_cli.models.folder import ModelFolder
from longnet_cli.nets.longnet import LongNet


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.arrow", "b.arrow", "folder/c.arrow", "model/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    os.link("a.arrow", "hard.arrow")
    Path("soft.arrow").symlink_to("a.arrow")
    Path("up").symlink_to(".")
    Path("list").write_text("b.arrow\nfolder\n")
    return tmp_path


@pytest.mark.parametrize(
    "output", ["a.arrow", "./a.arrow", "hard.arrow", "soft.arrow", "up/a.arrow", "folder/../a.arrow"]
)
@pytest.mark.parametrize("inputs", [["a.arrow"], ["b.arrow", "a*.arrow"], ["file://{}/a.arrow"], ["soft.arrow"]])
def test_a_file_is_known_by_every_name(files: Path, output: str, inputs: list[str]) -> None:
    inputs = [item.format(files) for item in inputs]
    with pytest.raises(ConfigError, match=r"^-o .*arrow is .*arrow, which this command reads: name another output$"):
        refuse_overwriting("-o", [output], Sources(inputs))
    refuse_overwriting("-o", ["b.arrow.new", "new"], Sources(inputs))


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("spelling", ["x.arrow", "./x.arrow", "up/x.arrow", "folder/../x.arrow", "{}/x.arrow", "link"])
def test_one_path_is_one_output_in_any_spelling(files: Path, spelling: str, new: bool) -> None:
    Path("link").symlink_to("x.arrow")
    if not new:
        Path("x.arrow").write_text("old")
    with pytest.raises(ConfigError, match=r"^--chosen .* is the output of --token-logprobs as well: name another$"):
        refuse_one_place({"--token-logprobs": spelling.format(files), "--chosen": "x.arrow", "-o": None})
    refuse_one_place({"--token-logprobs": "x.arrow", "--chosen": "y.arrow", "-o": None})
    with pytest.raises(ConfigError, match="--chosen - is the output of"):
        refuse_one_place({"--token-logprobs": "-", "--chosen": "-"})


@pytest.mark.parametrize(
    ("output", "inputs", "also"),
    [
        ("folder/c.arrow", ["@list"], []),
        ("list", ["@list"], []),
        ("folder", ["@list"], []),
        ("up/folder", ["folder/c.arrow"], []),
        (".", ["folder"], []),
        ("model/config.json", ["a.arrow"], [Path("model")]),
        ("b.arrow", ["a.arrow"], [None, Path("b.arrow")]),
    ],
)
def test_lists_folders_and_models_count(files: Path, output: str, inputs: list[str], also: list[Path | None]) -> None:
    with pytest.raises(ConfigError, match=r"^-o .* (is|holds) .*, which this command reads: name another output$"):
        refuse_overwriting("-o", [output], Sources(inputs), also)


def test_what_is_not_read_may_be_replaced(files: Path) -> None:
    refuse_overwriting("-o", ["b.arrow", "model", "new", "/dev/null", "-"], Sources(["a.arrow"]))
    refuse_overwriting("-o", ["folder"], Sources(["a.arrow", "model/config.json"]))


def small() -> LongNet:
    return tiny_net(vocab_size=300, segment_lengths=(8, 16), tie_embeddings=False).eval()


def test_the_tokenizer_of_a_model_is_asked_for_by_content(tmp_path: Path) -> None:
    own, other = Tokenizer.train(["some text and more text"] * 9, 265), Tokenizer.bytes()
    small().save_pretrained(tmp_path, own.to_json())
    own.save(tmp_path / "copy.json")
    found = ModelFolder(tmp_path).tokenizer()
    assert found is not None
    assert found.sha256 == own.sha256
    assert ModelFolder(tmp_path).tokenizer(str(tmp_path / "copy.json"))
    with pytest.raises(ConfigError, match=r"bytes: not the tokenizer of the model .*--tokenizer-differs"):
        ModelFolder(tmp_path).tokenizer("bytes")
    assert ModelFolder(tmp_path).tokenizer("bytes", differs=True).sha256 == other.sha256
    other.save(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="not the tokenizer that the model was saved with"):
        ModelFolder(tmp_path).tokenizer()
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="is missing, which the model was saved with"):
        ModelFolder(tmp_path).tokenizer()
    with pytest.raises(ConfigError, match="not the tokenizer of the model"):
        ModelFolder(tmp_path).tokenizer("bytes")
    assert ModelFolder(tmp_path).tokenizer(str(tmp_path / "copy.json"))


@pytest.mark.parametrize("chunk", [4, 1000])
def test_numbers_that_are_not_finite_name_document_and_token(tmp_path: Path, chunk: int) -> None:
    net = small()
    with torch.no_grad():
        net.embedding.weight[ord("z")] = torch.inf
    (tmp_path / "good.txt").write_text("good text")
    (tmp_path / "z.txt").write_text("twelve letters, then z is read")
    inputs, bos = [tmp_path / "good.txt", tmp_path / "z.txt"], Tokenizer.bytes().eos_id

    def documents() -> list:
        return list(Inputs(inputs, Tokenizer.bytes()).documents())

    net.embedding.weight.requires_grad_(False)
    with pytest.raises(
        NotFiniteError, match=r"z\.txt: document 'z.txt': the log-probability of token \d+ is not finite"
    ):
        list(scores(net, documents(), bos=bos, chunk=chunk))
    # the segment of 16 tokens with the z in it: what attention masks is multiplied by 0, and 0 times NaN is NaN
    with pytest.raises(NotFiniteError, match=r"document 'z.txt': the vector of tokens 15 to 19 is not finite"):
        encode(net, documents(), EncodeOptions(span=5), EncodeFacts(bos), chunk=chunk).read_all()
    reader = encode(small(), documents(), EncodeOptions(span=5), EncodeFacts(bos), chunk=chunk)
    assert np.isfinite(reader.read_all()["embedding"].combine_chunks().flatten()).all()
