"""Numbers for people: sizes and types as a person writes them, and counts, bytes and seconds as texts.

`1e9`, `1_000_000`, `32k`, `1.5M`, `64Ki`: the letters k, M, G, T are powers of 1000; Ki, Mi, Gi, Ti powers of 1024.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

_SIZE = re.compile(
    r"(\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:e\+?(\d{1,2}))?([kmgt]i?)?", re.ASCII | re.IGNORECASE
)
_UNITS = {"": 1}
for _power, _letter in enumerate("kMGT", 1):
    _UNITS |= {_letter: 1000**_power, f"{_letter.upper()}i": 1024**_power}
_ANY_CASE = {unit.lower(): size for unit, size in _UNITS.items()}
_BYTES = (" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB")
YEAR = 365.25 * 86400  # seconds
MAX_SIZE = 2**63 - 1  # what an int64 position can hold
# and our names of them
DTYPES_OF_TORCH = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
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
    number, exponent, unit = match.groups(default="")
    size = Fraction(number.replace("_", "")) * 10 ** int(exponent or 0) * _ANY_CASE[unit.lower()]
    if size.denominator != 1:
        raise ValueError(f"'{written}' is not a whole number")
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"'{written}' is out of range: a size is at least 1 and less than 2^63")
    return int(size)


def parse_sizes(text: str | Sequence[int]) -> list[int]:
    """Parse `8k,32k,1e6` to [8000, 32000, 1000000], in the order written. Raises ValueError as `parse_size` does."""
    items: Sequence[str | int] = text.split(",") if isinstance(text, str) else text
    if "" in items and len(items) > 1:
        raise ValueError(f"'{text}' has an empty size")
    return [*map(parse_size, items)]


def format_size(size: int) -> str:
    """Return the shortest text that `parse_size` reads as `size`: 65536 -> `64Ki`, 1000000 -> `1M`, 1536 -> `1536`."""
    spellings = [f"{size // unit}{name}" for name, unit in _UNITS.items() if size % unit == 0]
    return min(spellings, key=len)


def format_count(count: float) -> str:
    """Format 1234567 as `1.23M`: three significant digits, powers of 1000."""
    return _scaled(count, 1000, ("", "k", "M", "G", "T", "P", "E"))


def count_of(count: int, noun: str) -> str:
    """Format 1 as `1 token`, 1234 as `1,234 tokens`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def format_bytes(size: float) -> str:
    """Format 3221225472 as `3.00 GiB`: powers of 1024."""
    return _scaled(size, 1024, _BYTES)


def format_duration(seconds: float) -> str:
    """Format seconds: 0.00123 -> `1.23 ms`, 75 -> `1m15s`, 3700 -> `1h01m`, 200000 -> `2d07h`, 1e8 -> `3 years`."""
    if seconds < 59.95:
        for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
            if seconds * scale >= 0.9995:
                return f"{_three_digits(seconds * scale)} {unit}"
        return f"{seconds * 1e9:.0f} ns" if seconds > 0 else "0 s"
    years = seconds / YEAR
    if years >= 2:
        return f"{years:,.0f} years"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours < 24 else f"{hours // 24}d{hours % 24:02}h"


def _three_digits(value: float) -> str:
    if abs(value) < 9.995:
        return f"{value:.2f}"
    if abs(value) < 99.95:
        return f"{value:.1f}"
    return f"{value:.0f}"


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while abs(value) >= base * 0.9995 and power < len(units) - 1:
        value /= base
        power += 1
    whole = power == 0 and value == int(value)
    return (str(int(value)) if whole else _three_digits(value)) + units[power]
