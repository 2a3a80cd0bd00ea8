"""Fine-tune a native model with several patterns on the same windows, and compare them on held-out documents.

    python examples/package_corpus.py runs/packages wheels/*.whl
    python examples/search.py runs/packages/wheels.jsonl -o runs/search --rows window:1Ki window:1Ki,chosen=32x32 \\
      "1Ki/1,16Ki/4,look_back=1,overlap=once,queries=all optimizer.lr=0.0003"

A row is a pattern, and any values for `longnet train --set` behind it. `repeated=0.2` there makes a fifth of the
windows such that a passage is said again: an eightieth to a 27th of the window (200 to 600 of 16,384 tokens), an eighth
to three quarters of it later. These windows are cut from the recipe's own data.

The table has each row's keys per query (the choice of blocks counts too, by its cost), tokens per second of CPU time in
training and scoring, and perplexity relative to the first row: of all tokens, of key tokens (by the initial model at
two contexts, for all rows), and of tokens whose bigram was last said `--far` or more tokens ago. The standard errors
are over documents; nats of several seeds are added. What lies in the output folder is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from longnet_cli import Inputs, ModelFolder, parse_pattern
from longnet_cli.attention.branches import attention_flops
from longnet_cli.basics.sizes import parse_size
from longnet_cli.jobs.scoring.measures import Clusters
from longnet_cli.jobs.training.recipe import load_recipe

TRAINING = ["optimizer.lr=1e-3", "schedule.warmup_steps=5"]
REPEATED = "repeated="


def longnet(result: Path, *words: object) -> dict[str, Any]:
    """Run a command, unless `result` exists. Return what this file then holds: its CPU `seconds` and its `output`."""
    command = [*map(str, words)]
    if not result.exists():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "longnet_cli", *command], check=True, stdout=subprocess.PIPE)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        result.write_text(json.dumps({"command": command, "seconds": seconds, "output": done.stdout.decode()}))
    found = json.loads(result.read_text())
    if found["command"] != command:
        sys.exit(f"search: {result} is of other options: name another -o, or remove it")
    return found


def mix_with_repeated(args: argparse.Namespace, share: float) -> str:
    """Return the recipe's `data.mix`, with this share of windows in which a passage is said again. They are written."""
    sources = load_recipe(args.recipe, {}).data.sources
    output, tokens = args.output / "repeated.arrow", args.seq_len
    if not output.exists():
        inputs = Inputs([name for source in sources for name in source.inputs], ModelFolder.find(args.init).tokenizer())
        long = [each for each in inputs.documents() if len(each) > tokens]
        rng, rows = np.random.default_rng(0), []
        # An end-of-text id comes before each document. The last target lies beyond its window: hence one token more.
        for size in [tokens - 1] * args.steps + [tokens]:
            document = long[rng.integers(len(long))]
            begin = int(rng.integers(len(document) - tokens))
            ids = document.read(begin, begin + size).astype(np.int32)
            count, distance = rng.integers(tokens // 80, tokens // 27), rng.integers(tokens // 8, tokens * 3 // 4)
            start = rng.integers(size - distance - count)
            ids[start + distance : start + distance + count] = ids[start : start + count]
            rows.append(ids)
        table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))})
        with pa.ipc.new_file(str(output), table.schema) as file:
            file.write_table(table)
    weight = round(sum(source.weight for source in sources) * share / (1 - share), 3)
    mix = [{"inputs": source.inputs, "weight": source.weight} for source in sources]
    return json.dumps([*mix, {"inputs": [str(output)], "weight": weight}], separators=(",", "="))  # TOML


def measure(args: argparse.Namespace, row: str, seed: int) -> dict[str, Any]:
    """Train and score a row. Return the CPU seconds of both, and (documents, 2) nats and tokens of each group."""
    pattern, *values = row.split()
    folder = args.output / f"{re.sub(r'[^a-zA-Z0-9.,=:-]', '_', row)},{seed}"
    values = [
        f"data.mix={mix_with_repeated(args, float(each.removeprefix(REPEATED)))}" if each.startswith(REPEATED) else each
        for each in [*TRAINING, f"train.batch_tokens={args.seq_len}", f"train.seed={seed}", *values]
    ]
    words = ["--init", args.init, "-o", folder, "--pattern", pattern, "--seq-len", args.seq_len, "--steps", args.steps]
    words += [word for value in values for word in ("--set", value)]
    trained = longnet(Path(f"{folder}.trained.json"), "train", args.recipe, *words)
    judged = ",".join(str(args.output / f"judge-{context}.arrow") for context in (args.short, args.seq_len))
    words = ["--model", folder, "--context", args.seq_len, "--by-recall", "--key-tokens", judged]
    scored = longnet(Path(f"{folder}.scored.json"), "score", *args.inputs, *words, *args.scoring)
    documents = json.loads(scored["output"])["documents"]
    far = [[each for each in document["by_recall"] if (each["from"] or 0) >= args.far] for document in documents]
    return {
        "seconds": np.array([trained["seconds"], scored["seconds"]]),
        "all": np.array([[each["nll_sum"], each["n_tokens"]] for each in documents]),
        "key": np.array([[each["key_nll_sum"], each["key_n_tokens"]] for each in documents]),
        "far": np.array([[sum(r["nll"] * r["n_tokens"] for r in of), sum(r["n_tokens"] for r in of)] for of in far]),
    }


def ratio(mine: np.ndarray, first: np.ndarray) -> str:
    """Return the perplexity relative to that of the first row, +- its standard error; both (documents, 2)."""
    clusters, nats = Clusters(3), np.array([1.0, -1.0, 0.0])
    clusters.extend(np.column_stack([mine[:, 0], first[:, 0], mine[:, 1]])[mine[:, 1] > 0])
    found = math.exp(nats @ clusters.sums / max(1.0, clusters.sums[2]))
    return f"{found:.4f} +- {found * (clusters.error(nats, 2) or 0):.4f}"


def table(args: argparse.Namespace) -> Iterator[str]:
    """Yield lines of Markdown, one for each row as soon as it is measured."""
    yield "| row | keys | tokens/s: training | scoring | ppl | all tokens / first | by seed | key tokens | far |"
    yield "|---" * 9 + "|"
    firsts: list[dict[str, Any]] = []
    for row in args.rows:
        found = [measure(args, row, seed) for seed in args.seeds]
        firsts = firsts or found
        mine, first = ({key: sum(of[key] for of in each) for key in found[0]} for each in (found, firsts))
        nats, tokens = mine["all"].sum(0)
        speeds = np.array([args.steps * args.seq_len * len(found), tokens]) / mine["seconds"]
        keys = attention_flops(parse_pattern(row.split()[0]), 1, 1, args.seq_len, True) / (4 * args.seq_len)
        seeds = ", ".join(ratio(a["all"], b["all"]).split()[0] for a, b in zip(found, firsts, strict=True))
        all_, key, far = (ratio(mine[each], first[each]) for each in ("all", "key", "far"))
        costs = f"{keys:,.0f} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {math.exp(nats / tokens):.4f}"
        yield f"| `{row}` | {costs} | {all_} | {seeds} | {key} | {far} |"
    yield ""
    counts = {each: firsts[0][each][:, 1] for each in ("all", "key", "far")}
    yield "; ".join(
        f"{each}: {of.sum():,.0f} tokens of {np.count_nonzero(of)} documents" for each, of in counts.items()
    )


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="held-out documents, as `longnet score` takes them")
    parser.add_argument("--rows", nargs="+", required=True, metavar="ROW", help="a pattern, and values of the recipe")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--recipe", default="longnet-tiny")
    parser.add_argument("--init", default="longnet-tiny", help="the initial model, which also is the judge")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--seq-len", type=parse_size, default=16384, help="tokens of a window, and of a step")
    parser.add_argument("--short", type=parse_size, default=2048, help="the judge's short context")
    parser.add_argument("--far", type=parse_size, default=2048)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="of scoring")
    args = parser.parse_args(words)
    args.output.mkdir(parents=True, exist_ok=True)
    args.scoring = ["--dtype", args.dtype, "--format", "json", "--quiet"]
    try:
        for context in (args.short, args.seq_len):
            judge = args.output / f"judge-{context}"
            by = ["--model", args.init, "--context", context, "--token-logprobs", f"{judge}.arrow"]
            longnet(Path(f"{judge}.json"), "score", *args.inputs, *by, *args.scoring)
        for line in table(args):
            print(line, flush=True)
    except subprocess.CalledProcessError as error:  # the command has said why
        parser.exit(abs(error.returncode))


if __name__ == "__main__":
    main()
