"""JSON of values that JSON does not have: infinite numbers and NaN are null, bytes base64, dates and the like text."""

import base64
import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Return the JSON of a value, with null for floats that are not finite. The options are as in json.dumps."""
    try:
        return json.dumps(value, allow_nan=False, indent=indent, ensure_ascii=ensure_ascii)
    # Rare: a value with such a number, a mapping that is not a dict, or a date
    except (ValueError, TypeError):
        return json.dumps(
            finite(value),
            allow_nan=False,
            indent=indent,
            ensure_ascii=ensure_ascii,
            default=_text,
        )


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def finite(value: Any) -> Any:
    """Return a value with None in place of every float in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [*map(finite, value)] if isinstance(value, (list, tuple)) else value
