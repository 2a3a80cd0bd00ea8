"""The scripts beside docs/measurements/ run, at a tiny size, and print a row for each thing that they measure."""

from __future__ import annotations

import json
import math
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from builders import tiny_llama
from places import ROOT, imported
from processes import invoke

from longnet_cli import LongNetError
from longnet_cli.data.tokenizer import Tokenizer

pytestmark = pytest.mark.ci
FOLDER = ROOT / "docs/measurements"
WINDOW, CHOSEN = "window:64,sinks=4", "window:64,chosen=2x32"
# of each script: its arguments in a folder with a Llama and texts, and how many rows it prints
SCRIPTS = {
    "ask.py": (
        f"./llama --text a.txt --tokens 500 --passages 1 --alone --pattern {WINDOW}",
        15,
    ),  # ways and methods
    "passage.py": (
        f"./llama {CHOSEN} --passages a.txt --filler b.txt --tokens 50 --distances 300 --near 9 --every 4",
        2,
    ),
    "recall.py": ("window:16 --times .5 1 --steps 2 --dim 8 --heads 2 --layers 1", 2),
    "ruler.py": (
        f"./llama {CHOSEN} --text a.txt --tokens 1500 --haystacks 1 --questions 2",
        7,
    ),  # tasks
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_measurement_prints_its_rows(
    name: str, tmp_path: Path, command_env: dict[str, str], python: Path
) -> None:
    words, rows = SCRIPTS[name]
    tiny_llama(
        tmp_path / "llama", max_position_embeddings=400, bos_token_id=7, initializer_range=0.5
    )
    for text in ("a.txt", "b.txt"):
        (tmp_path / text).write_text(
            f"All is well that ends well. What ends in {text} is another matter. " * 150
        )
    command = [python, FOLDER / name.split()[0], *words.split()]
    done = subprocess.run(
        command, env=command_env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == rows
    assert all(
        np.isfinite([x for x in row.values() if isinstance(x, float)]).all() for row in found
    )


def test_a_long_document_has_the_sources_of_wheels_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    script, document, lines = (
        imported(FOLDER / "long_document.py"),
        tmp_path / "long.txt",
        "x = 2\n" * 99,
    )
    for wheel in ("b-1.whl", "a-2.whl"):
        with zipfile.ZipFile(tmp_path / wheel, "w") as archive:
            archive.writestr(f"{wheel[0]}/two.py", lines)
            archive.writestr(f"{wheel[0]}/one.py", "")
            archive.writestr(f"{wheel[0]}/data.txt", "left out")
    facts = script.join(500, document, [*map(str, tmp_path.glob("*.whl"))])
    text = "".join(f"# {name}/two.py\n{lines}\n" for name in "ab")
    assert document.read_text() == text
    assert facts["packages"] == ["a", "b"]
    assert facts["tokens"] == 2 * len(Tokenizer.load("longnet-tiny").encode(text[: len(text) // 2]))
    with pytest.raises(LongNetError, match="fewer than 10,000"):
        script.join(10_000, document, [str(tmp_path / "a-2.whl")])

    total = json.loads(
        invoke(
            "score", document, "--token-logprobs", tmp_path / "t.arrow", "--format", "json"
        ).stdout
    )
    parts = [*script.parts(str(tmp_path / "t.arrow"))]
    nats = sum(math.log(part["ppl"]) * (part["stop"] - part["start"]) for part in parts)
    assert (len(parts), nats) == (10, pytest.approx(total["total"]["nll_sum"], rel=1e-5))


def test_losses_by_recall_are_sums_over_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of bytes: two new pairs, the first token, and repeats; the other file has other losses of its tokens."""
    by_recall = imported(FOLDER / "by_recall.py")
    ids = np.random.default_rng(0).integers(0, 3, 60)
    pairs = list(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))
    last = [
        next((d for d in range(1, i + 1) if pairs[i - d] == pairs[i]), 0) for i in range(len(pairs))
    ]
    assert by_recall.distances(ids).tolist() == [0, *last]

    (tmp_path / "a.txt").write_text("xyxyxyxyxyxy")
    (tmp_path / "b.txt").write_text("xyxyxyxyxyxy")
    monkeypatch.chdir(tmp_path)
    for context in ("4", "8"):
        invoke(
            "score", "a.txt", "b.txt", "--context", context, "--token-logprobs", f"{context}.arrow"
        )
    total = json.loads(
        invoke("score", "a.txt", "b.txt", "--context", "4,8", "--format", "json").stdout
    )["totals"]
    lines = [line.strip("| ").split(" | ") for line in by_recall.table(["4.arrow", "8.arrow"])][2:]
    tokens = np.array([int(line[1]) for line in lines])
    assert lines[0][0] == "new"
    for at, each in enumerate(total):
        nats = np.array([float(line[2 + at]) for line in lines])
        assert nats @ tokens == pytest.approx(each["nll_sum"], abs=tokens.sum() * 1e-3)
    assert {line[4].partition(" +- ")[2] for line in lines} == {"0.000"}  # two equal documents


def test_a_seed_of_small_nets_has_rows_for_each_pattern_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    dilation = imported(FOLDER / "dilation.py")
    levels = "8/1,32/2,look_back=1,overlap=once,queries=all"
    model = {
        "vocab_size": 257,
        "dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "ffn_dim": 16,
        "position": "rope",
    }
    small = {
        "WINDOW": 64,
        "CONTEXTS": (16, 64),
        "POSITIONS": (0, 32, 64),
        "RECALL": (1, 8, 64),
        "MODEL": model,
    }
    small |= {
        "PATTERNS": {"window": "window:16", "mapped": levels},
        "SCRATCH": {"scratch-window": "window:16"},
    }
    small |= {
        "TRUNK_WINDOW": 32,
        "TRUNK_TOKENS": 64,
        "TRUNK_STEPS": 2,
        "STEPS": 2,
        "ROWS": tmp_path / "rows.jsonl",
    }
    for name, value in small.items():
        monkeypatch.setattr(dilation, name, value)
    for kind in dilation.KINDS:
        for part in ("train", "held-out"):
            lines = [
                json.dumps({"id": str(i), "text": f"{kind} of {i}, {part}. " * 20})
                for i in range(3)
            ]
            (tmp_path / f"{kind}-{part}.jsonl").write_text("\n".join(lines))
            invoke("tokenize", tmp_path / f"{kind}-{part}.jsonl", "-o", tmp_path / f"{kind}-{part}")
    Tokenizer.bytes().save(tmp_path / "mix" / "tokenizer.json")

    dilation.measure(tmp_path, 0, ["window", "mapped", "scratch-window"])
    dilation.measure(tmp_path, 0, ["window"])  # is there already
    rows = dilation.rows()
    assert [(row["pattern"], row["text"]) for row in rows] == [
        (name, kind) for name in ("window", "mapped", "scratch-window") for kind in dilation.KINDS
    ]
    for row in rows:
        whole = row["nats"]["64"]
        assert row["documents"] == ["0", "1", "2"]
        assert np.sum(row["position"], 1) == pytest.approx(whole, abs=0.01)
        assert np.sum(row["recall"], 1) == pytest.approx(whole, abs=0.01)
        assert np.sum(row["recall_tokens"], 1).tolist() == [64] * 3
    table = "\n".join(dilation.table())
    assert "| prose | mapped | 1 |" in table
    assert table.count("| python | scratch-window |") == 4
