"""Train small nets that differ in the pattern alone, to measure what dilated levels buy: docs/measurements/dilation.md.

    apt-get download anarchism=15.3-4
    pip download --no-deps --only-binary :all: -d wheels \\
      django==5.2.8 networkx==3.6.1 sphinx==8.2.3 sympy==1.14.0 twisted==25.5.0
    python docs/measurements/dilation.py data runs/dilation anarchism_15.3-4_all.deb wheels/*.whl
    OMP_NUM_THREADS=1 python docs/measurements/dilation.py train runs/dilation 0    # all nets of ARMS that lack a row
    OMP_NUM_THREADS=1 python docs/measurements/dilation.py train runs/dilation 1 paper-16Ki mapped-16Ki
    python docs/measurements/dilation.py reach      # and `table`, `contexts`: what the rows say

`train` trains nets of a seed one after the other, appends the rows of each to dilation.jsonl beside this script, keeps
the net itself in bfloat16 in nets/SEED-NAME, and measures that. A net whose rows are there is left out. If it is
killed, the same command goes on. Nets that are not `anew` go on from the seed's trunk, dense in blocks of 1,024, with
the same windows in the same order. Those of no steps are the trunk itself, with another pattern.

A step of 16,384 tokens takes one core of an AMD EPYC 3 to 6.5 s for a net of the paper's table, 2 to 4 s for others:
5 to 6 hours for all nets of seed 0 that lack a row, scoring included.

The data are pinned: `data` refuses tokens other than those measured (TOKENS). A held-out document is chosen by a hash
of its name.

A row holds, for each of at most DOCUMENTS held-out documents, of which it reads the first WINDOW tokens: `nats` in
separate windows of each context; in windows of WINDOW, `position`, the nats of each range of positions (POSITIONS), and
`recall`, the nats of tokens by how long ago their bigram was last said (RECALL; `recall_tokens` counts them).
`foreign` holds, for FOREIGN held-out windows of Python, what foreign.py measures: nats of their last tokens, by context
and with foreign text in place of parts of the past. Nets of the paper's table in small have only this.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import foreign
import numpy as np
import torch
from by_recall import distances
from self_extend import grouped_positions

from longnet_cli import LongNet, LongNetError, ModelFacts, parse_pattern
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.data.files.input_files import InputFiles
from longnet_cli.jobs.benchmark import device_name
from longnet_cli.jobs.converting import convert
from longnet_cli.jobs.scoring.measures import Clusters
from longnet_cli.jobs.training.loop import train
from longnet_cli.jobs.training.recipe import load_recipe

WINDOW = 16384
KINDS = ("prose", "python")
LEVELS = "512/1,2Ki/4,8Ki/16,look_back=1,overlap=once,queries=all"
NET = {"vocab_size": 4096, "dim": 128, "num_layers": 4, "num_heads": 4, "ffn_dim": 480}
WIDE = {"vocab_size": 4096, "dim": 192, "num_layers": 4, "num_heads": 12, "ffn_dim": 720}


class Arm(NamedTuple):
    """A net to train: `steps` of `batch_tokens`, in windows of `window`, on texts of `kinds` in equal shares.

    It goes on from the trunk of its seed or, if it is trained `anew`, has the sizes `net`. With no steps, it is the
    trunk with another pattern. It is compared with the net `beside`. A net of the paper's `table` is measured as
    `contexts` shows it.
    """

    pattern: str
    position: str = "rope"
    beside: str = "window"
    # Tokens of a position of each level, in place of its dilation rate
    group_sizes: tuple[int, ...] = ()
    steps: int = 96
    window: int = WINDOW
    batch_tokens: int = WINDOW
    anew: bool = False
    net: Mapping[str, int] = NET
    kinds: tuple[str, ...] = KINDS
    table: bool = False
    lr: float = 1.5e-3
    warmup: int = 5
    final: float = 0.02  # of the learning rate


BLOCKS = {"window": 1024, "batch_tokens": 8192, "steps": 750}
FROM_SCRATCH = {"anew": True, "steps": 471, "lr": 3e-3, "warmup": 40, "beside": "scratch-window"}
LONGER = {"steps": 384, "beside": "window-384"}
UNTRAINED = {"steps": 0, "beside": "window-0"}
AGAIN = {"beside": "window-96"}  # on the trunks that are kept
ALL_KEYS = "512/1,2Ki/1,8Ki/1,look_back=1,overlap=once,queries=all"
SELF_EXTEND = {"pattern": ALL_KEYS, "position": "rope_by_level", "group_sizes": (1, 4, 16)}
# Every residue of rate 12 has a head, as in the paper; its levels end at the length of the window
TABLE = {"anew": True, "net": WIDE, "kinds": KINDS[1:], "table": True}
TABLE |= {"steps": 427, "lr": 2e-3, "warmup": 40, "beside": "window-16Ki"}
SHORT = {"window": 2048, "position": "xpos"}
ARMS = {  # in the order in which they are trained
    "paper-16Ki": Arm("1Ki/1,2Ki/2,4Ki/4,8Ki/6,16Ki/12", "xpos", **TABLE),
    "mapped-16Ki": Arm(LEVELS, "rope_by_level", **TABLE),
    "window-16Ki": Arm("window:1Ki", **TABLE),
    "paper-2Ki": Arm("128/1,256/2,512/4,1Ki/6,2Ki/12", **SHORT, **TABLE),
    "dense-2Ki": Arm("2Ki/1", **SHORT, **TABLE),
    "paper-8Ki": Arm("512/1,1Ki/2,2Ki/4,4Ki/6,8Ki/12", "xpos", window=8192, **TABLE),
    "trunk": Arm("1Ki/1", anew=True, **BLOCKS, lr=3e-3, warmup=40, final=0.3),
    "window": Arm("window:1Ki"),
    "levels": Arm(LEVELS),
    "blocks": Arm("1Ki/1"),
    "mapped": Arm(LEVELS, "rope_by_level"),  # a step of a level is one position
    "paper-like": Arm("1Ki/1,4Ki/2,16Ki/4"),
    "scratch-window": Arm("window:1Ki", **FROM_SCRATCH),
    "scratch-levels": Arm(LEVELS, **FROM_SCRATCH),
    "scratch-mapped": Arm(LEVELS, "rope_by_level", **FROM_SCRATCH),
    "window-384": Arm("window:1Ki", **LONGER),
    "mapped-384": Arm(LEVELS, "rope_by_level", **LONGER),
    "window-0": Arm("window:1Ki", **UNTRAINED),
    "mapped-0": Arm(LEVELS, "rope_by_level", **UNTRAINED),
    "self-extend-0": Arm(**SELF_EXTEND, **UNTRAINED),
    "window-96": Arm("window:1Ki", **AGAIN),
    "mapped-96": Arm(LEVELS, "rope_by_level", **AGAIN),
    "self-extend-96": Arm(**SELF_EXTEND, **AGAIN),
}

HELD_OUT = 6  # of so many documents, one
DOCUMENT_CHARACTERS = 300_000  # of a document of Python, at least
DOCUMENTS = 16
CONTEXTS = (1024, 4096, WINDOW)
POSITIONS = (0, 1024, 2048, 4096, 8192, WINDOW)
# Tokens ago; the first number of each row is of new bigrams
RECALL = (
    1,
    1024,
    2048,
    4096,
    8192,
    WINDOW,
)
TOKENS = {  # SHA-256 of the ids, as little-endian int32, of all documents in order
    "prose-train": "4563c50c779a91757c7eebbbaac364e18665f2f5d3d65f7f65f65876bb94d4ce",
    "prose-held-out": "1ddd587a61930c4df1e5b13fad0dcd652533c5173523949ca8bb7b87ceb787e8",
    "python-train": "fc305d34e53522eb3fe224d841d627755334ecc09aa1de8010fafc500cc1022b",
    "python-held-out": "f66ddddf60b4dbee8a9644c8a668b31c3e2ed179a018d212ececd3c4d1ee6540",
}
ROWS = Path(__file__).with_suffix(".jsonl")
NETS = Path(__file__).with_name("nets")
FOREIGN = 24  # windows
CONTEXTS_OF_TABLE = (2048, 8192)  # and WINDOW


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
        [*run, *both, "-o", str(folder / "mix"), "--train-vocab", str(NET["vocab_size"])],
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
    for document in Inputs(
        InputFiles([str(folder)]), Tokenizer.load(str(folder)), None
    ).documents():
        yield document.doc_id, document.read(0, len(document))


def train_net(folder: Path, seed: int, name: str) -> float:
    """Train a net, or finish its training, in `folder`/`seed`/`name`. Return its CPU seconds since the last resume.

    A file of the folder holds these when it is done. The net is kept in NETS. The rows of dilation.jsonl are of nets
    that were trained with Muon, which `longnet train` had until commit a44d5bd7 (`optimizer.name`).
    """
    arm, place = ARMS[name], folder / str(seed) / name
    done, kept = place / "cpu_seconds", NETS / f"{seed}-{name}"
    if not done.exists():
        mix = [{"inputs": [str(folder / f"{kind}-train")], "weight": 1} for kind in arm.kinds]
        settings: dict[str, Any] = {
            "model.pattern": arm.pattern,
            "data.tokenizer": str(folder / "mix"),
            "data.mix": mix,
            "optimizer.weight_decay": 0.1,
            "optimizer.clip": 1.0,
            "optimizer.lr": arm.lr,
            "schedule.decay": "linear",
            "schedule.warmup_steps": arm.warmup,
            "schedule.final": arm.final,
            "train.seed": seed,
            "train.dtype": "bf16",
            "train.chunk": WINDOW,
            "train.batch_tokens": arm.batch_tokens,
            "train.stages": [{"seq_len": arm.window, "steps": arm.steps}],
            "train.save_minutes": 5.0,
            "train.save_every": 100,
        }
        if arm.anew:
            sizes = {**arm.net, "position": arm.position}
            settings |= {f"model.{key}": value for key, value in sizes.items()}
        else:
            settings["init"] = str(trunk(folder, seed, arm.position))
        began = time.process_time()
        with grouped_positions(arm.group_sizes):
            train(load_recipe(None, settings), place)
        done.write_text(str(time.process_time() - began))
    if not kept.exists():
        convert(place, kept, "bf16")
    return float(done.read_text())


def trunk(folder: Path, seed: int, position: str) -> Path:
    """Return the kept trunk of a seed, trained if there is none, or a copy of it with these positions.

    In blocks, which have one level, positions by level are plain ones.
    """
    kept = NETS / f"{seed}-trunk"
    if not kept.exists():
        train_net(folder, seed, "trunk")
    if position == ARMS["trunk"].position:
        return kept
    copy = folder / str(seed) / f"trunk-{position}"
    shutil.copytree(kept, copy, dirs_exist_ok=True)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"position": position}))
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


def foreign_past(net: LongNet, folder: Path, contexts: Sequence[int]) -> dict[str, Any]:
    """Return what a row holds of held-out windows of Python, by context and with a foreign past."""
    tokenizer = Tokenizer.load(str(folder / "mix"))
    inputs = Inputs(InputFiles([str(folder / f"{KINDS[1]}-held-out")]), tokenizer, None)
    windows = foreign.windows([*inputs.documents()], WINDOW, FOREIGN)
    facts = ModelFacts(tokenizer.eos_id)
    nats = foreign.nats(net, facts, windows, contexts, "bf16")
    names = [window.document for window in windows]
    rounded = {name: np.round(values, 3).tolist() for name, values in nats.items()}
    return {"documents": names, "nats": rounded}


def measure(folder: Path, seed: int, name: str) -> None:
    """Train and evaluate a net of a seed, and append its rows."""
    if any((row["seed"], row["pattern"]) == (seed, name) for row in rows()):
        return
    arm = ARMS[name]
    seconds = train_net(folder, seed, name) if arm.steps else 0
    if name == "trunk":
        return
    place = NETS / f"{seed}-{name}" if arm.steps else trunk(folder, seed, arm.position)
    net = LongNet.from_pretrained(place, pattern=parse_pattern(arm.pattern)).eval()
    sizes = net.config
    facts = {
        "seed": seed,
        "pattern": name,
        "notation": arm.pattern,
        "tokens": arm.steps * arm.batch_tokens,
        "keys": round(sizes.attention_flops(WINDOW) / WINDOW / 4 / sizes.dim / sizes.num_layers),
        "training_flops": round(sizes.training_flops([WINDOW]) / WINDOW),  # per token
        "cpu_seconds": round(seconds),  # of training after the last resume
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": device_name(torch.device("cpu")),
        "date": time.strftime("%Y-%m-%d"),
    }
    lines = []
    for kind in arm.kinds:
        with grouped_positions(arm.group_sizes):
            found = {} if arm.table else evaluate(net, folder, kind)
            if kind == KINDS[1]:
                contexts = CONTEXTS_OF_TABLE if arm.table else CONTEXTS[:1]
                found["foreign"] = foreign_past(net, folder, contexts)
        lines.append(json.dumps({**facts, "text": kind, **found}) + "\n")
    with ROWS.open("a", encoding="utf-8") as file:
        file.write("".join(lines))
    print(f"seed {seed}, {name}: rows written", file=sys.stderr, flush=True)


def reach() -> Iterator[dict[str, Any]]:
    """Yield what each net gains from its context, beside the net that it is compared with, on each kind of text.

    At the first context, the window sees everything: a difference there is not of what lies far away. `reach` is the
    ratio at the longest context over that at the first one; `gain` is what the net itself gains by its context; `ppl`
    is its perplexity at the longest one. Both are also given by seed. Standard errors are over documents, and over
    seeds if there are several.
    """
    found = by_net()
    for name in dict.fromkeys(name for _, name in found):
        row: dict[str, Any] = {"net": name, "contexts": [CONTEXTS[0], CONTEXTS[-1]]}
        for kind in KINDS:
            some, others = found[kind, name], found.get((kind, ARMS[name].beside), [])
            nats = np.array([each["nats"][str(WINDOW)] for each in some])
            of_kind: dict[str, Any] = {
                "seeds": len(some),
                "ppl": round(math.exp(nats.mean() / WINDOW), 3),
                "ppl_of_seeds": np.exp(nats.mean(1) / WINDOW).round(2).tolist(),
                "gain": compare(some, None, _reach, 0).rounded(),
            }
            if others and name != ARMS[name].beside:
                for at in (0, -1):
                    key = f"beside_{CONTEXTS[at]}"
                    of_kind[key] = compare(some, others, _by_context, at).rounded()
                ratio = compare(some, others, _reach, 0)
                of_kind["reach"] = ratio.rounded()
                of_kind["reach_of_seeds"] = np.round(ratio.seeds, 4).tolist()
            row[kind] = of_kind
        yield row


def contexts() -> Iterator[dict[str, Any]]:
    """Yield what foreign.py measures of each net, beside the net that it is compared with, where that is there."""
    found = {(row["pattern"], row["seed"]): row for row in rows() if "foreign" in row}
    for (name, seed), row in found.items():
        first = found.get((ARMS[name].beside, seed), row)["foreign"]
        if first["documents"] != row["foreign"]["documents"]:
            raise LongNetError(f"{name} and {ARMS[name].beside} were measured on other windows")
        sizes = {key: row[key] for key in ("notation", "tokens", "keys", "cpu_seconds")}
        measured = foreign.row(first["documents"], row["foreign"]["nats"], first["nats"])
        yield {"net": name, "seed": seed, "position": ARMS[name].position, **sizes, **measured}


def by_net() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the rows of each kind of text and net, by seed, in the order of ARMS, but for the paper's table."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    order = [*ARMS]
    for row in sorted(rows(), key=lambda row: (order.index(row["pattern"]), row["seed"])):
        if "nats" in row:
            found.setdefault((row["text"], row["pattern"]), []).append(row)
    return found


def table() -> Iterator[str]:
    """Yield lines of Markdown: perplexity by context, and three tables relative to the net that each is `beside`.

    A standard error is over documents, whose differences are means over seeds, and over seeds if there are several.
    """
    found = by_net()
    columns = " | ".join(f"ppl, {context:,}" for context in CONTEXTS)
    yield f"| text | pattern | seeds | keys | MFLOPs per token | {columns} |"
    yield "|---" * (5 + len(CONTEXTS)) + "|"
    for (kind, name), of_seeds in found.items():
        first = of_seeds[0]
        megaflops = round(first["training_flops"] / 1e6, 1)
        cells = [kind, name, str(len(of_seeds)), str(first["keys"]), str(megaflops)]
        for context in CONTEXTS:
            nats = np.mean([row["nats"][str(context)] for row in of_seeds])
            cells.append(f"{math.exp(nats / WINDOW):.3f}")
        yield f"| {' | '.join(cells)} |"
    edges = [f"{a:,} to {b - 1:,}" for a, b in pairwise(POSITIONS)]
    said = ["new", *(f"{a:,} to {b - 1:,} ago" for a, b in pairwise(RECALL))]
    sizes = [f"{context:,}" for context in CONTEXTS]
    for title, headings, measure in (
        ("ppl / that of the window, context", sizes, _by_context),
        (f"in windows of {WINDOW:,}, position", edges, _by_position),
        (f"in windows of {WINDOW:,}, the bigram was said", said, _by_recall),
    ):
        yield f"\n| text | {title} | {' | '.join(headings)} |"
        yield "|---" * (2 + len(headings)) + "|"
        for (kind, name), of_seeds in found.items():
            others = found.get((kind, ARMS[name].beside), [])
            if others and name != ARMS[name].beside:
                ratios = [compare(of_seeds, others, measure, i) for i in range(len(headings))]
                cells = [f"{each.ratio:.3f} +- {each.error:.3f}" for each in ratios]
                yield f"| {kind} | {name} | {' | '.join(cells)} |"


Measured = tuple[np.ndarray, np.ndarray]  # nats and tokens of each document, (documents,) each
# From a row and the index of a context, or of a range
Measure = Callable[[dict[str, Any], int], Measured]


def _by_context(row: dict[str, Any], index: int) -> Measured:
    nats = np.array(row["nats"][str(CONTEXTS[index])])
    return nats, np.full(len(nats), WINDOW)


def _by_position(row: dict[str, Any], index: int) -> Measured:
    nats = np.array(row["position"])[:, index]
    return nats, np.full(len(nats), POSITIONS[index + 1] - POSITIONS[index])


def _by_recall(row: dict[str, Any], index: int) -> Measured:
    return np.array(row["recall"])[:, index], np.array(row["recall_tokens"])[:, index]


def _reach(row: dict[str, Any], index: int) -> Measured:
    """Return what the longest context saves of the nats at the first one."""
    near, whole = (np.array(row["nats"][str(context)]) for context in (CONTEXTS[0], CONTEXTS[-1]))
    return whole - near, np.full(len(near), WINDOW)


class Comparison(NamedTuple):
    """The ratio of two perplexities, its standard error, and the ratio of each seed."""

    ratio: float
    error: float
    seeds: list[float]

    def rounded(self) -> list[float]:
        return [round(self.ratio, 4), round(self.error, 4)]


def compare(
    some: Sequence[dict[str, Any]],
    others: Sequence[dict[str, Any]] | None,
    measure: Measure,
    index: int,
) -> Comparison:
    """Return the ratio of two perplexities over the seeds that both have; without `others`, what is measured itself."""
    of_others = {row["seed"]: measure(row, index)[0] for row in others or ()}
    more = []
    for row in some:
        nats, tokens = measure(row, index)
        if others is None:
            more.append(nats)
        elif row["seed"] in of_others:
            more.append(nats - of_others[row["seed"]])
    of_documents = Clusters(2)
    of_documents.extend(np.stack([np.mean(more, 0), tokens], 1))
    error = of_documents.error(np.array([1.0, 0.0]), -1) or 0.0
    of_seeds = np.sum(more, 1) / tokens.sum()
    if len(of_seeds) > 1:
        error = math.hypot(error, of_seeds.std(ddof=1) / math.sqrt(len(of_seeds)))
    ratio = math.exp(of_seeds.mean())
    return Comparison(ratio, ratio * error, np.exp(of_seeds).tolist())


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_data = commands.add_parser("data")
    of_data.add_argument("folder", type=Path)
    of_data.add_argument("packages", nargs="+")
    of_training = commands.add_parser("train")
    of_training.add_argument("folder", type=Path)
    of_training.add_argument("seed", type=int)
    of_training.add_argument("nets", nargs="*", metavar="NET", help=", ".join(ARMS))
    for name in ("reach", "contexts", "table"):
        commands.add_parser(name)
    args = parser.parse_args()
    try:
        if args.command == "data":
            write_data(args.folder, args.packages)
        elif args.command == "train":
            if unknown := {*args.nets} - {*ARMS}:
                raise LongNetError(f"no net {', '.join(unknown)}: choose from {', '.join(ARMS)}")
            for name in args.nets or ARMS:
                measure(args.folder, args.seed, name)
        elif args.command == "table":
            print(*table(), sep="\n")
        else:
            for row in reach() if args.command == "reach" else contexts():
                print(json.dumps(row))
    except LongNetError as error:
        parser.exit(3, f"dilation: {error}\n")


if __name__ == "__main__":
    main()
