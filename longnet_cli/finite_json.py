"""JSON of values that it does not have: numbers that are NaN or infinite become null, dates and the like text."""

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """The JSON of a value, whose floats that are not finite are null; the other arguments are those of json.dumps."""
    try:
        return json.dumps(value, allow_nan=False, indent=indent, ensure_ascii=ensure_ascii)
    except (ValueError, TypeError):  # the rare value that has such a number, or a mapping that is no dict, or a date
        return json.dumps(finite(value), allow_nan=False, indent=indent, ensure_ascii=ensure_ascii, default=_text)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def finite(value: Any) -> Any:
    """A value with None in place of every float in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value
