"""Rank documents by the cosine of their vectors, which `longnet encode` writes: Arrow, Parquet, a folder or a pipe.

    longnet encode FILES -o vectors.arrow && python examples/nearest.py vectors.arrow
    longnet encode FILES -o - | python examples/nearest.py -
    python examples/nearest.py vectors.arrow --query "read a file in chunks" --top 5

Prints, for each vector, the two that are nearest to it. With --query, prints the vectors nearest to that text, which
the same model encodes, and the text that they stand for: of text files, or of a column that --keep carried along
(--text NAME). Give the folder that was encoded as --root FOLDER, so that its files are found. The mean of all vectors
is subtracted, unless the model was trained by contrast, where it has no use.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

SHOWN = 300  # characters of a hit


def read_table(source: str) -> pa.Table:
    """Return the rows of a file or a folder of files, Arrow IPC or Parquet, or (`-`) of a stream on stdin.

    Exits with one line if they cannot be read.
    """
    try:
        if source == "-":
            return pa.ipc.open_stream(sys.stdin.buffer).read_all()
        files = sorted(Path(source).glob("[!_]*.*")) or [Path(source)]
        with files[0].open("rb") as file:
            kind = "parquet" if file.read(4) == b"PAR1" else "ipc"
        return ds.dataset(files, format=kind).to_table()
    except (OSError, pa.ArrowException) as error:
        sys.exit(f"{source}: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}")


def vectors_of(table: pa.Table) -> np.ndarray:
    """Return the vectors (rows, dim) of a table, in float32."""
    column = table["embedding"].combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)


def read_vectors(source: str) -> tuple[list[str], np.ndarray]:
    """Return names, and vectors (rows, dim) in float32."""
    table = read_table(source)
    return table["doc_id"].to_pylist(), vectors_of(table)


def scaled(vectors: np.ndarray, mean: np.ndarray | float) -> np.ndarray:
    """Return vectors without `mean`, of length 1."""
    vectors = vectors - mean
    return vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-12)


def cosines(vectors: np.ndarray, mean: np.ndarray | float | None = None) -> np.ndarray:
    """Return the cosine of each pair of documents, (documents, documents); -2 for a document and itself."""
    # Vectors of a net that predicts tokens share a large common part: without it, documents differ more.
    vectors = scaled(vectors, vectors.mean(0) if mean is None else mean)
    cosine = vectors @ vectors.T
    np.fill_diagonal(cosine, -2)
    return cosine


def encode_query(query: str, facts: dict[bytes, bytes], dims: int) -> np.ndarray:
    """Return the vector (1, dims) of a text, by the model that the facts of a table name."""
    if b"longnet.model" not in facts:
        sys.exit("the vectors name no model to encode a query with: `longnet encode` has not written them")
    command = [sys.executable, "-m", "longnet_cli", "encode", "-", "--quiet", "--dims", str(dims)]
    prompt = facts.get(b"longnet.query_prompt", b"").decode()
    command += [
        "--model",
        facts[b"longnet.model"].decode(),
        "--pool",
        facts[b"longnet.pooling"].decode(),
        "--prefix",
        prompt or "none",
    ]
    if b"longnet.pattern" in facts:
        command += ["--pattern", facts[b"longnet.pattern"].decode()]
    if facts.get(b"longnet.normalized") == b"false":
        command += ["--no-normalize"]
    done = subprocess.run(command, input=query.encode(), stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # `longnet encode` has said why
    return vectors_of(pa.ipc.open_stream(done.stdout).read_all())


def text_of(row: dict, column: str | None, root: Path) -> str:
    """Return the start of the text of a row, which is in a column or in a file of `root`; empty if it is not known."""
    file = root / row["doc_id"]
    if column is None and not file.is_file():
        return ""
    try:
        text = row[column] if column else file.read_bytes().decode()
    except UnicodeDecodeError:  # compressed
        return ""
    return " ".join(text[row.get("char_start") or 0 : row.get("char_end")][:SHOWN].split())


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank documents by their vectors.")
    parser.add_argument("vectors", help="a file or a folder that `longnet encode` wrote, or - for a stream on stdin")
    parser.add_argument("--query", help="find what is nearest to this text")
    parser.add_argument("--top", type=int, default=3, help="so many hits")
    parser.add_argument("--text", metavar="NAME", help="the column with the texts")
    parser.add_argument("--root", type=Path, default=Path(), help="the folder with the text files")
    args = parser.parse_args()
    table = read_table(args.vectors)
    vectors, facts, names = vectors_of(table), table.schema.metadata or {}, table["doc_id"].to_pylist()
    mean = 0.0 if b"longnet.query_prompt" in facts else vectors.mean(0)  # trained by contrast, or not
    if args.query is not None:
        query = scaled(encode_query(args.query, facts, vectors.shape[1]), mean)[0]
        found = scaled(vectors, mean) @ query
        for place in np.argsort(-found)[: args.top].tolist():
            row = table.slice(place, 1).to_pylist()[0]
            print(f"{found[place]:.3f}  {names[place]}, tokens {row['start']} to {row['end']}")
            print(f"       {text_of(row, args.text, args.root)}")
        return
    cosine = cosines(vectors, mean)
    width = max(map(len, names))
    for row, name in enumerate(names):
        best = np.argsort(-cosine[row])[: min(2, len(names) - 1)]
        print(f"{name:<{width}}  " + "   ".join(f"{names[i]} ({cosine[row, i]:.2f})" for i in best))


if __name__ == "__main__":
    main()
