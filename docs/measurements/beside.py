"""Do the same work by `longnet` and by what people use today: CPU time, peak memory, and how far the numbers differ.

    pip install '.[hf]' datasets sentence-transformers
    OMP_NUM_THREADS=1 python docs/measurements/beside.py ./minilm ./smollm2

Each method is a process of its own, from its start to its end, which loads its libraries and its model. The text is
Python's own manual for `help()` (pydoc_data.topics). The script writes a line of JSON for each method: `task, method,
cpu_seconds, peak_mib` and `difference`, the largest difference to the numbers of the first method of the task: of a
component of a vector, relative of the sum of nats, and of the number of token ids that differ.

    encode     400 texts of 300 characters; a vector for each, by all-MiniLM-L6-v2
    score      16,000 characters, by SmolLM2-135M-Instruct in separate windows of 2,048 tokens, in fp32
    tokenize   20,000 texts of 500 characters, by SmolLM2's tokenizer, written as a folder of Arrow files
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MANUAL = "\n".join(text for _, text in sorted(topics.topics.items()))
WINDOW = 2048

SENTENCE_TRANSFORMERS = """
import sys, numpy, pyarrow.parquet
from sentence_transformers import SentenceTransformer
texts = pyarrow.parquet.read_table("texts.parquet")["text"].to_pylist()
numpy.save("theirs.npy", SentenceTransformer(sys.argv[1], device="cpu").encode(texts))
"""
TRANSFORMERS = f"""
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = AutoTokenizer.from_pretrained(sys.argv[1])(Path("page.txt").read_text()).input_ids
net = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.tensor([[net.config.bos_token_id, *ids]])
total = 0.0
with torch.inference_mode():
    for start in range(0, ids.shape[1] - 1, {WINDOW}):
        window = ids[:, start : start + {WINDOW} + 1]
        logits = net(window[:, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
print(total)
"""
DATASETS = """
import sys, datasets
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = datasets.Dataset.from_parquet("many.parquet", cache_dir="cache")
rows = rows.map(lambda batch: {"input_ids": tokenizer(batch["text"]).input_ids}, batched=True, remove_columns=["text"])
rows.save_to_disk("theirs")
"""


def write_inputs(folder: Path) -> None:
    """Write the texts of all three tasks into a folder."""

    def cut(number: int, length: int) -> pa.Table:
        room = len(MANUAL) - length
        starts = (n * length % room for n in range(number))
        texts = [MANUAL[start : start + length] for start in starts]
        return pa.table({"doc_id": [str(n) for n in range(number)], "text": texts})

    pq.write_table(cut(400, 300), folder / "texts.parquet")
    pq.write_table(cut(20_000, 500), folder / "many.parquet")
    (folder / "page.txt").write_text(MANUAL[:16_000], encoding="utf-8")


def timed(command: list[str], folder: Path) -> tuple[str, dict[str, float]]:
    """Run a command. Return what it prints, its CPU seconds and its peak memory in MiB."""
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    with open(folder / "printed", "w+", encoding="utf-8") as printed:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{command} ended with {os.waitstatus_to_exitcode(status)}")
        printed.seek(0)
        text = printed.read()
    seconds = usage.ru_utime + usage.ru_stime
    return text, {"cpu_seconds": round(seconds, 1), "peak_mib": round(usage.ru_maxrss / 1024)}


def vectors(path: Path) -> np.ndarray:
    """Return the vectors (texts, dim) that one of the methods wrote."""
    if path.suffix == ".npy":
        return np.load(path)
    return np.array(pq.read_table(path)["embedding"].to_pylist(), np.float32)


def ids_of(folder: Path) -> list[list[int]]:
    """Return the token ids of all documents in a folder of Arrow files."""
    documents: list[list[int]] = []
    for path in sorted(folder.glob("*.arrow")):
        with pa.memory_map(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            opened = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
            documents += opened.read_all()["input_ids"].to_pylist()
    return documents


def longnet(*words: str) -> list[str]:
    """Return the command line of `longnet`."""
    return [sys.executable, "-m", "longnet_cli", *words, "--quiet"]


def library(program: str, model: str) -> list[str]:
    """Return the command line of a Python program that takes a model."""
    return [sys.executable, "-c", program, model]


def differing(ours: list[list[int]], theirs: list[list[int]]) -> int:
    """Return the number of documents whose token ids differ."""
    return sum(mine != other for mine, other in zip(ours, theirs, strict=True))


def measure(folder: Path, minilm: str, smollm2: str) -> list[dict[str, Any]]:
    """Run all methods of all tasks, and return their rows."""
    rows: list[dict[str, Any]] = []

    def run(task: str, method: str, command: list[str], difference: Callable[[str], float]) -> None:
        printed, costs = timed(command, folder)
        rows.append({"task": task, "method": method, **costs, "difference": difference(printed)})

    def of_vectors(name: str) -> Callable[[str], float]:
        return lambda _: float(abs(vectors(folder / name) - vectors(folder / "theirs.npy")).max())

    encode = longnet("encode", "texts.parquet", "--model", minilm)
    run(
        "encode",
        "sentence-transformers",
        library(SENTENCE_TRANSFORMERS, minilm),
        of_vectors("theirs.npy"),
    )
    run("encode", "longnet", [*encode, "-o", "fp32.parquet"], of_vectors("fp32.parquet"))
    bf16 = [*encode, "-o", "bf16.parquet", "--dtype", "bf16"]
    run("encode", "longnet, bf16", bf16, of_vectors("bf16.parquet"))

    sums: list[float] = []

    def of_sums(total: float) -> float:
        sums.append(total)
        return abs(total / sums[0] - 1)

    run(
        "score",
        "transformers",
        library(TRANSFORMERS, smollm2),
        lambda printed: of_sums(float(printed)),
    )
    score = longnet(
        "score", "page.txt", "--model", smollm2, "--context", str(WINDOW), "--format", "json"
    )
    run("score", "longnet", score, lambda printed: of_sums(json.loads(printed)["total"]["nll_sum"]))

    run("tokenize", "datasets", library(DATASETS, smollm2), lambda _: 0)
    tokenize = longnet("tokenize", "many.parquet", "--tokenizer", smollm2, "-o", "ours")
    run(
        "tokenize", "longnet", tokenize,
        lambda _: differing(ids_of(folder / "ours"), ids_of(folder / "theirs")),
    )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Do the same work by longnet and by other tools.")
    parser.add_argument("minilm", type=Path, help="the folder of all-MiniLM-L6-v2")
    parser.add_argument("smollm2", type=Path, help="the folder of SmolLM2-135M-Instruct")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        write_inputs(Path(place))
        for row in measure(
            Path(place), str(options.minilm.resolve()), str(options.smollm2.resolve())
        ):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
