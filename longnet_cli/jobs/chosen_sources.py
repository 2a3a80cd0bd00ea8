"""The sources of an answer, from the blocks that the content chose.

Sources are passages of what was read that were chosen while the answer was generated, more often than before. The
evidence for a block is its vote by all of its keys, on average over the tokens of the answer and the layers that
choose, times the negative log of how often it was chosen before: the least common of what the answer looks at comes
first, as with the weights of rare words in a search (tf-idf). The blocks with the most evidence, and neighbours with a
third of it, are passages.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longnet_cli.attention.past import Seen
from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.tokenizer import Tokenizer
from longnet_cli.nets.net import Net
from longnet_cli.running.causal_stream import CausalStream

PASSAGES = 3
LEAST_SHARE = 1e-3  # so that one choice of a block that nothing chose before says little
NEIGHBOURING = 1 / 3  # of a passage's most evidence, that a neighbouring block needs to belong to it


def check_sources(model: Net) -> None:
    """Raise ConfigError for a model whose choices of blocks cannot be told."""
    if not model.config.pattern.chosen:
        raise ConfigError("the pattern has no chosen blocks to tell about: add --pattern finding")
    if model.stream():
        raise ConfigError("this model keeps a cache of its own, which does not tell what was chosen")


class ChosenPassage(NamedTuple):
    """A passage: characters [start, end) of all text read, its share of the answer's choices, and of those before."""

    start: int
    end: int
    share: float
    share_before: float
    text: str


class SourceWatch:
    """A watch over the choices of one stream, row 0. Call `begin` when the prompt is read; `found` at the end."""

    def __init__(self, stream: CausalStream, tokenizer: Tokenizer) -> None:
        self.stream, self.tokenizer, self.pattern = stream, tokenizer, stream.model.config.pattern
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

    def found(self) -> list[ChosenPassage]:
        """Return up to PASSAGES passages, the most telling one first; [] if all that was read was always seen."""
        if not self._seen or self._before is None:
            return []
        seen, votes = (torch.cat(each).cpu().numpy() for each in zip(*self._seen, strict=True))
        number = max(int(seen.max()) + 1, len(self._before))
        share, vote = (np.bincount(seen, weights, number) / len(self._seen) for weights in (None, votes))
        before = np.pad(self._before, (0, number - len(self._before)))
        more, passages = np.where(share > before, -vote * np.log(before.clip(LEAST_SHARE, 1)), 0), list[ChosenPassage]()
        ids, size = torch.cat(self.stream.ids, 1)[0].cpu().numpy(), self.pattern.chosen_block
        while len(passages) < PASSAGES and more.max() > 0:
            best = int(more.argmax())
            least, first, last = more[best] * NEIGHBOURING, best, best
            while first and more[first - 1] >= least:
                first -= 1
            while last + 1 < number and more[last + 1] >= least:
                last += 1
            start = len(
                self.tokenizer.decode(ids[: first * size], special=False).rstrip("\ufffd")
            )  # of a cut character
            text = self.tokenizer.decode(ids[: (last + 1) * size], special=False).rstrip("\ufffd")
            passages.append(ChosenPassage(start, len(text), float(share[best]), float(before[best]), text[start:]))
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
