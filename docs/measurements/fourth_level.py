"""Ask whether longnet-tiny gains by a fourth level: docs/measurements/dilation.md.

    python examples/package_corpus.py runs/packages
    python docs/measurements/fourth_level.py data runs/packages
    longnet tokenize runs/packages/whole_train.jsonl -o runs/packages/whole --tokenizer longnet-tiny
    mkdir -p runs/before && git archive b727aa70 models/longnet-tiny | tar -x -C runs/before
    L=look_back=1,overlap=once,queries=all
    longnet train docs/measurements/fourth-level.toml -o runs/four
    longnet train docs/measurements/fourth-level.toml -o runs/three --set model.pattern=512/1,2Ki/4,8Ki/16,$L
    python docs/measurements/fourth_level.py measure runs/packages ./runs/three ./runs/four

`data` joins neighbouring documents of a package, up to MOST characters, so that most are much longer than a
window. A joined document of fewer than LEAST characters is left out. `measure` prints the row of foreign.py for each
model, in windows of 64Ki tokens, beside the first model, with foreign text in place of other parts of the past (EDGES).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import foreign
import torch

from longnet_cli import Inputs, ModelFacts, ModelFolder
from longnet_cli.data.files.input_files import InputFiles

LEAST = 300_000  # characters
MOST = 3_000_000
WINDOW = 65536
WINDOWS = 24
CONTEXTS = (1024, 16384)
EDGES = (2048, 16384)  # tokens before the scored ones: the third level ends at the second


def package(document: dict[str, str]) -> str:
    """Return the name of a document's package."""
    return document["id"].partition("/")[0]


def joined(documents: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Yield the documents of packages, joined; each has the id of its first part."""
    whole: dict[str, str] | None = None
    for document in documents:
        more = document["text"]
        if whole and package(whole) == package(document) and len(whole["text"] + more) <= MOST:
            whole = whole | {"text": whole["text"] + more}
            continue
        if whole:
            yield whole
        whole = document
    if whole:
        yield whole


def write_data(folder: Path) -> None:
    """Write whole_train.jsonl and whole_held_out.jsonl beside the files of package_corpus.py."""
    for part in ("train", "held_out"):
        lines = (folder / f"{part}.jsonl").open(encoding="utf-8")
        with (folder / f"whole_{part}.jsonl").open("w", encoding="utf-8") as file:
            for whole in joined(map(json.loads, lines)):
                if len(whole["text"]) >= LEAST:
                    file.write(json.dumps(whole) + "\n")


def measure(folder: Path, models: Sequence[str]) -> Iterator[dict[str, object]]:
    """Yield the row of each model."""
    foreign.EDGES = EDGES
    first: dict[str, list[float]] = {}
    for model in models:
        loaded = ModelFolder.find(model).load(device=torch.device("cpu"))
        inputs = Inputs(InputFiles([str(folder / "whole_held_out.jsonl")]), loaded.tokenizer, None)
        windows = foreign.windows([*inputs.documents()], WINDOW, WINDOWS)
        facts = ModelFacts.of(loaded)
        nats = foreign.nats(loaded.net, facts, windows, CONTEXTS, "bf16")
        first = first or nats
        names = [window.document for window in windows]
        yield {"model": model, "pattern": facts.pattern} | foreign.row(names, nats, first)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("data", "measure"):
        commands.add_parser(name).add_argument("folder", type=Path)
    commands.choices["measure"].add_argument("models", nargs="+")
    args = parser.parse_args()
    if args.command == "data":
        write_data(args.folder)
    else:
        for row in measure(args.folder, args.models):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
