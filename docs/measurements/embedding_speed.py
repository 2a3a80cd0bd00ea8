"""Time `encode` beside sentence-transformers on the same windows: CPU time in one process, one thread, in alternation.

    pip install onnx onnxruntime
    python docs/measurements/embedding_speed.py ./all-MiniLM-L6-v2 --texts 200 --rounds 3

Texts are made of the words of this repository's documentation, of mixed lengths, none longer than the model's window.
sentence-transformers computes with torch, and with an ONNX model whose weights are in 8 bits (dynamic quantization of
onnxruntime); `encode` in fp32 and in bf16. It writes a line of JSON for each, `method, seconds` (the median), `faster`
(how many times as fast as the library with torch) and `cosine` (the least one between its vectors and the library's).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from sentence_transformers import SentenceTransformer

from longnet_cli import encode_batches

DOCS = Path(__file__).parents[1]


def make_texts(number: int, most: int) -> list[str]:
    """Return texts of 1 to `most` words, always the same ones."""
    words = " ".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))).split()
    chance = random.Random(0)
    plain = [word for word in words if word.isalpha()]
    return [" ".join(chance.choices(plain, k=chance.randint(1, most))) for _ in range(number)]


class States(torch.nn.Module):
    """A net as ONNX takes it: token states (texts, tokens, dim) of three positional inputs."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        return self.net(input_ids=ids, attention_mask=mask, token_type_ids=types)[0]


def in_8_bits(model: str) -> SentenceTransformer:
    """Return the library's model, whose net is computed by onnxruntime with weights in 8 bits."""
    library = SentenceTransformer(
        model, device="cpu", model_kwargs={"attn_implementation": "eager"}
    )
    net = library[0].auto_model
    names = ["input_ids", "attention_mask", "token_type_ids"]
    given = tuple(torch.ones(2, 8, dtype=torch.int64) for _ in names)
    axes = {name: {0: "texts", 1: "tokens"} for name in [*names, "states"]}
    with tempfile.TemporaryDirectory() as folder:
        whole, small = f"{folder}/whole.onnx", f"{folder}/small.onnx"
        torch.onnx.export(
            States(net),
            given,
            whole,
            input_names=names,
            output_names=["states"],
            dynamic_axes=axes,
            dynamo=False,
        )
        quantize_dynamic(whole, small, weight_type=QuantType.QInt8, per_channel=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(small, options)

    def forward(**features: Any) -> Any:
        states = session.run(None, {name: features[name].numpy() for name in names})[0]
        return SimpleNamespace(last_hidden_state=torch.from_numpy(states))

    net.forward = forward
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description="Time encode beside sentence-transformers.")
    parser.add_argument("model", help="a folder of sentence-transformers, or its name on a hub")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--words", type=int, default=120, help="of the longest text")
    args = parser.parse_args()
    torch.set_num_threads(1)
    texts = make_texts(args.texts, args.words)
    table = pa.table({"doc_id": [*map(str, range(len(texts)))], "text": texts})
    library, small = SentenceTransformer(args.model, device="cpu"), in_8_bits(args.model)

    def own(dtype: str) -> np.ndarray:
        return np.array(
            encode_batches(table, model=args.model, dtype=dtype)["embedding"].to_pylist(),
            np.float32,
        )

    methods: dict[str, Callable[[], np.ndarray]] = {
        "sentence-transformers, torch": lambda: library.encode_document(texts),
        "sentence-transformers, ONNX int8": lambda: small.encode_document(texts),
        "encode, fp32": lambda: own("fp32"),
        "encode, bf16": lambda: own("bf16"),
    }
    vectors = {name: method() for name, method in methods.items()}  # which warms up, too
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(args.rounds):
        for name, method in methods.items():
            begin = time.process_time()
            method()
            seconds[name].append(time.process_time() - begin)
    theirs, times = (
        next(iter(vectors.values())),
        {name: statistics.median(each) for name, each in seconds.items()},
    )
    for name, found in vectors.items():
        row = {
            "method": name,
            "seconds": round(times[name], 2),
            "cosine": float((found * theirs).sum(1).min()),
        }
        print(json.dumps(row | {"faster": next(iter(times.values())) / times[name]}))


if __name__ == "__main__":
    main()
