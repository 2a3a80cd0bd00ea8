"""Sizes as a person writes them: a number of tokens, or of anything else that is counted.

`1e9`, `1_000_000`, `32k`, `1.5M`, `64Ki`: the letters k, M, G, T are powers of 1000; Ki, Mi, Gi, Ti powers of 1024.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

_SIZE = re.compile(r"(\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:e\+?(\d{1,2}))?(?:([kmgt])(i?))?", re.ASCII | re.IGNORECASE)
MAX_SIZE = 2**63 - 1  # what an int64 position can hold
_SIZE_EXAMPLES = "write 1000000, 1_000_000, 1e6, 1M (10^6) or 64Ki (64 x 1024)"


def parse_size(text: str | int) -> int:
    """Return the whole number, at least 1, that `1e9`, `32k`, `64Ki`, ... stand for.

    An int is checked and returned, because typer passes an option's default to its parser. Raises ValueError, with an
    example, for anything else.
    """
    written = str(text).strip()
    match = _SIZE.fullmatch(written)
    if not match:
        raise ValueError(f"'{written}' is not a size: {_SIZE_EXAMPLES}")
    number, exponent, letter, binary = match.groups()
    power = " kmgt".index(letter.lower()) if letter else 0
    size = Fraction(number.replace("_", "")) * 10 ** int(exponent or 0) * (1024 if binary else 1000) ** power
    if size.denominator != 1:
        raise ValueError(f"'{written}' is not a whole number")
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"'{written}' is out of range: a size is at least 1 and less than 2^63")
    return int(size)


def parse_sizes(text: str | Sequence[int]) -> list[int]:
    """Parse `8k,32k,1e6` to [8000, 32000, 1000000], in the order written. Raises ValueError as `parse_size` does."""
    items: Sequence[str | int] = text.split(",") if isinstance(text, str) else text
    return [parse_size(item) for item in items]


def format_size(size: int) -> str:
    """Return the shortest text that `parse_size` reads as `size`: 65536 -> `64Ki`, 1000000 -> `1M`, 1536 -> `1536`."""
    found = [str(size)]
    for unit, suffix in ((1000, ""), (1024, "i")):
        for power, letter in enumerate("kMGT", 1):
            count, rest = divmod(size, unit**power)
            if count and not rest:
                found.append(f"{count}{letter.upper() if suffix else letter}{suffix}")
    return min(found, key=len)
