"""What many tests make: tiny nets, folders of models, documents, corpora, recipes, jobs, slides; and golden tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from places import GOLDEN
from safetensors import safe_open
from torch import Tensor

from longnet_cli.data.documents.input_documents import DocumentPass, Inputs
from longnet_cli.data.documents.token_documents import Document
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.jobs.job_options import ScoreOptions
from longnet_cli.jobs.row_jobs import ModelFacts
from longnet_cli.jobs.scoring.measures import Gain, Score, column
from longnet_cli.jobs.scoring.scoring import score
from longnet_cli.jobs.training.recipe import Recipe, load_recipe
from longnet_cli.jobs.training.windows import Batch
from longnet_cli.models.official_slide import official_name
from longnet_cli.nets.config import LongNetConfig, SlideConfig
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.positions import XPOS_GAMMA
from longnet_cli.nets.slide import SlideEncoder

SIZES = {"vocab_size": 257, "dim": 16, "num_layers": 2, "num_heads": 2, "ffn_dim": 32}
LEVELS = {"segment_lengths": (8, 32), "dilation_rates": (1, 2)}


def tiny_net(**changes: Any) -> LongNet:
    """A net of random weights, always the same, for bytes."""
    torch.manual_seed(0)
    return LongNet(LongNetConfig(**SIZES | LEVELS | changes))


def tiny_model(folder: Path, **changes: Any) -> Path:
    """The folder of such a net, with the tokenizer of bytes."""
    tiny_net(**changes).save_pretrained(folder, Tokenizer.bytes().to_json())
    return folder


def make_document(length: int, name: str = "a") -> Document:
    tokens = np.random.default_rng(length).integers(1, 97, length, dtype=np.int32)
    tokens.flags.writeable = False  # as a memory map is
    return Document(name, tokens, length, f"{name}.txt")


@dataclass(frozen=True)
class Scored:
    """What the row of a document says of one context."""

    doc_id: str
    context: int | None
    score: Score
    gain: Gain | None


def scores(
    model: Any, documents: Iterable[Document], *, bos: Any, **options: Any
) -> Iterator[Scored]:
    """The scores of each document at each context, lazily. Options that are no ScoreOptions are for `score`."""
    given = {
        each.name: options.pop(each.name) for each in fields(ScoreOptions) if each.name in options
    }
    if isinstance(given.get("context"), int):
        given["context"] = (given["context"],)
    chosen = ScoreOptions(**given)

    def read(reader: pa.RecordBatchReader) -> Iterator[Scored]:
        for batch in reader:
            for row in batch.to_pylist():
                for context in chosen.contexts:

                    def of(name: str, row: dict = row, context: int | None = context) -> Any:
                        return row.get(column(name, context, chosen.contexts))

                    longest = len(chosen.contexts) > 1 and context == max(chosen.context or ())
                    gain = Gain(*(row[name] for name in Gain._fields)) if longest else None
                    found = Score(of("nll_sum"), row["n_tokens"], row["n_bytes"])
                    yield Scored(row["doc_id"], context, found, gain)

    return read(score(model, documents, chosen, ModelFacts(bos), **options))


def tiny_llama(folder: Path, **changes: Any) -> Path:
    """The folder of a Llama of random weights, always the same, for bytes."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = hf.LlamaConfig(
        **{"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256} | sizes | changes
    )
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    Tokenizer.bytes().save(folder / "tokenizer.json")
    return folder


@dataclass(frozen=True)
class MadeInputs(Inputs):
    """Documents that were made, in place of files."""

    made: Iterable[Document] = ()

    def documents(self, **options: Any) -> MadeDocuments:
        return MadeDocuments(self, self.documents_of)

    def fingerprint(self) -> str:
        return str(self.names)


class MadeDocuments(DocumentPass):
    """The documents of `MadeInputs`, whose share nobody knows."""

    def __iter__(self) -> Iterator[Document]:
        return iter(self._inputs.made)


@dataclass
class NotedDocument:
    """What a stream needs of a document, noting what is read of it."""

    tokens: np.ndarray
    where: str = "here"
    reads: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= len(self)
        self.reads.append((start, stop))
        return self.tokens[start:stop].astype(np.int64)


def ids_of(batch: Batch) -> np.ndarray:
    """Return the ids of all windows of a batch, (rows, tokens)."""
    rows, tokens = batch.shape
    return np.stack([batch.read(row, 0, tokens) for row in range(rows)])


def write_corpus(folder: Path, bottles: int, held_out: int) -> Path:
    """A text, in which no place is like another, and a held-out text beside it, held_out.txt."""
    path = folder / "corpus.txt"
    path.write_text("".join(f"{n} green bottles hanging on the wall, " for n in range(bottles)))
    (folder / "held_out.txt").write_text(
        "and if one green bottle should accidentally fall, " * held_out
    )
    return path


LONG = [{"seq_len": 32, "steps": 30}, {"seq_len": 64, "steps": 10}]  # stages in which a net learns


def recipe(corpus: Path, **overrides: object) -> Recipe:
    """One of 6 steps, in two stages, of a net of one layer for bytes."""
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 32}
    settings = {
        "model": {**sizes, "segment_lengths": [16, 32], "dilation_rates": [1, 2]},
        "data.train": [str(corpus)],
        "optimizer.lr": 1e-2,
        "schedule.warmup_steps": 2,
        "train.stages": [{"seq_len": 32, "steps": 4}, {"seq_len": 64, "steps": 2}],
        "train.batch_tokens": 256,
    }
    return load_recipe(None, json.loads(json.dumps(settings)) | overrides)


def recipe_with_checkpoints(corpus: Path, **overrides: object) -> Recipe:
    """One of 10 steps, in two stages, that saves every second; write_corpus makes what it reads."""
    settings = {
        "model": SIZES | {"segment_lengths": [16, 32], "dilation_rates": [1, 2], "dropout": 0.1},
        "data.train": [str(corpus)],
        "data.held_out": [str(corpus.parent / "held_out.txt")],
        "schedule.warmup_steps": 2,
        "train.stages": [{"seq_len": 32, "steps": 6}, {"seq_len": 100, "steps": 4}],
        "train.batch_tokens": 256,
        "train.chunk": 60,  # shorter than the windows of the second stage
        "train.log_every": 3,
        "train.evaluate_every": 4,
        "train.save_every": 2,
    }
    return load_recipe(None, settings | overrides)


def job_folder(folder: Path) -> Path:
    """Texts, a decoder and an encoder for bytes, and a recipe for the texts."""
    text = "the quick brown fox jumps over the lazy dog, and again. " * 60
    levels = {"segment_lengths": (16, 64, 256), "dilation_rates": (1, 2, 4), "position": "rope"}
    (folder / "texts").mkdir()
    for index in range(5):
        (folder / f"texts/{index}.txt").write_text(text[: 90 * 4**index])
    for name, causal in (("decoder", True), ("encoder", False)):
        tiny_model(folder / name, **levels, causal=causal)
    recipe = f"""
        model.pattern = "16/1,64/2,256/4"
        model.position = "rope"
        model.dim = 16
        model.num_layers = 2
        model.num_heads = 2
        model.ffn_dim = 32
        data.train = ["{folder}/texts"]
        optimizer.lr = 1e-2
        train = {{ stages = [{{ seq_len = 256, steps = 20 }}], batch_tokens = 1024, log_every = 1 }}
        """
    (folder / "recipe.toml").write_text(recipe)
    return folder


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(run)]


def assert_same_model(run: Path, other: Path, tolerance: float) -> None:
    a, b = (LongNet.from_pretrained(path).state_dict() for path in (run, other))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def vectors(table: pa.Table) -> np.ndarray:
    return np.stack(table["embedding"].to_numpy())


def slide_config(**changes: Any) -> SlideConfig:
    sizes = {
        "dim": 32,
        "num_layers": 2,
        "num_heads": 4,
        "ffn_dim": 64,
        "in_features": 6,
        "grid": 50,
    }
    return SlideConfig(
        **sizes | {"segment_lengths": (16, 48, 96), "dilation_rates": (1, 2, 5)} | changes
    )


def slide_encoder(**changes: Any) -> SlideEncoder:
    """A slide encoder of random weights, always the same."""
    torch.manual_seed(0)
    return SlideEncoder(slide_config(**changes)).eval()


def to_torchscale(model: LongNet) -> dict[str, Tensor]:
    """A net as a state dict of torchscale's LongNetDecoder or LongNetEncoder, with all keys for a strict load."""
    config = model.config
    state = {official_name(name): tensor for name, tensor in model.state_dict().items()}
    if config.vocab_size and config.tie_embeddings:
        state["output_projection.weight"] = state["embed_tokens.weight"]
    if config.position == "xpos":
        size = config.head_dim
        scale = (torch.arange(0, size, 2) + XPOS_GAMMA * size) / ((1 + XPOS_GAMMA) * size)
        state |= {
            f"layers.{i}.self_attn.xpos.scale": scale.clone() for i in range(config.num_layers)
        }
    return state


def official_slide_state(**changes: Tensor) -> dict[str, Tensor]:
    """A small slide encoder under the official names."""
    torch.manual_seed(0)
    encoder = SlideEncoder(
        SlideConfig(
            dim=32,
            num_layers=2,
            num_heads=16,
            ffn_dim=64,
            in_features=6,
            **{
                name: getattr(SlideConfig.gigapath(), name)
                for name in ("segment_lengths", "dilation_rates")
            },
        )
    )
    ours = encoder.net.state_dict()
    inner = LongNet(
        LongNetConfig(
            **{name: getattr(encoder.config, name) for name in LongNetConfig.model_fields}
        )
    )
    inner.load_state_dict({name: ours[name] for name in inner.state_dict()})
    state = {f"encoder.{name}": tensor for name, tensor in to_torchscale(inner).items()}
    state["cls_token"] = ours["cls"][None, None]
    for kind in ("weight", "bias"):
        state |= {
            f"patch_embed.proj.{kind}": ours[f"project.{kind}"],
            f"norm.{kind}": ours[f"norm.{kind}"],
        }
    return {name: tensor.clone() for name, tensor in (state | changes).items()}


def slide(tiles: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (tiles, 6), and coords (tiles, 2) of different cells."""
    random = torch.Generator().manual_seed(seed)
    cells = torch.randperm(2500, generator=random)[:tiles]
    coords = torch.stack([cells // 50, cells % 50], -1) * 256 + torch.randint(
        0, 256, (tiles, 2), generator=random
    )
    return torch.randn(tiles, 6, generator=random), coords


def slide_table(tiles: int, width: int = 6, name: str = "s") -> pa.Table:
    """A slide as one row."""
    features, coords = slide(tiles)
    return pa.table(
        {"doc_id": [name], "features": [features[:, :width].tolist()], "coords": [coords.tolist()]}
    )


def read_golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """The state dict, the other tensors and the configuration of a golden file. Without it, the test is skipped."""
    path = GOLDEN / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"the golden tensors are not beside this checkout: {path}")
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        theirs = json.loads(file.metadata()["config"])
    state = {
        key.removeprefix("model."): x for key, x in tensors.items() if key.startswith("model.")
    }
    return state, {key: x for key, x in tensors.items() if not key.startswith("model.")}, theirs


def level_options(theirs: dict) -> list[str]:
    """The options of `longnet convert` for the levels of a golden file."""
    lengths, rates = (
        ",".join(map(str, theirs[name])) for name in ("segment_lengths", "dilation_rates")
    )
    return ["--segment-lengths", lengths, "--dilation-rates", rates]
