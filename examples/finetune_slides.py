"""Predict a label of slides from a frozen slide encoder, then fine-tune the encoder; AUC by cross-validation.

    python examples/finetune_slides.py layers features --model ./gigapath -o slides.arrow
    python examples/finetune_slides.py probe slides.arrow labels.csv
    python examples/finetune_slides.py tune features labels.csv --model ./gigapath
    python examples/finetune_slides.py make made     # made/features, made/labels.csv, made/encoder: random weights

`features` is a folder of HDF5 files as TRIDENT writes them, `labels.csv` has the columns slide_id (the name of a file
without .h5) and label (0 or 1). First look at `probe`: a linear model of the frozen encoder's vectors, which `layers`
writes, takes seconds. `tune` trains the whole encoder anew for each fold, by the recipe that Prov-GigaPath published
for PANDA: AdamW, one slide at a time, gradients of 32 slides a step, a rate that falls by 0.95 from layer to layer
towards the input and along a cosine after one epoch of warm-up, dropout 0.1, the mean over the tiles after layer 11.
Each slide is predicted by a model that has not seen it, and the standard error of the AUC is DeLong's. A file that
cannot be read ends it, or is left out with --skip-bad. A label needs as many slides as there are folds.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longnet_cli import SlideConfig, SlideEncoder


def read_labels(path: Path) -> dict[str, int]:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["slide_id"]: int(row["label"]) for row in csv.DictReader(file)}


def auc(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return the area under the ROC curve and its standard error (DeLong et al., 1988)."""
    ahead = scores[labels == 1][:, None] - scores[labels == 0]  # (positives, negatives)
    wins = (ahead > 0) + 0.5 * (ahead == 0)
    variance = sum(wins.mean(axis).var(ddof=1) / wins.shape[1 - axis] for axis in (0, 1))
    return float(wins.mean()), math.sqrt(variance)


def folds_of(labels: np.ndarray, folds: int) -> np.ndarray:
    """Return the fold of each slide, at random; each fold has its share of both labels."""
    found = np.empty(len(labels), np.int64)
    for label in (0, 1):
        (where,) = np.nonzero(labels == label)
        if len(where) < (least := max(2, folds)):
            sys.exit(
                f"{folds} folds need {least} slides of each label or more, and {len(where)} have the label {label}"
            )
        found[np.random.default_rng(0).permutation(where)] = np.arange(len(where)) % folds
    return found


def report(what: str, scores: np.ndarray, labels: np.ndarray) -> None:
    area, error = auc(scores, labels)
    print(
        f"{what}: AUC {area:.3f}, standard error {error:.3f}, {len(labels)} slides, {labels.sum()} of them positive"
    )


def fit(x: Tensor, y: Tensor, penalty: float = 1.0) -> Tensor:
    """Return the weights (dim + 1,) of a logistic regression of y on x (slides, dim); the first is the constant."""
    weights = torch.zeros(x.shape[1] + 1, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weights[1:] + weights[0], y)
        loss = loss + penalty / len(y) * weights[1:].square().sum()
        loss.backward()
        return loss

    optimizer.step(step)
    return weights.detach()


def probe(vectors: np.ndarray, labels: np.ndarray, folds: int) -> np.ndarray:
    """Return log odds of slides by logistic regressions of their vectors (slides, dim), each on the other folds."""
    fold, scores = folds_of(labels, folds), np.zeros(len(labels))
    for held_out in range(folds):
        train = fold != held_out
        mean, std = vectors[train].mean(0), vectors[train].std(0) + 1e-6
        x = torch.from_numpy((vectors - mean) / std / math.sqrt(vectors.shape[1]))
        weights = fit(x[train], torch.from_numpy(labels[train]).double())
        scores[~train] = (x[~train] @ weights[1:] + weights[0]).numpy()
    return scores


def read_slide(path: Path) -> tuple[Tensor, Tensor, float | None]:
    """Return features (1, N, in_features), coords (1, N, 2), and the side of a tile, None for the model's own."""
    import h5py

    with h5py.File(path) as file:
        side = file["coords"].attrs.get("patch_size_level0")
        features, coords = (
            torch.from_numpy(file["features"][:]).float(),
            torch.from_numpy(file["coords"][:]),
        )
    return (
        features.reshape(1, -1, features.shape[-1]),
        coords.reshape(1, -1, 2),
        None if side is None else float(side),
    )


def whole_slides(paths: Iterable[Path], skip_bad: bool) -> Iterator[Path]:
    """Yield the files that can be read. End the program at another one, or tell about it if it is to be skipped."""
    for path in paths:
        try:
            read_slide(path)
        except (OSError, KeyError, ValueError) as error:
            if not skip_bad:
                sys.exit(
                    f"{path}: cannot be read ({error}): make it anew, or leave it out (--skip-bad)"
                )
            print(f"{path}: left out ({error})", file=sys.stderr)
        else:
            yield path


@torch.no_grad()
def write_layers(paths: Iterable[Path], encoder: SlideEncoder, output: Path) -> None:
    """Write a table of the slides and their vectors: of the first layer's input and of every layer."""
    rows = []
    for path in paths:
        features, coords, side = read_slide(path)
        layers = encoder(features, coords, tile_size=side, all_layers=True)  # (layers + 1, 1, dim)
        rows.append({"doc_id": path.stem, "layers": layers[:, 0].tolist()})
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(output, table.schema) as file:
        file.write_table(table)


class Classifier(nn.Module):
    """A slide encoder, and a linear layer on the mean over the tiles after layer `layer`; 1 is the first layer."""

    def __init__(self, folder: str, layer: int, dropout: float) -> None:
        super().__init__()
        saved = SlideEncoder.from_pretrained(folder)
        self.encoder = SlideEncoder(SlideConfig(**dict(saved.config) | {"dropout": dropout}))
        self.encoder.load_state_dict(saved.state_dict())
        self.layer, self.head = layer, nn.Linear(saved.config.dim, 1)

    def forward(self, path: Path) -> Tensor:
        """Return the log odds of a slide, a number."""
        features, coords, side = (
            x.to(self.head.weight.device) if isinstance(x, Tensor) else x for x in read_slide(path)
        )
        layers = self.encoder(features, coords, tile_size=side, all_layers=True)
        return self.head(layers[self.layer, 0])[0]


def groups_of(model: Classifier, weight_decay: float, layer_decay: float) -> list[dict]:
    """Return parameters for AdamW with the `scale` of their rate: 1 for the head, smaller for each layer before it.

    Norms and biases do not decay.
    """
    last = model.encoder.config.num_layers + 1
    groups = []
    for name, weight in model.named_parameters():
        depth = last
        if name.startswith("encoder.net.layers."):
            depth = 1 + int(name.split(".")[3])
        elif name.startswith(("encoder.net.project.", "encoder.net.cls")):
            depth = 0
        decay = weight_decay if weight.ndim > 1 else 0.0
        groups.append(
            {"params": [weight], "scale": layer_decay ** (last - depth), "weight_decay": decay}
        )
    return groups


def rate_at(epoch: float, epochs: int) -> float:
    """Return the learning rate after `epoch` of `epochs` as a share of the largest: up in the first, then a cosine."""
    return epoch if epoch < 1 else 0.5 + 0.5 * math.cos(math.pi * (epoch - 1) / max(1, epochs - 1))


def tune(args: argparse.Namespace, slides: list[Path], labels: np.ndarray) -> np.ndarray:
    """Return log odds of slides, each by an encoder that was fine-tuned on the other folds."""
    fold, scores = folds_of(labels, args.folds), np.zeros(len(labels))
    for held_out in range(args.folds):
        torch.manual_seed(held_out)
        model = Classifier(args.model, args.layer, args.dropout).to(args.device)
        optimizer = torch.optim.AdamW(groups_of(model, args.weight_decay, args.layer_decay))
        (train,), (test,) = np.nonzero(fold != held_out), np.nonzero(fold == held_out)
        seen, peak = 0, args.rate * args.slides_per_step / 256
        for epoch in range(args.epochs):
            for each in np.random.default_rng(epoch).permutation(train):
                model.train()
                loss = F.binary_cross_entropy_with_logits(
                    model(slides[each]), torch.tensor(float(labels[each]))
                )
                (loss / args.slides_per_step).backward()
                seen += 1
                if seen % args.slides_per_step and seen != args.epochs * len(train):
                    continue
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate_at(seen / len(train), args.epochs) * group["scale"]
                optimizer.step()
                optimizer.zero_grad()
                print(
                    f"fold {held_out}: {seen} of {args.epochs * len(train)} slides",
                    file=sys.stderr,
                    flush=True,
                )
        model.eval()
        with torch.no_grad():
            scores[test] = [model(slides[each]).item() for each in test]
        print(f"fold {held_out}: {len(train)} slides trained on, {len(test)} predicted", flush=True)
    return scores


def make(folder: Path, slides: int = 40, size: int = 16, signal: float = 0.5) -> None:
    """Write made slides: a positive one has a spot of tissue whose tiles differ. And an encoder of random weights."""
    import h5py

    random = np.random.default_rng(0)
    (folder / "features").mkdir(parents=True, exist_ok=True)
    tumour = signal * random.normal(size=size)
    rows = []
    for index in range(slides):
        tissue = np.argwhere(random.random((16, 16)) < 0.4)
        features = random.normal(size=(len(tissue), size))
        if label := index % 2:
            features[np.abs(tissue - random.integers(4, 12, 2)).max(1) <= 3] += tumour
        with h5py.File(folder / f"features/slide-{index}.h5", "w") as file:
            file["features"], file["coords"] = features.astype(np.float16), tissue * 512
            file["coords"].attrs["patch_size_level0"] = 512
        rows.append(f"slide-{index},{label}\n")
    (folder / "labels.csv").write_text("slide_id,label\n" + "".join(rows), encoding="utf-8")
    torch.manual_seed(0)
    sizes = {"dim": 32, "num_layers": 3, "num_heads": 4, "ffn_dim": 64, "in_features": size}
    SlideEncoder(
        SlideConfig(**sizes, segment_lengths=(64, 256), dilation_rates=(1, 4))
    ).save_pretrained(folder / "encoder")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Predict a label of slides; AUC by cross-validation."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make", help="make slides and an encoder").add_argument("folder", type=Path)
    of_layers, of_vectors, of_tiles = map(commands.add_parser, ("layers", "probe", "tune"))
    of_layers.add_argument("-o", "--output", required=True, type=Path, help="an .arrow file")
    of_vectors.add_argument("vectors", type=Path, help="what `layers` wrote")
    for command in (of_layers, of_tiles):
        command.add_argument("features", type=Path, help="a folder of HDF5 files")
        command.add_argument("--model", required=True, help="the folder of a slide encoder")
        command.add_argument(
            "--skip-bad", action="store_true", help="leave out files that cannot be read"
        )
    for command in (of_vectors, of_tiles):
        command.add_argument("labels", type=Path, help="a CSV with the columns slide_id and label")
        command.add_argument("--layer", type=int, default=11, help="take this layer's vectors")
        command.add_argument("--folds", type=int, default=5)
    of_tiles.add_argument("--epochs", type=int, default=5)
    of_tiles.add_argument(
        "--rate", type=float, default=2e-3, help="for steps of 256 slides; smaller steps, less"
    )
    of_tiles.add_argument("--slides-per-step", type=int, default=32)
    of_tiles.add_argument("--weight-decay", type=float, default=0.05)
    of_tiles.add_argument("--layer-decay", type=float, default=0.95)
    of_tiles.add_argument("--dropout", type=float, default=0.1)
    of_tiles.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.command == "make":
        make(args.folder)
        return
    if args.command == "layers":
        paths = whole_slides(sorted(args.features.glob("*.h5")), args.skip_bad)
        write_layers(paths, SlideEncoder.from_pretrained(args.model), args.output)
        return
    known = read_labels(args.labels)
    if args.command == "probe":
        table = pa.ipc.open_file(args.vectors).read_all()
        rows = [
            row for row in table.select(["doc_id", "layers"]).to_pylist() if row["doc_id"] in known
        ]
        vectors = np.array([row["layers"][args.layer] for row in rows], np.float64)
        labels = np.array([known[row["doc_id"]] for row in rows])
        report("linear probe of the frozen encoder", probe(vectors, labels, args.folds), labels)
        return
    labelled = (path for path in sorted(args.features.glob("*.h5")) if path.stem in known)
    slides = list(whole_slides(labelled, args.skip_bad))
    labels = np.array([known[path.stem] for path in slides])
    report("fine-tuned encoder", tune(args, slides, labels), labels)


if __name__ == "__main__":
    main()
