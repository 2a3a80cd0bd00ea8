"""Training windows over one stream of tokens: shuffled, endless, and resumable from four integers."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from longnet_cli.errors import ConfigError, DataError

STATE_VERSION = 1


def pack(documents: Sequence[np.ndarray], eos_id: int) -> np.ndarray:
    """Join (tokens,) integer arrays into one (sum of tokens + 1 each,) int32 stream: eos doc eos doc ..."""
    stream = np.empty(sum(len(document) + 1 for document in documents), np.int32)
    start = 0
    for document in documents:
        stream[start] = eos_id
        stream[start + 1 : start + 1 + len(document)] = document
        start += len(document) + 1
    return stream


class TokenWindows:
    """Endless batches of windows, cut from the documents at a new phase and in a new order every epoch.

    Window i of an epoch holds the tokens [phase + i * seq_len, phase + (i + 1) * seq_len] of the stream: seq_len
    inputs and, one further, their targets. So an epoch shows every token once as an input, except the head before
    the phase and a ragged tail, which differ from epoch to epoch. Order and phase are a function of (seed, epoch).
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray] | np.ndarray,
        eos_id: int,
        seq_len: int,
        batch_size: int,
        seed: int,
        state: Mapping[str, int] | None = None,
    ) -> None:
        """`documents` are (tokens,) integer arrays, or one array: a stream that is packed already.

        `state` is one that a batch came with: the next batch is the one after it. Raises ConfigError for a state of
        another seed or version, DataError when the stream has no whole window or the state lies beyond its end.
        """
        if seq_len < 1 or batch_size < 1:
            raise ConfigError(f"seq_len and batch_size must be 1 or more, not {seq_len} and {batch_size}")
        if seed < 0:
            raise ConfigError(f"the seed must be 0 or more, not {seed}")
        self.stream = documents if isinstance(documents, np.ndarray) else pack(documents, eos_id)
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        if len(self.stream) < seq_len + 1:
            raise DataError(
                f"the data has {len(self.stream)} tokens, fewer than one window of {seq_len + 1} (seq_len + 1)"
            )
        self._epoch, self._window = self._resume(state) if state is not None else (0, 0)

    def epoch_windows(self, epoch: int) -> np.ndarray:
        """(windows,) int64: where each window of an epoch starts in the stream, in the order they are visited."""
        # Bit generators are stable over numpy versions, Generator.permutation is not: a resumed run must not differ.
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
        last_start = len(self.stream) - self.seq_len - 1
        phase = int(bits.random_raw()) % min(self.seq_len, last_start + 1)
        num_windows = (last_start - phase) // self.seq_len + 1
        order = np.argsort(bits.random_raw(num_windows), kind="stable")
        return phase + order.astype(np.int64) * self.seq_len

    def __iter__(self) -> Iterator[tuple[np.ndarray, dict[str, int]]]:
        """Yield (batch, state) forever: (batch_size, seq_len + 1) int64, and the state that resumes after it.

        A batch at the end of an epoch is filled from the next one.
        """
        epoch, window = self._epoch, self._window
        starts = self.epoch_windows(epoch)
        while True:
            batch = np.empty((self.batch_size, self.seq_len + 1), np.int64)
            for row in batch:
                if window == len(starts):
                    epoch, window = epoch + 1, 0
                    starts = self.epoch_windows(epoch)
                row[:] = self.stream[starts[window] : starts[window] + self.seq_len + 1]
                window += 1
            yield batch, {"version": STATE_VERSION, "seed": self.seed, "epoch": epoch, "window": window}

    def _resume(self, state: Mapping[str, int]) -> tuple[int, int]:
        """The (epoch, window) of a state that belongs to this seed and this stream."""
        missing = {"version", "seed", "epoch", "window"} - set(state)
        if missing or state["version"] != STATE_VERSION:
            raise ConfigError(f"not a data position of version {STATE_VERSION}: {dict(state)}")
        if state["seed"] != self.seed:
            raise ConfigError(f"the data position was saved with seed {state['seed']}, not {self.seed}")
        num_windows = len(self.epoch_windows(state["epoch"]))
        if not 0 <= state["window"] <= num_windows:
            raise DataError(
                f"the data position is window {state['window']} of epoch {state['epoch']}, which has {num_windows}: "
                "the data or seq_len changed since it was saved"
            )
        return state["epoch"], state["window"]
