"""`--pattern` on the commands that run a net, and `pattern` in recipes: taken, recorded, and refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.ipc as ipc
import pytest
from builders import tiny_model
from processes import invoke, refused

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.manifest import read_manifest
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.jobs.training.recipe import load_recipe
from longnet_cli.nets.config import LongNetConfig, parse_config
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.weights import load_config

SHAPE = {"vocab_size": 257, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "position": "rope"}
STAGES = {"train.stages": [{"seq_len": 64, "steps": 1}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", position="rope")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("Call me Ishmael. Some years ago, never mind how long precisely")
    return file


def test_score_and_encode_take_a_pattern_and_record_it(model: Path, text: Path, tmp_path: Path) -> None:
    saved = LongNet.from_pretrained(model)
    LongNet(LongNetConfig(**SHAPE, segment_lengths=(16,), dilation_rates=(1,))).save_pretrained(other := tmp_path / "o")
    LongNet.from_pretrained(model, pattern=Pattern((16,), (1,))).save_pretrained(other)
    Tokenizer.bytes().save(other / "tokenizer.json")
    assert LongNet.from_pretrained(other).config.pattern == Pattern((16,), (1,)) != saved.config.pattern

    def total(*words: str | Path) -> dict:
        result = invoke("score", text, "--format", "json", *words, code=0)
        return {key: value for key, value in json.loads(result.stdout)["total"].items() if key != "model"}

    own, given = total("--model", model), total("--model", model, "--pattern", "16/1")
    assert given == total("--model", model, "--pattern", "16/1", "-q") == total("--model", other)
    assert own["ppl"] != given["ppl"]
    assert (own["pattern"], given["pattern"]) == ("8/1,32/2", "16/1")
    invoke("encode", text, "--model", model, "--pattern", "16/1", "-o", tmp_path / "x.arrow", code=0)
    with ipc.open_file(tmp_path / "x.arrow") as file:
        assert file.schema.metadata[b"longnet.pattern"] == b"16/1"


def test_a_folder_of_vectors_is_resumed_with_its_pattern(model: Path, text: Path, tmp_path: Path) -> None:
    command = ["encode", text, "--model", model, "-o", tmp_path / "vectors"]
    assert invoke(*command, "--pattern", "16/1").exit_code == 0
    assert read_manifest(tmp_path / "vectors").settings["pattern"] == "16/1"
    assert invoke(*command, "--pattern", "16/1", "--resume").exit_code == 0
    assert "pattern was '16/1' and is now '8/1,32/2'" in str(refused(*command, "--resume"))


def test_recipes_say_patterns_too() -> None:
    recipe = {**{f"model.{key}": value for key, value in SHAPE.items()}, **STAGES}
    found = load_recipe(None, {**recipe, "model.pattern": "geometric:64,base=16"})
    assert found.model.pattern == Pattern((16, 32, 64), (1, 2, 4))
    assert parse_config(found.model.model_dump(), "saved") == found.model
    with pytest.raises(ConfigError, match="model: pattern says the whole pattern: leave out segment_lengths"):
        load_recipe(None, {**recipe, "model.pattern": "16/1", "model.segment_lengths": [8]})
    with pytest.raises(ConfigError, match=r"did you mean 'paper'\?"):
        load_recipe(None, {**recipe, "model.pattern": "papr"})


def test_inputs_take_the_place_of_the_recipes_mix() -> None:
    assert load_recipe("longnet-tiny", {"model.vocab_size": 257}).data.mix
    found = load_recipe("longnet-tiny", {"model.vocab_size": 257, "data.train": ["mine"]})
    assert [source.inputs for source in found.data.sources] == [["mine"]]


def test_a_configuration_with_another_pattern(model: Path) -> None:
    assert load_config(model, Pattern((4,), (2,), "grouped")).pattern == Pattern((4,), (2,), "grouped")
    with pytest.raises(ConfigError, match='pattern needs a text, as "window:1Ki", got 7'):
        parse_config({**SHAPE, "pattern": 7}, "x")
