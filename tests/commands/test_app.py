"""Proves how `longnet` starts and ends: fast, with one line for every failure and the exit code that is documented.

Failures are tried on an app of one command, in a real process, through the same `run` that the real one uses.
"""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from longnet_cli import __version__

HEAVY = ("torch", "numpy", "pyarrow", "tokenizers", "pydantic", "safetensors")
UNUSED = [
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "jinja2",
    "transformers",
    "pyarrow.compute",
    "pyarrow.parquet",
    "rich",
    "longnet_cli.jobs.estimating",
]

SCRIPT = """
import os, signal, sys, typer
from longnet_cli.cli.app import run
from longnet_cli.basics.errors import *

app = typer.Typer()

@app.command()
def act() -> None:
{body}

@app.command()
def other() -> None:
    pass

run(app)
"""

Script = Callable[[str], Path]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """A program of one command `act`, with the given body."""

    def write(body: str) -> Path:
        path = tmp_path / "program.py"
        path.write_text(SCRIPT.format(body="\n".join("    " + line for line in body.splitlines())))
        return path

    return write


@pytest.fixture
def act(script: Script, command_env: dict[str, str]) -> Callable[..., subprocess.CompletedProcess]:
    """Runs $ACT, the command of the program, or another bash line."""

    def run(body: str, line: str = "$ACT", **env: str) -> subprocess.CompletedProcess:
        env = (
            command_env
            | {"PROGRAM": (program := f"{sys.executable} {script(body)}"), "ACT": f"{program} act"}
            | env
        )
        command = ["bash", "-o", "pipefail", "-c", line]
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)

    return run


@pytest.fixture
def stop(
    script: Script, command_env: dict[str, str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """Starts the program, sends a signal when it says it is ready, and returns its exit code and stderr."""

    def run(body: str, signum: int) -> tuple[int, str]:
        program = subprocess.Popen(
            [sys.executable, script(body), "act"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=command_env,
        )
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signum)
        _, stderr = program.communicate(timeout=30)
        return program.returncode, stderr

    return run


WORDS = r"""
0 --help => 141
0 -h => Usage: longnet
2 --versoin => --version
2 score => longnet: error: Missing argument 'INPUT'. (help: longnet score -h)
2 score x --zz => longnet: error: No such option: --zz (help: longnet score -h)
2 score x --context 64,,128 => Invalid value for '--context': '64,,128' has an empty size (help: longnet score -h)
2 score x --chunk 0 => Invalid value for '--chunk': '0' is out of range
2 score x --device gpu => Invalid value for '--device': 'gpu' is not a device
2 score x --contxt 8 => --context
2 score x --keep n,n => 'n,n' is no list of names
2 score x --format yaml => '--format': 'yaml' is not one of 'text',
"""
ROWS = [re.fullmatch("(.) (.+) => (.+)", row).groups() for row in WORDS.strip().splitlines()]
ROWS += [("2", "", "Usage: longnet"), ("0", "--version", f"longnet {__version__}\n")]
ROWS += [("2", f"encode x -o {'x' * 256}", "error: File name too long: xxxx")]


@pytest.mark.parametrize(("code", "words", "said"), ROWS)
def test_words_of_a_command_line(run_longnet, words, code, said):
    result = run_longnet(*words.split(), code=int(code))
    assert said in result.stdout + result.stderr
    assert not result.stderr or result.returncode


def test_help_lists_commands_by_what_they_are_for(run_longnet):
    found = re.findall(r"^\W+ (\w+)  +[A-Z]", run_longnet("--help").stdout, re.MULTILINE)
    assert " ".join(found) == (
        "score encode generate ask train tokenize data pattern plot bench convert"
    )


@pytest.mark.parametrize("command", [["score"], ["data", "inspect"], []])
def test_help_before_a_command_is_its_help(run_longnet, command):
    asked, expected = run_longnet("help", *command), run_longnet(*command, "--help")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, expected.stdout, "")


@pytest.mark.parametrize(
    ("typed", "completed"), [("", "longnet-tiny"), ("longnet-t", "longnet-tiny"), ("./", "")]
)
def test_the_shell_completes_shipped_models_and_leaves_paths_to_itself(
    run_longnet, typed, completed
):
    words = {"COMP_WORDS": f"longnet score --model {typed}", "COMP_CWORD": "3"}
    done = run_longnet(env={"_LONGNET_COMPLETE": "complete_bash", **words}, fresh=True)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, completed.split(), "")


TOKENIZE = ["tokenize", "t.txt", "--tokenizer", "bytes", "-o", "t.parquet", "-q"]


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [(["--help"], HEAVY), (TOKENIZE, ["torch"]), (["score", "t.txt", "-q"], UNUSED)],
)
def test_commands_import_nothing_heavy_that_they_do_not_use(
    run_python, tmp_path, arguments, unwanted
):
    """What keeps `longnet --help` below 0.3 s and `score` near `import torch`, without a clock in a test."""
    (tmp_path / "t.txt").write_text("a small file")
    found = f"[name for name in {unwanted!r} if name in sys.modules], gc.get_freeze_count() > 0"
    probe = (
        "import atexit, gc, sys\n"
        f"atexit.register(lambda: print({found}, file=sys.stderr))\n"
        "from longnet_cli.cli.app import main\n"
        "main()\n"
    )
    said = run_python("-c", probe, *arguments).stderr
    assert said == f"[] {unwanted is UNUSED}\n"  # torch's objects are frozen


def test_frozen_imports_are_no_leaks_at_the_exit(run_python):
    pytest.importorskip("triton", reason="torch installs Triton with CUDA only")
    code = "import triton._C.libtriton; from longnet_cli.cli.starting import freeze_imports; freeze_imports()"
    assert run_python("-c", code).stderr == ""


def test_unknown_command_is_exit_2_with_a_suggestion(act):
    result = act("pass", "$PROGRAM othr")
    assert result.returncode == 2
    assert "Did you mean 'other'" in result.stderr
    assert result.stdout == ""


ROW = "('row 7:\\n  bad [token] id')"
LITTLE = "import resource as r\nr.setrlimit(r.RLIMIT_AS, (300 << 20, 300 << 20))\n"  # ulimit -v
BUG = "KeyError: 'key' (run with LONGNET_TRACEBACK=1 for the traceback)"


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        (f"raise LongNetError{ROW}", 1, "row 7: bad [token] id"),
        (f"raise ConfigError{ROW}", 2, "row 7: bad [token] id"),
        (f"raise DataError{ROW}", 3, "row 7: bad [token] id"),
        (f"raise CheckpointError{ROW}", 4, "row 7: bad [token] id"),
        (f"raise MemoryLimitError{ROW}", 5, "row 7: bad [token] id"),
        ("raise MemoryError", 5, "out of memory"),
        (
            "class OutOfMemoryError(RuntimeError): pass\nraise OutOfMemoryError('of CUDA')",
            5,
            "out of memory: of CUDA",
        ),
        ("import torch\ntorch.empty(1 << 60, dtype=torch.uint8)", 5, None),
        (f"{LITTLE}import torch", 5, None),
        ("raise RuntimeError('could not create a primitive')", 5, None),
        ("open('/nowhere/to/be.found')", 1, "No such file or directory: /nowhere/to/be.found"),
        ("{}['key']", 1, BUG),
    ],
)
def test_a_failure_is_one_line_and_its_exit_code(act, body, code, line):
    result = act(body)
    assert (result.returncode, result.stderr.count("\n")) == (code, 1)
    assert result.stderr == f"longnet: error: {line}\n" or (
        line is None and "out of memory" in result.stderr
    )


@pytest.mark.parametrize(
    ("problem", "ranks", "lost"),
    [
        (
            "RuntimeError('[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Gone')",
            2,
            True,
        ),
        ("dist.DistStoreError('timeout')", 2, True),
        ("RuntimeError('Broken pipe of gloo')", 2, False),
        ("dist.DistStoreError('timeout')", 1, False),
        ("RuntimeError('Connection closed by peer')", 1, False),
    ],
)
def test_only_a_rank_of_several_loses_another(act, problem, ranks, lost):
    body = f"import torch.distributed as dist\nraise {problem}"
    said = act(body, RANK="0", WORLD_SIZE=str(ranks)).stderr
    assert ("another rank ended, and this one with it" in said) == lost
    assert ("(run with LONGNET_TRACEBACK=1 for the traceback)" in said) != lost


def test_a_bug_has_a_traceback_if_asked_for_and_a_failure_has_none(act):
    assert "Traceback" in act("{}['key']", LONGNET_TRACEBACK="1").stderr
    assert act("raise DataError('bad')", LONGNET_TRACEBACK="1").stderr == "longnet: error: bad\n"


@pytest.mark.parametrize(
    ("body", "code"), [("raise typer.Exit(3)", 3), ("raise typer.Abort", 1), ("pass", 0)]
)
def test_exit_codes_of_typer_are_kept(act, body, code):
    assert act(body).returncode == code


@pytest.mark.parametrize("flush", ["True", "False"])
def test_closed_pipe_is_exit_141_and_silent(act, flush):
    result = act(f"for row in range(100_000): print(row, flush={flush})", "$ACT | head -1")
    assert (result.returncode, result.stdout, result.stderr) == (141, "0\n", "")


def test_closed_pipe_that_shows_only_at_the_end(act):
    # the one row waits in Python's buffer until the reader has gone
    wait = "end = select.poll(); end.register(1, 0); end.poll()"
    result = act(f"import select; print('row'); {wait}", "$ACT | true")
    assert (result.returncode, result.stderr) == (141, "")


def test_closed_pipe_of_both_streams(act):
    body = "for row in range(100_000): print(row, flush=True); print('note', file=sys.stderr)"
    assert act(body, "$ACT 2>&1 | head -1").returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("body", ["print('row', flush=True)", "print('row')"])
def test_full_disk_is_one_line_and_exit_1(act, body):
    result = act(body, "$ACT > /dev/full")
    assert (result.returncode, result.stderr) == (1, "longnet: error: No space left on device\n")


def test_errors_never_land_in_the_results(act):
    result = act("raise DataError('bad')", "$ACT 2>&-")
    assert (result.returncode, result.stdout) == (3, "")


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_clean_up_and_have_their_exit_code(stop, tmp_path, signum, code):
    temporary = tmp_path / "shard.tmp"
    body = f"""temporary = {str(temporary)!r}
open(temporary, "w").close()
try:
    print("ready", flush=True)
    signal.pause()
finally:
    os.remove(temporary)"""
    assert stop(body, signum) == (code, "")
    assert not temporary.exists()


def test_ctrl_c_while_modules_are_imported_leaves_no_traceback(command_env):
    # With importtime, Python says what it imports
    command = [sys.executable, "-X", "importtime", "-m", "longnet_cli", "--version"]
    with subprocess.Popen(command, env=command_env, stderr=subprocess.PIPE, text=True) as process:
        while "longnet_cli.basics.errors" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == -signal.SIGINT


def test_nohup_is_kept(act):
    body = "import signal\nos.kill(os.getpid(), signal.SIGHUP)\nprint('lives')"
    assert act(body, "(trap '' HUP; exec $ACT)").stdout == "lives\n"
    assert act(body, "$ACT").returncode == 129


def test_a_second_sigterm_does_not_cut_the_clean_up_short(stop, tmp_path):
    cleaned = tmp_path / "cleaned"
    body = f"""try:
    print("ready", flush=True)
    signal.pause()
finally:
    os.kill(os.getpid(), 15)
    open({str(cleaned)!r}, "w").close()"""
    assert stop(body, signal.SIGTERM) == (143, "")
    assert cleaned.exists()


def test_a_name_that_is_no_text_is_shown_and_ends_nothing(run_longnet):
    done = run_longnet("data inspect", "\udcff.txt", env={"PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 3
    assert "\\xff.txt: no such file" in done.stdout
    assert "\\xff.txt: no such file" in done.stderr
