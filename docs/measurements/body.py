"""Ask which layers learn more, the paper's or Llama's: docs/training.md.

    python examples/stdlib_corpus.py runs/stdlib
    longnet tokenize @runs/stdlib/train.txt -o runs/stdlib/tokens --train-vocab 4096
    longnet tokenize @runs/stdlib/held_out.txt -o runs/stdlib/held-out --tokenizer runs/stdlib/tokens
    python docs/measurements/body.py runs/stdlib runs/body --steps 120

The figures of the page are of the first 20 files of held_out.txt.

Nets of the same number of weights in their matrices read the same tokens in the same order: a seed decides the first
weights and the order. For each kind of layers, a short run chooses the learning rate. A row is printed for each run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

BODIES = {
    "paper": {"ffn_dim": 512},
    "llama": {
        "ffn_dim": 384,
        "kv_heads": 2,
        "norm": "rmsnorm",
        "ffn": "swiglu",
        "bias": False,
    },
}
RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (1, 2, 3)
SIZES = {
    "dim": 128,
    "num_layers": 4,
    "num_heads": 4,
    "position": "rope_by_level",
    "pattern": "128/1,512/4,look_back=1,overlap=once,queries=all",
}
STEP = 8192  # tokens


def trained(
    data: Path, out: Path, body: str, rate: float, steps: int, seed: int
) -> dict[str, object]:
    """Train a net, or take one that is there, and return its row."""
    name = f"{body}-{rate:g}-{steps}-{seed}"
    settings: dict[str, object] = {
        **{f"model.{key}": value for key, value in (SIZES | BODIES[body]).items()},
        "data.tokenizer": str(data / "tokens"),
        "data.train": [str(data / "tokens")],
        "data.held_out": [str(data / "held-out")],
        "optimizer.lr": rate,
        "optimizer.weight_decay": 0.1,
        "optimizer.clip": 1.0,
        "schedule.warmup_steps": 10,
        "train.batch_tokens": STEP,
        "train.evaluate_every": steps,
        "train.held_out_context": 1024,
        "train.seed": seed,
    }
    metrics = out / name / "metrics.jsonl"
    if not (out / name / "model.safetensors").exists():
        words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        options = [option for word in words for option in ("--set", word)]
        stage = ["--seq-len", "1024", "--steps", str(steps)]
        command = ["longnet", "train", "-q", *options, *stage, "-o", str(out / name)]
        subprocess.run(command, check=True)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    loss = next(line["held_out_loss"] for line in reversed(lines) if "held_out_loss" in line)
    return {"body": body, "lr": rate, "steps": steps, "seed": seed, "held_out_loss": loss}


def rows(data: Path, out: Path, steps: int) -> Iterator[dict[str, object]]:
    """Yield the rows of the short runs, then those of each seed at the rate that was best."""
    for body in BODIES:
        tries = []
        for rate in RATES:
            tries.append(trained(data, out, body, rate, steps // 4, 0))
            yield tries[-1]
        best = min(tries, key=lambda row: float(str(row["held_out_loss"])))
        for seed in SEEDS:
            yield trained(data, out, body, float(str(best["lr"])), steps, seed)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=160)
    args = parser.parse_args()
    for row in rows(args.data, args.out, args.steps):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
