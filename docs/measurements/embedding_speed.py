"""Time `encode` beside sentence-transformers on the same windows: CPU time in one process, one thread, in alternation.

    python docs/measurements/embedding_speed.py ./all-MiniLM-L6-v2 --texts 200 --rounds 5

Texts are made of the words of this repository's documentation: first of one length, then of mixed lengths, all of them
no longer than the model's window. Prints the median of each, the ratio, and the largest difference of a number.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from sentence_transformers import SentenceTransformer

from longnet_cli import encode_batches

DOCS = Path(__file__).parents[1]


def make_texts(number: int, lengths: range) -> list[str]:
    """Return texts of so many words, always the same ones."""
    words = " ".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))).split()
    chance = random.Random(0)
    plain = [word for word in words if word.isalpha()]
    return [" ".join(chance.choices(plain, k=chance.choice(lengths))) for _ in range(number)]


def compare(model: str, texts: list[str], rounds: int) -> str:
    """Return a line with the CPU time of both, and whether they agree."""
    library = SentenceTransformer(model, device="cpu")
    table = pa.table({"doc_id": [*map(str, range(len(texts)))], "text": texts})
    theirs, ours = library.encode_document(texts), encode_batches(table, model=model)
    vectors = np.array(ours["embedding"].to_pylist(), np.float32)
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        for taken, run in zip(
            seconds, (library.encode_document, lambda _: encode_batches(table, model=model)), strict=True
        ):
            begin = time.process_time()
            run(texts)
            taken.append(time.process_time() - begin)
    library_time, own_time = map(statistics.median, seconds)
    times = f"library {library_time:.2f} s, encode {own_time:.2f} s, {library_time / own_time:.2f} times as fast"
    return f"{sum(ours['n_tokens'].to_pylist()):,} tokens: {times}; difference {np.abs(vectors - theirs).max():.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time encode beside sentence-transformers.")
    parser.add_argument("model", help="a folder of sentence-transformers, or its name on a hub")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--words", type=int, default=120, help="of the longest text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, lengths in (("one length", range(args.words, args.words + 1)), ("mixed", range(1, args.words + 1))):
        print(f"{name}: {compare(args.model, make_texts(args.texts, lengths), args.rounds)}")


if __name__ == "__main__":
    main()
