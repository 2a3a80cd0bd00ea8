"""Embedding models by their names on a hub: all of their files come along, and an old cache is completed or refused."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pyarrow.ipc as ipc
import pytest
from conftest import RunLongnet
from loopback_hub import LoopbackHub, fill_cache, loopback_hub, read_folder

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'longnet-cli[hf]'")

from sentence_models import save_model

# not importorskip: importing it takes five seconds, which only the worker that runs these tests needs to spend
pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(
        not find_spec("sentence_transformers"), reason="not installed: pip install 'longnet-cli[sentence-transformers]'"
    ),
]

NAME = "org/sentences"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("made") / "model", pool="max", after=("dense",), prompts={"document": "the: "}
    )


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with loopback_hub() as found:
        yield found


@pytest.fixture
def home(tmp_path: Path, command_env: dict[str, str]) -> Path:
    command_env |= {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_DOWNLOAD_TIMEOUT": "30",
    }
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        command_env.pop(name, None)
    (tmp_path / "a.txt").write_text("the long net reads a document")
    return tmp_path / "hf" / "hub"


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder and of its folders."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def encoded(run_longnet: RunLongnet, tmp_path: Path, model: Path | str) -> list:
    done = run_longnet("encode", "a.txt", "-m", model, "-o", "v.arrow")
    assert done.returncode == 0, done.stderr
    return ipc.open_file(tmp_path / "v.arrow").read_all()["embedding"].to_pylist()


def test_a_hub_gives_all_that_a_folder_has(
    run_longnet: RunLongnet, tmp_path: Path, home: Path, hub: LoopbackHub, folder: Path, command_env: dict[str, str]
) -> None:
    wanted = encoded(run_longnet, tmp_path, folder)
    command_env["HF_ENDPOINT"] = hub.url
    hub.push(NAME, files_of(folder) | {"2_Dense/pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx"})
    assert encoded(run_longnet, tmp_path, NAME) == wanted
    got = {line.partition("/resolve/")[2].partition("/")[2] for line in hub.requests if "/resolve/" in line}
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"} <= got
    assert not {"2_Dense/pytorch_model.bin", "onnx/model.onnx"} & got
    hub.requests.clear()
    assert encoded(run_longnet, tmp_path, NAME) == wanted
    assert hub.requests == []


def test_an_old_cache_is_completed_or_refused(
    run_longnet: RunLongnet, tmp_path: Path, home: Path, hub: LoopbackHub, folder: Path, command_env: dict[str, str]
) -> None:
    """It was filled by a program that reads no modules.json."""
    wanted = encoded(run_longnet, tmp_path, folder)
    hub.push(NAME, files_of(folder))
    cache = home / f"models--{NAME.replace('/', '--')}"
    snapshot = cache / "snapshots" / fill_cache(home, NAME, files_of(folder))
    for name in ("modules.json", "config_sentence_transformers.json", "1_Pooling/config.json"):
        (snapshot / name).unlink()
    done = run_longnet("encode", "a.txt", "-m", NAME, "-o", "v.arrow", env={"HF_HUB_OFFLINE": "1"})
    assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
    assert "HF_HUB_OFFLINE is set" in done.stderr
    done = run_longnet("encode", "a.txt", "-m", cache, "-o", "v.arrow")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
    assert "does not know whether the model has modules.json" in done.stderr
    command_env["HF_ENDPOINT"] = hub.url
    assert encoded(run_longnet, tmp_path, NAME) == wanted


def test_a_cache_that_knows_of_no_modules_is_read_offline(
    run_longnet: RunLongnet, tmp_path: Path, home: Path, folder: Path, command_env: dict[str, str]
) -> None:
    plain = {name: data for name, data in read_folder(folder).items() if name not in ("modules.json",)}
    commit = fill_cache(home, NAME, plain)
    absent = home / f"models--{NAME.replace('/', '--')}" / ".no_exist" / commit / "modules.json"
    absent.parent.mkdir(parents=True)
    absent.touch()
    command_env["HF_HUB_OFFLINE"] = "1"
    done = run_longnet("encode", "a.txt", "-m", NAME, "-o", "v.arrow")
    assert done.returncode == 0, done.stderr
    assert "there is no modules.json: the vector is the mean over all tokens" in done.stderr
