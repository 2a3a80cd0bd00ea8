"""Train small nets that differ in the pattern alone, to measure what dilated levels buy: docs/measurements/dilation.md.

    apt-get download anarchism=15.3-4
    pip download --no-deps --only-binary :all: -d wheels \\
      django==5.2.8 networkx==3.6.1 sphinx==8.2.3 sympy==1.14.0 twisted==25.5.0
    python docs/measurements/dilation.py data runs/dilation anarchism_15.3-4_all.deb wheels/*.whl
    OMP_NUM_THREADS=1 python docs/measurements/dilation.py seed runs/dilation 1
    OMP_NUM_THREADS=1 python docs/measurements/dilation.py seed runs/dilation 2
    python docs/measurements/dilation.py table

`seed` is one unit of work: a trunk, dense in blocks of 1,024, and each pattern of PATTERNS that goes on from it with
the same windows in the same order. It appends a row per pattern and kind of text to dilation.jsonl beside this script,
and leaves out patterns whose rows are there. A seed takes an hour and a half of one core. If it is killed, the same
command goes on. With names after the seed, it trains these patterns alone, so two processes can share a seed once its
trunk is there, which `seed runs/dilation 1 trunk` makes. `seed runs/dilation 0 scratch-window scratch-levels
scratch-mapped` trains the controls, which have no trunk.

The data are pinned: `data` refuses tokens other than those measured (TOKENS). Half of the windows is English prose,
half is Python source. A held-out document is chosen by a hash of its name.

A row holds, for each of at most DOCUMENTS held-out documents, of which it reads the first WINDOW tokens: `nats` in
separate windows of each context; in windows of WINDOW, `position`, the nats of each range of positions (POSITIONS), and
`recall`, the nats of tokens by how long ago their bigram was last said (RECALL; `recall_tokens` counts them).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from by_recall import distances

from longnet_cli import LongNet, LongNetError
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.names import Sources
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.jobs.benchmark import device_name
from longnet_cli.jobs.scoring.measures import Clusters
from longnet_cli.jobs.training.loop import train
from longnet_cli.jobs.training.recipe import load_recipe

WINDOW = 16384
LEVELS = "512/1,2Ki/4,8Ki/16,look_back=1,overlap=once,queries=all"
PATTERNS = {
    "window": "window:1Ki",
    "levels": LEVELS,
    "blocks": "1Ki/1",
    "mapped": LEVELS,  # with positions by level: a step of a level is one position
    "chosen": "window:512,chosen=32x32,chosen_every=32,layers=2",
    "paper": "1Ki/1,4Ki/2,16Ki/4",
    "dense": "16Ki/1",
}
SCRATCH = {"scratch-window": "window:1Ki", "scratch-levels": LEVELS, "scratch-mapped": LEVELS}
TRUNK_WINDOW, TRUNK_TOKENS, TRUNK_STEPS = 1024, 8192, 750  # windows, steps of so many tokens
STEPS = 96  # of each pattern, of one window of WINDOW
MODEL = {
    "vocab_size": 4096,
    "dim": 128,
    "num_layers": 4,
    "num_heads": 4,
    "ffn_dim": 480,
    "position": "rope",
}

KINDS = ("prose", "python")
HELD_OUT = 6  # of so many documents, one
DOCUMENT_CHARACTERS = 300_000  # of a document of Python, at least
DOCUMENTS = 16
CONTEXTS = (1024, 4096, WINDOW)
POSITIONS = (0, 1024, 2048, 4096, 8192, WINDOW)
RECALL = (
    1,
    1024,
    2048,
    4096,
    8192,
    WINDOW,
)  # tokens ago; the first number of each row is of new bigrams
TOKENS = {  # SHA-256 of the ids, as little-endian int32, of all documents in order
    "prose-train": "4563c50c779a91757c7eebbbaac364e18665f2f5d3d65f7f65f65876bb94d4ce",
    "prose-held-out": "1ddd587a61930c4df1e5b13fad0dcd652533c5173523949ca8bb7b87ceb787e8",
    "python-train": "fc305d34e53522eb3fe224d841d627755334ecc09aa1de8010fafc500cc1022b",
    "python-held-out": "f66ddddf60b4dbee8a9644c8a668b31c3e2ed179a018d212ececd3c4d1ee6540",
}
ROWS = Path(__file__).with_suffix(".jsonl")


def is_held_out(name: str) -> bool:
    """Return whether the document with this name is kept from training."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0


def prose(package: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the English documents of a Debian package, sorted by name."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        for path in sorted(Path(folder).rglob("*.md.gz")):
            yield path.name.removesuffix(".md.gz"), gzip.decompress(path.read_bytes()).decode()


def python(wheel: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of documents of a wheel: neighbouring source files, each under a comment with its name."""
    archive, parts, first = zipfile.ZipFile(wheel), list[str](), ""
    for name in sorted(name for name in archive.namelist() if name.endswith(".py")):
        try:
            text = archive.read(name).decode()
        except UnicodeDecodeError:
            continue
        if text.strip():
            first = first or name
            parts.append(f"# {name}\n{text.rstrip()}\n\n")
        if sum(map(len, parts)) >= DOCUMENT_CHARACTERS:
            yield first, "".join(parts)
            parts, first = [], ""
    if parts:
        yield first, "".join(parts)


def write_data(folder: Path, packages: Sequence[str]) -> None:
    """Write the documents as text, train the tokenizer, and write the tokens. Raises LongNetError for other tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    texts: dict[str, list[str]] = {
        f"{kind}-{part}": [] for kind in KINDS for part in ("train", "held-out")
    }
    for path in sorted(map(Path, packages), key=lambda path: path.name):
        kind, documents = ("prose", prose) if path.suffix == ".deb" else ("python", python)
        for name, text in documents(path):
            part = "held-out" if is_held_out(name) else "train"
            texts[f"{kind}-{part}"].append(json.dumps({"id": name, "text": text}) + "\n")
    for name, lines in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    run = [sys.executable, "-m", "longnet_cli", "tokenize", "-q"]
    both = [str(folder / f"{kind}-train.jsonl") for kind in KINDS]
    subprocess.run(
        [*run, *both, "-o", str(folder / "mix"), "--train-vocab", str(MODEL["vocab_size"])],
        check=True,
    )
    for name in texts:
        words = ["--tokenizer", str(folder / "mix")]
        subprocess.run(
            [*run, str(folder / f"{name}.jsonl"), "-o", str(folder / name), *words], check=True
        )
        digest = hashlib.sha256()
        for _, ids in tokens_of(folder / name):
            digest.update(ids.astype("<i4").tobytes())
        if digest.hexdigest() != TOKENS[name]:
            raise LongNetError(f"{folder / name} has other tokens than those of the measurement")


def tokens_of(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the ids (n,) of each document of a folder of tokens."""
    for document in Inputs(Sources([str(folder)]), Tokenizer.load(str(folder)), None).documents():
        yield document.doc_id, document.read(0, len(document))


def train_net(folder: Path, seed: int, name: str, pattern: str, initial: Path | None) -> float:
    """Train a net, or finish its training, in `folder`/`seed`/`name`. Return its CPU seconds since the last resume.

    A file of the folder holds these when it is done, so that two processes can take a trunk that is.
    """
    done = folder / str(seed) / name / "cpu_seconds"
    if done.exists():
        return float(done.read_text())
    tokens = {
        "data.mix": [{"inputs": [str(folder / f"{kind}-train")], "weight": 1} for kind in KINDS]
    }
    settings: dict[str, Any] = {
        "model.pattern": pattern,
        "data.tokenizer": str(folder / "mix"),
        **tokens,
    }
    settings |= {"optimizer.name": "muon", "optimizer.weight_decay": 0.1, "optimizer.clip": 1.0}
    settings |= {
        "schedule.decay": "linear",
        "train.seed": seed,
        "train.dtype": "bf16",
        "train.chunk": WINDOW,
    }
    settings |= {"train.save_minutes": 5.0, "train.save_every": 100}
    whole = TRUNK_STEPS * TRUNK_TOKENS // WINDOW + STEPS
    if initial:
        settings |= {"init": str(initial), "train.batch_tokens": WINDOW, "optimizer.lr": 1.5e-3}
        settings |= {"train.stages": [{"seq_len": WINDOW, "steps": STEPS}]}
        settings |= {"schedule.warmup_steps": 5, "schedule.final": 0.02}
    else:
        settings |= {f"model.{key}": value for key, value in MODEL.items()}
        if name == "scratch-mapped":
            settings["model.position"] = "rope_by_level"
        settings |= {"optimizer.lr": 3e-3, "schedule.warmup_steps": 40}
        trunk = name == "trunk"
        stage = (
            {"seq_len": TRUNK_WINDOW, "steps": TRUNK_STEPS}
            if trunk
            else {"seq_len": WINDOW, "steps": whole}
        )
        settings |= {
            "train.batch_tokens": TRUNK_TOKENS if trunk else WINDOW,
            "train.stages": [stage],
        }
        settings |= {"schedule.final": 0.3 if trunk else 0.02}
    began = time.process_time()
    train(load_recipe(None, settings), folder / str(seed) / name)
    done.write_text(str(time.process_time() - began))
    return float(done.read_text())


def by_level(trunk: Path) -> Path:
    """Return a copy of a trunk with positions by level, which are the same in blocks."""
    copy = shutil.copytree(trunk, trunk.with_name("trunk-by-level"), dirs_exist_ok=True)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"position": "rope_by_level"}))
    LongNet.from_pretrained(copy, verify=False).save_pretrained(copy)
    return copy


@torch.inference_mode()
def evaluate(net: LongNet, folder: Path, kind: str) -> dict[str, Any]:
    """Return the measures of a row over the held-out documents of a kind that have WINDOW tokens."""
    eos = Tokenizer.load(str(folder / "mix")).eos_id
    measures: dict[str, Any] = {
        name: [] for name in ("documents", "position", "recall", "recall_tokens")
    }
    measures["nats"] = {str(context): [] for context in CONTEXTS}
    for name, ids in tokens_of(folder / f"{kind}-held-out"):
        if len(ids) < WINDOW or len(measures["documents"]) == DOCUMENTS:
            continue
        stream = torch.from_numpy(np.concatenate(([eos], ids[:WINDOW])).astype(np.int64))
        for context in CONTEXTS:
            inputs, targets = stream[:-1].view(-1, context), stream[1:].view(-1, context)
            hidden = torch.cat([net(row[None]) for row in inputs])
            nats = [
                torch.nn.functional.cross_entropy(net.logits(x).float(), y, reduction="none")
                for x, y in zip(
                    hidden.flatten(0, 1).split(1024), targets.flatten().split(1024), strict=True
                )
            ]
            of_tokens = torch.cat(nats).double().numpy()
            measures["nats"][str(context)].append(round(of_tokens.sum(), 3))
        ago = np.searchsorted(RECALL, distances(ids[:WINDOW]), side="right")
        measures["documents"].append(name)
        measures["position"].append(
            [round(of_tokens[a:b].sum(), 3) for a, b in pairwise(POSITIONS)]
        )
        measures["recall"].append(np.bincount(ago, of_tokens, len(RECALL)).round(3).tolist())
        measures["recall_tokens"].append(np.bincount(ago, minlength=len(RECALL)).tolist())
    return measures


def rows() -> list[dict[str, Any]]:
    """Return the rows that are measured already."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def measure(folder: Path, seed: int, names: Sequence[str]) -> None:
    """Train and evaluate nets of a seed, and append their rows."""
    if unknown := {*names} - {"trunk", *PATTERNS, *SCRATCH}:
        raise LongNetError(
            f"no pattern {', '.join(unknown)}: choose from {', '.join([*PATTERNS, *SCRATCH])}"
        )
    for name in names:
        if any((row["seed"], row["pattern"]) == (seed, name) for row in rows()):
            continue
        initial = None if name in SCRATCH else folder / str(seed) / "trunk"
        if initial:
            train_net(folder, seed, "trunk", f"{TRUNK_WINDOW}/1", None)
        if name == "trunk":
            continue
        if initial and name == "mapped":
            initial = by_level(initial)
        pattern = {**PATTERNS, **SCRATCH}[name]
        seconds = train_net(folder, seed, name, pattern, initial)
        net = LongNet.from_pretrained(folder / str(seed) / name).eval()
        results = [{"text": kind, **evaluate(net, folder, kind)} for kind in KINDS]
        sizes = net.config
        facts = {
            "seed": seed,
            "pattern": name,
            "notation": pattern,
            "keys": round(
                sizes.attention_flops(WINDOW) / WINDOW / 4 / sizes.dim / sizes.num_layers
            ),
            "training_flops": round(sizes.training_flops([WINDOW]) / WINDOW),  # per token
            "cpu_seconds": round(seconds),  # of training after the last resume
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": device_name(torch.device("cpu")),
            "date": time.strftime("%Y-%m-%d"),
        }
        with ROWS.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(facts | result) + "\n" for result in results))
        print(f"seed {seed}, {name}: rows written", file=sys.stderr, flush=True)


def table() -> Iterator[str]:
    """Yield lines of Markdown: a summary, perplexity by context, and three tables relative to the first pattern.

    Nets from scratch are relative to the window from scratch. A standard error is over documents, whose differences are
    means over seeds, and over seeds if there are several.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows(), key=lambda row: row["seed"]):
        found.setdefault((row["text"], row["pattern"]), []).append(row)
    names = [name for name in (*PATTERNS, *SCRATCH) if (KINDS[0], name) in found]
    columns = [(KINDS[0], 0), (KINDS[0], -1), *((KINDS[1], at) for at in range(len(CONTEXTS)))]
    first, *controls = SCRATCH

    def ratio(kind: str, name: str, measure: Measure, index: int) -> str:
        window = first if name in controls else names[0]
        return _ratio(found[kind, name], found[kind, window], measure, index)

    yield (
        "| ppl / that of the window | seeds | "
        + " | ".join(f"{kind}, {CONTEXTS[at]:,}" for kind, at in columns)
        + " |"
    )
    yield "|---" * (2 + len(columns)) + "|"
    for name in names[1:]:
        cells = [ratio(kind, name, _by_context, at) for kind, at in columns]
        yield f"| {name} | {len(found[KINDS[0], name])} | " + " | ".join(cells) + " |"
    yield (
        "\n| text | pattern | seeds | keys | MFLOPs per token | "
        + " | ".join(f"ppl, {c:,}" for c in CONTEXTS)
        + " |"
    )
    yield "|---" * (5 + len(CONTEXTS)) + "|"
    for kind in KINDS:
        for name in names:
            of_seeds = found[kind, name]
            ppl = [
                math.exp(np.mean([row["nats"][str(context)] for row in of_seeds]) / WINDOW)
                for context in CONTEXTS
            ]
            facts = [
                kind,
                name,
                len(of_seeds),
                of_seeds[0]["keys"],
                round(of_seeds[0]["training_flops"] / 1e6, 1),
            ]
            yield (
                "| "
                + " | ".join(map(str, facts))
                + " | "
                + " | ".join(f"{each:.3f}" for each in ppl)
                + " |"
            )
    edges = [f"{a:,} to {b - 1:,}" for a, b in pairwise(POSITIONS)]
    said = ["new", *(f"{a:,} to {b - 1:,} ago" for a, b in pairwise(RECALL))]
    for title, columns, measure in (
        (
            "ppl / that of the window, context",
            [f"{context:,}" for context in CONTEXTS],
            _by_context,
        ),
        (f"in windows of {WINDOW:,}, position", edges, _by_position),
        (f"in windows of {WINDOW:,}, the bigram was said", said, _by_recall),
    ):
        yield f"\n| text | {title} | " + " | ".join(columns) + " |"
        yield "|---" * (2 + len(columns)) + "|"
        for kind in KINDS:
            for name in names[1:]:
                cells = [ratio(kind, name, measure, i) for i in range(len(columns))]
                yield f"| {kind} | {name} | " + " | ".join(cells) + " |"


Measured = tuple[np.ndarray, np.ndarray]  # nats and tokens of each document, (documents,) each
Measure = Callable[
    [dict[str, Any], int], Measured
]  # from a row and the index of a context, or of a range


def _by_context(row: dict[str, Any], index: int) -> Measured:
    nats = np.array(row["nats"][str(CONTEXTS[index])])
    return nats, np.full(len(nats), WINDOW)


def _by_position(row: dict[str, Any], index: int) -> Measured:
    nats = np.array(row["position"])[:, index]
    return nats, np.full(len(nats), POSITIONS[index + 1] - POSITIONS[index])


def _by_recall(row: dict[str, Any], index: int) -> Measured:
    return np.array(row["recall"])[:, index], np.array(row["recall_tokens"])[:, index]


def _ratio(
    some: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], measure: Measure, index: int
) -> str:
    """Return the ratio of two perplexities, over the seeds that both have, with its standard error."""
    of_others = {row["seed"]: row for row in others}
    pairs = [
        (measure(row, index), measure(of_others[row["seed"]], index))
        for row in some
        if row["seed"] in of_others
    ]
    if not pairs:
        return ""
    tokens = pairs[0][0][1]
    more = np.array([nats - other for (nats, _), (other, _) in pairs])  # (seeds, documents)
    documents = Clusters(2)
    documents.extend(np.stack([more.mean(0), tokens], 1))
    error = documents.error(np.array([1.0, 0.0]), -1) or 0.0
    of_seeds = more.sum(1) / tokens.sum()
    if len(pairs) > 1:
        error = math.hypot(error, of_seeds.std(ddof=1) / math.sqrt(len(pairs)))
    ratio = math.exp(of_seeds.mean())
    return f"{ratio:.3f} +- {ratio * error:.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_data = commands.add_parser("data")
    of_data.add_argument("folder", type=Path)
    of_data.add_argument("packages", nargs="+")
    of_seed = commands.add_parser("seed")
    of_seed.add_argument("folder", type=Path)
    of_seed.add_argument("seed", type=int)
    of_seed.add_argument(
        "patterns", nargs="*", metavar="PATTERN", help=", ".join(["trunk", *PATTERNS, *SCRATCH])
    )
    commands.add_parser("table")
    args = parser.parse_args()
    try:
        if args.command == "data":
            write_data(args.folder, args.packages)
        elif args.command == "table":
            print(*table(), sep="\n")
        else:
            measure(args.folder, args.seed, args.patterns or [*PATTERNS])
    except LongNetError as error:
        parser.exit(3, f"dilation: {error}\n")
