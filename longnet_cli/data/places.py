"""Places of tokens in the text of their document, in characters: which stretch of the text a span of tokens stands for.

A byte-level tokenizer whose tokens are the text's bytes has places by counting: spans then tile the text, and a leading
space belongs to the token after it. Counting needs nothing but the ids, so it is done when places are asked for. All
other tokenizers (words, SentencePiece, a normalizer that changed the text) have the places that the library gives,
which are kept beside the ids.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from longnet_cli.data.documents import Document
    from longnet_cli.data.tokenizer import Tokenizer

COUNTED = 1 << 18  # tokens per step of a count: 2 MB of int64, which stay in the CPU cache


def token_places(words: Tokenizer, text: str, encoding: Any) -> np.ndarray:
    """Return the characters [start, end) of each token in its text, (tokens, 2) int32.

    `encoding` is the library's for this text. A character of which a token has only some bytes counts as its own. A
    token that stands for no character is an empty place between its neighbours.
    """
    ids = np.fromiter(encoding.ids, np.int64, len(encoding.ids))
    if words.token_bytes is not None and b"".join(map(_bytes(words).__getitem__, encoding.ids)) == text.encode():
        begin, inside = _characters(words)
        ends = np.cumsum(begin[ids])
        return np.stack((ends - begin[ids] - inside[ids], ends), 1).astype(np.int32)
    places = np.fromiter((edge for pair in encoding.offsets for edge in pair), np.int32, 2 * len(ids)).reshape(-1, 2)
    nowhere = places[:, 0] == places[:, 1]
    before = np.concatenate(([0], np.maximum.accumulate(places[:, 1])[:-1])) if len(ids) else places[:, 0]
    places[nowhere] = before[nowhere, None]
    return places


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
            self._begin, self._inside = _characters(words)

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

    def _count(self, stop: int) -> None:
        """Count the characters that begin before token `stop`."""
        while self._position < stop:
            ids = self.document.read(self._position, min(stop, self._position + COUNTED))
            self._begun += int(self._begin[ids].sum())
            self._position += len(ids)


@cache
def _characters(words: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each id, how many characters begin in its bytes, and whether it begins inside of one."""
    begin, inside = np.zeros(words.vocab_size, np.int64), np.zeros(words.vocab_size, bool)
    for index, data in words.bytes_of_tokens():
        follows = [byte & 0xC0 == 0x80 for byte in data]
        begin[index], inside[index] = follows.count(False), follows[:1] == [True]
    return begin, inside


@cache
def _bytes(words: Tokenizer) -> list[bytes]:
    """Return the bytes of each id."""
    bytes_of = [b""] * words.vocab_size
    for index, data in words.bytes_of_tokens():
        bytes_of[index] = bytes(data)
    return bytes_of
