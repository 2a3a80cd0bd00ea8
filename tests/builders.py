"""What many tests make: a tiny net, a document, a corpus, a table in a file; golden tensors; closeness."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from longnet_cli.data.documents import Document
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.longnet import LongNet

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


def tiny_llama(folder: Path, **changes: Any) -> Path:
    """The folder of a Llama of random weights, always the same, for bytes."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = hf.LlamaConfig(**{"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256} | sizes | changes)
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    Tokenizer.bytes().save(folder / "tokenizer.json")
    return folder


@dataclass(frozen=True)
class MadeInputs(Inputs):
    """Documents that were made, in place of files."""

    made: Iterable[Document] = ()

    def documents(self) -> Iterator[Document]:
        return iter(self.made)

    def fingerprint(self) -> str:
        return str(self.names)


def write_corpus(folder: Path, bottles: int, held_out: int) -> Path:
    """A text, in which no place is like another, and a held-out text beside it, held_out.txt."""
    path = folder / "corpus.txt"
    path.write_text("".join(f"{n} green bottles hanging on the wall, " for n in range(bottles)))
    (folder / "held_out.txt").write_text("and if one green bottle should accidentally fall, " * held_out)
    return path


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write rows as Parquet, JSON Lines, an Arrow stream (.stream) or an Arrow file, two at a time."""
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with (ipc.new_stream if path.suffix == ".stream" else ipc.new_file)(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Relative in the norm of each tensor.

    With one visible key dq and dk are exactly 0, the difference of two equal numbers: hence a floor of a tenth of the
    largest tensor's norm, which larger problems never touch.
    """
    floor = max(x.double().norm().item() for x in expected) * 0.1
    names = ("out", "dq", "dk", "dv", "d(level_bias)")[: len(found)]
    for name, a, b in zip(names, found, expected, strict=True):
        error = (a.double() - b.double()).norm().item() / max(b.double().norm().item(), floor, 1e-30)
        assert error <= tolerance, f"{name} is off by {error:.2e}"


def read_golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """The state dict, the other tensors and the configuration of a golden file. Without it, the test is skipped."""
    path = Path(__file__).resolve().parents[2] / "shared" / "golden" / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"the golden tensors are not beside this checkout: {path}")
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        theirs = json.loads(file.metadata()["config"])
    state = {key.removeprefix("model."): x for key, x in tensors.items() if key.startswith("model.")}
    return state, {key: x for key, x in tensors.items() if not key.startswith("model.")}, theirs
