"""What happens between the start and the end of a command: kills, and files that were cut."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.ipc as ipc
import pytest
from processes import kill_and_resume


@pytest.fixture(scope="session")
def pages(book: str) -> list[str]:
    """Texts of 4 KB."""
    return [book[start : start + 4000] for start in range(0, 4_000_000, 4000)]


def test_a_folder_that_was_killed_goes_on_to_the_same_bytes(start, library, tmp_path):
    files = sorted(library, key=lambda path: path.stat().st_size)[::6]
    (tmp_path / "files.txt").write_text("\n".join(map(str, files)))
    words = "tokenize @files.txt --tokenizer longnet-tiny --shard-tokens 50k"
    kill_and_resume(start, [words], tmp_path, kills=2)


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
