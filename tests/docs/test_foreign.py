"""`foreign.py` replaces the past that it says, by text of another package, and finds what a net takes from there."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from places import ROOT, imported

from longnet_cli import Document, LongNet, LongNetConfig, LongNetError, ModelFacts, parse_pattern

TOKENS = 96


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = imported(ROOT / "docs/measurements/foreign.py")
    monkeypatch.setattr(module, "SCORED", 16)
    monkeypatch.setattr(module, "EDGES", (16, 32))
    return module


def documents(*names: str) -> list[Document]:
    """Return documents of 200 tokens, each of its own."""
    drawn = np.random.default_rng(0)
    return [Document(name, drawn.integers(0, 50, 200), None, name) for name in names]


def test_windows_are_spread_over_documents_and_packages(foreign):
    found = foreign.windows(documents("a/x", "a/y", "b/x", "b/y"), TOKENS, 2)
    assert [window.document for window in found] == ["a/x", "b/x"]
    found = foreign.windows(documents("a/x", "a/y", "b/x"), TOKENS, 5)
    assert [window.document for window in found] == ["a/x", "a/x", "a/y", "a/y", "b/x"]
    with pytest.raises(LongNetError, match="6 windows of 96 tokens, not 7"):
        foreign.windows(documents("a/x", "a/y", "b/x"), TOKENS, 7)
    with pytest.raises(LongNetError, match="of one package"):
        foreign.windows(documents("a/x", "a/y"), TOKENS, 2)


def test_only_the_part_is_foreign(foreign):
    found = foreign.windows(documents("a/x", "a/y", "b/x"), TOKENS, 3)
    assert foreign.parts(TOKENS) == [(16, 80), (16, 32), (32, 80)]
    for true, other in zip(found, foreign.replaced(found, (16, 32)), strict=True):
        same = true.ids == other.ids
        assert same[:48].all()
        assert same[64:].all()
        assert not same[48:64].all()
        taken = [each for each in found if np.array_equal(each.ids[48:64], other.ids[48:64])]
        assert [each.package != true.package for each in taken] == [True]


def test_a_net_that_does_not_see_the_part_has_the_same_perplexity(foreign):
    """A window of one layer sees no further than 15 tokens; dense attention of the same weights does."""
    found = foreign.windows(documents("a/x", "a/y", "b/x"), TOKENS, 3)
    names = [window.document for window in found]
    rows = {}
    for text in ("window:8", "dense"):
        torch.manual_seed(0)
        sizes = {"vocab_size": 50, "dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 16}
        config = LongNetConfig(**sizes, pattern=parse_pattern(text), position="rope")
        net = LongNet(config).eval()
        of_windows = foreign.nats(net, ModelFacts(bos=0), found, [32], "fp32")
        rows[text] = foreign.row(names, of_windows, of_windows)
    unseen, seen = (row["replaced"] for row in rows.values())
    assert [each["true_foreign"] for each in unseen] == [1.0, 1.0, 1.0]
    assert all(each["true_foreign"] != 1.0 for each in seen)
    assert rows["dense"]["reach"] == [1.0, 0.0]  # beside itself
    assert rows["dense"]["gain"][0] != 1.0


def test_neighbouring_documents_of_a_package_are_joined(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs/measurements")
    fourth_level = imported(ROOT / "docs/measurements/fourth_level.py")
    monkeypatch.setattr(fourth_level, "MOST", 130)
    parts = [{"id": name, "text": 60 * "x"} for name in ("a/1", "a/2", "a/3", "b/1")]
    joined = [(whole["id"], len(whole["text"])) for whole in fourth_level.joined(parts)]
    assert joined == [("a/1", 120), ("a/3", 60), ("b/1", 60)]
