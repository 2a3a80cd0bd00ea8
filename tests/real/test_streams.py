"""What happens between the start and the end of a command: pipes with pauses, kills, files that were cut, draws."""

from __future__ import annotations

import json
import subprocess
import threading
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc as ipc
import pytest
from processes import Start, kill_and_resume, kill_training
from real_files import Run


@pytest.fixture(scope="session")
def pages(book: str) -> list[str]:
    """Texts of 4 KB."""
    return [book[start : start + 4000] for start in range(0, 4_000_000, 4000)]


@pytest.mark.parametrize("form", ["lines", "arrow"])
@pytest.mark.parametrize("command", ["score", "encode"])
def test_each_page_of_a_slow_pipe_has_its_result_before_the_next(
    start: Start, pages: list[str], command: str, form: str
) -> None:
    """Nobody sends the next page before the last one has its result: a command that holds one back would wait."""
    process = start(
        command, "-", *(["--format", "jsonl"] if command == "score" else []), stdin=subprocess.PIPE
    )
    timer = threading.Timer(300, process.kill)
    timer.start()
    names, vectors, batches = [], None, None
    for page in pages[:5]:
        batch = pa.RecordBatch.from_pylist([{"text": page}])
        if form == "lines":
            process.stdin.write(json.dumps({"text": page}).encode() + b"\n")
        else:
            batches = batches or ipc.new_stream(process.stdin, batch.schema)
            batches.write_batch(batch)
        process.stdin.flush()
        if command == "score":
            names.append(json.loads(process.stdout.readline())["doc_id"])
        else:
            vectors = vectors or ipc.open_stream(process.stdout)
            names += vectors.read_next_batch()["doc_id"].to_pylist()
    timer.cancel()
    assert names == [f"stdin:{number}" for number in range(5)]


@pytest.mark.parametrize("command", ["tokenize", pytest.param("encode", marks=pytest.mark.slow)])
def test_a_folder_that_was_killed_goes_on_to_the_same_bytes(
    start: Start, library: list[Path], tmp_path: Path, command: str
) -> None:
    files = sorted(library, key=lambda path: path.stat().st_size)[
        :: 6 if command == "tokenize" else 48
    ]
    (tmp_path / "files.txt").write_text("\n".join(map(str, files)))
    words = {
        "tokenize": ["--tokenizer", "longnet-tiny", "--shard-tokens", "50k"],
        "encode": ["--shard-rows", 2],
    }
    kill_and_resume(start, [command, "@files.txt", *map(str, words[command])], tmp_path, kills=2)


@pytest.mark.slow
def test_training_that_was_killed_goes_on_to_the_same_bytes(
    start: Start, book: str, tmp_path: Path
) -> None:
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    words = [
        "train",
        "longnet-tiny",
        "--data",
        "book.txt",
        "--tokenizer",
        "longnet-tiny",
        "--resume",
        "-q",
    ]
    sizes = [
        "--seq-len",
        "2Ki",
        "--steps",
        "5",
        "--set",
        "train.batch_tokens=2048",
        "--set",
        "train.save_every=1",
    ]
    kill_training(lambda folder: start(*words, *sizes, "-o", folder), tmp_path, kills=3)


@pytest.mark.slow
def test_an_arrow_file_that_was_cut_is_one_line_each_time(
    start: Start, pages: list[str], tmp_path: Path
) -> None:
    """A thread of pyarrow that still reads at the end of the process would abort it, now and then."""
    table = pa.table({"text": pages})
    with ipc.new_file(tmp_path / "whole.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=500)
    (tmp_path / "cut.arrow").write_bytes((tmp_path / "whole.arrow").read_bytes()[:-8])
    for _ in range(10):
        process = start("score cut.arrow -q", fresh=True)
        said = process.communicate()[1].decode()
        assert (process.returncode, said.count("\n")) == (3, 1), said


def test_equal_prompts_are_drawn_apart(run: Run, pages: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"text": pages[0]}) + "\n" for _ in range(20))
    )
    words = (
        "generate",
        "--input",
        "x.jsonl",
        "--temperature",
        1.3,
        "-n",
        4,
        "--seed",
        7,
        "--format",
        "jsonl",
        "-q",
    )
    first, again = (run(*words, mib=900) for _ in range(2))
    assert first.stdout == again.stdout
    drawn = Counter(tuple(row["tokens"]) for row in first.rows)
    assert len(drawn) > 10
