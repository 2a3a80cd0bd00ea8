"""Replace the far past of held-out windows by foreign text, to measure what a net takes from there.

    python examples/package_corpus.py runs/packages
    python docs/measurements/foreign.py longnet-tiny runs/packages/held_out.jsonl --patterns window:1Ki own

A window is `--window` tokens of a document, and its last SCORED tokens are scored: with their true past, with shorter
contexts, and with a part of the past replaced by tokens at the same places of a window of another package. The parts
are all that stands more than EDGES[0] tokens before the scored ones, and what stands between two neighbours of EDGES.
The text beside the scored tokens stays, so a net that takes nothing from the replaced part has the same perplexity:
true / foreign is 1.

Prints a row of JSON for each pattern: perplexity at each context; `gain`, that of the window beside that of the
shortest context; perplexity at both beside the first pattern's; `reach`, which is the quotient of these two: what
a pattern gains by its context more than the first one does; and true / foreign of each part. Standard errors are over
documents. A package is what a document's name says before its first slash.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from longnet_cli import (
    Document,
    Inputs,
    LongNetError,
    ModelFacts,
    ModelFolder,
    Net,
    ScoreOptions,
    parse_pattern,
    score,
)
from longnet_cli.basics.sizes import parse_size
from longnet_cli.data.files.input_files import InputFiles
from longnet_cli.jobs.scoring.measures import Clusters

SCORED = 2048
EDGES = (2048, 4096, 8192)  # tokens before the scored ones; the last part reaches to the start
OWN = "own"  # the pattern of the model


class Window(NamedTuple):
    """Tokens of a document, (n,) ids."""

    document: str
    ids: np.ndarray

    @property
    def package(self) -> str:
        return self.document.partition("/")[0]


def windows(documents: Sequence[Document], tokens: int, count: int) -> list[Window]:
    """Return `count` windows of so many tokens, spread evenly over the documents, in their order.

    The first windows of all documents come before the second ones. Raises LongNetError if there are fewer windows, or
    if all are of one package.
    """
    most = max(map(len, documents), default=0) // tokens
    places: list[tuple[int, int]] = []  # the index of a document, and where the window starts
    for start in range(0, most * tokens, tokens):
        places += [(at, start) for at, each in enumerate(documents) if len(each) >= start + tokens]
        if len(places) >= count:
            break
    if len(places) < count:
        raise LongNetError(f"there are {len(places)} windows of {tokens} tokens, not {count}")
    places.sort()
    found = []
    for index in range(count):
        at, start = places[index * len(places) // count]  # evenly spread
        found.append(Window(documents[at].doc_id, documents[at].read(start, start + tokens)))
    if len({window.package for window in found}) < 2:
        raise LongNetError("all windows are of one package: none of them is foreign to another")
    return found


def parts(tokens: int) -> list[tuple[int, int]]:
    """Return the parts of a window's past that are replaced, as (from, to) so many tokens before the scored ones."""
    past = tokens - SCORED
    edges = [edge for edge in EDGES if edge < past]
    between = [*pairwise([*edges, past])]
    return [(edges[0], past), *between] if len(between) > 1 else between


def replaced(found: Sequence[Window], part: tuple[int, int]) -> Iterator[Window]:
    """Yield each window with the part of its past that is foreign: of the window of another package half a turn on."""
    near, far = part
    for at, window in enumerate(found):
        turn = [*found[at + len(found) // 2 :], *found]
        other = next(each for each in turn if each.package != window.package)
        scored_from = len(window.ids) - SCORED
        begin, end = scored_from - far, scored_from - near
        ids = np.concatenate([window.ids[:begin], other.ids[begin:end], window.ids[end:]])
        yield Window(window.document, ids)


def nats(
    net: Net, facts: ModelFacts, found: Sequence[Window], contexts: Sequence[int], dtype: str
) -> dict[str, list[float]]:
    """Return the nats of each window's scored tokens: "C" for each context and the window, "A-B" for each of `parts`.

    The contexts are shorter than the windows, in ascending order.
    """
    tokens = len(found[0].ids)

    def scored(given: Sequence[Window], *sizes: int) -> list[dict[str, Any]]:
        documents = [
            Document(f"{each.document} {at}", each.ids, None, each.document)
            for at, each in enumerate(given)
        ]
        options = ScoreOptions(context=sizes, last=SCORED)
        return score(net, documents, options, facts, dtype=dtype).read_all().to_pylist()

    sizes = [*contexts, tokens]
    true = scored(found, *sizes)
    of_windows = {str(size): [row[f"nll_sum_{size}"] for row in true] for size in sizes}
    for part in parts(tokens):
        rows = scored([*replaced(found, part)], tokens)
        of_windows["{}-{}".format(*part)] = [row["nll_sum"] for row in rows]
    return of_windows


def ratio(documents: Sequence[str], more: np.ndarray) -> list[float | None]:
    """Return the ratio of two perplexities and its standard error, from the difference of nats of each window (n,)."""
    clusters = Clusters(2)
    for name in dict.fromkeys(documents):
        of_document = more[np.array(documents) == name]
        clusters.add([of_document.sum(), SCORED * len(of_document)])
    value = math.exp(clusters.sums[0] / clusters.sums[1])
    error = clusters.error(np.array([1.0, 0.0]), 1)
    return [round(value, 5), error and round(value * error, 5)]


def row(
    documents: Sequence[str], own: Mapping[str, Sequence[float]], first: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the measures of a pattern, beside those of the first pattern; both are `nats` of the same windows."""
    of_own = {name: np.array(values) for name, values in own.items()}
    of_first = {name: np.array(values) for name, values in first.items()}
    contexts = [name for name in of_own if "-" not in name]
    shortest, whole = contexts[0], contexts[-1]
    beside = {name: of_own[name] - of_first[name] for name in (shortest, whole)}
    replaced_parts = []
    for name in [*of_own][len(contexts) :]:
        value, error = ratio(documents, of_own[whole] - of_own[name])
        near, far = map(int, name.split("-"))
        replaced_parts.append({"from": near, "to": far, "true_foreign": value, "se": error})
    ppl = {name: round(math.exp(of_own[name].mean() / SCORED), 4) for name in contexts}
    return {
        "windows": len(documents),
        "documents": len({*documents}),
        "scored": SCORED,
        "contexts": [*map(int, contexts)],
        "ppl": ppl,
        "gain": ratio(documents, of_own[whole] - of_own[shortest]),
        "beside_shortest": ratio(documents, beside[shortest]),
        "beside": ratio(documents, beside[whole]),
        "reach": ratio(documents, beside[whole] - beside[shortest]),
        "replaced": replaced_parts,
    }


def main() -> None:
    """Print the row of each pattern."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder, or the name of a model that ships")
    parser.add_argument("documents", help="JSON Lines of `id` and `text`, or other inputs")
    parser.add_argument("--patterns", nargs="+", default=[OWN], help=f"or {OWN}, the model's")
    parser.add_argument("--window", type=parse_size, default=16384, help="tokens")
    parser.add_argument("--windows", type=int, default=24, help="how many")
    parser.add_argument(
        "--contexts", type=parse_size, nargs="+", default=[1024], help="shorter ones"
    )
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    args = parser.parse_args()
    first: dict[str, list[float]] = {}
    for text in args.patterns:
        pattern = None if text == OWN else parse_pattern(text)
        loaded = ModelFolder.find(args.model).load(device=torch.device("cpu"), pattern=pattern)
        inputs = Inputs(InputFiles([args.documents]), loaded.tokenizer, None)
        found = windows([*inputs.documents()], args.window, args.windows)
        facts = ModelFacts.of(loaded)
        of_windows = nats(loaded.net, facts, found, args.contexts, args.dtype)
        first = first or of_windows
        named = {"model": args.model, "pattern": facts.pattern, "tokens": args.window}
        measured = row([each.document for each in found], of_windows, first)
        print(json.dumps(named | measured), flush=True)


if __name__ == "__main__":
    main()
