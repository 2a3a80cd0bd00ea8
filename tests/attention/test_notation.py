"""The grammar of patterns: what is written is what is read, by a name if it has one; wrong words get one line."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT
from strategies import choices, chosen_patterns, patterns

from longnet_cli.attention import Pattern
from longnet_cli.attention.notation import (
    format_levels,
    format_pattern,
    is_pattern,
    parse_pattern,
    pattern_fields,
)
from longnet_cli.basics.sizes import MAX_SIZE, format_size, parse_size

TILED = {"look_back": 1, "overlap": "once", "queries": "all"}


def choosing(width: int = 1024, **options: int) -> Pattern:
    return Pattern((width,), (1,), look_back=1, **options)


FAR = Pattern((1024, 1024), (1, 4), look_back=(1, 5), overlap="once", queries="all", sinks=4)
READ = {
    "paper": Pattern.paper(),
    "paper:sinks=4": Pattern(Pattern.paper().segment_lengths, (1, 2, 4, 6, 12), sinks=4),
    "geometric:1e9,base=1Ki,ratio=4": Pattern.geometric(10**9, 1024, 4),
    "window:1Ki": Pattern.window(1024),
    "window:1Ki,look_back=0,sinks=4": Pattern.window(1024, 0, 4),
    "geometric:4Ki,base=1Ki,ratio=4,look_back=1,overlap=once,queries=all": Pattern(
        (1024, 4096), (1, 4), **TILED
    ),
    "pretrained": Pattern.pretrained(),
    "pretrained:512,sinks=8": Pattern.pretrained(512, 8),
    "finding": choosing(chosen=32),
    "finding:512,chosen=16x64,chosen_every=4": choosing(
        512, chosen=16, chosen_block=64, chosen_every=4
    ),
    "window:1Ki,chosen=32x32": choosing(chosen=32),
    "window:1Ki,chosen=16": choosing(chosen=16),
    "window:1Ki,chosen=16x64,chosen_every=4": choosing(chosen=16, chosen_block=64, chosen_every=4),
    "1Ki/1,4Ki/4": Pattern((1024, 4096), (1, 4)),
    " 16/1 , 64/4 , head_offsets = grouped , look_back = 0/1": Pattern(
        (16, 64), (1, 4), "grouped", (0, 1)
    ),
    "1Ki/1,1Ki/4,look_back=1/5,overlap=once,queries=all,sinks=4": FAR,
}
WRITTEN = {
    "paper": Pattern.paper(),
    "geometric:1Gi,base=2Ki,ratio=2": Pattern.geometric(10**9),
    "window:1704,sinks=4": Pattern.pretrained(),
    "geometric:1Mi,base=1Ki,ratio=4,look_back=1": Pattern(
        (1024, 4096, 16384, 65536, 262144, 1048576), (1, 4, 16, 64, 256, 1024), look_back=1
    ),
    "window:1Ki,chosen=32x32": choosing(chosen=32),
    "window:1Ki,chosen=1Kix64,chosen_every=4": choosing(chosen=1024, chosen_block=64, chosen_every=4),
    "dense": Pattern.dense(),
    "1024/1": Pattern((1024,), (1,)),
    "4096/1,1024/4": Pattern((4096, 1024), (1, 4)),
    "1024/1,1024/4,look_back=1/5,overlap=once,queries=all,sinks=4": FAR,
    "paper:head_offsets=grouped": Pattern(*(getattr(Pattern.paper(), n) for n in ("segment_lengths", "dilation_rates")),
                                          "grouped"),
}  # fmt: skip
WRONG = {
    "": "unknown pattern ''. Write paper, geometric:LENGTH",
    "windw:1Ki": "unknown pattern 'windw': did you mean 'window'?",
    "window": "window needs a width, as window:64Ki",
    "window:": "something is missing beside a colon or a comma",
    "window,1Ki": "a colon follows the name: window:1Ki",
    "paper,window:1Ki": "one pattern is needed, and these are two: paper,window:1Ki",
    "window:1Ki,,": "something is missing",
    "window:1Ki,sink=4": "window has no option 'sink': did you mean 'sinks'?",
    "window:1Ki,base=4": "window has no option 'base'",
    "window:1Ki,sinks": "window takes one width, and 'sinks' is one more: did you mean 'sinks'?",
    "window:sinks=4,1Ki": "'1Ki' stands behind an option",
    "window:1Ki,sinks=4,sinks=5": "sinks is given twice",
    "window:1Ki,sinks=-1": "sinks: '-1' is not a size",
    "window:1Ki,overlap=onse": 'overlap must be "repeat" or "once", got \'onse\'',
    "64/1,1Ki/4,level_bias=0/-2": "a list of levels has no option 'level_bias'",
    "window:1Ki,chosen=32x": "chosen: '' is not a size",
    "window:1Ki,chosen=32,chosen_block=64": "window has no option 'chosen_block'",
    "paper:1Ki": "paper takes no size, and '1Ki' is one more",
    "geometric:1e9,ratio=1": "need length >= 1, base >= 1, ratio >= 2",
    "geometric:many": "'many' is not a size",
    "1Ki,4Ki": "'1Ki' is not a level: write segment length / dilation rate, as 4Ki/4",
    "1Ki/1/2": "'1Ki/1/2' is not a level",
    "1Ki/1,base=4": "a list of levels has no option 'base'",
    "8/1,16/2,head_offsets=blocked": 'head_offsets must be "modulo" or "grouped"',
    "8/1,16/2,queries=some": 'queries must be "dilated" or "all"',
    "8/1,16/2,look_back=1/2/3": "look_back needs one number from 0, or 2, one per level",
    "8/1,16/2,sinks=9": "sinks must be from 0 to the first segment length, 8, got 9",
    "16/1,8/2,overlap=once": "overlap='once' needs levels in ascending segment length",
    "16/1,8/2,queries=all": "queries='all' needs levels in ascending segment length",
    "8/2,16/4,sinks=1": "sinks=1 needs levels in ascending segment length, the first at rate 1",
    "8/1,12/2,overlap=once": 'overlap="once" needs segments that nest, and 8 does not divide 12',
    "8/1,16/2,look_back=5/1,overlap=once": 'overlap="once" needs levels that look back at least as far',
    "window:16,chosen=0x8": "chosen_block is of chosen blocks: give their number, chosen",
    "window:16,chosen_every=4": "chosen_every is of chosen blocks: give their number, chosen",
    "16/1,32/1,look_back=1,chosen=4x8": "chosen=4 needs a window: one level at rate 1 that looks back",
    "16/2,look_back=1,chosen=4x8": "chosen=4 needs a window: one level at rate 1 that looks back",
    "window:16,look_back=0,chosen=4x8": "chosen=4 needs a window: one level at rate 1",
    "window:16,sinks=4,chosen=4x8": "chosen=4 excludes sinks: the first block, which is always seen",
    "window:16,chosen=4x12": "chosen_block must divide the segment length 16, got 12",
    "window:16,chosen=4x8,chosen_every=3": "chosen_every must divide chosen_block, 8, got 3",
}


@pytest.mark.parametrize("text", READ)
def test_reads(text):
    assert parse_pattern(text) == READ[text]
    assert is_pattern(text.strip())


@pytest.mark.parametrize("text", WRITTEN)
def test_writes_a_name_or_levels(text):
    assert format_pattern(WRITTEN[text]) == text


@pytest.mark.parametrize("text", WRONG)
def test_wrong_words(text):
    with pytest.raises(ValueError, match=r".") as caught:
        parse_pattern(text)
    assert str(caught.value).startswith(WRONG[text])
    assert "\n" not in str(caught.value)


@given(patterns() | choices().map(lambda choice: choice.pattern) | chosen_patterns())
def test_round_trip(pattern):
    text = format_pattern(pattern)
    assert parse_pattern(text) == parse_pattern(format_levels(pattern)) == pattern
    assert is_pattern(text)
    assert Pattern(**pattern_fields(pattern)) == pattern


@given(st.integers(1, MAX_SIZE), st.integers(1, 10**4), st.sampled_from([1, 64, 1000, 1 << 20]))
def test_constructors_round_trip(length, base, ratio):
    try:
        made = Pattern.geometric(length, base, ratio + 1)
    except ValueError:  # more levels than there can be
        return
    assert parse_pattern(format_pattern(made)) == made


@given(
    st.integers(1, MAX_SIZE)
    | st.integers(1, 40).map(lambda n: n << 20)
    | st.integers(1, 90).map(lambda n: n * 10**9)
)
def test_sizes_round_trip(size):
    assert parse_size(format_size(size)) == size
    assert len(format_size(size)) <= len(str(size))


@pytest.mark.parametrize(
    "text", ["./1Ki/1", "my-run/window", "2024-run/4", "longnet-tiny", "recipe.toml", "2024/run"]
)
def test_other_words_are_no_patterns(text):
    assert not is_pattern(text)


def test_the_documented_way_from_python():
    assert "parse_pattern" in (Pattern.__doc__ or "")
    page = (ROOT / "docs/patterns.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(program)


def test_options_stand_in_for_defaults_that_do_not_fit_the_size():
    """Blocks of 32 do not divide a window of 48, but the blocks given do."""
    assert parse_pattern("finding:48,chosen=4x16") == Pattern(
        (48,), (1,), look_back=1, chosen=4, chosen_block=16
    )
    with pytest.raises(ValueError, match="chosen"):
        parse_pattern("finding:48,chosen=4")
