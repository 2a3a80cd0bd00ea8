"""Compare patterns on a model you have, without training: what each costs in nats per token, keys, time and memory.

    python examples/real_model.py runs/real
    python examples/compare_patterns.py runs/real/smollm2 runs/real/prose/secA5.txt dense window:1Ki window:1Ki,sinks=4

Arguments that are files are documents, as text or as token ids in Arrow. All others are patterns. `dense` is scored in
separate windows of the length that the model was trained on. Every other pattern reads a document as a whole.

It writes one line of JSON per pattern, document and range of positions: `pattern, document, from, to` (the number of
tokens before), `tokens, nats` (their sum), `seconds` of CPU time (interpolated inside chunks), `keys` (per query, on
average over the whole document) and `peak_bytes` (of the process that scored all documents with this pattern). The
table on stderr has the nats per token of each document and of all, and the perplexity relative to the first pattern,
with its standard error over documents. With a file of such lines in place of the model, it prints their table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from longnet_cli import ConfigError, LongNetError, parse_pattern
from longnet_cli.basics.sizes import parse_size

EDGES = [
    0,
    10,
    100,
    1_000,
    2_000,
    4_000,
    8_000,
    16_000,
    32_000,
    64_000,
    100_000,
    1_000_000,
    10_000_000,
]
Row = dict[str, Any]


def measure(
    folder: str, pattern: str, paths: list[str], limit: int | None, dtype: str, chunk: int
) -> list[Row]:
    """Return the rows of a pattern, one per document and range of EDGES."""
    import torch

    from longnet_cli import Document, Events, Inputs, ModelFacts, ModelFolder, ScoreOptions, score
    from longnet_cli.attention.branches import attention_flops
    from longnet_cli.running.device import peak_memory

    tokenizer, held = (
        ModelFolder(Path(folder)).tokenizer(),
        {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype],
    )
    dense = pattern == "dense"
    net = ModelFolder(Path(folder)).net(
        pattern=None if dense else parse_pattern(pattern), dtype=held
    )
    if dense and not net.config.as_trained:
        raise ConfigError(f"{folder} has a pattern of its own: dense is for a model without one")
    context = net.config.max_tokens if dense else None
    rows: list[Row] = []
    for found in Inputs(paths, tokenizer).documents():
        ids = found.read(0, min(len(found), limit or len(found)))
        name = Path(found.where).name
        document = Document(name, ids, len(ids), name)
        logprobs: list[np.ndarray] = []
        ends, times = [0], [time.process_time()]

        def keep(
            *tokens: Any, logprobs: Any = logprobs, ends: Any = ends, times: Any = times
        ) -> None:
            logprobs.append(tokens[3])
            ends.append(ends[-1] + len(tokens[3]))
            times.append(time.process_time())

        facts = ModelFacts(ModelFolder(Path(folder)).bos(tokenizer))
        options = ScoreOptions((context,) if context else None)
        score(
            net, [document], options, facts, chunk=chunk, dtype=dtype, events=Events(logprobs=keep)
        ).read_all()
        nats = -np.concatenate(logprobs).astype(np.float64)
        read = min(context or len(ids), len(ids))
        keys = attention_flops(parse_pattern(pattern), 1, 1, read, True) / (4 * read)
        common = {"pattern": pattern, "document": document.doc_id, "keys": round(keys)}
        for first, last in pairwise(EDGES):
            if len(part := nats[first:last]):
                seconds = float(np.diff(np.interp([first, first + len(part)], ends, times))[0])
                measured = {"tokens": len(part), "nats": part.sum(), "seconds": round(seconds, 2)}
                rows.append({**common, "from": first, "to": last, **measured})
        print(
            f"{pattern}, {name}: {nats.mean():.4f} in {times[-1] - times[0]:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    peak = peak_memory(torch.device("cpu"))
    return [{**row, "peak_bytes": peak} for row in rows]


def table(rows: list[Row]) -> Iterator[str]:
    """Yield lines of Markdown: a row per pattern, over the documents of the first one; its error is over these."""
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    documents = list(
        dict.fromkeys(row["document"] for row in rows if row["pattern"] == patterns[0])
    )
    found = {(p, d): _sums(rows, p, d) for p in patterns for d in documents}
    yield (
        "| pattern | keys | "
        + " | ".join(documents)
        + " | nats per token | ppl / first | +- | peak MiB |"
    )
    yield "|---" * (len(documents) + 6) + "|"
    firsts = np.array([found[patterns[0], d] for d in documents])
    for p in patterns:
        sums = np.array([found[p, d] for d in documents])  # (documents, 3)
        nats, keys = sums[:, :2].sum(0) / sums[:, 2].sum()
        more = (sums[:, 0] - firsts[:, 0]) / sums[:, 2]
        error = more.std(ddof=1) / math.sqrt(len(more)) if len(more) > 1 else math.nan
        ratio = math.exp((sums[:, 0] - firsts[:, 0]).sum() / sums[:, 2].sum())
        peak = max(
            row["peak_bytes"]
            for row in rows
            if row["pattern"] == p and row["document"] in documents
        )
        each = " | ".join(f"{mean:.4f}" for mean in sums[:, 0] / sums[:, 2])
        yield f"| `{p}` | {keys:,.0f} | {each} | {nats:.4f} | {ratio:.4f} | {ratio * error:.4f} | {peak / 2**20:,.0f} |"


def _sums(rows: list[Row], pattern: str, document: str) -> tuple[float, float, int]:
    """Return the nats, the keys and the number of all tokens of a document."""
    found = [row for row in rows if row["pattern"] == pattern and row["document"] == document]
    tokens = [row["tokens"] for row in found]
    keys = sum(row["keys"] * n for row, n in zip(found, tokens, strict=True))
    return sum(row["nats"] for row in found), keys, sum(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", help="a Hugging Face model folder; or a file of rows, whose table is printed"
    )
    parser.add_argument("words", nargs="*", metavar="FILE|PATTERN", help="documents and patterns")
    parser.add_argument(
        "--tokens", type=parse_size, help="read only so many tokens of each document"
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument(
        "--chunk", type=parse_size, default=4096, help="tokens that are in memory at once"
    )
    options = parser.parse_intermixed_args()
    if Path(options.model).is_file():
        lines = Path(options.model).read_text(encoding="utf-8").splitlines()
        print(*table([json.loads(line) for line in lines]), sep="\n")
        return
    paths = [word for word in options.words if Path(word).is_file()]
    patterns = [word for word in options.words if word not in paths]
    if not paths or not patterns:
        parser.error("give at least one file and one pattern")
    if not (Path(options.model) / "config.json").is_file():
        parser.error(f"{options.model}: not the folder of a model")
    try:
        for pattern in patterns:
            parse_pattern(pattern)
    except ValueError as error:
        parser.error(str(error))
    rows: list[Row] = []
    for pattern in patterns:
        # Its own process, so that its peak memory is the pattern's
        with get_context("spawn").Pool(1) as pool:
            arguments = (
                options.model,
                pattern,
                paths,
                options.tokens,
                options.dtype,
                options.chunk,
            )
            try:
                found = pool.apply(measure, arguments)
            except LongNetError as error:
                parser.exit(error.exit_code, f"compare_patterns: {error}\n")
        for row in found:
            print(json.dumps(row), flush=True)
        rows += found
    print(*table(rows), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
