"""The integer geometry: a shard asks for what it sees, and no more, in as few calls as the figures say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Choice, choices

from longnet_cli.attention.branches import branches
from longnet_cli.attention.pattern import Pattern
from longnet_cli.attention.spans import SINKS, FarSpan, Lanes, far_spans


def covered(pattern: Pattern, level: int, total: int) -> np.ndarray:
    """Which positions a level covers for each query, (queries, positions), by the definition."""
    segment = np.arange(total) // pattern.segment_lengths[level]
    return np.abs(segment[:, None] - segment) <= pattern.look_backs[level]


def seen(pattern: Pattern, level: int, causal: bool, total: int) -> np.ndarray:
    """Which positions each query sees at a level, (queries, positions), by the definition, if all keys were kept."""
    found = covered(pattern, level, total)
    if level and pattern.overlap == "once":
        found &= ~covered(pattern, level - 1, total)
    if level:
        found[:, : pattern.sinks] = False
    return np.tril(found) if causal else found


PLACES = st.floats(0, 0.999) | st.sampled_from([0.01, 0.02, 0.04])  # some start among the sinks


TILED = Pattern((4, 32), (1, 2), look_back=1, overlap="once")


@given(choice=choices(), shards=st.lists(st.tuples(PLACES, PLACES), min_size=9, max_size=9))
# one segment of 4
@example(choice=Choice(TILED, 1, 96, 1, 2, 0, False, None, 0), shards=[(44.5 / 96, 47.5 / 96)])
def test_far_spans_are_what_a_shard_sees_outside_it(choice, shards):
    """All of it, no position twice, none that the level before covers for all queries or that lies before the first of
    the past, and sinks where the first level has none.
    """
    pattern, total = choice.pattern, choice.start + choice.tokens
    levels = [seen(pattern, level, choice.causal, total) for level in range(len(pattern.levels))]
    for shard in shards:
        start, last = sorted(int(each * total) for each in shard)
        spans = far_spans(pattern, start, last + 1, choice.causal, total)
        for level, of_queries in enumerate(levels):
            needed = {*of_queries[start : last + 1].any(0).nonzero()[0]} - {*range(start, last + 1)}
            found = [
                p for span in spans if span.level == level for p in range(span.start, span.stop)
            ]
            assert len(found) == len(set(found))
            assert needed <= set(found)
            if level and pattern.overlap == "once":
                assert not covered(pattern, level - 1, total)[start : last + 1, found].all(0).any()
            past = [p for p in found if p < start]
            assert not (past and needed) or min(past) == min(needed)
        far_from_sinks = pattern.sinks and start and not levels[0][start : last + 1, 0].all()
        sinks = [FarSpan(SINKS, 0, min(start, pattern.sinks))] if far_from_sinks else []
        assert [span for span in spans if span.level == SINKS] == sinks


def test_figures_of_the_paper():
    paper = Pattern.paper()
    assert round(paper.keys_per_query) == 4267
    assert paper.cache_rows == 11_606
    assert Pattern.geometric(2**30).cache_rows == 40_960
    assert Pattern.geometric(2**30).levels[-1] == (2**30, 2**19)


def test_offsets():
    modulo, grouped = Pattern((8,), (4,)), Pattern((8,), (4,), "grouped")
    assert modulo.offsets(0, 6) == (0, 1, 2, 3, 0, 1)
    assert grouped.offsets(0, 6) == (0, 0, 1, 1, 2, 2)
    assert Pattern((8,), (8,), "grouped").offsets(0, 12) == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)


@pytest.mark.parametrize("head_offsets", ["modulo", "grouped"])
def test_few_calls(head_offsets):
    """12 heads, whole segments: the paper's pattern takes 12 calls, not the 25 of a call an offset."""
    paper = Pattern(Pattern.paper().segment_lengths, Pattern.paper().dilation_rates, head_offsets)
    assert len(branches(Lanes(paper, 12, 12), 0, 65_536, True, "exact", ())) == 12
