"""Draw the time per token by length: python cost_picture.py OUTPUT FILE ... of `longnet bench --format jsonl`.

A file is a curve of its pattern, by its name. Dense attention goes on from its longest run, dashed, by the square of
the length.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def draw(output: str, *files: str) -> None:
    """Write the picture of rows of `bench`: whole runs, and not the decades of a streamed one."""
    figure = Figure(figsize=(5.0, 2.7), layout="constrained")
    axes = figure.subplots()
    machines: dict[str, None] = {}
    for file in map(Path, files):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        whole = [row for row in rows if not row["stop"] and row["status"] != "stopped"]
        shape = f"one attention layer of {rows[0]['heads']} heads x {rows[0]['head_dim']}"
        machines[f"{shape}, {rows[0]['machine']}, {rows[0]['date']}"] = None
        for impl, name in (("dilated", file.stem), ("dense", "dense")):
            timed = [row for row in whole if row["impl"] == impl and row["status"] == "ok"]
            if not timed:
                continue
            lengths = [row["seq"] for row in timed]
            (line,) = axes.plot(
                lengths,
                [1 / row["tokens_per_second"] for row in timed],
                "o-",
                markersize=4,
                label=name,
            )
            skipped = [
                row["seq"] for row in whole if row["impl"] == impl and row["status"] == "skipped"
            ]
            if skipped:
                longest = timed[-1]
                further = [longest["seq"], *skipped]
                times = [seq / longest["seq"] / longest["tokens_per_second"] for seq in further]
                axes.plot(further, times, "--", color=line.get_color())
                line.set_label(f"{name} (dashed: extrapolated)")
    figure.suptitle("\n".join(machines), fontsize="small")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens in the sequence",
        ylabel="time per token, seconds",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(output, dpi=300)


if __name__ == "__main__":
    draw(*sys.argv[1:])
