"""The examples for Ray and Spark give the vectors of the command, on these engines: `make engines`.

No package index has a Java with all modules that Spark asks for: it is the machine's, 17 or newer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from places import ROOT
from processes import environment


def write_corpus(folder: Path, library: list[Path]) -> None:
    """Write 400 documents into four Parquet files."""
    folder.mkdir()
    rows = [(str(path), path.read_text(encoding="utf-8")[:1000] or "x") for path in library]
    for shard in range(4):
        names, texts = zip(*rows[shard:400:4], strict=True)
        pq.write_table(pa.table({"doc_id": names, "text": texts}), folder / f"{shard}.parquet")


def assert_same_vectors(ours: pa.Table, theirs: pa.Table) -> None:
    """The rows of the 400 documents, in any order."""
    ours, theirs = ours.sort_by("doc_id"), theirs.sort_by("doc_id")
    assert theirs["doc_id"].to_pylist() == ours["doc_id"].to_pylist()
    assert len(ours) == 400
    vectors = [np.stack(table["embedding"].to_numpy()) for table in (ours, theirs)]
    np.testing.assert_allclose(*vectors, atol=1e-5)


@pytest.mark.parametrize("script", ["ray_encode.py", "spark_encode.py"])
def test_vectors_are_those_of_the_command(script, run, library, tmp_path):
    if script == "spark_encode.py" and not (shutil.which("java") or "JAVA_HOME" in os.environ):
        pytest.skip("Spark needs a Java: install one, or set JAVA_HOME")
    write_corpus(tmp_path / "corpus", library)
    run("encode corpus -o ours.arrow -q", mib=1500)
    command = [sys.executable, ROOT / "examples" / script, "corpus", "theirs"]
    subprocess.run(command, cwd=tmp_path, env=environment(), timeout=600, check=True)
    ours = feather.read_table(tmp_path / "ours.arrow")
    assert_same_vectors(ours, pq.read_table(tmp_path / "theirs"))


def test_ray_goes_on_without_a_node_that_is_killed(run, library, tmp_path):
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    write_corpus(tmp_path / "corpus", library)
    run("encode", "corpus", "-o", "ours.arrow", "-q", mib=1500)
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    try:
        node = cluster.add_node(num_cpus=1)
        script = [sys.executable, ROOT / "examples/ray_encode.py", tmp_path / "corpus", "theirs"]
        options = ["--workers", "3", "--batch-rows", "20"]
        env = environment() | {"RAY_ADDRESS": cluster.address}
        process = subprocess.Popen([*script, *options], cwd=tmp_path, env=env)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        while not any("Encoder" in worker.name() for worker in raylet.children(recursive=True)):
            assert process.poll() is None, "the job ended before a worker was on the second node"
            time.sleep(0.1)
        time.sleep(2)  # in the middle of its work
        cluster.remove_node(node, allow_graceful=False)
        assert process.wait(600) == 0
    finally:
        cluster.shutdown()
    ours = feather.read_table(tmp_path / "ours.arrow")
    assert_same_vectors(ours, pq.read_table(tmp_path / "theirs"))
