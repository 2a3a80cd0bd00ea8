"""Models by their names on a hub: from a cache without a network, and from a hub on the loopback interface.

`--model` finds shipped models by name and folders by path, and says which one it took if both have a name.
"""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pytest
from builders import tiny_llama, tiny_model
from conftest import RunLongnet
from loopback_hub import LoopbackHub, fill_cache, loopback_hub, read_folder
from processes import contents, invoke, wait_for
from safetensors.torch import load, save

from longnet_cli.basics.errors import CheckpointError, ConfigError, InputWarning
from longnet_cli.basics.model_files import PROMPTS
from longnet_cli.hub import model_names as module
from longnet_cli.hub.model_names import list_models, model_path, preset_dir
from longnet_cli.hub.repository import _checked_etags
from longnet_cli.jobs.training.checkpoint import read_checkpoint
from longnet_cli.models.folder import ModelFolder

TEXT = "A document to read, of some length. " * 4
TINY = "org/tiny"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small LongNet."""
    return read_folder(tiny_model(tmp_path_factory.mktemp("made") / "tiny"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of another one, to which a branch moves."""
    return read_folder(tiny_model(tmp_path_factory.mktemp("made") / "other", ffn_dim=16))


@pytest.fixture
def unreached() -> Iterator[LoopbackHub]:
    with loopback_hub() as found:
        yield found


@pytest.fixture(autouse=True)
def home(tmp_path: Path, command_env: dict[str, str]) -> Path:
    """A cache of this test alone, without a network, and a text to read."""
    command_env |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    command_env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        command_env.pop(name, None)
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path / "hf" / "hub"


@pytest.fixture
def hub(unreached: LoopbackHub, command_env: dict[str, str], home: Path) -> LoopbackHub:
    """The hub of all commands of a test."""
    command_env["HF_ENDPOINT"] = unreached.url
    return unreached


@pytest.fixture
def model_of(run_longnet: RunLongnet) -> Callable[..., str]:
    """The name that `score` gives to a model."""

    def model_of(name: str, *options: str) -> str:
        done = run_longnet(f"score a.txt -m {name} --format json", *options, code=0)
        return json.loads(done.stdout)["total"]["model"]

    return model_of


@pytest.fixture
def refusal(run_longnet: RunLongnet) -> Callable[..., str]:
    """The one line of a command, by default `score`, that ends with `code`."""

    def refusal(name: str = TINY, command: str = "score a.txt -m", code: int = 4, **how) -> str:
        done = run_longnet(f"{command} {name}", code=code, **how)
        assert (done.stdout, done.stderr.count("\n")) == ("", 1), done.stderr
        return done.stderr.removeprefix("longnet: error: ").rstrip("\n")

    return refusal


@pytest.mark.ci
def test_commands_take_a_name_from_the_cache_and_write_its_commit(
    run_longnet, model_of, tmp_path, home, command_env, tiny
):
    command_env["HF_HUB_OFFLINE"] = "1"
    name = f"{TINY}@{fill_cache(home, TINY, tiny)}"
    for command in (
        f"score a.txt -m {TINY} -o s.arrow",
        f"encode a.txt -m {TINY} --tokenizer {TINY} -o v.arrow",
        f"convert {TINY} --dtype bf16 -o half",
        f"tokenize a.txt --tokenizer {TINY} -o tokens",
    ):
        run_longnet(command, code=0)
    assert model_of(TINY, "--token-logprobs", "t.arrow") == name
    for file in ("t.arrow", "s.arrow", "v.arrow"):
        with pa.ipc.open_file(tmp_path / file) as table:
            assert table.schema.metadata[b"longnet.model"].decode() == name, file
    made = run_longnet(f"generate -n 3 -m {name} --format jsonl", "A doc")
    assert json.loads(made.stdout)["model"] == name
    assert json.loads((tmp_path / "half/config.json").read_text())["_name_or_path"] == name
    assert model_of("./half") == "./half"


def test_a_folder_here_wins(model_of, tmp_path, hub, tiny, other):
    hub.push(TINY, other)
    (tmp_path / TINY).mkdir(parents=True)
    for name, data in tiny.items():
        (tmp_path / TINY / name).write_bytes(data)
    assert (model_of(TINY), hub.requests) == (TINY, [])


@pytest.mark.ci
def test_only_what_is_read_is_downloaded_once_by_all_processes(
    start, model_of, command_env, hub, home, tiny
):
    hub.secret, command_env["HF_TOKEN"] = "s3cret", "s3cret"
    more = dict.fromkeys(
        ("pytorch_model.bin", "modeling.py", "README.md", "onnx/model.safetensors"), b"other"
    )
    commit = hub.push(TINY, tiny | more | {PROMPTS: b"{}"})
    both = [start(f"score a.txt -m {TINY} --format json") for _ in range(2)]
    for each in both:
        assert json.loads(each.communicate()[0])["total"]["model"] == f"{TINY}@{commit}"
    got = hub.downloaded()
    read = {"config.json", PROMPTS, "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    read |= {"modules.json", "sentence_bert_config.json"}
    assert sorted(got) == sorted(read)
    assert {path.name for path in (home / "models--org--tiny/snapshots" / commit).iterdir()} == read
    hub.requests.clear()
    model_of(TINY)
    assert hub.requests == []


@pytest.mark.ci
def test_a_broken_download_is_continued(start, run_longnet, hub, tmp_path):
    hub.push(TINY, read_folder(tiny_model(tmp_path / "made", vocab_size=200_000)))
    hub.stalled = "/cdn/"
    process = start(f"score a.txt -m {TINY}")
    wait_for(lambda: any(line.startswith("GET /cdn/") for line in hub.requests))
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    hub.stalled = None
    hub.requests.clear()
    hub.breaks = [11 << 20]  # huggingface_hub keeps parts of 10 MiB
    done = run_longnet(f"score a.txt -m {TINY}")
    if "the same command continues it" in done.stderr:  # older versions of huggingface_hub
        done = run_longnet(f"score a.txt -m {TINY}")
    assert done.returncode == 0, done.stderr
    assert hub.downloaded() == ["model.safetensors"] * 2
    assert hub.ranges == [f"bytes={10 << 20}-"]


@pytest.mark.ci
def test_a_sharded_model_is_downloaded_whole(model_of, tmp_path, hub):
    files = read_folder(tiny_llama(tmp_path / "llama", max_position_embeddings=256))
    tensors = load(files.pop("model.safetensors"))
    places = {
        name: f"model-0000{1 + number % 2}-of-00002.safetensors"
        for number, name in enumerate(tensors)
    }
    for file in {*places.values()}:
        files[file] = save(
            {name: x for name, x in tensors.items() if places[name] == file}, {"format": "pt"}
        )
    files["model.safetensors.index.json"] = json.dumps(
        {"metadata": {}, "weight_map": places}
    ).encode()
    commit = hub.push(TINY, files)
    # its weights are compared with its configuration: a missing shard would be told
    assert model_of(TINY) == f"{TINY}@{commit}"


@pytest.mark.ci
def test_a_moved_branch_is_taken_with_update_and_a_resumed_run_keeps_its_commit(
    run_longnet, model_of, tmp_path, hub, tiny, other
):
    first = f"{TINY}@{hub.push(TINY, tiny)}"
    training = f"train --init {TINY} --data a.txt --tokenizer {TINY} -o run --seq-len 16"
    training += " --set train.batch_tokens=16 --set optimizer.lr=1e-3"
    shape = json.loads(tiny["config.json"])
    keys = ("dim", "num_layers", "num_heads", "ffn_dim", "segment_lengths", "dilation_rates")
    sets = [f"--set=model.{key}={shape[key]}" for key in (*keys, "vocab_size")]
    encoding = f"encode a.txt -m {TINY} -o vectors"
    run_longnet(f"{training} --steps 1", *sets, code=0)
    run_longnet(encoding, code=0)
    second = f"{TINY}@{hub.push(TINY, other)}"
    hub.requests.clear()
    assert (model_of(TINY), hub.requests) == (first, [])
    assert model_of(TINY, "--update") == model_of(TINY) == second
    assert model_of(first) == first
    run_longnet(f"{encoding} --resume", code=0)
    done = run_longnet(f"{training} --steps 2", *sets)
    assert "continuing after step 1" in done.stderr
    recipe = json.loads((tmp_path / "run/recipe.json").read_text())
    assert (recipe["init"], recipe["data"]["tokenizer"]) == (first, first)
    (checkpoint,) = tmp_path.glob("run/checkpoints/step-00000002")
    assert read_checkpoint(checkpoint)["recipe"]["init"] == first


NOT_TAKEN = "{name}: no folder of that name here, and not taken from {hub}: "
REFUSED = {
    "org/none": "it is not there, or private: check the name, or log in",
    "org/gated": "it is gated: ask for access on its page, then log in",
    "org/tiny@v9": "it has no such branch, tag or commit",
    "org/quantized": "it has no safetensors: pickles are never read; name a GGUF file as ORG/NAME:FILE.gguf",
    "org/pickled": "it has no safetensors: pickles are never read",
}


def test_what_a_hub_refuses_is_one_line(refusal, hub, tiny):
    hub.push(TINY, tiny)
    hub.push("org/gated", tiny)
    hub.refused["org/gated"] = (403, "GatedRepo")
    hub.push("org/quantized", {"a.gguf": b"GGUF", "config.json": b"{}"})
    hub.push("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b""})
    for name, said in REFUSED.items():
        assert refusal(name).startswith(NOT_TAKEN.format(name=name, hub=hub.url) + said), name
    assert refusal("org/tiny:a.gguf") == "org/tiny:a.gguf: the repository has no a.gguf"
    said = refusal("org/pickled", "tokenize a.txt -o tokens --tokenizer")
    assert "org/pickled: the repository has no tokenizer.json" in said
    assert "--update is for a model on a hub" in refusal("--update", "score a.txt", 2)


def test_a_name_without_a_slash_is_asked_for_unless_it_looks_shipped(model_of, refusal, hub, tiny):
    commit = hub.push("gpt2", tiny)
    assert model_of("gpt2", "--tokenizer", f"gpt2@{commit}") == f"gpt2@{commit}"
    not_taken = NOT_TAKEN.format(name="my-run", hub=hub.url) + "it is not there"
    assert refusal("my-run").startswith(not_taken)
    asked = len(hub.requests)
    said = refusal("longnet-tny", code=2)
    assert "no folder here has this name; shipped with weights: longnet-tiny" in said
    assert len(hub.requests) == asked


OUT = "../../../victim.txt"
LIES = {
    "sha": (
        {"sha": OUT},
        f"the hub names the commit '{OUT}', which is not 40 hexadecimal digits",
    ),
    "commit": ({"X-Repo-Commit": OUT}, "Invalid pointer path"),
    "another commit": ({"X-Repo-Commit": "a" * 40}, "no such folder; expected a model"),
    "ETag": (
        {"ETag": "../" + OUT},
        "the hub names a file '\"../../../../victim.txt\"', which is not of digits",
    ),
    "ETag of a new file": (
        {"ETag": "../../../../new.txt"},
        "the hub names a file '\"../../../../new.txt\"', which is not of digits",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_a_hub_names_leads_nowhere_else(refusal, tmp_path, home, hub, tiny, lie):
    """A commit, an ETag or a name that would be a path out of the cache is refused, and no file is changed."""
    hub.push(TINY, tiny)
    hub.told, said = LIES[lie]
    home.mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "hf", home):
        (folder / "victim.txt").write_text("mine")
    before = contents(tmp_path)
    assert said in refusal()
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    of_library = ("hf/hub/models--org--tiny/", "hf/hub/.locks/", "hf/hub/CACHEDIR.TAG")
    assert not [name for name in {*after} - {*before} if not name.startswith(of_library)]


def test_another_commit_than_was_asked_for_is_not_taken(refusal, home, hub, tiny):
    name = f"{TINY}@{hub.push(TINY, tiny)}"
    hub.told = {"sha": "a" * 40}
    named = f"the hub names the commit '{'a' * 40}'"
    assert refusal(name) == f"{name}: {named}, which is not the one that was asked for"
    assert not home.exists()


def test_a_file_outside_of_the_snapshot_is_not_taken(refusal, tmp_path, hub, tiny):
    for name in ("../../../victim.safetensors", "/victim.safetensors", "a/../../b.safetensors"):
        index = json.dumps({"weight_map": {"x": name}}).encode()
        files = {
            "config.json": tiny["config.json"],
            "model.safetensors.index.json": index,
            name: b"x",
        }
        hub.push(TINY, files)
        refusal()
    assert not [name for name in hub.downloaded() if "victim" in name]
    for place in (tmp_path, *tmp_path.parents):
        assert not list(place.glob("*victim*"))


def test_answers_are_checked_of_a_client_that_is_made_later(hub, tiny):
    """huggingface_hub makes a new one when a host has not answered: an attacker can cause that."""
    from huggingface_hub import close_session, get_hf_file_metadata

    commit = hub.push(TINY, tiny)
    url, hub.told = f"{hub.url}/{TINY}/resolve/{commit}/config.json", {"ETag": "../x"}
    with _checked_etags(TINY):
        close_session()
        with pytest.raises(CheckpointError, match=r"'\"../x\"', which is not of digits"):
            get_hf_file_metadata(url)
    assert get_hf_file_metadata(url).etag == "../x"


def test_one_file_that_a_hub_refuses_is_named(refusal, hub, tiny):
    hub.push(TINY, tiny)
    for code in (403, 404):
        hub.status["model.safetensors"] = code
        said = refusal()
        assert said.startswith(NOT_TAKEN.format(name=TINY, hub=hub.url)), said
        assert f"{code} " in said, said
        assert "model.safetensors" in said, said


@pytest.mark.ci
def test_without_folder_cache_and_network_one_line_says_why(
    refusal, command_env, home, unreached, tiny
):
    nowhere = NOT_TAKEN.format(name=TINY, hub="http://127.0.0.1:9")
    not_taken = nowhere.replace(TINY, f"{TINY}@v1")
    assert refusal(f"{TINY}@v1").startswith(f"{not_taken}ConnectError: ")
    assert refusal(env={"HF_HUB_OFFLINE": "1"}) == f"{nowhere}HF_HUB_OFFLINE is set"
    run = "train --data a.txt --seq-len 8 --steps 1 -o run --nproc 2 --init"
    assert refusal(TINY, run).startswith(f"init: {nowhere}")  # asked once, before the ranks start
    unreached.push(TINY, tiny)
    unreached.stalled = "/api/"
    silent = {"HF_ENDPOINT": unreached.url, "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    assert "Timeout: " in refusal(env=silent)
    command_env["PYTHONPATH"] = f"{home}:{command_env['PYTHONPATH']}"
    home.mkdir(parents=True)
    (home / "huggingface_hub.py").write_text("raise ModuleNotFoundError")
    said = refusal(fresh=True)
    assert said.endswith("that needs the extra hf: in longnet's folder, pip install '.[hf]'")


@pytest.mark.ci
def test_a_damaged_cache_is_one_line_or_downloaded_again(
    model_of, refusal, command_env, home, unreached, tiny
):
    commit = fill_cache(home, TINY, tiny)
    assert "ConnectError: " in refusal(f"{TINY} --update")
    folder = home / "models--org--tiny"
    weights = folder / "snapshots" / commit / "model.safetensors"
    blob, again = weights.resolve(), f"; to download it again, remove {folder}"
    blob.write_bytes(tiny["model.safetensors"][:-100])
    said = refusal()
    assert said.startswith(f"{weights}: damaged or not a safetensors file")
    assert said.endswith(again)
    blob.write_bytes(tiny["model.safetensors"][:-1] + b"!")  # of one size: a LongNet has a digest
    assert "damaged" in refusal()
    blob.write_bytes(tiny["model.safetensors"])
    model_of(TINY)
    words = (folder / "snapshots" / commit / "tokenizer.json").resolve()
    words.write_text("{")
    for command in ("score a.txt -m", "tokenize a.txt -o tokens --tokenizer"):
        said = refusal(TINY, command, 2)
        assert "tokenizer.json: not a tokenizer.json: " in said
        assert said.endswith(again)
    words.write_bytes(tiny["tokenizer.json"])
    blob.unlink()
    (folder / "refs/main").write_text("../../elsewhere")
    assert "ConnectError: " in refusal()
    unreached.push(TINY, tiny)
    command_env["HF_ENDPOINT"] = unreached.url
    model_of(TINY)


TEXTS = "org/sentences"


@pytest.fixture(scope="module")
def made_sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not find_spec("sentence_transformers"):
        pytest.skip("not installed: pip install '.[sentence-transformers]'")
    from sentence_models import save_model

    place = tmp_path_factory.mktemp("made") / "model"
    return save_model(place, pool="max", after=("dense",), prompts={"document": "the: "})


@pytest.fixture
def sentences(
    made_sentences: Path, command_env: dict[str, str], home: Path, tmp_path: Path
) -> Path:
    """A folder of sentence-transformers, all of whose files come along, and a text of its words."""
    command_env["HF_HUB_DOWNLOAD_TIMEOUT"] = "30"
    (tmp_path / "a.txt").write_text("the long net reads a document")
    return made_sentences


def encoded(run_longnet, tmp_path: Path, model: Path | str) -> list:
    run_longnet(f"encode a.txt -m {model} -o v.arrow", code=0)
    return pa.ipc.open_file(tmp_path / "v.arrow").read_all()["embedding"].to_pylist()


@pytest.mark.ci
def test_a_hub_gives_all_that_a_folder_has(run_longnet, tmp_path, home, hub, sentences):
    wanted = encoded(run_longnet, tmp_path, sentences)
    hub.push(
        TEXTS,
        contents(sentences) | {"2_Dense/pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx"},
    )
    assert encoded(run_longnet, tmp_path, TEXTS) == wanted
    got = {*hub.downloaded()}
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"} <= got
    assert not {"2_Dense/pytorch_model.bin", "onnx/model.onnx"} & got
    hub.requests.clear()
    assert encoded(run_longnet, tmp_path, TEXTS) == wanted
    assert hub.requests == []


@pytest.mark.ci
def test_an_old_cache_is_completed_or_refused(
    run_longnet, refusal, tmp_path, home, unreached, sentences, command_env
):
    """It was filled by a program that reads no modules.json."""
    wanted = encoded(run_longnet, tmp_path, sentences)
    unreached.push(TEXTS, contents(sentences))
    cache = home / f"models--{TEXTS.replace('/', '--')}"
    snapshot = cache / "snapshots" / fill_cache(home, TEXTS, contents(sentences))
    for name in ("modules.json", "config_sentence_transformers.json", "1_Pooling/config.json"):
        (snapshot / name).unlink()
    said = refusal(TEXTS, "encode a.txt -o v.arrow -m", env={"HF_HUB_OFFLINE": "1"})
    assert said.endswith("HF_HUB_OFFLINE is set")
    command_env["HF_ENDPOINT"] = unreached.url
    assert encoded(run_longnet, tmp_path, TEXTS) == wanted


@pytest.mark.ci
def test_a_cache_that_knows_of_no_modules_is_read_offline(
    run_longnet, tmp_path, home, sentences, command_env
):
    plain = {name: data for name, data in read_folder(sentences).items() if name != "modules.json"}
    commit = fill_cache(home, TEXTS, plain)
    absent = home / f"models--{TEXTS.replace('/', '--')}" / ".no_exist" / commit / "modules.json"
    absent.parent.mkdir(parents=True)
    absent.touch()
    command_env["HF_HUB_OFFLINE"] = "1"
    done = run_longnet(f"encode a.txt -m {TEXTS} -o v.arrow", code=0)
    assert "there is no modules.json: the vector is the mean over all tokens" in done.stderr


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


def test_a_folder_needs_no_slash_unless_a_shipped_model_has_its_name(
    shipped, tmp_path, monkeypatch
):
    for name in ("mine", "longnet-tiny"):
        make_model(tmp_path / "work" / name)
    (tmp_path / "work" / "a.txt").touch()
    monkeypatch.chdir(tmp_path / "work")
    assert ModelFolder.find("mine").path == Path("mine")
    with pytest.warns(InputWarning, match="not the folder here: for that, write ./longnet-tiny"):
        assert ModelFolder.find("longnet-tiny").path == shipped / "longnet-tiny"
    assert ModelFolder.find("./longnet-tiny").path == Path("longnet-tiny")
    for name in ("longnet-tinny", "a.txt"):
        with pytest.raises(ConfigError, match=f"unknown model '{name}': no folder here"):
            model_path(name)
    monkeypatch.chdir(shipped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model_path("longnet-tiny") == shipped / "longnet-tiny"


OPENED: list[str] = []  # by the process, since the hook was added


def test_encode_reads_config_json_once(tmp_path):
    tiny_llama(tmp_path / "llama", max_position_embeddings=64)
    (tmp_path / "a.txt").write_text("a text")
    sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)
    invoke(
        f"encode {tmp_path}/a.txt -m {tmp_path}/llama -o {tmp_path}/v.arrow",
        code=0,
    )
    assert OPENED.count(str(tmp_path / "llama" / "config.json")) == 1
