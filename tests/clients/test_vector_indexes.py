"""What `encode` writes, in indexes of vectors: faiss and usearch find the neighbours that a matrix product finds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import make_document, tiny_net
from pyarrow import feather

from longnet_cli.data.outputs import ShardWriter
from longnet_cli.jobs.encoding import EncodeFacts, encode
from longnet_cli.jobs.options import EncodeOptions


@pytest.fixture
def vectors(tmp_path: Path) -> np.ndarray:
    """(40, 32) float32, a view of the column `embedding` of a file that is mapped."""
    batches = encode(tiny_net(dim=32), [make_document(30 + i) for i in range(40)], EncodeOptions(), EncodeFacts(256))
    with ShardWriter(tmp_path / "vectors.arrow", batches.schema) as writer:
        for batch in batches:
            writer.write(batch)
    table = feather.read_table(tmp_path / "vectors.arrow", memory_map=True)
    return table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)


def nearest(vectors: np.ndarray) -> Any:
    return np.argsort(-vectors @ vectors.T, axis=1, kind="stable")[:, :5]


def test_faiss(vectors: np.ndarray) -> None:
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(32)
    index.add(vectors)
    scores, found = index.search(vectors, 5)
    assert np.array_equal(found, nearest(vectors))
    assert np.abs(scores - np.take_along_axis(vectors @ vectors.T, found, 1)).max() < 1e-6


def test_usearch(vectors: np.ndarray) -> None:
    usearch = pytest.importorskip("usearch.index")
    index = usearch.Index(ndim=32, metric="ip", dtype="f32")
    index.add(np.arange(len(vectors)), vectors)
    found = index.search(vectors, 5, exact=True)
    assert np.array_equal(found.keys, nearest(vectors))
    assert np.abs(1 - found.distances - np.take_along_axis(vectors @ vectors.T, nearest(vectors), 1)).max() < 1e-6
