"""Rank documents by the cosine of their vectors, which `longnet encode` writes: Arrow, Parquet, a folder or a pipe.

    longnet encode FILES -o vectors.arrow && python examples/nearest.py vectors.arrow
    longnet encode FILES -o - | python examples/nearest.py -
    python examples/nearest.py vectors.arrow --query "read a file in chunks" --top 5 --words

Prints, for each vector, the two that are nearest to it. With --query, prints the documents nearest to that text, which
the same model encodes, each by the best of its spans, and the text of that span: of text files, or of a column that
--keep carried along (--text NAME). Give the folder that was encoded as --root FOLDER, so that its files are found.
--words adds the words that query and span share (TF-IDF), which finds more than either alone. The mean of all vectors
is subtracted, and a line says so, if a model of tokens was not trained to make vectors: they share a large common part.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from collections import Counter
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
    return (
        column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)
    )


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
        sys.exit(
            "the vectors name no model to encode a query with: `longnet encode` has not written them"
        )
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
    # Windows are read by the model's own attention
    if b"longnet.pattern" in facts and b"longnet.context" not in facts:
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
        text = row[column] if column else file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:  # compressed
        return ""
    return text[row.get("char_start") or 0 : row.get("char_end")]


def shared_words(query: str, texts: list[str]) -> np.ndarray:
    """Return the TF-IDF of the words that each text shares with the query: the cosine, (texts,)."""
    counted = [Counter(re.findall(r"\w+", text.lower())) for text in (query, *texts)]
    holders = Counter(word for counts in counted[1:] for word in counts)
    weights = [
        {
            w: (1 + np.log(n)) * np.log1p(len(texts) / holders[w])
            for w, n in c.items()
            if w in holders
        }
        for c in counted
    ]
    asked, lengths = (
        weights[0],
        [sum(x * x for x in each.values()) ** 0.5 + 1e-12 for each in weights],
    )
    return (
        np.array([sum(x * each.get(w, 0.0) for w, x in asked.items()) for each in weights[1:]])
        / lengths[1:]
    )


def z_scores(scores: np.ndarray) -> np.ndarray:
    """Return scores without their mean, in standard deviations: so two kinds of score can be added."""
    return (scores - scores.mean()) / (scores.std() + 1e-12)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank documents by their vectors.")
    parser.add_argument(
        "vectors", help="a file or a folder that `longnet encode` wrote, or - for a stream on stdin"
    )
    parser.add_argument("--query", help="find what is nearest to this text")
    parser.add_argument("--top", type=int, default=3, help="so many hits")
    parser.add_argument(
        "--words", action="store_true", help="add the words that query and span share"
    )
    parser.add_argument("--text", metavar="NAME", help="the column with the texts")
    parser.add_argument("--root", type=Path, default=Path(), help="the folder with the text files")
    args = parser.parse_args()
    table = read_table(args.vectors)
    vectors, facts, names = (
        vectors_of(table),
        table.schema.metadata or {},
        table["doc_id"].to_pylist(),
    )
    # those of an embedding model, and of a model that itself reads vectors, as slide encoders do, stay as they are
    centred = b"longnet.modules" not in facts and b"longnet.tokenizer_sha256" in facts
    mean = vectors.mean(0) if centred else 0.0
    if centred:
        print("cosines of vectors without their mean, which all share", file=sys.stderr)
    if args.query is not None:
        query = scaled(encode_query(args.query, facts, vectors.shape[1]), mean)[0]
        found = scaled(vectors, mean) @ query
        rows = table.drop_columns("embedding").to_pylist()
        if args.words:
            texts = [text_of(row, args.text, args.root) for row in rows]
            if not any(texts):
                sys.exit(
                    "--words needs the texts: give their folder (--root), or their column (--text)"
                )
            found = z_scores(found) + z_scores(shared_words(args.query, texts))
        elif not any(text_of(row, args.text, args.root) for row in rows[:1]):
            print(
                "no texts are shown: give their folder (--root), or their column (--text)",
                file=sys.stderr,
            )
        # The best span of each document
        best = {names[place]: place for place in np.argsort(found).tolist()}
        for place in sorted(best.values(), key=lambda place: -found[place])[: args.top]:
            row = rows[place]
            print(f"{found[place]:.3f}  {names[place]}, tokens {row['start']} to {row['end']}")
            if text := text_of(row, args.text, args.root):
                print(f"       {' '.join(text[:SHOWN].split())}")
        return
    cosine = cosines(vectors, mean)
    width = max(map(len, names))
    for row, name in enumerate(names):
        best = np.argsort(-cosine[row])[: min(2, len(names) - 1)]
        print(f"{name:<{width}}  " + "   ".join(f"{names[i]} ({cosine[row, i]:.2f})" for i in best))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, as any other program
    main()
