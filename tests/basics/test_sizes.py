"""Proves that sizes and lists of sizes are read as documented."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet_cli.basics.sizes import parse_size, parse_sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1e9", 10**9),
        ("1E+9", 10**9),
        ("1.5e3", 1500),
        ("32K", 32_000),
        ("1.5M", 1_500_000),
        (".5k", 500),
        ("64ki", 65_536),
        ("1.5Mi", 3 * 2**19),
        (" 8k ", 8000),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


NO_SIZES = [
    "",
    "k",
    "abc",
    "8kb",
    "1e",
    "1__0",
    "_1",
    "0x10",
    "1,5",
    "inf",
    "nan",
    "٣",
    "1e-3",
    "-1",
    "-8k",
]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (NO_SIZES, "is not a size: write 1000000, .* or 64Ki"),
        (["0", "0k", "1e99", "9223372036854775808"], "is out of range"),
        (["1.5", "1.0001k", "0.5"], "is not a whole number"),
    ],
)
def test_what_is_no_size_is_told(texts, message):
    for text in texts:
        with pytest.raises(ValueError, match=message):
            parse_size(text)


@given(st.integers(1, 2**63 - 1))
def test_every_way_to_write_an_integer_reads_back(size):
    assert parse_size(str(size)) == parse_size(f"{size:_}") == parse_size(size) == size


@given(st.integers(1, 9000), st.integers(0, 4))
def test_letters_are_powers(number, power):
    assert parse_size(f"{number}{['', 'k', 'M', 'G', 'T'][power]}") == number * 1000**power
    assert parse_size(f"{number}{['', 'Ki', 'Mi', 'Gi', 'Ti'][power]}") == number * 1024**power


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_value_error(text):
    try:
        size = parse_size(text)
    except ValueError:
        return
    assert size >= 1


def test_lists_keep_their_order():
    assert parse_sizes("8k,32k,1e6") == [8000, 32_000, 1_000_000]
    assert parse_sizes("64Ki") == [65_536]
    assert parse_sizes("2, 1, 2") == [2, 1, 2]
    for text in ("", ",", "8k,", "8k,,32k", "8k;32k"):
        with pytest.raises(ValueError, match=r"is not a size|has an empty size"):
            parse_sizes(text)
