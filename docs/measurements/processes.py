"""Measure how fast one and two processes read, and say what that means for a corpus on many of them.

    OMP_NUM_THREADS=1 python docs/measurements/processes.py ./minilm ./smollm2

A process has one thread. Each job runs on a short and on a long input, of Python's own manual for `help()`: the
difference gives the rate, and `start` is how long the short run takes, its work included. The script writes a line of
JSON for each job, `job, processes, rate, start` (characters of text per second; seconds). Then it writes, for each size
of a corpus and number of processes, the hours that this rate takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data import topics

MANUAL = "\n".join(text for _, text in sorted(topics.topics.items()))
SIZES = {"10 GB": 1e10, "1 TB": 1e12, "10 TB": 1e13}
PROCESSES = (1, 8, 64, 1000)


def write_texts(folder: Path, count: int, length: int) -> str:
    """Write `count` texts of `length` characters into a folder of JSON Lines files, and return its name."""
    name = f"texts-{count}"
    (folder / name).mkdir()
    for shard in range(4):
        starts = ((number * length) % (len(MANUAL) - length) for number in range(shard, count, 4))
        lines = (json.dumps({"text": MANUAL[start : start + length]}) for start in starts)
        (folder / name / f"{shard}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return name


def seconds_of(folder: Path, *words: str) -> float:
    """Return how long a command takes."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "longnet_cli", *words, "--quiet"]
    begin = time.perf_counter()
    subprocess.run(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def rate_of(folder: Path, short: list[str], long: list[str], more: float) -> tuple[float, float]:
    """Return the rate, in what `more` counts, and how long the short command takes."""
    first = seconds_of(folder, *short)
    second = seconds_of(folder, *long)
    return more / (second - first), first


def measure(folder: Path, minilm: str, smollm2: str) -> list[dict[str, float | str]]:
    """Run all jobs with one and with two processes, and return their rows."""
    encode = ["--model", minilm, "--dtype", "bf16"]
    score = ["--model", smollm2, "--dtype", "bf16", "--context", "1Ki"]
    few, many = write_texts(folder, 40, 2000), write_texts(folder, 400, 2000)
    some = write_texts(folder, 12, 2000)
    (folder / "short.txt").write_text(MANUAL[:50_000], encoding="utf-8")
    (folder / "long.txt").write_text(MANUAL[:450_000], encoding="utf-8")
    rows: list[dict[str, float | str]] = []
    for processes in (1, 2):
        for_each = ["--dp", str(processes)]
        sharing = ["--sp", str(processes)]
        jobs = {
            "encode, MiniLM, --dp": (
                ["encode", few, *encode, "-o", f"few-{processes}", *for_each],
                ["encode", many, *encode, "-o", f"many-{processes}", *for_each],
                360 * 2000,
            ),
            "score, SmolLM2-135M, --dp": (
                ["score", some, *score, *for_each],
                ["score", few, *score, *for_each],
                28 * 2000,
            ),
            "score of one document, longnet-tiny, --sp": (
                ["score", "short.txt", *sharing],
                ["score", "long.txt", *sharing],
                400_000,
            ),
        }
        for job, (short, long, more) in jobs.items():
            rate, start = rate_of(folder, short, long, more)
            rows.append({"job": job, "processes": processes, "rate": rate, "start": start})
    return rows


def hours(rows: list[dict[str, float | str]]) -> list[dict[str, float | str]]:
    """Return the hours that each size of a corpus takes on each number of processes, at the rate of one of them."""
    table: list[dict[str, float | str]] = []
    for row in rows:
        if row["processes"] != 1 or "--dp" not in str(row["job"]):
            continue
        for size, n_bytes in SIZES.items():
            for processes in PROCESSES:
                seconds = n_bytes / processes / float(row["rate"]) + float(row["start"])
                reading = processes * float(row["rate"])
                table.append(
                    {
                        "job": row["job"],
                        "size": size,
                        "processes": processes,
                        "hours": seconds / 3600,
                        "bytes_per_second": reading,
                    }
                )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one and two processes.")
    parser.add_argument("minilm", type=Path, help="the folder of all-MiniLM-L6-v2")
    parser.add_argument("smollm2", type=Path, help="the folder of SmolLM2-135M-Instruct")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        minilm, smollm2 = str(options.minilm.resolve()), str(options.smollm2.resolve())
        rows = measure(Path(place), minilm, smollm2)
    for row in [*rows, *hours(rows)]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
