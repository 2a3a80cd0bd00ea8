"""Training windows over streams of tokens: shuffled, mixed, endless, resumable from one count.

    documents --TokenStream--> eos doc eos doc ... --TokenWindows--> (Batch, state)

A stream is an index, never a copy: the tokens of a window are read from its documents when they are needed. Window n
of a run is a pure function of (seed, n), the same for any number of ranks. So the only state is one number, `step`:
the number of windows that all ranks together have taken.

    n --Mix.source--> source, index --divmod--> epoch, position --_Epoch.start--> a place in the stream

Windows span documents. `Batch.document_starts` says where a document starts inside a window: an eos id within a
document is a token like any other.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from math import gcd, lcm
from typing import Any

import numpy as np

from longnet_cli.attention.pattern import ceil_div
from longnet_cli.basics.errors import ConfigError, DataError
from longnet_cli.data.documents.token_documents import Document

POSITION_VERSION = 2

# Read from one place of a file: half a megabyte of int32, long enough for a sequential read
RUN_TOKENS = 1 << 17
DIGEST_TOKENS = 256  # tokens at the start of a stream that its digest covers
POOL_RUNS = 16  # runs of windows from all over the stream whose windows are shuffled together
LONGEST_PERIOD = 10_000  # most windows in the period of a mix, whose table is made in some 10 ms


class TokenStream:
    """The tokens `eos doc eos doc ...` of one source, by position. It holds 8 bytes per document, and no tokens."""

    def __init__(
        self,
        documents: Sequence[Document],
        lengths: np.ndarray,
        eos_id: int,
        answer_edges: Sequence[int] = (),
    ) -> None:
        """Make the stream of documents that have these lengths, (documents,) int64.

        Answers begin and end, in turn, at `answer_edges`, which count the ids of all documents without any eos.
        """
        self.documents = documents
        self.eos_id = eos_id
        # of the eos before each document, and the end
        self.starts = np.zeros(len(lengths) + 1, np.int64)
        np.add(lengths, 1, out=self.starts[1:])
        np.cumsum(self.starts, out=self.starts)
        self._answer_edges = np.array(answer_edges, np.int64)
        if len(answer_edges):
            first_ids = self.starts[:-1] - np.arange(len(lengths))
            within = self._answer_edges.copy()
            within[1::2] -= 1  # the last id of an answer, and not the id after it
            # each document has an eos before its ids
            self._answer_edges += first_ids.searchsorted(within, "right")

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def digest(self) -> str:
        """A digest of the lengths of all documents and of the first DIGEST_TOKENS tokens, to recognize other data."""
        first = np.empty(min(DIGEST_TOKENS, len(self)), np.int64)
        self.read_into(first, 0)
        digest = hashlib.sha256(self.starts.data)
        digest.update(first.data)
        return digest.hexdigest()[:16]

    def is_answer(self, start: int, stop: int) -> np.ndarray:
        """Return which of the tokens [start, stop) an assistant is to write, (stop - start,) bool."""
        edges_before = self._answer_edges.searchsorted(np.arange(start, stop), "right")
        return edges_before % 2 == 1

    def locate(self, position: int) -> int:
        """Return the index of the document at a position. The eos before a document belongs to it."""
        return int(self.starts.searchsorted(position, side="right")) - 1

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill `out`, (tokens,) int64, with the tokens from position `start` on. Reads nothing else."""
        stop = start + len(out)
        first = self.locate(start)
        bounds = self.starts[first : self.locate(stop - 1) + 2].tolist()
        for index, (eos, end) in enumerate(pairwise(bounds), first):
            begin = max(eos + 1, start)
            end = min(end, stop)
            if eos >= start:
                out[eos - start] = self.eos_id
            if begin < end:
                out[begin - start : end - start] = self.documents[index].read(
                    begin - eos - 1, end - eos - 1
                )


class Batch:
    """Windows of streams as (rows, tokens) ids, none of them in memory but those that are fetched.

    `numbers` gives the number of each row's window in the run.
    """

    def __init__(
        self,
        starts: Sequence[tuple[TokenStream, int]],
        tokens: int,
        numbers: Sequence[int],
    ) -> None:
        self.starts = starts
        self.shape = (len(starts), tokens)
        self.numbers = numbers
        self._fetched = np.empty((len(starts), 0), np.int64)

    def fetch(self, tokens: int) -> None:
        """Read the first `tokens` of each window before they are asked for."""
        stop = min(tokens, self.shape[1])
        self._fetched = np.stack([self.read(row, 0, stop) for row in range(self.shape[0])])

    def read(self, row: int, start: int, stop: int) -> np.ndarray:
        """Return the ids [start, stop) of a window, (stop - start,) int64. Reads only these, and checks no bounds."""
        stream, position = self.starts[row]
        if stop <= self._fetched.shape[1]:
            return self._fetched[row, start:stop]
        out = np.empty(stop - start, np.int64)
        if len(out):
            stream.read_into(out, position + start)
        return out

    def is_answer(self, row: int, start: int, stop: int) -> np.ndarray:
        """Return which of the ids [start, stop) of a window an assistant is to write, (stop - start,) bool."""
        stream, position = self.starts[row]
        return stream.is_answer(position + start, position + stop)

    def document_starts(self, row: int, tokens: int) -> list[int]:
        """Return where documents start in the first `tokens` ids of a window, at their eos; 0 is always included."""
        stream, position = self.starts[row]
        first, last = stream.starts.searchsorted((position + 1, position + tokens))
        return [0, *(stream.starts[first:last] - position).tolist()]


class Mix:
    """A rule for the source of window n: no source is ever a whole window ahead of its share, or behind it.

    The order repeats with a period, the sum of the weights as whole numbers in lowest terms (0.7 and 0.3: 10).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Set up the order of `weights`, all above 0. Raises ConfigError for a period over LONGEST_PERIOD."""
        # 0.7 is 7/10, not the double next to it
        fractions = [Fraction(repr(float(weight))) for weight in weights]
        scale = lcm(*(fraction.denominator for fraction in fractions))
        shares = [int(fraction * scale) for fraction in fractions]
        divisor = gcd(*shares)
        self.shares = [share // divisor for share in shares]
        self.period = sum(self.shares)
        if self.period > LONGEST_PERIOD:
            raise ConfigError(
                f"the weights {list(weights)} are the ratio {':'.join(map(str, self.shares))}, whose sum is over "
                f"{LONGEST_PERIOD:,}: round them to fewer digits"
            )
        # Proportionate fair scheduling: of the sources that would be less than one window ahead of their share after
        # this window, take the one with the earliest deadline. Meeting every deadline keeps each within one window.
        taken = [0] * len(self.shares)  # windows of each source so far
        # of each window, its source, and how many windows of that source come before it
        self._turns: list[tuple[int, int]] = []

        def deadline(source: int) -> int:
            return ((taken[source] + 1) * self.period - 1) // self.shares[source]

        for n in range(self.period):
            behind = [
                source
                for source, share in enumerate(self.shares)
                if taken[source] * self.period < share * (n + 1)
            ]
            source = min(behind, key=deadline)
            self._turns.append((source, taken[source]))
            taken[source] += 1

    def source(self, n: int) -> tuple[int, int]:
        """Return the source of window n, and how many of the n windows before it came from that source."""
        periods, rest = divmod(n, self.period)
        source, before = self._turns[rest]
        return source, periods * self.shares[source] + before


class _Epoch:
    """The windows of one source in one epoch: where they start, in the order they are visited.

    The windows are numbered along the stream and grouped in runs of neighbours. First the runs are shuffled, then
    all windows within each pool of POOL_RUNS runs. So a batch is drawn from all over the stream, while reads fall
    on few places at a time, each read from end to end. Memory: a number per run and a number per window of a pool.
    """

    def __init__(self, key: tuple[int, int, int], stream_len: int, seq_len: int) -> None:
        """`key` is (seed, source, epoch); `stream_len` is seq_len + 1 or more."""
        self.key = key
        self.seq_len = seq_len
        self.windows, rest = divmod(stream_len - 1, seq_len)
        self.run = max(1, RUN_TOKENS // seq_len)
        bits = self._bits()
        self.phase = int(bits.random_raw()) % (rest + 1)
        runs = ceil_div(self.windows, self.run)
        self.runs = _shuffled(bits, runs)
        # the last run of the stream may be shorter
        sizes = np.full(runs, self.run)
        sizes[self.runs == runs - 1] = self.windows - self.run * (runs - 1)
        # of the runs in the order they are visited, and the end, in windows
        self.starts = np.concatenate(([0], sizes)).cumsum()
        self._pool = -1
        self._members = np.empty(0, np.int64)

    def start(self, position: int) -> int:
        """Return where in the stream the window visited at `position` (0 .. windows - 1) starts."""
        pool, place = divmod(position, self.run * POOL_RUNS)
        if pool != self._pool:
            first = position - place
            members = _shuffled(self._bits(pool), min(self.run * POOL_RUNS, self.windows - first))
            self._pool = pool
            self._members = first + members
        visited = int(self._members[place])
        index = int(self.starts.searchsorted(visited, side="right")) - 1
        in_run = visited - int(self.starts[index])
        return self.phase + (int(self.runs[index]) * self.run + in_run) * self.seq_len

    def _bits(self, *more: int) -> np.random.PCG64:
        seed, *spawn_key = self.key
        return np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(*spawn_key, *more)))


def _shuffled(bits: np.random.PCG64, count: int) -> np.ndarray:
    """Return 0 .. count - 1 in a random order, (count,) int64."""
    # Bit generators are stable over numpy versions, Generator.permutation is not: a resumed run must not differ.
    return np.argsort(bits.random_raw(count), kind="stable").astype(np.int64)


class TokenWindows:
    """Endless batches of windows of seq_len + 1 tokens: seq_len inputs and, one further, their targets.

    An epoch of a source cuts its stream of T tokens into (T - 1) // seq_len windows. Each token is an input once,
    except the last token and (T - 1) % seq_len others at the head and the tail. The number left out at the head is the
    phase. Phase and order are drawn anew from (seed, source, epoch). Each source starts its epochs independently of the
    others.

    The windows of all ranks are one sequence. Its next rows * world windows are a global batch, of which rank d takes
    d, d + world, ... A state is the same on every rank, and fits any other rank, world and rows. It is JSON of

        version, seed, seq_len, weights             decide the sequence: checked
        tokens, digests (of each source)            differ for other data: checked
        step                                        the position: how many windows were taken
    """

    def __init__(
        self,
        sources: Sequence[TokenStream],
        seq_len: int,
        rows: int,
        seed: int,
        *,
        weights: Sequence[float] = (1.0,),
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Make the windows of `sources`. `rows` is per rank. `weights`, one per source, need not sum to 1.

        `rank` of `world` counts data-parallel ranks. Raises ConfigError for weights with too many digits, DataError for
        a source without a whole window.
        """
        self.sources = sources
        self.seq_len = seq_len
        self.rows = rows
        self.rank = rank
        self.world = world
        for index, stream in enumerate(sources):
            if len(stream) < seq_len + 1:
                name = "the data" if len(sources) == 1 else f"source {index} of the mix"
                raise DataError(
                    f"{name} has {len(stream)} tokens, fewer than one window of {seq_len + 1} (seq_len + 1)"
                )
        self.mix = Mix(weights)
        self.identity = {
            "version": POSITION_VERSION,
            "seed": seed,
            "seq_len": seq_len,
            "weights": self.mix.shares,
            "tokens": [*map(len, sources)],
            "digests": [stream.digest for stream in sources],
        }
        self.seed = seed
        self.step = 0
        self._epochs = [self._epoch(source, 0) for source in range(len(sources))]

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Yield (batch, state) forever: (rows, seq_len + 1) ids, and the state that resumes after the batch."""
        step = self.step
        while True:
            numbers = range(step + self.rank, step + self.rows * self.world, self.world)
            step += self.rows * self.world
            yield self.batch(numbers), self.state(step)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return these windows of the run."""
        places = map(self.locate, numbers)
        starts = [(self.sources[source], start) for source, _, start in places]
        return Batch(starts, self.seq_len + 1, numbers)

    def locate(self, n: int) -> tuple[int, int, int]:
        """Return (source, epoch, start in the source's stream) of window n of the run. Fast unless n goes back far."""
        source, index = self.mix.source(n)
        epoch, position = divmod(index, self._epochs[source].windows)
        if epoch != self._epochs[source].key[2]:
            self._epochs[source] = self._epoch(source, epoch)
        return source, epoch, self._epochs[source].start(position)

    def state(self, step: int) -> dict[str, Any]:
        """Return the state after `step` windows of all ranks."""
        return {**self.identity, "step": step}

    def places(self, first: int, last: int) -> list[str]:
        """Return where the windows first .. last - 1 start: file and row, each once, in order."""
        places = dict[str, None]()
        for source, _, start in map(self.locate, range(first, last)):
            stream = self.sources[source]
            places[stream.documents[stream.locate(start)].where] = None
        return list(places)

    def _epoch(self, source: int, epoch: int) -> _Epoch:
        return _Epoch((self.seed, source, epoch), len(self.sources[source]), self.seq_len)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch that `state` came with. The time for this does not grow with the step.

        Raises ConfigError for a state of another version, seed, seq_len or mix, DataError where the data changed.
        """
        step = state.get("step")
        if state.get("version") != POSITION_VERSION or not isinstance(step, int) or step < 0:
            raise ConfigError(f"not a data position of version {POSITION_VERSION}: {dict(state)}")
        for key, mine in self.identity.items():
            if state.get(key) == mine:
                continue
            saved = f"the data position was saved with {key} {state.get(key)}, not {mine}"
            if key == "digests":
                saved = "the data has as many tokens as the run's own data, and other documents"
            if key in ("tokens", "digests"):
                raise DataError(
                    f"{saved}: restore the data, or start another run with -o and --init"
                )
            raise ConfigError(saved)
        self.step = step
