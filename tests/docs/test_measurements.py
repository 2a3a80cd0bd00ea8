"""The scripts beside docs/measurements/ run, at a tiny size, and print a row for each thing that they measure."""

from __future__ import annotations

import json
import math
import zipfile

import numpy as np
import pytest
import torch
from builders import tiny_llama
from places import ROOT, imported
from processes import invoke

from longnet_cli import LongNet, LongNetError
from longnet_cli.data.documents.tokenizer import Tokenizer
from longnet_cli.nets.config import LongNetConfig
from longnet_cli.nets.positions import position_table

pytestmark = pytest.mark.ci
FOLDER = ROOT / "docs/measurements"
WINDOW, CHOSEN = "window:64,sinks=4", "window:64,chosen=2x32"
# of each script: its arguments in a folder with a Llama and texts, and how many rows it prints
# The command of a script, and how many rows it prints: ways, methods or tasks
SCRIPTS = {
    "ask.py": (f"./llama --text a.txt --tokens 500 --passages 1 --alone --pattern {WINDOW}", 15),
    "flex.py": ("64 window:16 dilated flex --repeats 1", 2),
    "many_documents.py": ("many --documents 20 40 --jobs score tokenize", 8),
    "passage.py": (
        f"./llama {CHOSEN} --passages a.txt --filler b.txt --tokens 50 --distances 300 --near 9 --every 4",
        2,
    ),
    "recall.py": ("window:16 --times .5 1 --steps 2 --dim 8 --heads 2 --layers 1", 2),
    "ruler.py": (
        f"./llama {CHOSEN} --text a.txt --tokens 1500 --haystacks 1 --questions 2",
        7,
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_measurement_prints_its_rows(name, tmp_path, run_python, python):
    words, rows = SCRIPTS[name]
    tiny_llama(
        tmp_path / "llama", max_position_embeddings=400, bos_token_id=7, initializer_range=0.5
    )
    for text in ("a.txt", "b.txt"):
        (tmp_path / text).write_text(
            f"All is well that ends well. What ends in {text} is another matter. " * 150
        )
    done = run_python(FOLDER / name, *words.split(), python=python)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == rows
    assert all(
        np.isfinite([x for x in row.values() if isinstance(x, float)]).all() for row in found
    )


def test_a_long_document_has_the_sources_of_wheels_in_order(tmp_path, monkeypatch):
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


def test_losses_by_recall_are_sums_over_tokens(tmp_path, monkeypatch):
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
        invoke("score a.txt b.txt --context", context, "--token-logprobs", f"{context}.arrow")
    total = json.loads(invoke("score a.txt b.txt --context 4,8 --format json").stdout)["totals"]
    lines = [line.strip("| ").split(" | ") for line in by_recall.table(["4.arrow", "8.arrow"])][2:]
    tokens = np.array([int(line[1]) for line in lines])
    assert lines[0][0] == "new"
    for at, each in enumerate(total):
        nats = np.array([float(line[2 + at]) for line in lines])
        assert nats @ tokens == pytest.approx(each["nll_sum"], abs=tokens.sum() * 1e-3)
    assert {line[4].partition(" +- ")[2] for line in lines} == {"0.000"}  # two equal documents


def test_nets_of_a_seed_have_rows_that_the_tables_read(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    dilation = imported(FOLDER / "dilation.py")
    net = {"vocab_size": 257, "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16}
    size = {"window": 64, "batch_tokens": 64, "steps": 2}
    anew = {"anew": True, "net": net}
    levels = "8/1,32/2,look_back=1,overlap=once,queries=all"
    arms = {
        "trunk": dilation.Arm("32/1", **anew, window=32, batch_tokens=64, steps=2),
        "window": dilation.Arm("window:16", **size),
        "mapped": dilation.Arm(levels, "rope_by_level", **size),
        "all-keys": dilation.Arm(
            "8/1,32/1,look_back=1,overlap=once,queries=all",
            "rope_by_level",
            group_sizes=(1, 2),
            **size | {"steps": 0},
        ),
        "scratch-window": dilation.Arm("window:16", **anew, **size),
        "of-paper": dilation.Arm(
            "16/1,64/2", "xpos", "of-paper", **anew, **size, kinds=("python",), table=True
        ),
    }
    small = {
        "WINDOW": 64,
        "CONTEXTS": (16, 64),
        "CONTEXTS_OF_TABLE": (32,),
        "POSITIONS": (0, 32, 64),
        "RECALL": (1, 8, 64),
        "FOREIGN": 3,
        "ARMS": arms,
        "ROWS": tmp_path / "rows.jsonl",
        "NETS": tmp_path / "nets",
    }
    for name, value in small.items():
        monkeypatch.setattr(dilation, name, value)
    monkeypatch.setattr(dilation.foreign, "SCORED", 16)
    monkeypatch.setattr(dilation.foreign, "EDGES", (8, 32))
    for kind in dilation.KINDS:
        for part in ("train", "held-out"):
            lines = [
                json.dumps({"id": f"{i}/a", "text": f"{kind} of {i}, {part}. " * 20})
                for i in range(3)
            ]
            (tmp_path / f"{kind}-{part}.jsonl").write_text("\n".join(lines))
            invoke("tokenize", tmp_path / f"{kind}-{part}.jsonl", "-o", tmp_path / f"{kind}-{part}")
    Tokenizer.bytes().save(tmp_path / "mix" / "tokenizer.json")

    for name in [*arms, "window"]:  # the last one is there already
        dilation.measure(tmp_path, 0, name)
    rows = dilation.rows()
    assert [(row["pattern"], row["text"]) for row in rows] == [
        *((name, kind) for name in [*arms][1:5] for kind in dilation.KINDS),
        ("of-paper", "python"),
    ]
    trained = {f"0-{name}" for name in arms if arms[name].steps}
    assert {path.name for path in (tmp_path / "nets").iterdir()} == trained
    assert LongNet.from_pretrained(tmp_path / "nets/0-mapped").config.position == "rope_by_level"
    for row in rows[:-1]:
        whole = row["nats"]["64"]
        assert row["documents"] == ["0/a", "1/a", "2/a"]
        assert np.sum(row["position"], 1) == pytest.approx(whole, abs=0.01)
        assert np.sum(row["recall"], 1) == pytest.approx(whole, abs=0.01)
        assert np.sum(row["recall_tokens"], 1).tolist() == [64] * 3

    table = "\n".join(dilation.table())
    assert "| prose | mapped | 1 |" in table
    assert table.count("| python | scratch-window |") == 4
    of_nets = {row["net"]: row for row in dilation.reach()}
    mapped = of_nets["mapped"]["python"]
    quotient = mapped["beside_64"][0] / mapped["beside_16"][0]
    assert mapped["reach"][0] == pytest.approx(quotient, abs=2e-4)
    of_windows = {row["net"]: row for row in dilation.contexts()}
    assert [row["contexts"] for row in of_windows.values()] == [[16, 64]] * 4 + [[32, 64]]
    assert of_windows["mapped"]["beside"][0] != 1


def test_grouped_positions_show_every_key_where_a_level_shows_it(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    self_extend = imported(FOLDER / "self_extend.py")
    sizes = {"vocab_size": 257, "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16}
    sizes |= {"position": "rope_by_level", "queries": "all", "overlap": "once", "look_back": 1}
    mapped = LongNetConfig(**sizes, segment_lengths=[8, 32], dilation_rates=[1, 2])
    all_keys = LongNetConfig(**sizes, segment_lengths=[8, 32], dilation_rates=[1, 1])

    def positions(config):
        return position_table(config, torch.arange(64), torch.float32)

    with self_extend.grouped_positions((1, 2)):
        grouped = positions(all_keys)
    for given, expected in zip(grouped, positions(mapped), strict=True):
        torch.testing.assert_close(given, expected, rtol=0, atol=0)
    assert not torch.equal(positions(all_keys).k, grouped.k)  # and they end with the context


FLEX = """
import sys, torch
sys.path.append(sys.argv[3])
from longnet_cli import dilated_attention, parse_pattern
from flex import flex_attention
torch.manual_seed(0)
q, k, v = torch.randn(3, 2, 3, 200, 16)
causal, pattern = bool(sys.argv[1]), parse_pattern(sys.argv[2])
theirs = flex_attention(pattern, 3, 200, causal, torch.device("cpu"))(q, k, v).transpose(1, 2)
ours = dilated_attention(*(x.transpose(1, 2) for x in (q, k, v)), pattern, causal=causal)
assert (theirs - ours).abs().max() < 1e-6
"""


@pytest.mark.parametrize(
    ("causal", "text"),
    [
        ("causal", "16/1,64/4,look_back=1,overlap=once,queries=all,sinks=2"),
        ("causal", "1Ki/1"),
        ("", "16/1,64/2,192/3,overlap=once"),
    ],
)
def test_flex_attention_has_the_mask_of_the_pattern(causal, text, run_python):
    """A compiler makes it, in a process of its own: others may have told torch's compiler that there are no vectors.

    No key of these patterns counts twice.
    """
    run_python("-c", FLEX, causal, text, FOLDER)
