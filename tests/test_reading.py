"""The reader: windows in, hidden states out in order. That its numbers are right, scoring and encoding test.

pytest tests/test_reading.py
"""

from __future__ import annotations

from longnet_cli.runtime.reading import batches_by_length


def test_batches_by_length() -> None:
    lengths = [3, 100, 7, 7, 1, 40]
    batches = list(batches_by_length(lengths, limit=50))
    assert batches == [[1], [5], [2, 3, 0, 4]]
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 50 for b in batches)
