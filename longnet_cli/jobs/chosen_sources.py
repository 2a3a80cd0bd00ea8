"""The sources of an answer, from the blocks that the content chose, and the file that `score --chosen` writes.

Sources are passages of what was read that were chosen while the answer was generated, more often than before. The
evidence for a block is its vote by all of its keys, on average over the tokens of the answer and the layers that
choose, times the negative log of how often it was chosen before: the least common of what the answer looks at comes
first, as with the weights of rare words in a search (tf-idf). The blocks with the most evidence, and neighbours with a
third of it, are passages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from longnet_cli.attention import Pattern
from longnet_cli.attention.past import Seen
from longnet_cli.data.outputs import ShardWriter
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.running.causal_stream import CausalStream
from longnet_cli.running.reader import OnWindows, Window

BATCH = 1 << 14  # rows per record batch


def chosen_schema(metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """Return the schema of chosen blocks: a row says what the tokens [start, stop) of a document see in a layer.

    Positions count the tokens that the net reads, those before the document included. Block b is the tokens
    [b n, (b + 1) n), for n in the metadata as `longnet.chosen_block`.
    """
    fields = [
        pa.field("doc_id", pa.string()),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("stop", pa.int64(), nullable=False),
        pa.field("blocks", pa.list_(pa.int32()), nullable=False),
    ]
    return pa.schema(fields, metadata=dict(metadata or {}))


@contextmanager
def write_chosen(path: str | Path, pattern: Pattern, metadata: Mapping[str, str] | None = None) -> Iterator[OnWindows]:
    """Open a file for chosen blocks (see `chosen_schema`), and yield the `on_choice` of `score`."""
    rows: list[dict[str, Any]] = []
    size, every = pattern.chosen_block, pattern.chosen_every
    with ShardWriter(path, chosen_schema({**(metadata or {}), "longnet.chosen_block": str(size)})) as writer:

        def flush() -> None:
            if rows:
                writer.write(pa.RecordBatch.from_pylist(rows, schema=writer.schema))
            rows.clear()

        def on_choice(windows: Sequence[Window], layer: int, seen: Seen) -> None:
            first, _, queries, _ = seen.part.groups
            for window, of_row in zip(windows[seen.part.rows], seen.blocks, strict=True):
                name = window.sequence.document.doc_id  # type: ignore[attr-defined]
                groups = zip(range(first, len(window), every), of_row.tolist(), strict=False)  # others are padding
                for start, blocks in groups:
                    stop = min(start + queries, len(window))  # the rest is padding
                    rows.append({"doc_id": name, "layer": layer, "start": start, "stop": stop, "blocks": blocks})
            if len(rows) >= BATCH:
                flush()

        yield on_choice
        flush()


PASSAGES = 3
LEAST_SHARE = 1e-3  # so that one choice of a block that nothing chose before says little
NEIGHBOURING = 1 / 3  # of a passage's most evidence, that a neighbouring block needs to belong to it


class Passage(NamedTuple):
    """A passage: characters [start, end) of all text read, its share of the answer's choices, and of those before."""

    start: int
    end: int
    share: float
    share_before: float
    text: str


class SourceWatch:
    """A watch over the choices of one stream, row 0. Call `begin` when the prompt is read; `found` at the end."""

    def __init__(self, stream: CausalStream) -> None:
        self.stream, self.pattern = stream, stream.model.config.pattern
        # by layer: the blocks that the last token sees, and their votes; it predicts the first token of the answer
        self._last: dict[int, tuple[Tensor, Tensor]] = {}
        self._seen: list[tuple[Tensor, Tensor]] = []  # of the answer: those of each token and layer
        self._before: np.ndarray | None = None
        stream.watch(self._on_choice)

    def begin(self) -> None:
        """Count from now on what the answer sees."""
        self._seen = [*self._last.values()]
        pasts = [cache.past for cache in self.stream.caches if cache.past and cache.past.kind == "chooses"]
        counts = [past.counts[0] for past in pasts if past.counts is not None]
        longest = max(map(len, counts), default=0)
        total = sum(np.pad(x.cpu().numpy(), (0, longest - len(x))) for x in counts)
        self._before = total / (len(counts) * self._choosers(longest).clip(1)) if longest else np.zeros(0)

    def found(self, tokenizer: Tokenizer) -> list[Passage]:
        """Return up to PASSAGES passages, the most telling one first; [] if all that was read was always seen."""
        if not self._seen or self._before is None:
            return []
        seen, votes = (torch.cat(each).cpu().numpy() for each in zip(*self._seen, strict=True))
        number = max(int(seen.max()) + 1, len(self._before))
        share, vote = (np.bincount(seen, weights, number) / len(self._seen) for weights in (None, votes))
        before = np.pad(self._before, (0, number - len(self._before)))
        more, passages = np.where(share > before, -vote * np.log(before.clip(LEAST_SHARE, 1)), 0), list[Passage]()
        ids, size = torch.cat(self.stream.ids, 1)[0].cpu().numpy(), self.pattern.chosen_block
        while len(passages) < PASSAGES and more.max() > 0:
            best = int(more.argmax())
            least, first, last = more[best] * NEIGHBOURING, best, best
            while first and more[first - 1] >= least:
                first -= 1
            while last + 1 < number and more[last + 1] >= least:
                last += 1
            start = len(tokenizer.decode(ids[: first * size], special=False).rstrip("\ufffd"))  # of a cut character
            text = tokenizer.decode(ids[: (last + 1) * size], special=False).rstrip("\ufffd")
            passages.append(Passage(start, len(text), float(share[best]), float(before[best]), text[start:]))
            more[first : last + 1] = 0
        return passages

    def _on_choice(self, layer: int, seen: Seen) -> None:
        if self.pattern.kind(layer) != "chooses" or seen.part.groups.near <= self.pattern.chosen_keys:
            return  # it sees what another layer has chosen, or all blocks
        some = slice(-1, None) if self._before is None else slice(None)
        for blocks, votes in zip(seen.blocks[0][some], seen.votes(some)[0], strict=True):
            if self._before is None:
                self._last[layer] = blocks, votes
            else:
                self._seen += [(blocks, votes)] * seen.part.groups.queries

    def _choosers(self, blocks: int) -> np.ndarray:
        """Return how many groups so far could choose each of the first blocks."""
        pattern, (w,), (back,) = self.pattern, self.pattern.segment_lengths, self.pattern.look_backs
        ends = np.maximum(np.arange(blocks) * pattern.chosen_block, pattern.chosen_keys)
        first = (ends // w + back + 1) * w  # the first query that sees blocks beyond the end
        return (-(-self.stream.position // pattern.chosen_every) - -(-first // pattern.chosen_every)).clip(0)
