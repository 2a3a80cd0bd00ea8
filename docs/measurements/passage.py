"""Say a passage again, long after a model has read it, to see what the model finds again. Nothing is trained.

    python examples/real_model.py runs/real
    python docs/measurements/passage.py runs/real/smollm2 window:1Ki,sinks=4 finding \\
      --filler runs/real/prose/sec[A-E]*.txt --passages runs/real/prose/secJ5.txt docs/measurements/recall.py

Pages of a book whose other pages are the filler:

    apt-get download debian-handbook && dpkg-deb -x debian-handbook_*.deb runs
    python examples/real_model.py runs/handbook --no-model --prose runs/usr/share/doc/debian-handbook/html/en-US
    cd runs/handbook/prose
    python ../../../docs/measurements/passage.py ../../real/smollm2 finding --filler *.txt --passages \\
      sect.apt-get.txt \\
      sect.kernel-compilation.txt sect.ldap-directory.txt sect.monitoring.txt sect.release-lifecycle.txt

A document starts with 200 tokens of filler, and one passage from the middle of each file. Then comes filler again: the
files of `--filler` that are not passages, joined. At each distance, each passage is read for the second time, as if the
document went on with it there. The `--near` tokens before every second reading are the filler that comes last, the same
at all distances. A window begins at a multiple of its length. So distances that differ by such a multiple, as the
default ones do, have the same near keys.

The filler is read once per pattern; forked processes read the near text and the passages. In a model of transformers, a
pattern with chosen blocks reads the passages with every number of `--every` in turn.

It writes one line of JSON per pattern, distance and passage: `pattern, distance, passage, every, nats` (per token of
the second reading), `first` (of the first reading) and `seconds`. The passage "natural" is the filler that
comes after the near text, for comparison. The table on stderr has the nats, and their means over all other passages.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longnet_cli import ConfigError, LongNetError, ModelFolder, Net, open_stream, parse_pattern
from longnet_cli.attention import Pattern
from longnet_cli.basics.sizes import parse_size

PREFACE = 200  # tokens before the first passage
NATURAL = "natural"

Row = dict[str, Any]


@torch.inference_mode()
def nats_of(net: Net, stream: Any, ids: np.ndarray) -> list[float]:
    """Read the next ids (n,); return the n - 1 nats of all but the first."""
    tokens = torch.from_numpy(ids)
    hidden = stream(tokens[None])
    return net.nll(hidden[0, :-1], tokens[1:]).tolist()


def apart(net: Net, stream: Any, read: Callable[[], Any], every: int | None = None) -> Any:
    """Return what `read()` returns (JSON), but leave the stream as it was: a forked process reads.

    With `every`, blocks are chosen every so many tokens there.
    """
    source, sink = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(source)
            if every:
                stream.pattern = replace(stream.pattern, chosen_every=every)
            os.write(sink, json.dumps(read()).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(sink)
    with os.fdopen(source) as pipe:
        said = pipe.read()
    if os.waitpid(child, 0)[1]:
        sys.exit("the process that reads apart failed")  # and has said why
    return json.loads(said)


def measure(
    net: Net,
    start: np.ndarray,
    written: str,
    passages: dict[str, np.ndarray],
    filler: np.ndarray,
    options: Any,
) -> Iterator[Row]:
    """Yield the rows of a pattern. `start` are the ids before a document."""
    stream, pattern = open_stream(net), net.config.pattern
    nats_of(net, stream, np.concatenate([start, filler[:PREFACE]]))
    first = {name: float(np.mean(nats_of(net, stream, ids))) for name, ids in passages.items()}
    at, end = PREFACE, PREFACE + max(options.distances)
    near, natural = filler[end - options.near : end], filler[end : end + options.tokens]

    def again(distance: int) -> list[Row]:
        """Read the near text, and then each passage apart."""
        if options.near:
            nats_of(net, stream, near)
        rows = []
        for name, ids in (passages | {NATURAL: natural}).items():
            for every in options.every if pattern.chosen else [None]:
                begin = time.perf_counter()
                nats = float(np.mean(apart(net, stream, partial(nats_of, net, stream, ids), every)))
                row = {"pattern": written, "distance": distance, "passage": name, "every": every}
                row |= {"nats": nats, "first": first.get(name)}
                rows.append(row | {"seconds": round(time.perf_counter() - begin, 2)})
        return rows

    for distance in sorted(options.distances):
        stop = PREFACE + distance - options.near
        while at < stop:
            chunk = filler[at : min(at + options.chunk, stop)]
            nats_of(net, stream, chunk)
            at += len(chunk)
        yield from apart(net, stream, partial(again, distance))


def table(rows: list[Row]) -> Iterator[str]:
    """Yield lines of Markdown: a row per pattern and way, a column per passage and distance, and for their mean."""
    ways: dict[tuple, dict] = {}
    for row in rows:
        nats = ways.setdefault((row["pattern"], row["every"]), {})
        nats.setdefault(row["distance"], {})[row["passage"]] = row["nats"]
    for of_distance in ways.values():
        for nats in of_distance.values():
            nats["mean"] = np.mean([value for name, value in nats.items() if name != NATURAL])
    columns = [
        (distance, name)
        for distance, nats in next(iter(ways.values()), {}).items()
        for name in nats
    ]
    yield (
        "| pattern | " + " | ".join(f"{name} at {distance:,}" for distance, name in columns) + " |"
    )
    yield "|---" * (len(columns) + 1) + "|"
    for (pattern, every), of_distance in ways.items():
        name = f"`{pattern}`" + (f", every {every}" if every else "")
        yield f"| {name} | " + " | ".join(f"{of_distance[at][of]:.3f}" for at, of in columns) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model folder")
    parser.add_argument("patterns", nargs="+")
    parser.add_argument(
        "--passages",
        nargs="+",
        required=True,
        metavar="FILE",
        help="the middle of each is a passage",
    )
    parser.add_argument(
        "--filler", nargs="+", required=True, metavar="FILE", help="text, joined; no passages"
    )
    parser.add_argument("--tokens", type=parse_size, default=1000, help="of a passage")
    parser.add_argument(
        "--distances", type=parse_size, nargs="+", default=[10 << 10, 60 << 10], help="of filler"
    )
    parser.add_argument(
        "--near", type=parse_size, default=2048, help="of these tokens, the last before a passage"
    )
    parser.add_argument(
        "--every",
        type=int,
        nargs="+",
        default=[16, 4, 1],
        help="chosen_every of the second reading",
    )
    parser.add_argument("--chunk", type=parse_size, default=4096, help="tokens of a forward pass")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of weights and keys"
    )
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)  # other threads would be missing in a forked process
    folder = ModelFolder.find(options.model)
    tokenizer = folder.tokenizer()

    def read(path: str) -> np.ndarray:
        return tokenizer.encode(Path(path).read_text(encoding="utf-8", errors="replace")).astype(
            np.int64
        )

    rows: list[Row] = []
    try:
        patterns: dict[str, Pattern] = {text: parse_pattern(text) for text in options.patterns}
        filler = np.concatenate(
            [read(path) for path in options.filler if path not in options.passages]
        )
        if options.near > min(options.distances):
            raise ConfigError(
                f"the near text, {options.near} tokens, is longer than a distance: give a smaller --near"
            )
        needed = PREFACE + max(options.distances) + options.tokens
        if len(filler) < needed:
            raise ConfigError(
                f"the filler has {len(filler)} tokens, and {needed} are needed: give more files"
            )
        passages = {}
        for path in options.passages:
            ids = read(path)
            begin = max(0, (len(ids) - options.tokens) // 2)
            passages[Path(path).name] = ids[begin : begin + options.tokens]
        held = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
        for written, pattern in patterns.items():
            net = folder.net(pattern=pattern, dtype=held)
            start = net.start_rows(folder.bos(tokenizer))
            for row in measure(net, start, written, passages, filler, options):
                print(json.dumps(row), flush=True)
                rows.append(row)
    except (LongNetError, ValueError, OSError) as error:
        parser.exit(2, f"passage: {error}\n")
    print(*table(rows), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
