"""Places of tokens in the text of their document, in characters: which stretch of the text a span of tokens stands for.

A byte-level tokenizer whose tokens are the text's bytes has places by counting: spans then tile the text, and a leading
space belongs to the token after it. Counting needs nothing but the ids, so it is done when places are asked for. All
other tokenizers (words, SentencePiece, a normalizer that changed the text) have the places that the library gives,
which are kept beside the ids.
"""

from __future__ import annotations

import numpy as np

from longnet_cli.data.documents import Document

COUNTED = 1 << 18  # tokens per step of a count: 2 MB of int64, which stay in the CPU cache


class TextPlaces:
    """The places of spans in the text of one document; spans come in order."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self._position = self._begun = 0
        self._counts, words = False, document.tokenizer
        if words is not None and document.places is None and words.token_bytes is not None:
            steps = range(0, len(document), COUNTED)
            sizes = (words.n_bytes(document.read(i, i + COUNTED)) or 0 for i in steps)
            self._counts = sum(sizes) == document.n_bytes  # otherwise the tokenizer dropped some of the text
            self._begin, self._inside = words.characters

    def of(self, start: int, end: int) -> tuple[int | None, int | None]:
        """Return the first character of the tokens [start, end), and the one after their last; None if not known."""
        if self.document.places is not None:
            places = self.document.places[start:end]
            return int(places[:, 0].min()), int(places[:, 1].max())
        if not self._counts:
            return None, None
        self._count(start)
        first = self._begun - int(self._inside[self.document.read(start, start + 1)].sum())
        self._count(end)
        return first, self._begun

    def each(self, start: int, stop: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Return the same of each of the tokens [start, stop), two of (n,); None if not known."""
        if self.document.places is not None:
            first, after = self.document.places[start:stop].T
            return first, after
        if not self._counts:
            return None, None
        self._count(start)
        ids = self.document.read(start, stop)
        after = self._begun + np.cumsum(self._begin[ids])
        return after - self._begin[ids] - self._inside[ids], after

    def _count(self, stop: int) -> None:
        """Count the characters that begin before token `stop`."""
        while self._position < stop:
            ids = self.document.read(self._position, min(stop, self._position + COUNTED))
            self._begun += int(self._begin[ids].sum())
            self._position += len(ids)
