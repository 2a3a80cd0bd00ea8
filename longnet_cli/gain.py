"""The gain of a document: how many nats per token its longest context saves over its shortest one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from longnet_cli.data.documents import SPOOL_BYTES
from longnet_cli.data.files import no_place
from longnet_cli.measures import Clusters, Gain

GAIN_BLOCK = 128  # neighbouring tokens gain together; blocks are taken as independent
MANY_NATS = 2.0  # a token that gains this much is exp(2), about 7, times as likely


class GainTally:
    """The gain of one document that is scored at each of several `contexts`, in turn.

    The nats at the shortest or the longest context, whichever comes first, are kept: 4 bytes per token, in a file in
    $TMPDIR if they are many. `tokens` is the number of tokens that have been compared.
    """

    def __init__(self, contexts: Sequence[int]) -> None:
        self.longest = max(contexts)
        self._ends = sorted((min(contexts), self.longest), key=contexts.index)  # in the order in which they come
        self._kept: Any = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 (float32 nats, closed at the end)
        self._open = np.empty(0)  # gains in the block that is not full yet
        self._blocks = Clusters(2)  # of each, the sum of gains and the number of tokens
        self._many = self.tokens = 0

    def add(self, context: int, nats: np.ndarray) -> None:
        """Take the next (n,) float32 nats at a context. Raises LongNetError if the disk is full."""
        if context == self._ends[0]:
            try:
                self._kept.write(nats.tobytes())
            except OSError as error:
                raise no_place(error) from error
        elif context == self._ends[1] and len(nats):
            self._kept.seek(nats.itemsize * self.tokens)
            saved = np.frombuffer(self._kept.read(nats.nbytes), np.float32).astype(np.float64) - nats
            self._compare(saved if context == self.longest else -saved)

    def result(self) -> Gain:
        """Return the gain. Call it when all tokens have been compared."""
        self._kept.close()
        if not self.tokens:
            return Gain(None, None, None)
        if len(self._open):
            self._end_blocks(self._open[None])
        total, tokens = self._blocks.sums
        return Gain(float(total / tokens), self._blocks.error(np.array([1.0, 0.0]), 1), self._many / float(tokens))

    def _compare(self, gained: np.ndarray) -> None:
        """Add the gains of the next (n,) tokens."""
        self.tokens += len(gained)
        self._many += int(np.count_nonzero(gained > MANY_NATS))
        gained = np.concatenate((self._open, gained))
        whole = len(gained) // GAIN_BLOCK * GAIN_BLOCK
        self._end_blocks(gained[:whole].reshape(-1, GAIN_BLOCK))
        self._open = gained[whole:]

    def _end_blocks(self, gained: np.ndarray) -> None:
        """Add full blocks of gains, (blocks, tokens per block)."""
        self._blocks.extend(np.stack((gained.sum(1), np.full(len(gained), float(gained.shape[1]))), axis=1))
