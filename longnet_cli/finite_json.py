"""JSON of numbers that may be NaN or infinite, which JSON does not have: they become null."""

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """The JSON of a value, whose floats that are not finite are null; the other arguments are those of json.dumps."""
    try:
        return json.dumps(value, allow_nan=False, indent=indent, ensure_ascii=ensure_ascii)
    except (ValueError, TypeError):  # the rare value that has such a number, or a mapping that is no dict
        return json.dumps(finite(value), allow_nan=False, indent=indent, ensure_ascii=ensure_ascii)


def finite(value: Any) -> Any:
    """A value with None in place of every float in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value
