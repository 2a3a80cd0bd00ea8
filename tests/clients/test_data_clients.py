"""Other programs open what longnet writes: datasets, polars, duckdb, pandas and pyarrow, as it is.

pip install -e '.[data-test]'
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from conftest import RunLongnet

from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.weights import model_digest

TEXTS = {"a": "one, two", "b": "three " * 40, "c": "four"}
MODEL = "longnet-tiny"


@pytest.fixture(params=[1, 2], ids=["one-shard", "shards"])
def folders(request: pytest.FixtureRequest, tmp_path: Path, run_longnet: RunLongnet) -> Path:
    """Tokens and vectors as Arrow and Parquet, in a single shard or in several."""
    for name, text in TEXTS.items():
        (tmp_path / f"in/{name}.txt").parent.mkdir(exist_ok=True)
        (tmp_path / f"in/{name}.txt").write_text(text)
    size = ["1000", "1"][request.param - 1]
    for form in ("arrow", "parquet"):
        more = ["--shard-format", form, "-q"]
        made = [
            run_longnet(
                "tokenize in -o",
                f"tokens-{form}",
                "--shard-tokens",
                size,
                "--tokenizer",
                MODEL,
                *more,
            ),
            run_longnet("encode in -o", f"vectors-{form}", "--shard-rows", size, *more),
        ]
        assert [done.returncode for done in made] == [0, 0], made
    return tmp_path


def expected() -> list[list[int]]:
    return [Tokenizer.load(MODEL).encode(text).tolist() for text in TEXTS.values()]


def test_datasets_loads_a_folder(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    for form in ("arrow", "parquet"):
        tokens, vectors = (
            datasets.load_dataset(
                str(folders / f"{name}-{form}"), cache_dir=str(tmp_path / "cache")
            )["train"]
            for name in ("tokens", "vectors")
        )
        assert tokens["input_ids"][:] == expected()
        assert vectors["n_tokens"][:] == [len(ids) for ids in expected()]
        places = ["start", "end", "char_start", "char_end"]
        assert sorted(vectors.column_names) == sorted(
            ["doc_id", "span", *places, "n_tokens", "embedding"]
        )


def test_polars_scans_a_folder(folders):
    polars = pytest.importorskip("polars")
    for form, scan in (("arrow", polars.scan_ipc), ("parquet", polars.scan_parquet)):
        assert scan(folders / f"tokens-{form}").collect()["input_ids"].to_list() == expected()
        found = scan(folders / f"vectors-{form}").select("doc_id", "embedding").collect()
        assert found["doc_id"].to_list() == [f"{name}.txt" for name in TEXTS]
        assert all(
            sum(x * x for x in vector) == pytest.approx(1, abs=1e-5)
            for vector in found["embedding"]
        )


def test_duckdb_reads_a_folder(folders):
    duckdb = pytest.importorskip("duckdb")
    asked = "select list(doc_id order by doc_id), sum({})::int from "
    count = ([f"{name}.txt" for name in TEXTS], sum(map(len, expected())))
    for name, tokens in (("tokens", "len(input_ids)"), ("vectors", "n_tokens")):
        found = duckdb.sql(
            f"{asked.format(tokens)} '{folders / name}-parquet/*.parquet'"
        ).fetchall()
        arrow_table = ds.dataset(folders / f"{name}-arrow", format="ipc")
        assert arrow_table.count_rows() == 3
        assert found == duckdb.sql(f"{asked.format(tokens)} arrow_table").fetchall() == [count]


def test_pandas_reads_files_and_a_folder(folders, run_longnet):
    pandas = pytest.importorskip("pandas")
    for form in ("arrow", "parquet"):
        assert run_longnet("encode in -o", f"v.{form}", "-q").returncode == 0
    arrow, *parquet = (
        pandas.read_feather(folders / "v.arrow"),
        pandas.read_parquet(folders / "v.parquet"),
    )
    parquet.append(pandas.read_parquet(folders / "vectors-parquet"))
    for found in (arrow, *parquet):
        assert found["doc_id"].to_list() == [f"{name}.txt" for name in TEXTS]
        assert found["embedding"][0] == pytest.approx(arrow["embedding"][0], abs=1e-5)


def test_every_output_names_model_and_tokenizer_by_their_digests(tmp_path, run_longnet):
    (tmp_path / "a.txt").write_text("one, two")
    words = Tokenizer.load(MODEL)
    known = {b"longnet.tokenizer_sha256": words.sha256.encode()}
    made = {b"longnet.model_sha256": model_digest(LongNet.from_pretrained(MODEL)).encode()}
    made |= known | {b"longnet.model": MODEL.encode()}
    for command, metadata in (
        (["tokenize", "a.txt", "--tokenizer", MODEL, "-o"], known),
        (["encode", "a.txt", "-o"], made),
        (["score", "a.txt", "--token-logprobs"], made),
    ):
        for form in ("arrow", "parquet"):
            assert run_longnet(*command, f"out.{form}").returncode == 0
            path = tmp_path / f"out.{form}"
            schema: pa.Schema = (
                pq.read_schema(path) if form == "parquet" else ipc.open_file(path).schema
            )
            assert metadata.items() <= schema.metadata.items()
            assert (b"longnet.pattern" in schema.metadata) == (metadata is made)
