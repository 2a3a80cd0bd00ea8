"""Rank documents by the cosine of their vectors, read from a file or a pipe that `longnet encode` writes.

    longnet encode FILES -o vectors.arrow && python examples/nearest.py vectors.arrow
    longnet encode FILES -o - | python examples/nearest.py -

Prints, for each document, the two that are nearest to it.
"""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa


def read_vectors(source: str) -> tuple[list[str], np.ndarray]:
    """Return names, and vectors (documents, dim) in float32, of an Arrow IPC file or (`-`) of a stream on stdin."""
    if source == "-":
        table = pa.ipc.open_stream(sys.stdin.buffer).read_all()
    else:
        table = pa.ipc.open_file(pa.memory_map(source)).read_all()
    column = table["embedding"].combine_chunks()
    vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)
    return table["doc_id"].to_pylist(), vectors


def cosines(vectors: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of documents, (documents, documents); -2 for a document and itself."""
    # Vectors of one model share a large common part: without it, documents differ more.
    vectors = vectors - vectors.mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-12
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -2)
    return cosine


def main(source: str) -> None:
    names, vectors = read_vectors(source)
    cosine = cosines(vectors)
    width = max(map(len, names))
    for row, name in enumerate(names):
        best = np.argsort(-cosine[row])[:2]
        print(f"{name:<{width}}  " + "   ".join(f"{names[i]} ({cosine[row, i]:.2f})" for i in best))


if __name__ == "__main__":
    main(*sys.argv[1:])
