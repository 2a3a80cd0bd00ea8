"""Every option of the app and every key of a recipe does something: what, the table in `every_option.py` says.

Either it changes the rows, or it leaves them as they are and changes something else, which is seen: files, streams,
exit codes, memory, processes. The table has exactly the options that the app has, and the keys that a recipe has.
Another table there has the ways to the same rows: chunks, disks, ranks, shards, formats, pipes.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
import torch
import typer
from builders import official_slide_state, slide_encoder, slide_table, tiny_llama, tiny_net
from conftest import environment
from every_option import OPTIONS, RECIPE, SAME
from files import write_file, write_rows
from forked import Forked
from loopback_hub import LoopbackHub, fill_cache, loopback_hub, read_folder
from pydantic import BaseModel
from safetensors import safe_open

from longnet_cli.cli.app import app
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.data.files.manifest import read_manifest
from longnet_cli.jobs.training.recipe import LoraRecipe, Recipe

# options of typer, which change a shell's start, and the short help
TYPERS = {"--install-completion", "--show-completion", "-h"}
ALONE = ("memory", "compiled")  # what is seen of a process that does nothing else
EXTRAS = {"p.svg": "matplotlib", "metrics.jsonl": "matplotlib", "lora.": "peft"}
EXTRAS |= {"/llama": "transformers", "/encoder": "transformers", "org/tiny": "huggingface_hub"}
LEAST = {"memory": 10 << 10, "cpu": 0.3}  # KiB, seconds
APART = 1e-3  # relative; numbers that are closer are rounded in another way
CLOSE = 1e-5  # numbers of another cut into chunks or ranks are this close
MEASURED = re.compile(r"seconds|_per_second|peak_|mfu|bytes_per")

# Runs commands in one process, each in its folder, and writes what they did.
RUN = """
import json, os, sys, time
from functools import cache
from typer import testing
from longnet_cli.cli.app import app

seen = []

def look(event, args):
    if event == "open" and isinstance(args[0], str):
        if (place := os.path.relpath(args[0])).startswith("../in/"):
            seen.append(("opened", place))
    elif event == "socket.connect":
        seen.append(("asked", str(args[1])))

sys.addaudithook(look)
testing._get_command = cache(testing._get_command)  # which takes as long as a small command
for run in json.load(open(sys.argv[1])):
    os.chdir(run["folder"])
    seen.clear()
    began = time.process_time()
    done = testing.CliRunner().invoke(app, run["args"])
    found = {kind: sorted({what for other, what in seen if other == kind}) for kind in ("opened", "asked")}
    error = done.exception if not isinstance(done.exception, SystemExit) else None
    found |= {"code": getattr(error, "exit_code", 1) if error else done.exit_code, "error": repr(error)}
    found |= {"stdout": done.stdout_bytes.decode("latin-1"), "stderr": done.stderr}
    found["cpu"] = time.process_time() - began
    found["compiled"] = "torch._inductor.codecache" in sys.modules
    found["memory"] = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    with open(run["folder"] + ".json", "w") as file:
        json.dump(found, file)
"""


class Row(NamedTuple):
    """A row of the table: an option, what differs, and the words of its two runs."""

    option: str
    differs: str
    one: list[str]
    other: list[str]


def rows_of(text: str, command: str) -> list[Row]:
    common, *lines = text[1:].split("\n")
    found = []
    for line in filter(None, lines):
        option, differs, rest = line.split(None, 2)
        values, _, own = rest.partition(" @ ")
        runs = (f"{own or common} {value}" for value in (*values.split(" | "), "")[:2])
        found.append(Row(option, differs, *([*command.split(), *shlex.split(run)] for run in runs)))
    return found


TABLE = {command: rows_of(text, command) for command, text in OPTIONS.items()} | {
    "recipe": rows_of(RECIPE, "train")
}


def options_of(group: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(command, its longest name) of each option of the app."""
    for option in group.params:
        if option.param_type_name == "option" and not TYPERS.intersection(option.opts):
            yield name, max(option.opts, key=len)
    for word, command in getattr(group, "commands", {}).items():
        yield from options_of(command, f"{name} {word}".strip())


def keys_of(model: type[BaseModel], name: str) -> Iterator[str]:
    """The keys of a recipe: those of its tables and of the tables in its lists."""
    for key, info in model.model_fields.items():
        kinds = [
            kind
            for kind in parts_of(info.annotation)
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        for kind in kinds:
            yield from keys_of(kind, f"{name}{key}.")
        if not kinds:
            yield f"{name}{key}"


def parts_of(kind: Any) -> Iterator[Any]:
    yield kind
    for part in get_args(kind):
        yield from parts_of(part)


def test_the_table_has_every_option_and_every_key():
    listed = [
        (command, row.option)
        for command, rows in TABLE.items()
        for row in rows
        if command != "recipe"
    ]
    assert sorted(listed) == sorted(options_of(typer.main.get_command(app)))
    keys = [*keys_of(Recipe, ""), *keys_of(LoraRecipe, "lora.")]
    assert sorted(row.option for row in TABLE["recipe"]) == sorted(keys)


@dataclass
class Outcome:
    """What a run did; `rows` by where they are, stdout or a kind of file."""

    code: int
    stdout: str
    stderr: str
    error: str = ""
    opened: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    memory: int = 0
    cpu: float = 0.0
    compiled: bool = False
    processes: int = 0
    pieces: int = 0
    files: list[str] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)

    def read(self, folder: Path) -> Outcome:
        """Add what is in the run's folder and on stdout."""
        self.files = sorted(
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
        )
        for name in self.files:
            if "checkpoints/" in name and name.endswith(".safetensors"):
                with safe_open(folder / name, "pt") as file:
                    self.pieces += len(file.keys())
            if not re.search(r"checkpoints/|best/|recipe.json|_manifest", name):
                found, types = read_file(folder / name)
                self.types |= types
                if name.endswith("metrics.jsonl"):
                    peaks = (
                        json.loads(line)["peak_memory_bytes"] for line in (folder / name).open()
                    )
                    self.memory = max(self.memory, *(peak // 1024 for peak in peaks))
                if found is not None:
                    kind = "tensors" if isinstance(found, dict) else "file"
                    self.rows[kind] = [
                        *self.rows.get(kind, []),
                        *(found if kind == "file" else found.items()),
                    ]
        lines = self.stdout.splitlines() if self.stdout[:1] in ("{", "[") else []
        if lines:
            whole = self.stdout.startswith("{\n") or self.stdout.startswith("[")
            self.rows["stdout"] = [
                *flat(json.loads(self.stdout) if whole else [*map(json.loads, lines)])
            ]
        return self


def read_file(path: Path) -> tuple[Any, dict[str, str]]:
    """The rows or tensors of a file, and their types; None for other files."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        types = {name: str(tensor.dtype) for name, tensor in tensors.items()}
        return {name: tensor.double().flatten().tolist() for name, tensor in tensors.items()}, types
    if path.suffix in (".arrow", ".parquet"):
        table = ipc.open_file(path).read_all() if path.suffix == ".arrow" else pq.read_table(path)
        rows = table.to_pylist()
        if "logprobs" in table.column_names:  # a document's rows are those of its chunks
            lists = [name for name in table.column_names if isinstance(rows[0][name], list)]
            rows = [{name: [token for row in rows for token in row[name]] for name in lists}]
        return rows, {each.name: str(each.type) for each in table.schema}
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        # Other formats have no row of totals
        return [*flat([row for row in rows if row.get("kind") != "total"])], {}
    if path.name == "config.json":
        return [json.loads(path.read_text())], {}
    return None, {}


def flat(value: Any) -> Iterator[Any]:
    """The rows of JSON: of a list, and of documents and totals; without what says which of both they are."""
    for row in value if isinstance(value, list) else [value]:
        if "documents" in row and "total" in row:
            yield from flat([*row["documents"], *row.get("totals", [row["total"]])])
        else:
            flops = (
                {"flops": round(row["flops_per_second"] * row["seconds"])}
                if row.get("flops_per_second")
                else {}
            )
            yield {
                key: x for key, x in row.items() if key != "kind" and not MEASURED.search(key)
            } | flops


def apart(one: Any, other: Any, near: float = APART) -> bool:
    """Whether they differ by more than rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() != other.keys() or any(apart(one[key], other[key], near) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return True
        if one and all(isinstance(x, float) for x in (*one, *other)):
            return bool(np.linalg.norm(np.subtract(one, other)) > near * np.linalg.norm(one))
        return any(apart(x, y, near) for x, y in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) > near * max(abs(one), abs(other))
    return one != other


class Runs:
    """Runs commands in folders beside `in`."""

    def __init__(self, folder: Path, forked: Forked, hub: LoopbackHub) -> None:
        self.folder, self.forked, self.count = folder, forked, 0
        self.env = environment() | {"OMP_NUM_THREADS": "1"}
        self.hub_env = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": hub.url}

    def prepare(self, words: list[str], recipe: dict[str, Any] | None = None) -> dict[str, Any]:
        """Make the folder of a run, and return its job."""
        self.count += 1
        folder = self.folder / f"{self.count}"
        folder.mkdir()
        for word in [word for word in words if word.startswith("+")]:
            shutil.copytree(self.folder / "start" / word[1:], folder / word[1:])
        given = [word[1:] for word in words if word.startswith("<")]
        args = [word for word in words if not word.startswith(("+", "<"))]
        if recipe is not None:
            for word in [word for word in args if "=" in word]:
                assign(recipe, word)
            (folder / "recipe.json").write_text(json.dumps(recipe))
            args = [
                "train",
                "recipe.json",
                "-o",
                "run",
                *(word for word in args[1:] if "=" not in word),
            ]
        return {
            "folder": str(folder),
            "args": args,
            "stdin": str(folder / given[0]) if given else os.devnull,
        }

    def together(self, jobs: list[dict[str, Any]], **env: str) -> list[Outcome]:
        """Run the jobs one after the other in one process."""
        path = self.folder / f"jobs-{self.count}.json"
        path.write_text(json.dumps(jobs))
        command = [self.forked.python, "-c", RUN, path]
        done = subprocess.run(
            command, env=self.env | env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return [
            Outcome(**json.loads(Path(job["folder"] + ".json").read_text())).read(
                Path(job["folder"])
            )
            for job in jobs
        ]

    def real(self, job: dict[str, Any]) -> Outcome:
        """Run one as a command, and count its processes."""
        folder, most = Path(job["folder"]), 0
        streams = [folder.parent / f"{folder.name}.{name}" for name in ("out", "err")]
        with streams[0].open("w") as out, streams[1].open("w") as err, open(job["stdin"]) as given:
            command = [self.forked.longnet, *job["args"]]
            process = subprocess.Popen(
                command, cwd=folder, env=self.env, stdin=given, stdout=out, stderr=err
            )
            while (code := process.poll()) is None:
                most = max(most, sum(place == str(folder.resolve()) for place in working_folders()))
                time.sleep(0.02)
        texts = [stream.read_text() for stream in streams]
        return Outcome(code, *texts, processes=most).read(folder)


def working_folders() -> Iterator[str]:
    for place in Path("/proc").glob("[0-9]*/cwd"):
        try:
            yield os.readlink(place)
        except OSError:
            continue


def assign(recipe: dict[str, Any], word: str) -> None:
    """Set a key of a recipe; null removes it."""
    path, _, text = word.partition("=")
    try:
        value = json.loads(text)
    except ValueError:
        value = text[1:-1].split(",") if text.startswith("[") else text
    *tables, key = path.split(".")
    for name in tables:
        recipe = recipe.setdefault(name, {})
    if value is None:
        recipe.pop(key, None)
    else:
        recipe[key] = value


BASE_RECIPE = {
    "model": {"dim": 8, "num_layers": 1, "num_heads": 2, "ffn_dim": 8, "segment_lengths": [8, 16]}
    | {"dilation_rates": [1, 2], "position": "rope"},
    "data": {"train": ["../in/t.txt"]},
    "optimizer": {"lr": 0.01},
    "schedule": {"warmup_steps": 1},
    "train": {
        "stages": [{"seq_len": 16, "steps": 3}],
        "batch_tokens": 32,
        "log_every": 1,
        "chunk": 16,
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, forked: Forked) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("every_option")
    with loopback_hub() as hub:
        runs = Runs(folder, forked, hub)
        make_inputs(folder / "in")
        tiny = {
            name: data
            for name, data in read_folder(folder / "in/native").items()
            if name != "chat_template.jinja"
        }
        commit = fill_cache(folder / "hf/hub", "org/tiny", tiny)
        assert hub.push("org/tiny", tiny) == commit
        make_outputs(runs)
        yield runs


def make_inputs(folder: Path) -> None:
    """Texts, tables, tokenizers and models."""
    (folder / "spill").mkdir(parents=True)
    texts = [
        "the quick brown fox jumps over the lazy dog. " * 4,
        "AAA, a bear: " * 9 + "it walked away, far away",
    ]
    for name, text in zip("tu", texts, strict=True):
        (folder / f"{name}.txt").write_text(text)
    (folder / "long.txt").write_text(
        "".join(f"{n} green bottles, " for n in range(5000))[: 1 << 14 | 1]
    )
    lines = [
        f"{word} {texts[n % 2][n : 40 + n]}"
        for n, word in enumerate(["one", "two", "three", "four", "five"])
    ]
    rows = [
        {"id": f"{n}", "name": f"n{n}", "group": n // 2, "text": line, "body": f"{n} {line[::-1]}"}
        for n, line in enumerate(lines)
    ]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "rows.parquet", rows)
    ids = [[*text.encode()] for text in texts]
    write_file(folder / "ids.arrow", pa.table({"doc_id": ["t.txt", "u.txt"], "input_ids": ids}))
    kept = {
        "maps": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
        "bytes": [b"\xff\0", None],
    }
    kept |= {
        "large": pa.array([2**64 - 1, None], pa.uint64()),
        "times": pa.array([0, None], pa.timestamp("s")),
    }
    pq.write_table(
        pa.table({"doc_id": ["a", "b"], "input_ids": ids, **kept}), folder / "kept.parquet"
    )
    places = {"char_start": [0, 0], "char_end": [len(text.strip()) for text in texts]}
    vectors = pa.array([[1.0] * 16, [-1.0] * 16], pa.list_(pa.float32(), 16))
    table = pa.table({"doc_id": ["t.txt", "u.txt"], **places, "embedding": vectors})
    facts = {"longnet.model": "../in/native", "longnet.pooling": "mean"}
    write_file(folder / "passages.arrow", table.replace_schema_metadata(facts))
    (folder / "bad.jsonl").write_text('{"text": "good enough"}\n{"text": 5}\n')
    ids = pa.array([*b"some wordsAmore wordsAthe endB"], pa.int32())
    pq.write_table(pa.table({"ids": ids}), folder / "flat.parquet")
    write_rows(folder / "questions.jsonl", [{"question": "fox"}, {"question": "dog"}])
    write_rows(
        folder / "metrics.jsonl", [{"step": n, "loss": 5 - n, "lr": 0.1} for n in range(1, 4)]
    )
    slides = [slide_table(tiles, name=name) for name, tiles in {"s": 40, "t": 131, "u": 1}.items()]
    pq.write_table(pa.concat_tables(slides), folder / "slide.parquet")
    other = Tokenizer.train([texts * 9], 265)
    other.save(folder / "other.json")
    for name, changes in (("native", {}), ("init", {"num_layers": 1}), ("both", {"causal": False})):
        net = tiny_net(**{"vocab_size": 280, "position": "rope"} | changes)
        for p in net.parameters():  # initial weights are so small that options would hardly show
            p.data.mul_(4 if p.dim() > 1 else 1)
        net.save_pretrained(folder / name, Tokenizer.bytes().to_json())
    (folder / "native/chat_template.jinja").write_text("{{ messages[-1].content }} Answer: ")
    slide_encoder().save_pretrained(folder / "slide")
    torch.save({"model": official_slide_state()}, folder / "slide.pth")
    if find_spec("transformers"):
        tiny_llama(folder / "llama", hidden_size=8, intermediate_size=8, num_attention_heads=2)
        from sentence_models import net, word_pieces

        net("bert", word_pieces().get_vocab_size()).save_pretrained(folder / "encoder")
        word_pieces().save(str(folder / "encoder/tokenizer.json"))


def make_outputs(runs: Runs) -> None:
    """What commands have written: a run, a state, log-probabilities, folders that are not finished."""
    start = runs.folder / "start"
    start.mkdir()
    read = "../in/t.txt ../in/u.txt -m ../in/native"
    lines = [
        f"score {read} --context 4 --token-logprobs short.arrow",
        f"score {read} --token-logprobs long.arrow",
        "generate some -m ../in/native -n 1 --save-state state",
        "train ../in/recipe.json -o run --seq-len 16 --steps 2",
        "tokenize ../in/t.txt ../in/u.txt -o tokens --shard-tokens 20",
        f"score {read} -o gains --shard-tokens 20",
        f"encode {read} -o vectors --shard-rows 1",
    ]
    (runs.folder / "in/recipe.json").write_text(json.dumps(BASE_RECIPE))
    done = runs.together([{"folder": str(start), "args": line.split()} for line in lines])
    assert [each.code for each in done] == [0] * len(lines), [each.error for each in done]
    for name in ("tokens", "gains", "vectors"):  # as if the last shard had not been written
        manifest = read_manifest(start / name)
        manifest.shards.pop()
        (start / name / "_unfinished.json").write_text(manifest.to_json())
        (start / name / "_manifest.arrow").unlink()


def differing(row: Row, one: Outcome, other: Outcome) -> bool:
    if row.differs in LEAST:
        return getattr(one, row.differs) - getattr(other, row.differs) > LEAST[row.differs]
    if row.differs in ("opened", "asked"):  # by the first run alone
        return len({*getattr(one, row.differs)} - {*getattr(other, row.differs)}) > 0
    if row.differs == "nothing":
        return (one.stdout, one.stderr, one.files) == (other.stdout, other.stderr, other.files)
    if row.differs == "rows":
        return apart(one.rows, other.rows)
    return getattr(one, row.differs) != getattr(other, row.differs)


def missed(row: Row, one: Outcome, other: Outcome) -> str | None:
    """What is not as the row says, with what was seen of both values."""
    values = " and ".join(shlex.join(words) for words in (row.one, row.other))
    if row.differs != "code" and (
        failed := [run for run in (one, other) if run.code not in (0, 6)]
    ):
        return f"{row.option}: {values}: exit code {failed[0].code}: {failed[0].error} {failed[0].stderr[-300:]}"
    if not differing(row, one, other):
        seen = (str(getattr(run, row.differs, ""))[:200] for run in (one, other))
        return f"{row.option}: {values}: no difference in {row.differs}: {' and '.join(seen)}"
    if row.differs not in ("rows", "code"):
        changed = [
            place
            for place in one.rows.keys() & other.rows.keys()
            if apart(one.rows[place], other.rows[place])
        ]
        if changed:
            return f"{row.option}: {values}: other rows in {', '.join(changed)}"
    return None


def starts_ranks(words: list[str]) -> bool:
    return not {"--nproc", "--sp", "--dp"}.isdisjoint(words)


def kind_of(row: Row) -> str:
    """How the runs of a row are run."""
    if row.differs == "processes" or starts_ranks(row.one):
        return "real"
    return "alone" if row.differs in ALONE else "asked" if row.differs == "asked" else "together"


def extras_of(line: str) -> list[str]:
    return [extra for word, extra in EXTRAS.items() if word in line]


@pytest.mark.parametrize(
    "kinds_of_runs",
    [
        pytest.param(("together", "asked"), marks=pytest.mark.ci),
        pytest.param(("alone", "real"), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("command", TABLE)
def test_every_option_does_something(command, kinds_of_runs, runs):
    """All rows that fail are said together. What several rows run is run once. Processes of their own are slow."""
    rows = [
        row
        for row in TABLE[command]
        if kind_of(row) in kinds_of_runs and all(map(find_spec, extras_of(shlex.join(row.one))))
    ]
    kinds = {
        (kind_of(row), shlex.join(words)): words for row in rows for words in (row.one, row.other)
    }
    found: dict[tuple[str, str], Outcome] = {}
    for kind in dict.fromkeys(kind for kind, _ in kinds):
        lines = [line for line in kinds if line[0] == kind]
        jobs = [
            runs.prepare(kinds[line], copy.deepcopy(BASE_RECIPE) if command == "recipe" else None)
            for line in lines
        ]
        if kind == "real":
            outcomes = [*map(runs.real, jobs)]
        elif kind == "alone":
            outcomes = [outcome for job in jobs for outcome in runs.together([job])]
        else:
            outcomes = runs.together(jobs, **(runs.hub_env if kind == "asked" else {}))
        found |= zip(lines, outcomes, strict=True)
    said = [
        missed(row, *(found[kind_of(row), shlex.join(words)] for words in (row.one, row.other)))
        for row in rows
    ]
    assert not [*filter(None, said)], "\n".join(filter(None, said))


@pytest.mark.ci
@pytest.mark.parametrize(
    "block", SAME.strip().split("\n\n"), ids=lambda block: block.partition("\n")[0]
)
def test_ways_to_the_same_rows(block, runs):
    for extra in extras_of(block):
        pytest.importorskip(extra)
    first, *others = block.split("\n")
    ways = {line: shlex.split(line.replace("*", first, 1)) for line in (first, *others)}
    jobs = {line: runs.prepare(words) for line, words in ways.items()}
    real = [line for line, words in ways.items() if starts_ranks(words) or "-" in words]
    alike = [line for line in ways if line not in real]
    found = dict(zip(alike, runs.together([jobs[line] for line in alike]), strict=True))
    found |= {line: runs.real(jobs[line]) for line in real}
    assert not {line: each.error + each.stderr for line, each in found.items() if each.code}
    rows = {line: documents(each) for line, each in found.items()}
    assert rows[first]
    assert not {line: rows[line] for line in others if apart(rows[line], rows[first], CLOSE)}, rows[
        first
    ]


def documents(outcome: Outcome) -> list[dict[str, Any]]:
    """The rows of documents, or all where there are none."""
    rows = [row for kind in ("file", "stdout") for row in outcome.rows.get(kind, [])]
    return [row for row in rows if "doc_id" in row] or rows
