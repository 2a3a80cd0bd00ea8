"""What the reader reads: documents as sequences, in batches. That its numbers are right, scoring and encoding test."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import slide, slide_encoder

from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.documents import Document, Part
from longnet_cli.data.vectors import Vectors
from longnet_cli.nets.longnet import LongNet
from longnet_cli.nets.net import Bos, InputSequence
from longnet_cli.running.reader import Reader, batches_by_length


def test_batches_by_length() -> None:
    lengths = [3, 100, 7, 7, 1, 40, 0]
    batches = list(batches_by_length(lengths, limit=50))
    assert batches == [[1], [5], [2, 3, 0, 4]]
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 50 for b in batches)
    lengths = [100 - i for i in range(50)] * 3
    padded = 0
    for batch in batches_by_length(lengths, limit=2048, least=256):
        longest, shortest = max(lengths[i] for i in batch), min(lengths[i] for i in batch)
        assert longest * len(batch) <= 2048
        assert longest * (len(batch) - 1) < 256 or 16 * shortest >= 15 * longest
        padded += longest * len(batch)
    assert padded < 1.06 * sum(lengths)


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_below_one_is_refused(chunk: int) -> None:
    model = LongNet.from_pretrained("longnet-tiny")
    with pytest.raises(ConfigError, match=f"chunk must be 1 or more, not {chunk}"):
        Reader(model, chunk=chunk)


def of_ids(bos: Bos) -> tuple[InputSequence, np.ndarray]:
    """A sequence of token ids, and all its rows."""
    document = Document("a", np.arange(5), None, "a.txt")
    return LongNet.from_pretrained("longnet-tiny").sequence(document, bos), np.append(
        np.atleast_1d(bos or ()), range(5)
    )


def of_tiles(grid: int) -> tuple[InputSequence, np.ndarray]:
    encoder, (x, at) = slide_encoder(grid=grid), slide(5)
    document = Vectors("a", "a.h5", 6, [Part(x.numpy().ravel())], at.double().numpy(), None, str, {})
    rows = encoder.net.rows(x[None], at[None] if grid else None, torch.tensor([5]))
    return encoder.net.sequence(document), rows[0].numpy()


@pytest.mark.parametrize(
    ("found", "given"), [(of_ids, None), (of_ids, 7), (of_ids, (7, 8, 9)), (of_tiles, 50), (of_tiles, 0)]
)
def test_any_part_of_a_sequence_is_that_part_of_all_its_rows(found, given) -> None:
    sequence, rows = found(given)
    assert len(sequence) == len(rows) == sequence.own_start + 5
    for start in range(len(rows) + 1):
        for stop in range(start, len(rows) + 1):
            part = sequence.read(start, stop)
            np.testing.assert_array_equal(part, rows[start:stop])
            assert part.dtype == (np.int64 if found is of_ids else np.float32)
