"""The scripts in examples/: the corpus of the shipped model, the Llama of transformers that is trained twice, the
encoder of masked tokens, labels of slides, patterns compared on a pretrained model, plans for a
cluster, and the report of a GPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from builders import tiny_llama, tiny_model, tiny_net
from places import ROOT, imported
from processes import invoke, total
from torch.utils.flop_counter import FlopCounterMode

from longnet_cli.attention import Pattern
from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.jobs.encoding import encode
from longnet_cli.jobs.reading_plan import ReadingPlan
from longnet_cli.jobs.training.costs import step_flops, training_memory
from longnet_cli.jobs.training.recipe import Recipe, load_recipe
from longnet_cli.models.folder import ModelFolder
from longnet_cli.running.ranks.exchange import Exchange
from longnet_cli.running.ranks.ranks import Ranks, even_edges

pytestmark = pytest.mark.ci


def longnet(*arguments: str | Path) -> None:
    invoke(*arguments, code=0)


def test_the_standard_library_is_split_by_the_hash_of_a_path(tmp_path):
    script = ROOT / "examples/stdlib_corpus.py"
    subprocess.run([sys.executable, script, tmp_path / "lists"], check=True, capture_output=True)
    train = (tmp_path / "lists/train.txt").read_text().splitlines()
    held_out = (tmp_path / "lists/held_out.txt").read_text().splitlines()
    assert len(train) > 10 * len(held_out) > 0
    assert not set(train) & set(held_out)
    assert all(Path(path).stat().st_size >= 512 for path in train + held_out)
    module = imported(script)
    # the files that the demo scores, whatever Python runs it
    for name in (
        "ast.py",
        "calendar.py",
        "pydoc.py",
        "random.py",
        "sysconfig.py",
        "json/encoder.py",
        "http/server.py",
    ):
        assert module.is_held_out(name)
    assert not module.is_held_out("json/decoder.py")


def test_packages_become_long_documents_and_are_held_out_whole(tmp_path, monkeypatch):
    module = imported(ROOT / "examples/package_corpus.py")
    names = [f"package{i}" for i in range(40)]
    for name in (*names, "pip"):
        for path in ("a/one.py", "a/two.py", "b/three.py"):
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text("x = 1\n" * 30_000)
        (tmp_path / name / "b/latin.py").write_bytes(b"# \xe9\n")
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    module.main(str(tmp_path / "out"))
    found = {}
    for split in ("train", "held_out"):
        with (tmp_path / f"out/{split}.jsonl").open() as file:
            found[split] = [json.loads(line) for line in file]
    packages = {split: {row["id"].split("/")[0] for row in rows} for split, rows in found.items()}
    assert packages["held_out"] == {name for name in names if module.is_held_out(name)}
    assert packages["train"] == set(names) - packages["held_out"]
    first, second = found["train"][:2]
    assert (first["id"], second["id"]) == ("package0/a/one.py", "package0/b/three.py")
    assert first["text"].startswith("# package0/a/one.py\nx = 1\n")
    assert "# package0/a/two.py\n" in first["text"]


def test_a_wheel_becomes_a_document_from_its_middle(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        for name in (*(f"a/{i}.py" for i in range(6)), "a-1.dist-info/b.py"):
            wheel.writestr(name, f"# {name}\n" * 5_000)
    imported(ROOT / "examples/package_corpus.py").main(
        str(tmp_path / "out"), str(tmp_path / "a.whl")
    )
    (row,) = [json.loads(line) for line in (tmp_path / "out/wheels.jsonl").read_text().splitlines()]
    assert row["id"] == "a/2.py"
    assert len(row["text"]) == 86_000
    assert "\n# a/3.py\n# a/3.py\n" in row["text"]


def test_an_encoder_learns_masked_tokens(tmp_path, command_env, python):
    """The recipe at a small size: below what a net without context reaches."""
    tokens, run, held_out = tmp_path / "tokens", tmp_path / "encoder", tmp_path / "held_out"
    held_out.mkdir()
    for path in sorted((ROOT / "longnet_cli/data").rglob("*.py"))[:10]:
        shutil.copy(path, held_out)
    longnet("tokenize", ROOT / "longnet_cli", "-o", tokens, "--train-vocab", "288")
    settings = {
        "data.held_out": [str(held_out)], "train.stages": [{"seq_len": 128, "steps": 140}], "train.batch_tokens": 1024,
        "optimizer.lr": 2e-2,
    }  # fmt: skip
    command = ["train", ROOT / "examples/encoder.toml", "--data", tokens, "--tokenizer", tokens]
    for key, value in settings.items():
        command += ["--set", f"{key}={json.dumps(value)}".replace(": ", "=")]
    longnet(*command, "-o", run, "-q")
    loss = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["held_out_loss"]
    ids = np.concatenate([x.read() for x in Inputs([held_out], Tokenizer.load(tokens)).documents()])
    shares = np.unique(ids, return_counts=True)[1] / len(ids)
    assert loss < -(shares * np.log(shares)).sum()  # what a net without context cannot reach


def test_labels_of_slides_are_predicted_from_a_frozen_and_from_a_tuned_encoder(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("h5py")
    module = imported(ROOT / "examples/finetune_slides.py")
    assert module.auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == pytest.approx(
        (0.75, 0.125**0.5)
    )
    module.make(tmp_path / "made", slides=16, signal=2.0)
    made = {name: str(tmp_path / "made" / name) for name in ("features", "labels.csv", "encoder")}
    vectors = str(tmp_path / "slides.arrow")
    words = ["layers", made["features"], "--model", made["encoder"], "-o", vectors]
    monkeypatch.setattr(sys, "argv", ["finetune_slides.py", *words])
    module.main()
    fast = ["--model", made["encoder"], "--epochs", "2", "--slides-per-step", "2", "--rate", "0.5"]
    for command in (
        ["probe", vectors, made["labels.csv"]],
        ["tune", made["features"], made["labels.csv"], *fast],
    ):
        monkeypatch.setattr(
            sys, "argv", ["finetune_slides.py", *command, "--layer", "3", "--folds", "2"]
        )
        module.main()
        line = capsys.readouterr().out.splitlines()[-1]
        assert "16 slides, 8 of them positive" in line
        assert float(re.search(r"AUC ([\d.]+), standard error [\d.]+", line)[1]) > 0.8, line
    cut = tmp_path / "made/features/slide-7.h5"
    cut.write_bytes(cut.read_bytes()[:2000])
    for skip, refusal in (
        (False, rf"{cut}: cannot be read \(.*\): make it anew"),
        (True, "and 7 have the label 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["x", *command, "--folds", "8", *["--skip-bad"] * skip])
        with pytest.raises(SystemExit, match=refusal):
            module.main()
    model = module.Classifier(made["encoder"], 3, 0.1)
    scales = {}
    for (name, _), group in zip(
        model.named_parameters(), module.groups_of(model, 0.05, 0.5), strict=True
    ):
        scales[name] = group["scale"], group["weight_decay"]
    assert scales["encoder.net.cls"] == (1 / 16, 0.0)
    assert scales["encoder.net.project.weight"] == (1 / 16, 0.05)
    assert scales["encoder.net.layers.0.attention.q.weight"] == (1 / 8, 0.05)
    assert scales["encoder.net.layers.2.ffn_norm.weight"] == (1 / 2, 0.0)
    assert scales["head.weight"] == (1, 0.05)
    assert [module.rate_at(epoch, 5) for epoch in (0.5, 1, 3, 5)] == pytest.approx([0.5, 1, 0.5, 0])


def test_a_llama_learns_densely_and_dilated(tmp_path, run_python, python):
    """The script at a small size: both losses fall, side by side, and what it saves is what the commands take."""
    pytest.importorskip("transformers")
    tokens, output, steps = tmp_path / "tokens", tmp_path / "run", 10
    longnet("tokenize", ROOT / "examples", "-o", tokens, "--train-vocab", "512")
    script = ROOT / "examples/hf_llama.py"
    size = ["--tokens", tokens, "--steps", str(steps), "--context", "128"]
    done = run_python(script, output, *size, python=python)
    rows = [json.loads(line) for line in (output / "curves.jsonl").read_text().splitlines()]
    assert [(row["attention"], row["step"]) for row in rows] == [
        (name, step) for step in range(1, steps + 1) for name in ("dense", "dilated")
    ]
    for name in ("dense", "dilated"):
        curve = [row["loss"] for row in rows if row["attention"] == name]
        assert sum(curve[-3:]) < sum(curve[:3]) - 0.4
    assert len(done.stdout.splitlines()) == 1 + steps + 1
    assert "dense / dilated = " in done.stdout.splitlines()[-1]

    dilated = ModelFolder(output / "dilated").net().config.pattern
    assert dilated.segment_lengths == (8, 16, 32, 64, 128)
    assert ModelFolder(output / "dense").net().config.pattern == Pattern.dense()


def test_both_llamas_begin_with_the_same_weights():
    pytest.importorskip("transformers")
    build = imported(ROOT / "examples/hf_llama.py").build
    dense, dilated = (build(100, 4096, 0, is_dilated) for is_dilated in (False, True))
    for name, tensor in dense.state_dict().items():
        assert tensor.equal(dilated.state_dict()[name])
    assert dilated.config.dilated_attention["segment_lengths"] == [256, 512, 1024, 2048, 4096]
    assert dense.config._attn_implementation == "sdpa"


def test_patterns_are_compared_on_a_pretrained_model(tmp_path, run_python):
    """In windows of what the model was trained on, dense; a document as one otherwise. One process per pattern."""
    tiny_llama(tmp_path / "llama", max_position_embeddings=64, bos_token_id=7)
    (tmp_path / "a.txt").write_text("some text " * 30)
    (tmp_path / "b.txt").write_text("another text " * 30)
    words = "./llama a.txt b.txt --tokens 200 dense window:16,sinks=2"
    done = run_python(ROOT / "examples/compare_patterns.py", *words.split())
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["pattern"], row["document"], row["from"], row["tokens"]) for row in rows[3:8]] == [
        ("dense", "b.txt", 0, 10), ("dense", "b.txt", 10, 90), ("dense", "b.txt", 100, 100),
        ("window:16,sinks=2", "a.txt", 0, 10), ("window:16,sinks=2", "a.txt", 10, 90),
    ]  # fmt: skip
    (tmp_path / "first.txt").write_text(("some text " * 30)[:200])
    alone = total(tmp_path / "first.txt", "--model", tmp_path / "llama", "--context", 64)
    assert sum(row["nats"] for row in rows[:3]) == pytest.approx(alone["nll_sum"], rel=1e-6)
    table = [line for line in done.stderr.splitlines() if line.startswith("| `")]
    assert [line.split(" | ")[0] for line in table] == ["| `dense`", "| `window:16,sinks=2`"]


def gpu_report(
    env: dict[str, str], *arguments: str | Path, python: str | Path = sys.executable
) -> subprocess.CompletedProcess:
    command = [python, ROOT / "examples/gpu_report.py", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def machine_with(names: Iterable[str], folder: Path) -> Path:
    """A Python that has these packages alone, without copies. Return its path."""
    venv.create(folder, with_pip=False)
    (there,) = folder.glob("lib/python*/site-packages")
    for name in names:
        files = importlib.metadata.files(name)
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            (there / top).symlink_to(files[0].locate().parents[len(files[0].parts) - 1] / top)
    return folder / "bin/python"


def wheels_of(names: Iterable[str], folder: Path) -> None:
    """Make wheels of packages that are installed here."""
    folder.mkdir()
    for name in names:
        package = importlib.metadata.distribution(name)
        label = f"{re.sub('[-_.]+', '_', name)}-{package.version}"
        with zipfile.ZipFile(folder / f"{label}-py3-none-any.whl", "w") as wheel:
            for file in package.files:
                if file.parts[0] != ".." and "__pycache__" not in file.parts:
                    wheel.write(file.locate(), file)


def test_the_report_of_a_gpu_is_whole(tmp_path, command_env, monkeypatch):
    """On the CPU, in tiny sizes: every section, every figure, and the tests of a GPU themselves.

    As on a machine that has torch, this checkout and wheels, but no package index, and that has not installed us.
    """
    monkeypatch.syspath_prepend(ROOT / "examples")
    there = importlib.import_module("gpu_report").requirements("torch", "numpy", "pyarrow", "pip")
    python = machine_with(there, tmp_path / "machine")
    needs = gpu_report(command_env, "--needs").stdout.split()
    names = {need.partition("==")[0] for need in needs}
    assert {"pydantic", "typer", "pytest"} < names
    assert not names & {"torch", "sympy", "longnet-cli"}
    wheels_of(names - there, tmp_path / "wheels")
    env = {name: value for name, value in command_env.items() if name != "PYTHONPATH"} | {
        "PIP_NO_INDEX": "1"
    }
    done = gpu_report(
        env, "--small", "--wheels", tmp_path / "wheels", "-o", tmp_path / "gpu.md", python=python
    )
    report = (tmp_path / "gpu.md").read_text()
    assert (done.returncode, done.stdout) == (0, ""), done.stderr + report
    assert re.search(r"^Nothing failed\.$", report, re.MULTILINE)
    parts = dict(part.split("\n", 1) for part in report.split("\n## ")[1:])
    titles = ["The machine", "Is it right?", "Where the time goes", "Attention", "A billion tokens"]
    assert [*parts] == [*titles, "Training longnet-125m"]
    assert "| longnet-cli | not installed |" in parts["The machine"]
    assert re.search(r"takes [\d.,]+ ms\.\n", parts["Where the time goes"])
    assert re.search(
        r"\n\| `aten::[^`]*attention[^`]*` \| \d+ \| [\d.]+ \| \d+ % \|\n",
        parts["Where the time goes"],
    )
    assert re.search(
        r"\n\| \*\*chosen\*\* \| cpu_flash \| cpu_flash \| cpu_flash \|\n", parts["The machine"]
    )
    passed, failed = map(int, re.findall(r"(\d+) (?:passed|failed)", parts["Is it right?"]))
    assert passed >= 10
    assert failed == 0
    for title, rows in (("Attention", 4), ("A billion tokens", 1), ("Training longnet-125m", 2)):
        started = "python examples/gpu_report.py --train 128 256" if rows == 2 else "longnet bench"
        assert parts[title].startswith(f"\n    {started} ")
        _, _, *lines = [line for line in parts[title].splitlines() if line.startswith("|")]
        assert len(lines) == rows
        cells = [cell.strip() for line in lines for cell in line.strip("|").split("|")]
        assert title == "Training longnet-125m" or all(cells)
        assert "- " not in parts[title].split("|---")[-1], "a row was not measured"


def test_predictions_are_judged(tmp_path, monkeypatch):
    """Each is an interval within a factor of two, of a number that some step of the report has."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    script = importlib.import_module("gpu_report")
    steps = {step.title: step for step in script.steps(True, tmp_path)}
    for card, of_card in json.loads(script.PREDICTED.read_text())["cards"].items():
        for row in of_card["rows"]:
            low, high = row.pop("low"), row.pop("high")
            assert 0 < low < high <= 2 * low
            step, field = steps[row.pop("step")], row.pop("field")
            for found, verdict in (
                (low, "inside"),
                (high, "inside"),
                (1.01 * high, "OUTSIDE"),
                (0.99 * low, "OUTSIDE"),
            ):
                lines = script.judged(
                    step.title, [{**row, field: found}], f"1 x NVIDIA {card} 80GB"
                )
                assert verdict in lines[1]
    assert script.judged("Attention", [{"seconds": 1.0}], "another card") == []


def test_what_the_time_does_not_allow_is_named(tmp_path, command_env):
    done = gpu_report(command_env, "--small", "--minutes", "0", "-o", tmp_path / "gpu.md")
    assert done.returncode == 1
    assert (tmp_path / "gpu.md").read_text().count(": not run, the time was over") == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_line(tmp_path, command_env):
    done = gpu_report(command_env, "-o", tmp_path / "gpu.md")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "there is no device 'cuda' here" in done.stderr
    assert not (tmp_path / "gpu.md").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_notebook_of_a_first_run(tmp_path, monkeypatch, capsys):
    """Up to where it needs a GPU, and without its installing."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in json.loads((ROOT / "examples/gpu_first_run.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code" and not cell["metadata"]:
            exec("".join(cell["source"]).replace('SOURCE = ""', f"SOURCE = {str(ROOT)!r}"), names)
    assert capsys.readouterr().out == "There is no GPU.\n"


SMALL = {
    "model": {"vocab_size": 100, "dim": 64, "num_layers": 2, "num_heads": 4, "ffn_dim": 192, "position": "rope",
              "segment_lengths": [64, 256, 1024], "dilation_rates": [1, 2, 8]},
    "train": {"stages": [{"seq_len": 1024, "steps": 3}], "batch_tokens": 4096},
}  # fmt: skip
MACHINE = """
device = "cpu"
dtype = "fp32"
devices = 4
node = 2
measured = { products = 1e10, attention = 1e10, attention_backward = 2e10, bandwidth = 1e9, memory = 1e9 }
others = { node_link = 1e9, network = 1e8 }
assumed = { share = 0.5, message = 1e-4, host_link = 1e9, disk = 1e9, reserved = 0 }
"""


def small_recipe(**changes: object) -> Recipe:
    keys = {f"{table}.{key}": value for table, keys in SMALL.items() for key, value in keys.items()}
    return load_recipe(None, keys | changes)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("cluster")


def test_a_plan_for_a_cluster_adds_up(cluster, tmp_path):
    (tmp_path / "own.toml").write_text(MACHINE)
    machine = cluster.find_machine(str(tmp_path / "own.toml"))
    plans = cluster.training_plans(small_recipe(), machine)
    assert len(plans) == 3 * 2 * 2  # meshes, shards, activation_checkpointing
    totals = [float(f"{plan.total:.3g}") for plan in plans]
    assert totals == sorted(totals)
    tied = [
        replace(plan, total=total)
        for plan, total in zip(plans, itertools.cycle((1.001, 1.0)), strict=False)
    ]
    assert cluster.ordered(tied) == tied
    for plan in plans:
        seen = sum(plan.seconds.values()) - plan.seconds[cluster.HIDDEN]
        assert plan.total == pytest.approx(3 * seen)
        crossing = plan.seconds["exchange"] + plan.seconds[cluster.HIDDEN]
        assert (crossing > 0) == ("--sp 1 " not in plan.options)
    alone = next(plan for plan in plans if plan.options == "--sp 1 --dp 4 --chunk 1Ki --shard none")
    ranks = Ranks(0, 4, 1)
    work = step_flops(small_recipe(**{"train.chunk": 1024}), small_recipe().train.stages[0], ranks)
    # a window for each rank
    assert alone.seconds["matrix products"] == pytest.approx(work.products * 1024 / 5e9)
    assert alone.seconds["attention"] == pytest.approx(
        (work.attention + work.attention_backward / 2) * 1024 / 1e10
    )
    # over the network, in a ring
    crossed = 2 * 3 / 4 * 4 * small_recipe().model.num_parameters() / 1e8
    assert alone.seconds["weights"] == pytest.approx(crossed + 40 * 1e-4)
    kinds = training_memory(small_recipe(**{"train.chunk": 1024}), torch.device("cpu"), ranks)
    for kind in {*kinds, *alone.memory}:
        assert alone.memory.get(kind, 0) == kinds.get(kind, 0)
    named = {
        "parallel.sp": 4,
        "parallel.shard": "none",
        "train.chunk": 256,
        "train.activation_checkpointing": False,
    }
    (shared,) = cluster.training_plans(small_recipe(**named), machine)
    exchange = Exchange(small_recipe().model, even_edges(0, 1024, 4), rank=3)
    *far, near, _ = exchange.sizes(exchange.received, (1, 0, 4, 16))
    seconds = max(4 * near / 1e9, 4 * sum(far) / 1e8) + 3e-4
    crossing = shared.seconds["exchange"] + shared.seconds[cluster.HIDDEN]
    assert crossing == pytest.approx(4 * 2 * 2 * seconds)  # windows, layers, directions
    assert shared.memory["far rows"] == 2 * 4 * (near + sum(far))
    with pytest.raises(ConfigError, match="dp x sp is any x 3, and there are 4 devices"):
        cluster.training_plans(small_recipe(**{"parallel.sp": 3}), machine)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("h10x8", "", "known are h100xN, h200xN, a100xN, and .toml files"),
        ("own.toml", MACHINE.replace("disk = 1e9, ", ""), "disk: each of products, "),
        ("own.toml", MACHINE + "data_sheet = { network = 1e9 }", "network: each of products, "),
        ("own.toml", MACHINE.replace("1e10", "-1"), "rates must be positive"),
    ],
)
def test_a_wrong_machine_of_a_cluster_is_named(cluster, name, text, message, tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        cluster.find_machine(str(path) if text else name)


@pytest.mark.parametrize(
    "pattern", [Pattern((128,), (1,)), Pattern.window(32), Pattern((32,), (1,))]
)
def test_a_cluster_counts_keys_twice_where_chunks_see_each_other(cluster, pattern):
    net = tiny_net(causal=False, position="rope", **vars(pattern)).eval()
    net(torch.zeros(1, 4, dtype=torch.int64))  # the first pass tries the kernel, by products
    reading = ReadingPlan(net.config, 64)
    reading.add([(500, 0)])
    with FlopCounterMode(display=False) as counter:
        encode(net, [Document("0", np.full(500, 5), 500, "0.txt")], chunk=64).read_all()
    counted = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)
    )
    again = 500 * cluster.keys_again(net.config, 500, 64)
    assert reading.flops() - reading.attention_flops() + again == pytest.approx(counted, rel=1e-6)


def test_the_commands_of_a_cluster(cluster, tmp_path, monkeypatch, capsys):
    """A calibrated machine is planned for; ranks share a document."""

    def run(*words: str) -> str:
        cluster.app(words, standalone_mode=False)
        return capsys.readouterr().out

    monkeypatch.setattr(cluster, "SECONDS", 0.0)  # four runs of each
    here = str(tmp_path / "here.toml")
    assert run("calibrate", here, "--device", "cpu") == f"1 x cpu -> {here}\n"
    assert 1e7 < cluster.find_machine(here).rates["products"] < 1e14
    assert "the fastest of 2 that fit, of 2" in run(
        "plan", "longnet-tiny", "--on", here, "--set", "train.dtype=fp32"
    )
    training = run(
        "plan", "longnet-125m", "--on", "h100x8", "--set", 'train.stages=[{seq_len="64Ki",steps=1}]'
    )
    assert "train longnet-125m -o run --data DATA --tokenizer TOKENIZER --set" in training
    assert "links tokens at most 32,768 apart, and sequences have 65,536" in training
    reading = "plan --model longnet-tiny --tokens 4Mi --pattern geometric:4Mi --on"
    plans = [run(*reading.split(), f"h100x{n}") for n in (1, 2, 16)]
    one, two, _ = (float(re.search(r"matrix products +([\d.]+) ms", plan)[1]) for plan in plans)
    assert one == pytest.approx(2 * two, rel=0.01)
    pattern = "geometric:4Mi,base=2Ki,ratio=2"
    asked = f" score DOCUMENTS --model longnet-tiny --pattern {pattern} -o rows --sp "
    assert [
        re.search(rf"\n\n(.*){asked}", plan)[1].removesuffix(" -m longnet_cli") for plan in plans
    ] == [
        "longnet",
        "torchrun --standalone --nproc-per-node 2",
        "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 8",
    ]
    short = run("plan", "--model", "longnet-tiny", "--tokens", "16Ki", "--on", "h100x8")
    assert "7 of 8 devices have nothing to read" in short


def test_a_plan_that_does_not_fit_names_an_option_that_would(cluster, tmp_path, capsys):
    (tmp_path / "own.toml").write_text(MACHINE)
    encoder = tiny_model(tmp_path / "encoder", causal=False, position="rope")
    for length, said in (("4Mi", ": --spill would"), ("16Mi", ", nor with --spill")):
        sets = (
            f'train.stages=[{{seq_len="{length}",steps=1}}]',
            f"train.batch_tokens={length}",
            "model.position=rope",
        )
        pattern = "model.pattern=dense"
        words = [word for setting in (*sets, pattern) for word in ("--set", setting)]
        assert (
            cluster.app(["plan", "longnet-125m", "--on", "h100x1", *words], standalone_mode=False)
            == 5
        )
        assert f"none of 2 fits{said}\n" in capsys.readouterr().out
    for model, on, words, said in (
        (encoder, tmp_path / "own.toml", (), "none of 3 fits: --spill would\n"),
        (
            "longnet-tiny",
            "h100x1",
            ("--pattern", "dense"),
            "none of 1 fits: --pattern window:1Ki would\n",
        ),
        (encoder, tmp_path / "own.toml", ("--spill",), "the fastest of 3 that fit, of 3\n"),
    ):
        command = ["plan", "--model", str(model), "--tokens", "64Mi", "--on", str(on), *words]
        assert cluster.app(command, standalone_mode=False) == (5 if "none" in said else None)
        assert said in capsys.readouterr().out
