"""Proves that a resumed run sees what an uninterrupted one would, and that an epoch shows every token once."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet_cli.data.windows import TokenWindows, pack
from longnet_cli.errors import ConfigError, DataError


def test_pack_puts_eos_before_every_document():
    stream = pack([np.array([1, 2], np.uint16), np.array([], np.int32), np.array([3], np.int64)], eos_id=9)
    assert stream.dtype == np.int32
    assert stream.tolist() == [9, 1, 2, 9, 9, 3]


@settings(max_examples=100, deadline=None)
@given(
    total=st.integers(2, 300),
    seq_len=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    stop=st.integers(1, 12),
)
def test_resumed_equals_uninterrupted(total, seq_len, batch_size, seed, stop):
    stream = np.arange(max(total, seq_len + 1), dtype=np.int32)
    whole = list(islice(TokenWindows(stream, 0, seq_len, batch_size, seed), 16))
    state = whole[stop - 1][1]
    resumed = islice(TokenWindows(stream, 0, seq_len, batch_size, seed, state=state), 16 - stop)
    for (batch, after), (expected, expected_after) in zip(resumed, whole[stop:], strict=True):
        assert batch.dtype == np.int64
        assert batch.shape == (batch_size, seq_len + 1)
        assert np.array_equal(batch, expected)
        assert after == expected_after


@settings(max_examples=100, deadline=None)
@given(total=st.integers(2, 500), seq_len=st.integers(1, 60), seed=st.integers(0, 1000), epoch=st.integers(0, 5))
def test_every_token_is_an_input_once_an_epoch(total, seq_len, seed, epoch):
    stream = np.arange(max(total, seq_len + 1), dtype=np.int32)
    starts = TokenWindows(stream, 0, seq_len, 1, seed).epoch_windows(epoch)
    inputs = np.sort(np.concatenate([stream[start : start + seq_len] for start in starts]))
    assert np.array_equal(inputs, np.arange(inputs[0], inputs[-1] + 1))  # each once, without a gap
    assert inputs[0] < seq_len  # the head
    assert len(stream) - 1 - inputs[-1] <= seq_len  # the tail: less than a window, and the last target


def test_epochs_differ_in_phase_and_order_and_seeds_differ():
    windows = TokenWindows(np.arange(1000), 0, 16, 1, seed=3)
    assert {int(windows.epoch_windows(epoch).min()) for epoch in range(40)} > {0, 15}
    assert not np.array_equal(windows.epoch_windows(0), np.sort(windows.epoch_windows(0)))
    assert not np.array_equal(windows.epoch_windows(0), TokenWindows(np.arange(1000), 0, 16, 1, 4).epoch_windows(0))


def test_the_order_is_pinned():
    # A checkpoint of today must resume on the numpy of tomorrow.
    assert TokenWindows(np.arange(40), 0, 8, 1, seed=7).epoch_windows(2).tolist() == [28, 4, 20, 12]


def test_a_stream_of_one_window_and_of_less():
    batch, state = next(iter(TokenWindows([np.array([1, 2, 3])], 9, 3, 2, seed=0)))
    assert batch.tolist() == [[9, 1, 2, 3], [9, 1, 2, 3]]
    assert state == {"version": 1, "seed": 0, "epoch": 1, "window": 1}
    with pytest.raises(DataError, match=r"4 tokens.* 5 "):
        TokenWindows([np.array([1, 2, 3])], 9, 4, 1, seed=0)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"seed": 1}, ConfigError),
        ({"version": 2}, ConfigError),
        ({"window": 1000}, DataError),
    ],
)
def test_a_state_of_another_run_is_refused(change, error):
    state = {"version": 1, "seed": 0, "epoch": 0, "window": 0}
    with pytest.raises(error):
        TokenWindows(np.arange(100), 0, 8, 1, seed=0, state=state | change)
    with pytest.raises(ConfigError):
        TokenWindows(np.arange(100), 0, 8, 1, seed=0, state={"seed": 0})


def test_a_read_only_stream_is_copied_into_writable_batches():
    stream = np.arange(100)
    stream.flags.writeable = False
    batch, _ = next(iter(TokenWindows(stream, 0, 8, 2, seed=0)))
    assert batch.flags.writeable
    assert not np.shares_memory(batch, stream)
