"""The reader: windows in, hidden states out in order. That its numbers are right, scoring and encoding test.

pytest tests/test_reading.py
"""

from __future__ import annotations

import pytest

from longnet_cli.errors import ConfigError
from longnet_cli.model import LongNet
from longnet_cli.runtime.reader import Reader, batches_by_length


def test_batches_by_length() -> None:
    lengths = [3, 100, 7, 7, 1, 40]
    batches = list(batches_by_length(lengths, limit=50))
    assert batches == [[1], [5], [2, 3, 0, 4]]
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 50 for b in batches)


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_below_one_is_refused(chunk: int) -> None:
    model = LongNet.from_pretrained("longnet-tiny")
    with pytest.raises(ConfigError, match=f"chunk must be 1 or more, not {chunk}"):
        Reader(model, chunk=chunk)
