"""What happens between the start and the end of a command: kills, and files that were cut."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.ipc as ipc
import pytest
from processes import kill_and_resume, kill_training


@pytest.fixture(scope="session")
def pages(book: str) -> list[str]:
    """Texts of 4 KB."""
    return [book[start : start + 4000] for start in range(0, 4_000_000, 4000)]


@pytest.mark.parametrize(
    ("command", "every"),
    [
        ("tokenize @files.txt --tokenizer longnet-tiny --shard-tokens 50k", 6),
        pytest.param("encode @files.txt --shard-rows 2", 48, marks=pytest.mark.slow),
    ],
)
def test_a_folder_that_was_killed_goes_on_to_the_same_bytes(
    start, library, tmp_path, command, every
):
    files = sorted(library, key=lambda path: path.stat().st_size)[::every]
    (tmp_path / "files.txt").write_text("\n".join(map(str, files)))
    kill_and_resume(start, [command], tmp_path, kills=2)


@pytest.mark.slow
def test_training_that_was_killed_goes_on_to_the_same_bytes(start, book, tmp_path):
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    words = """train longnet-tiny --data book.txt --tokenizer longnet-tiny --resume -q --seq-len 2Ki
        --steps 5 --set train.batch_tokens=2048 --set train.save_every=1"""
    kill_training(lambda folder: start(words, "-o", folder), tmp_path, kills=3)


@pytest.mark.slow
def test_an_arrow_file_that_was_cut_is_one_line_each_time(start, pages, tmp_path):
    """A thread of pyarrow that still reads at the end of the process would abort it, now and then."""
    table = pa.table({"text": pages})
    with ipc.new_file(tmp_path / "whole.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=500)
    (tmp_path / "cut.arrow").write_bytes((tmp_path / "whole.arrow").read_bytes()[:-8])
    for _ in range(10):
        process = start("score cut.arrow -q", fresh=True)
        said = process.communicate()[1].decode()
        assert (process.returncode, said.count("\n")) == (3, 1), said
