"""Proves that whatever ends `tokenize`, its output is whole or says that it is not, and --resume completes it.

Real processes: killed at random moments, stopped by signals, on a full disk, with a reader that leaves or stalls.
"""

import fcntl
import mmap
import os
import random
import signal
import subprocess
import sys
import termios
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.ipc as ipc
import pytest
from processes import assert_full, contents, kill_and_resume, wait_for

from longnet_cli.basics.errors import DataError
from longnet_cli.data.inputs import Inputs


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """60 documents of 0.1 to 20 kB."""
    chance = random.Random(0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(60):
        (folder / f"{index}.txt").write_text("".join(chance.choices("abc déf\n", k=chance.randint(100, 20_000))))
    return folder


def test_killed_and_resumed_the_shards_are_the_same(start, corpus, tmp_path):
    kill_and_resume(start, ["tokenize", corpus, "--shard-tokens", "10000", "--eos"], tmp_path, kills=3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_finished_shards_and_no_others(start, run_longnet, corpus, tmp_path, number, code):
    command = ["tokenize", corpus, "--shard-tokens", "10000", "-o"]
    process = start(*command, "out")
    wait_for(lambda: (tmp_path / "out" / "shard-00003.arrow").exists())
    process.send_signal(number)
    assert process.communicate()[1] == b""
    assert process.returncode == code
    names = sorted(os.listdir(tmp_path / "out"))
    assert names[0] == "_unfinished.json"
    assert names[1:] == [f"shard-{index:05d}.arrow" for index in range(len(names) - 1)]
    assert run_longnet(*command, "out", "--resume").returncode == 0
    assert run_longnet(*command, "whole").returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def unread(pipe: IO[bytes]) -> int:
    """How many bytes wait in a pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.mark.parametrize("output", ["out", "out.arrow", "-"])
def test_a_signal_ends_a_wait_for_input(start, tmp_path, output):
    process = start("tokenize", "-", "-o", output, stdin=subprocess.PIPE)
    process.stdin.write(b"a line\n")
    process.stdin.flush()
    wait_for(lambda: unread(process.stdin) == 0)  # and now it waits for more
    for _ in range(10):  # Python learns of a signal right before a call that waits only from the next one
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(2)
            break
    assert process.returncode == 143
    assert not process.stdout.read().endswith(b"\xff\xff\xff\xff\0\0\0\0")
    assert sorted(os.listdir(tmp_path)) in ([], ["out"])


def test_a_signal_ends_a_wait_for_a_reader_that_stalls(start, corpus):
    process = start("tokenize", corpus, "-o", "-")
    assert process.stdout.read(1)
    size = fcntl.fcntl(process.stdout, fcntl.F_GETPIPE_SZ)
    wait_for(lambda: unread(process.stdout) >= size - 2 * mmap.PAGESIZE)  # its last pages may be full in part
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert process.stderr.read() == b""


def test_documents_come_out_while_the_input_waits(start):
    """The reader may keep the last document that it has, whose next row may be another part of it."""
    process = start("tokenize", "-", "-o", "-", stdin=subprocess.PIPE)
    timer = threading.Timer(20, process.kill)  # lest the test wait for ever
    timer.start()
    schema = pa.schema([("text", pa.string())])
    with ipc.new_stream(process.stdin, schema) as writer:
        writer.write(pa.record_batch([["one", "two"]], schema=schema))
        process.stdin.flush()
        begun = ipc.open_stream(process.stdout)
        assert begun.read_next_batch()["input_ids"][0].as_py() == list(b"one")
        writer.write(pa.record_batch([["three", "four"]], schema=schema))
        process.stdin.flush()
        assert begun.read_next_batch().num_rows >= 1
    process.stdin.close()
    begun.read_all()
    assert process.wait(20) == 0
    timer.cancel()


@pytest.mark.parametrize("ending", ["kill", "fail"])
def test_a_cut_stream_is_refused(start, corpus, tmp_path, ending):
    if ending == "fail":
        (corpus / "bad.txt").write_bytes(b"\xff")
    with open(tmp_path / "cut.arrow", "wb") as file:
        process = start(
            "tokenize", corpus, "-" if ending == "kill" else corpus, "-o", "-", stdin=subprocess.PIPE, stdout=file
        )
        if ending == "kill":
            wait_for(lambda: (tmp_path / "cut.arrow").stat().st_size > 100_000)
            process.kill()
        assert process.wait(30) == (-9 if ending == "kill" else 3)
    with pytest.raises(DataError, match="truncated"):
        list(Inputs([tmp_path / "cut.arrow"]).documents())


def test_a_full_disk_keeps_finished_shards_and_room_lets_it_resume(start, run_longnet, corpus, tmp_path, small_disk):
    command = ["tokenize", corpus, "--shard-tokens", "20000", "-o"]
    assert run_longnet(*command, "whole").returncode == 0
    whole = contents(tmp_path / "whole")
    out = small_disk / "out"
    assert len(assert_full(start(*command, out), "No space left on device", out, whole)) >= 2
    assert_full(start(*command, out, "--resume"), "No space left on device", out, whole)
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    assert run_longnet(*command, out, "--resume").returncode == 0
    assert contents(out) == whole


def test_a_shard_too_large_for_the_file_system_is_one_line(run_longnet, longnet, corpus, tmp_path, command_env):
    """The limit on file sizes, which any user may set, does as a full disk does."""
    (corpus / "30.txt").write_text("x" * 1_000_000)
    command = ["tokenize", corpus, "--shard-tokens", "20000", "-o"]
    assert run_longnet(*command, "whole").returncode == 0
    limited = ["bash", "-c", f'ulimit -f 500; exec {longnet} "$@"', "bash"]
    words = [*limited, *map(str, command), str(tmp_path / "out")]
    process = subprocess.Popen(words, env=command_env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out = tmp_path / "out"
    assert len(assert_full(process, "File too large", out, contents(tmp_path / "whole"))) >= 5
    assert run_longnet(*command, out, "--resume").returncode == 0
    assert contents(out) == contents(tmp_path / "whole")
