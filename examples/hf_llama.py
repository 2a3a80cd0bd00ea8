"""Train a small Llama of Hugging Face transformers twice on the standard library: dense, and dilated by one line.

    python examples/hf_llama.py runs/hf-llama

Both models start with the same weights and read the same 200 windows of 4096 tokens. They take turns, one step each, so
that other load on the machine slows both. The loss and the seconds of every step go to `curves.jsonl`, a table goes to
stdout, and the models go to `dense/` and `dilated/`, for `longnet score --model runs/hf-llama/dilated`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import transformers as hf

from longnet_cli import Tokenizer
from longnet_cli.attention import Pattern
from longnet_cli.integrations.transformers import use_dilated_attention

END_OF_TEXT = 0  # its id in a vocabulary that `longnet tokenize --train-vocab` made
LR, WARMUP = 1e-3, 0.1  # the highest learning rate, and the share of steps that lead up to it


def tokenize_stdlib(output: Path) -> Path:
    """Return a folder of Arrow shards of the standard library's training part, with its own vocabulary; made once."""
    tokens = output / "tokens"
    if not (tokens / "_manifest.arrow").exists():  # it marks a complete folder
        script = Path(__file__).parent / "stdlib_corpus.py"
        subprocess.run([sys.executable, script, output / "lists"], check=True)
        longnet = [sys.executable, "-m", "longnet_cli", "tokenize", f"@{output}/lists/train.txt"]
        subprocess.run([*longnet, "-o", tokens, "--train-vocab", "4096"], check=True)
    return tokens


def read_stream(folder: Path) -> np.ndarray:
    """Return all documents, one after the other, each after an end of text: (tokens,) int64."""
    pieces = []
    for path in sorted(folder.glob("*.arrow")):
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        for part, ids in zip(table["part"], table["input_ids"], strict=True):
            if part.as_py() == 0:  # later parts continue the document
                pieces.append(np.array([END_OF_TEXT]))
            pieces.append(ids.values.to_numpy().astype(np.int64))
    return np.concatenate(pieces)


def build(vocab: int, context: int, seed: int, dilated: bool) -> hf.PreTrainedModel:
    """Return a Llama of about 4 million parameters. If `dilated`, with the paper's five levels, shrunk to `context`."""
    config = hf.LlamaConfig(
        vocab_size=vocab, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=context, tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT, eos_token_id=END_OF_TEXT,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = hf.LlamaForCausalLM(config)
    if dilated:
        paper = Pattern.paper()
        lengths = tuple(max(1, w * context // 32768) for w in paper.segment_lengths)
        use_dilated_attention(model, Pattern(lengths, paper.dilation_rates))
    return model.train()


def learning_rate(step: int, steps: int) -> float:
    """Return the learning rate of a step: up in a line, then down in a half cosine to a tenth."""
    done = step / steps
    return LR * (
        done / WARMUP
        if done < WARMUP
        else 0.55 + 0.45 * math.cos(math.pi * (done - WARMUP) / (1 - WARMUP))
    )


def train_step(
    model: hf.PreTrainedModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor, lr: float
) -> float:
    """Train for one step. Return the loss before it, in nats per token."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def print_table(rows: list[dict], steps: int) -> None:
    """Print the means over tenths of the steps, and the total seconds."""
    print(f"{'steps':>12} {'dense loss':>11} {'s/step':>8} {'dilated loss':>13} {'s/step':>8}")
    width = max(1, steps // 10)
    for start in range(0, steps, width):
        cells = []
        for name in ("dense", "dilated"):
            part = [
                row
                for row in rows
                if row["attention"] == name and start < row["step"] <= start + width
            ]
            cells += [sum(row[key] for row in part) / len(part) for key in ("loss", "seconds")]
        between = f"{start + 1}..{min(start + width, steps)}"
        print(
            f"{between:>12} {cells[0]:>11.4f} {cells[1]:>8.3f} {cells[2]:>13.4f} {cells[3]:>8.3f}"
        )
    dense, dilated = (
        sum(row["seconds"] for row in rows if row["attention"] == name)
        for name in ("dense", "dilated")
    )
    print(
        f"{'seconds':>12} {'':>11} {dense:>8.1f} {'':>13} {dilated:>8.1f}   dense / dilated = {dense / dilated:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--tokens",
        type=Path,
        help="a folder that longnet tokenize wrote; else the standard library's",
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    hf.utils.logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    tokens = args.tokens or tokenize_stdlib(args.output)
    stream = read_stream(tokens)
    words = Tokenizer.load(tokens)
    vocab = words.vocab_size
    models = {
        name: build(vocab, args.context, args.seed, name == "dilated")
        for name in ("dense", "dilated")
    }
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
        for name, model in models.items()
    }
    draw = np.random.default_rng(args.seed)
    rows: list[dict] = []
    with (args.output / "curves.jsonl").open("w", encoding="utf-8") as file:
        for step in range(args.steps):
            start = int(draw.integers(len(stream) - args.context))
            ids = torch.from_numpy(stream[start : start + args.context])[None]
            for name, model in models.items():
                begin = time.perf_counter()
                loss = train_step(model, optimizers[name], ids, learning_rate(step + 1, args.steps))
                seconds = time.perf_counter() - begin
                rows.append({"attention": name, "step": step + 1, "loss": loss, "seconds": seconds})
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
            print(
                f"step {step + 1}: dense {rows[-2]['loss']:.4f}, dilated {rows[-1]['loss']:.4f}",
                file=sys.stderr,
            )
    for name, model in models.items():
        model.save_pretrained(args.output / name)
        words.save(args.output / name / "tokenizer.json")
    print_table(rows, args.steps)


if __name__ == "__main__":
    main()
