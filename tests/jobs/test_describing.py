"""What `longnet pattern` says, against what the operator, its cache and its dense reference do."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import recipe
from hypothesis import given
from hypothesis import strategies as st
from pattern_nets import net
from places import ROOT
from processes import invoke
from reference import key_counts
from strategies import choices

from longnet_cli.attention import Pattern
from longnet_cli.attention.branches import attention_flops
from longnet_cli.attention.cache import cached_rows
from longnet_cli.attention.notation import parse_pattern
from longnet_cli.attention.spans import Lanes
from longnet_cli.basics.errors import ConfigError
from longnet_cli.jobs.describing import (
    NOTHING,
    Subject,
    cells_between,
    default_length,
    describe,
    find_subject,
    picture,
)

TILED = {"look_back": 1, "overlap": "once"}
EVEN = [
    Pattern((16, 32, 64), (1, 2, 4)),
    Pattern.window(16, sinks=4),
    Pattern((16, 32, 64), (1, 2, 4), look_back=1, overlap="once", queries="all", sinks=4),
    Pattern((16, 64), (1, 4), **TILED, queries="all"),
]
KEYS = {"name", "pattern", "levels", "apart", "total", "dense", "seq", "heads",
        "head_dim", "causal"}  # fmt: skip
TINY = "512/1,2048/4,8192/16,32768/64,look_back=1,overlap=once,queries=all"  # of longnet-tiny
ROW = {
    "segment_length",
    "dilation_rate",
    "look_back",
    "keys_per_query",
    "flops",
    "flops_share",
    "cache_rows",
}


@pytest.mark.parametrize("pattern", EVEN, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_costs_are_the_counted_ones(pattern, causal):
    seq, heads = 1024, 4
    found = describe(Subject("", pattern, heads, 8, causal), seq)
    assert found.total.flops == attention_flops(pattern, heads, 8, seq, causal)
    assert found.dense.flops == attention_flops(Pattern((seq,), (1,)), heads, 8, seq, causal)
    assert sum(level.flops for level in found.levels) + found.apart.flops == found.total.flops
    counts = key_counts(pattern, heads, seq, causal, 0, "exact")[0].double()
    if causal:  # a query and its own key make half a pair, as in the FLOPs of a causal square
        counts -= counts.diagonal(dim1=1, dim2=2).diag_embed() / 2
    inner = counts[:, 256:768].sum(-1).mean().item()
    assert found.total.keys_per_query == pytest.approx(inner, rel=1e-12)
    if causal:
        assert found.total.cache_rows == cached_rows(Lanes(pattern, heads, heads)) // heads
        assert (
            sum(level.cache_rows or 0 for level in found.levels) + pattern.sinks
            == found.total.cache_rows
        )
    else:
        assert found.total.cache_rows is None


@given(choices())
def test_a_picture_has_what_the_reference_counts(choice):
    seq = choice.tokens
    counts = key_counts(choice.pattern, choice.heads, seq, choice.causal, 0, "exact")[0].numpy() > 0
    cells = picture(choice.pattern, seq, seq, choice.heads, choice.causal)
    assert ((cells != NOTHING) == counts.any(0)).all()
    size, first = (seq + 1) // 2, seq // 3
    queries = np.arange(seq - size, seq + 1)
    keys = np.arange(first, first + size + 1)
    part = cells_between(queries, keys, choice.pattern, seq, choice.heads, choice.causal)
    assert (part == cells[seq - size :, first : first + size]).all()


def test_chosen_blocks():
    """The keys that a text may name at most, and what is kept."""
    pattern = Pattern((128,), (1,), look_back=2, chosen=4, chosen_block=32, chosen_every=4)
    for seq in (60, 384, 700, 400_011):
        found = describe(Subject("", pattern, 3, 4), seq)
        assert found.apart.flops == 3 * 4 * 4 * max(0, seq - 384) * 4 * 32
        assert found.total.flops == sum(level.flops for level in found.levels) + found.apart.flops
    assert (found.apart.keys_per_query, found.apart.cache_rows) == (128, 400_011)
    assert found.total.cache_rows == 3 * 128 + 400_011
    cells = picture(pattern, 800, 800, 3)
    assert (cells[799, :512] == 1).all()
    assert (cells[799, 512:] == 0).all()


def test_a_billion_tokens():
    pattern = Pattern.geometric(10**9)
    found = describe(Subject("", pattern, 2, 4), default_length(pattern))
    assert found.total.flops == attention_flops(pattern, 2, 4, 1 << 30, True)
    assert found.total.keys_per_query == pattern.keys_per_query / 2
    assert found.total.cache_rows == cached_rows(Lanes(pattern, 2, 2)) // 2 == 40960


def test_the_command_loads_no_torch_for_a_pattern():
    program = (
        "import sys; from longnet_cli.cli.app import app; "
        "app(['pattern', 'geometric:1e9'], standalone_mode=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program + "; sys.exit('torch' in sys.modules)"], capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_json_has_the_keys_of_the_contract():
    result = invoke("pattern paper window:1Ki,sinks=4 longnet-tiny --format json", code=0)
    rows = json.loads(result.stdout)
    assert [row["pattern"] for row in rows[1:]] == ["1024/1,look_back=1,sinks=4", TINY]
    assert all(
        row.keys() == KEYS and all(level.keys() == ROW for level in row["levels"]) for row in rows
    )
    assert (rows[2]["heads"], rows[2]["head_dim"]) == (4, 64)


@pytest.mark.parametrize("name", ["longnet-125m", "examples/small.toml", "./models/longnet-tiny"])
def test_recipes_and_models_are_described(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    subject = find_subject(name)
    assert subject.causal


def test_a_model_of_transformers(tmp_path):
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 3, "hidden_size": 32}
    config = {
        **sizes,
        "model_type": "llama",
        "dilated_attention": {"segment_lengths": [8], "dilation_rates": [1]},
    }
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(config))
    subject = find_subject(f"{tmp_path}/")
    assert (subject.pattern, subject.heads, subject.head_dim) == (Pattern((8,), (1,)), 4, 8)
    (tmp_path / "config.json").write_text(json.dumps(config | {"dilated_attention": None}))
    with pytest.raises(ConfigError, match="no pattern"):
        find_subject(f"{tmp_path}/")


@given(
    st.integers(40, 10**12), st.sampled_from(["paper", "window:1Ki,sinks=4", "1Ki/1,3Ki/7,9Ki/5"])
)
def test_pictures_of_any_length(seq, text):
    cells = picture(parse_pattern(text), seq, 16, 12)
    assert cells.shape == (min(seq, 16),) * 2
    assert (np.triu(cells, 1) == NOTHING)[np.triu_indices(len(cells), 1)].all()
    assert (np.diagonal(cells) == 0).all()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "pattern",
    [Pattern((16,), (1,)), Pattern.window(8), Pattern((8, 32), (1, 4)), replace(EVEN[2], sinks=0)],
    ids=str,
)
def test_nothing_is_linked_farther(pattern, layers):
    """Another first token changes tokens within the distance, and none beyond it."""
    model, ids = net(pattern, layers=layers).double(), torch.arange(300)[None] % 50
    with torch.no_grad():
        changed = (model(ids) != model(torch.cat([ids[:, :1] + 1, ids[:, 1:]], 1))).any(2)[0]
    distance = int(changed.nonzero().max())
    reach = pattern.farthest(layers)
    assert reach / 3 < distance <= reach


def test_a_recipe_notes_a_long_warm_up_and_a_pattern_shorter_than_the_sequences(tmp_path):
    warm_up, short = recipe(tmp_path, **{"schedule.warmup_steps": 500}).notes()
    assert (
        "links tokens at most 32 apart, and sequences have 64: what is farther is never seen"
        in short
    )
    assert "steps are warm-up: the learning rate rises for schedule.warmup_steps=500" in warm_up
    assert not recipe(tmp_path, **{"model.segment_lengths": [16, 64]}).notes()
