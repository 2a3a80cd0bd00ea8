"""Proves, on a thousand bad inputs and options, that none ends in a traceback, hangs, or changes a number in silence.

Options are read from the app, fields from the models, so those of tomorrow are tried too.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from builders import tiny_model
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from processes import contents
from safetensors.torch import load_file, save_file

from longnet_cli.cli.app import app
from longnet_cli.jobs.training.recipe import Recipe
from longnet_cli.nets.config import LongNetConfig

# that a run may use: a hang, if it is not one that waits, however busy the machine is
CPU_SECONDS = 10
MEMORY = 12 << 30  # bytes of addresses that a run may have
CODES = {0, 1, 2, 3, 4, 5}
SIZES = {"vocab_size": 257, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 24}
LEVELS = {"segment_lengths": [8, 16], "dilation_rates": [1, 2]}
RECIPE = {
    "model": SIZES | LEVELS,
    "data": {"train": ["t.txt"], "tokenizer": "bytes", "column": "text", "held_out": ["u.txt"]},
    "train": {"stages": [{"seq_len": 16, "steps": 1}], "batch_tokens": 32, "chunk": 32},
}

# Words that somebody, or a script gone wrong, may write where any value is due
WORDS = """
-
-1
0
1
3
nan
inf
-inf
1e18
1e400
9223372036854775807
9223372036854775808
true
missing
./missing
.
/
t.txt
a.arrow
a.jsonl
broken.arrow
link.arrow
model
./model
run
bytes
model/tokenizer.json
recipe.toml
@t.txt
*.txt
/dev/null
out
out.arrow
out.parquet
out.jsonl
x.png
é
[
a=b
=
a,b
1,2
model.dim=true
train.steps=1e30
data.train=[[[
http://example.invalid/a
nope://a/b
""".splitlines()
WORDS += [" ", "\x1b[31m", "\udcff", "9" * 5000, "n" * 300, "a/" * 3000]
NUMBERS = [
    -1,
    0,
    1,
    2,
    3,
    5,
    16,
    64,
    10**5,
    2**31,
    2**40,
    2**63 - 1,
    2**63,
    10**30,
    0.5,
    -0.5,
    1e-300,
    1e300,
]
VALUES = st.one_of(
    st.sampled_from(
        [
            *NUMBERS,
            None,
            True,
            False,
            [],
            {},
            "",
            "x",
            "\0",
            "\ud800",
            "1e3",
            "xpos",
            [1, 2],
            [2**40, 8],
        ]
    ),
    st.just([1] * 10**5),
    st.lists(st.sampled_from([*NUMBERS, True, "x"]), max_size=4),
    st.dictionaries(
        st.sampled_from(["a", "seq_len", "inputs", ""]), st.sampled_from([1, "x", None]), max_size=2
    ),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
)

# What each command needs to run at all, small
COMMANDS = {
    "tokenize": "t.txt -o out.arrow",
    "train": "recipe.toml -o new --dry-run -q",
    "pattern": "paper --seq 2Ki",
    "plot": "run",
    "score": "t.txt -m ./model -q",
    "encode": "t.txt -m ./model -o out.arrow -q",
    "bench": "--seq 64 --heads 1 --head-dim 8 --repeats 1 --max-time 1 -q",
    "data inspect": "t.txt",
}
# options that would start a thousand processes
FEW = {"--nproc": ["", "0", "-1", "x", "1.5", str(2**63)]}


class Done(NamedTuple):
    """`code` is None where a run took too long, and minus the signal where one ended it."""

    code: int | None
    stdout: str
    stderr: str


Run = Callable[[list[str], Path], Done]


def options_of(command: str) -> list[tuple[str, bool]]:
    """(name, whether it takes a value) of each option of a command of the app."""
    found: Any = typer.main.get_command(app)
    for name in command.split():
        found = found.commands[name]
    options = [option for option in found.params if option.param_type_name == "option"]
    return [
        (name, not option.is_flag)
        for option in options
        for name in (*option.opts, *option.secondary_opts)
    ]


@st.composite
def wrong_options(draw: st.DrawFn) -> tuple[str, Any]:
    command = draw(st.sampled_from(sorted(COMMANDS)))
    args = [*command.split(), *COMMANDS[command].split()]
    for _ in range(draw(st.integers(1, 3))):
        name, takes = draw(st.sampled_from(options_of(command)))
        args += [name, draw(st.sampled_from(FEW.get(name, WORDS)))] if takes else [name]
    if draw(st.booleans()):
        args.insert(
            len(command.split()),
            draw(st.sampled_from([word for word in WORDS if not word.startswith("-")])),
        )
    return "options", args


def paths_of(cls: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in cls.model_fields.items():
        yield (*prefix, name)
        if hasattr(field.annotation, "model_fields"):
            yield from paths_of(field.annotation, (*prefix, name))


def changed(data: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    name, *rest = path
    inner = data.get(name)
    return data | {
        name: changed(inner if isinstance(inner, dict) else {}, tuple(rest), value)
        if rest
        else value
    }


FIELDS = st.lists(
    st.tuples(st.sampled_from(sorted(paths_of(LongNetConfig))), VALUES), min_size=1, max_size=2
)
KEYS = st.lists(
    st.tuples(st.sampled_from(sorted(paths_of(Recipe))), VALUES), min_size=1, max_size=2
)
MODEL_FILES = st.sampled_from(["model.safetensors", "config.json", "tokenizer.json"])
FILES = MODEL_FILES.map("model/{}".format) | st.sampled_from(["recipe.json", "run/metrics.jsonl"])
SPOILT = st.sampled_from(
    ["fifo", "nested", "empty", "folder", "device", "huge number", "not UTF-8"]
)
CASES = st.one_of(
    wrong_options(),
    wrong_options(),
    st.tuples(st.just("config"), st.tuples(FIELDS, st.booleans())),
    st.tuples(st.just("recipe"), KEYS),
    st.tuples(
        st.just("flip"),
        st.tuples(MODEL_FILES, st.floats(0, 1, exclude_max=True), st.integers(0, 7)),
    ),
    st.tuples(st.just("spoilt"), st.tuples(FILES, SPOILT)),
)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    (folder / "t.txt").write_text("the quick brown fox " * 20)
    (folder / "u.txt").write_text("over the lazy dog " * 20)
    (folder / "a.jsonl").write_text('{"input_ids": [1, 2, 3]}\n{"text": 5}\n')
    (folder / "broken.arrow").write_bytes(b"ARROW1\0\0" + bytes(range(200)))
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    toml = [f"{name} = {json.dumps(value)}\n" for name, value in (SIZES | LEVELS).items()]
    (folder / "recipe.toml").write_text(
        f"[model]\n{''.join(toml)}[data]\ntrain = ['t.txt']\n"
        "[train]\nstages = [{seq_len = 16, steps = 1}]\nbatch_tokens = 32\nchunk = 32\n"
    )
    (folder / "run").mkdir()
    (folder / "run/metrics.jsonl").write_text(
        "".join(f'{{"step": {n}, "loss": {5 - n}}}\n' for n in range(1, 4))
    )
    tiny_model(folder / "model", **SIZES, **LEVELS)
    shutil.copytree(folder / "model", folder / "other")
    weights = folder / "other/model.safetensors"
    save_file(load_file(weights), weights)  # as another tool does: without digests
    return folder


@pytest.fixture(scope="module")
def run(longnet: Path, template: Path) -> Run:
    """`run(["score", ...], folder)`, within limits: what hangs or asks for all memory fails."""

    def run(args: list[str], folder: Path) -> Done:
        limited = f'ulimit -v {MEMORY >> 10}; ulimit -St {CPU_SECONDS}; exec "$@"'
        words = ["bash", "-c", limited, "bash", longnet, *args]
        env = {name: value for name, value in os.environ.items() if not name.startswith("LONGNET_")}
        options = {
            "stdin": subprocess.DEVNULL,
            "capture_output": True,
            "text": True,
            "errors": "replace",
        }
        try:
            done = subprocess.run(
                words, cwd=folder, env=env | {"NO_COLOR": "1"}, timeout=60, **options
            )
        except subprocess.TimeoutExpired:
            return Done(None, "", "")
        return Done(done.returncode, done.stdout, done.stderr)

    assert run(["tokenize", "t.txt", "-o", "a.arrow"], template).code == 0
    os.link(template / "a.arrow", template / "link.arrow")
    (template / "a.arrow.tokenizer.json").unlink()
    return run


def prepare(folder: Path, kind: str, case: Any) -> list[str]:
    """Make what a case needs in its folder; returns the command."""
    score = ["score", "t.txt", "-q", "--format", "json", "-m"]
    if kind == "options":
        return case
    if kind == "config":
        fields, digests = case
        name = "model" if digests else "other"
        data = json.loads((folder / name / "config.json").read_text())
        for path, value in fields:
            data = changed(data, path, value)
        (folder / name / "config.json").write_text(json.dumps(data))
        return [*score, f"./{name}"]
    if kind == "recipe":
        data = RECIPE
        for path, value in case:
            data = changed(data, path, value)
        (folder / "recipe.json").write_text(json.dumps(data))
        return ["train", "./recipe.json", "-o", "new", "-q", "--dry-run"]
    if kind == "flip":
        name, place, bit = case
        content = bytearray((folder / "model" / name).read_bytes())
        content[int(place * len(content))] ^= 1 << bit
        (folder / "model" / name).write_bytes(content)
        return [*score, "./model"]
    name, how = case
    path = folder / name
    path.unlink()
    if how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "device":
        path.symlink_to("/dev/zero")
    else:
        head = {
            "nested": b"[" * 200_000 + b"\n",
            "empty": b"",
            "huge number": b'{"dim": ' + b"9" * 5000 + b"}\n",
        }
        path.write_bytes(head.get(how, b"\xff\xfe\x00"))
    if name.startswith("model"):
        return [*score, "./model"]
    return (
        ["plot", "run"]
        if name.startswith("run")
        else ["train", "./recipe.json", "-o", "new", "-q", "--dry-run"]
    )


def complaint(done: Done) -> str | None:
    """What is wrong with how a command ended, whatever it was asked; None for nothing."""
    if done.code in (None, -signal.SIGXCPU):
        return "hangs"
    if done.code not in CODES:
        return "an exit code that is not documented"
    if "Traceback" in done.stderr or "LONGNET_TRACEBACK" in done.stderr:
        return "an exception that reaches the user"
    if (
        done.code
        and sum(line.startswith("longnet: error: ") for line in done.stderr.splitlines()) != 1
    ):
        return "not one line of error"
    return None


@pytest.mark.slow
def test_nothing_bad_ends_in_a_traceback_hangs_or_changes_a_number(run, template, tmp_path):
    baseline = run(["score", "t.txt", "-q", "--format", "json", "-m", "./model"], template)
    assert baseline.code == 0
    read = {"t.txt", "recipe.toml", "recipe.json", "run/metrics.jsonl", "model/model.safetensors"}

    @settings(
        max_examples=1000,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        # A case is small: making it smaller takes minutes
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )
    @given(CASES)
    def attack(chosen: tuple[str, Any]) -> None:
        kind, case = chosen
        folder = tmp_path / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        (folder / "link.arrow").unlink()
        os.link(folder / "a.arrow", folder / "link.arrow")
        command = prepare(folder, kind, case)
        before = contents(folder)
        done = run(command, folder)
        event(f"{kind}: exit code {done.code}")
        shown = f"{command} in a case of {kind}, {str(case)[:300]}: {done._replace(stdout=done.stdout[-300:])}"
        if wrong := complaint(done):
            raise AssertionError(f"{wrong}: {shown}")
        for name in read & before.keys():
            assert (folder / name).read_bytes() == before[name], f"{name} is changed: {shown}"
        if done.code == 0 and (kind == "flip" or (kind == "config" and case[1])):
            assert done.stdout == baseline.stdout, f"another number: {shown}"

    attack()
