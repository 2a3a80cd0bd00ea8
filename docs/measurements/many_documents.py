"""Measure what a document costs where there are millions of them: time and memory of each command, and their slopes.

    OMP_NUM_THREADS=1 python docs/measurements/many_documents.py runs/many --documents 1e5 1e6 1e7

A document has LENGTH ids or, for `tokenize`, as many letters. Each size is written once as Parquet and once as Arrow,
in files of FILE documents. The net is so small that nearly all of the time is that of reading and writing. `train`
takes five steps.

The script prints a line of JSON for each command, format and size: `job, format, documents, cpu_seconds, seconds,
peak_memory_bytes`. Beside a smaller size, it also has `us_per_document` and `bytes_per_document`: CPU time and memory
of the documents that are more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from longnet_cli import LongNet, LongNetConfig
from longnet_cli.data.documents.tokenizer import Tokenizer

LENGTH = 32
FILE = 1_000_000
GROUP = 1 << 16  # rows written at a time
NET = {"vocab_size": 257, "dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64}
PATTERN = {"segment_lengths": (32,), "dilation_rates": (1,)}
JOBS = {
    "inspect": ["data", "inspect", "{data}"],
    "train": [
        "train", "--data", "{data}", "--init", "{model}", "--seq-len", "256", "--steps", "5",
        "--set", "train.batch_tokens=1Ki", "-o", "{out}",
    ],
    "score": ["score", "{data}", "--model", "{model}", "-o", "{out}.arrow"],
    "encode": ["encode", "{data}", "--model", "{model}", "-o", "{out}.arrow"],
    "tokenize": ["tokenize", "{data}", "--tokenizer", "bytes", "-o", "{out}"],
}  # fmt: skip


def batches(documents: int, seed: int, column: str) -> Iterator[pa.RecordBatch]:
    """Yield rows of ids, which are letters, or of texts of these letters."""
    generator = np.random.default_rng(seed)
    for start in range(0, documents, GROUP):
        rows = min(GROUP, documents - start)
        letters = generator.integers(97, 123, rows * LENGTH, dtype=np.int32)
        ends = pa.array(np.arange(rows + 1, dtype=np.int32) * LENGTH)
        if column == "tokens":
            values = pa.ListArray.from_arrays(ends, pa.array(letters))
        else:
            text = pa.py_buffer(letters.astype(np.uint8))
            values = pa.StringArray.from_buffers(rows, ends.buffers()[1], text)
        yield pa.RecordBatch.from_arrays([values], [column])


def write(folder: Path, kind: str, documents: int, column: str) -> Path:
    """Write a folder of files of documents, unless it is there."""
    out = folder / f"{column}-{kind}-{documents}"
    if out.exists():
        return out
    out.mkdir(parents=True)
    types = {"tokens": pa.list_(pa.int32()), "text": pa.string()}
    schema = pa.schema([(column, types[column])])
    for index, first in enumerate(range(0, documents, FILE)):
        path = str(out / f"{index:05d}.{kind}")
        if kind == "parquet":
            writer = pq.ParquetWriter(path, schema, use_dictionary=False)
        else:
            writer = pa.ipc.new_file(path, schema)
        with writer:
            for batch in batches(min(FILE, documents - first), index, column):
                writer.write_batch(batch)
    return out


def run(words: Sequence[str]) -> dict[str, float]:
    """Run a command, and return what it took."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "longnet_cli", *words, "--quiet"], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    return {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "seconds": time.perf_counter() - begin,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
    }


def measure(
    folder: Path, sizes: Sequence[int], jobs: Sequence[str], kinds: Sequence[str]
) -> Iterator[dict[str, object]]:
    """Yield a row for each job, format and size."""
    torch.manual_seed(0)
    model = folder / "model"
    LongNet(LongNetConfig(**NET, **PATTERN)).save_pretrained(model, Tokenizer.bytes().to_json())
    for job in jobs:
        for kind in kinds:
            before: dict[str, float] = {}
            for documents in sizes:
                data = write(folder, kind, documents, "text" if job == "tokenize" else "tokens")
                out = folder / "out"
                names = {"data": str(data), "model": str(model), "out": str(out)}
                taken = run([word.format(**names) for word in JOBS[job]])
                shutil.rmtree(out, ignore_errors=True)
                out.with_suffix(".arrow").unlink(missing_ok=True)
                row: dict[str, object] = {
                    "job": job,
                    "format": kind,
                    "documents": documents,
                    **taken,
                }
                if before:
                    more = documents - before["documents"]
                    seconds = taken["cpu_seconds"] - before["cpu_seconds"]
                    memory = taken["peak_memory_bytes"] - before["peak_memory_bytes"]
                    row["us_per_document"] = round(1e6 * seconds / more, 2)
                    row["bytes_per_document"] = round(memory / more, 1)
                yield row
                before = {"documents": documents, **taken}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=float, nargs="+", default=[1e5, 1e6, 1e7])
    parser.add_argument("--jobs", nargs="+", default=[*JOBS], choices=[*JOBS])
    parser.add_argument("--formats", nargs="+", default=["parquet", "arrow"])
    args = parser.parse_args()
    for row in measure(args.folder, [*map(int, args.documents)], args.jobs, args.formats):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
