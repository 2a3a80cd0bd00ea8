"""Proves that `--model` finds shipped models by name and folders by path, and says which of the two was wrong."""

import sys

import pytest
from builders import tiny_llama
from processes import invoke

from longnet_cli.basics.errors import ConfigError
from longnet_cli.hub import model_names as module
from longnet_cli.hub.model_names import list_models, preset_dir
from longnet_cli.models.folder import ModelFolder


def make_model(folder):
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    return folder


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A models/ folder with two models and a recipe."""
    folder = tmp_path / "shipped"
    make_model(folder / "longnet-tiny")
    make_model(folder / "longnet-small")
    (folder / "longnet-125m.toml").touch()
    (folder / "README.md").touch()
    monkeypatch.setattr(module, "preset_dir", lambda: folder)
    return folder


def test_the_real_folder_is_beside_or_inside_the_package():
    assert preset_dir().name == "models"


def test_a_name_is_a_shipped_model_with_weights(shipped):
    assert list_models() == ["longnet-small", "longnet-tiny"]
    assert ModelFolder.find("longnet-tiny").path == shipped / "longnet-tiny"


def test_a_name_is_never_looked_up_in_the_current_folder(shipped, tmp_path, monkeypatch):
    make_model(tmp_path / "work" / "mine")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(ConfigError, match=r"a path needs a slash, e.g. ./mine"):
        ModelFolder.find("mine")
    assert ModelFolder.find("./mine").path.samefile(tmp_path / "work" / "mine")


OPENED: list[str] = []  # by the process, since the hook was added


def test_encode_reads_config_json_once(tmp_path):
    tiny_llama(tmp_path / "llama", max_position_embeddings=64)
    (tmp_path / "a.txt").write_text("a text")
    sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)
    invoke("encode", f"{tmp_path}/a.txt", "-m", f"{tmp_path}/llama", "-o", f"{tmp_path}/v.arrow", code=0)
    assert OPENED.count(str(tmp_path / "llama" / "config.json")) == 1
