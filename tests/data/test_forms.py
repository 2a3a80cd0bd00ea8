"""The same documents in twelve forms, written by their real libraries, score the same to the last digit.

pip install -e '.[data-test]'
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import RunLongnet
from files import write_file, write_stream

TEXTS = ["def f(x):\n    return x\n", "wörld, 漢字\n" * 9, "a", "import os\n" * 40, "two words"]
TABLE = pa.table({"id": [f"d{index}" for index in range(len(TEXTS))], "text": TEXTS, "n": range(len(TEXTS))})
LINES = "".join(json.dumps(row) + "\n" for row in TABLE.to_pylist()).encode()


def of_datasets(path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(TABLE.to_pydict()).save_to_disk(str(path), num_shards=2)


def of_polars(method: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        polars: Any = pytest.importorskip("polars")
        getattr(polars.from_arrow(TABLE), method)(path)

    return write


def of_duckdb(path: Path) -> None:
    duckdb: Any = pytest.importorskip("duckdb")
    duckdb.from_arrow(TABLE).write_parquet(str(path))


def feather_of_pandas(path: Path) -> None:
    pytest.importorskip("pandas").DataFrame(TABLE.to_pydict()).to_feather(path)


def zstd_lines(path: Path) -> None:
    path.write_bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(LINES))


def text_files(path: Path) -> None:
    path.mkdir()
    for name, text in zip(TABLE["id"].to_pylist(), TEXTS, strict=True):
        (path / name).write_text(text, encoding="utf-8")


FORMS: dict[str, Callable[[Path], object]] = {
    "ipc.arrow": lambda path: write_file(path, TABLE),
    "stream.arrow": lambda path: write_stream(path, TABLE),
    "datasets": of_datasets,
    "polars.arrow": of_polars("write_ipc"),
    "polars-stream.arrow": of_polars("write_ipc_stream"),
    "polars.parquet": of_polars("write_parquet"),
    "duckdb.parquet": of_duckdb,
    "pandas.feather": feather_of_pandas,
    "lines.jsonl": lambda path: path.write_bytes(LINES),
    "lines.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "lines.jsonl.zst": zstd_lines,
    "texts": text_files,
}


@pytest.fixture(scope="module")
def first() -> dict[str, list]:
    """What the first form scored."""
    return {}


@pytest.mark.ci
@pytest.mark.parametrize("form", FORMS)
def test_each_form_scores_the_same(form: str, first: dict[str, list], tmp_path: Path, run_longnet: RunLongnet) -> None:
    FORMS[form](tmp_path / form)
    columns = [] if form == "texts" else ["--keep", "n", "--id-column", "text"]
    done = run_longnet("score", form, "--format", "json", "--chunk", "100", *columns)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    documents = [(row["doc_id"], row.get("n")) for row in found["documents"]]
    assert documents == ([*zip(TEXTS, range(5), strict=True)] if columns else [(f"d{n}", None) for n in range(5)])
    numbers = [[row["nll_sum"], row["n_tokens"], row["n_bytes"]] for row in (*found["documents"], found["total"])]
    assert numbers == first.setdefault("numbers", numbers)
