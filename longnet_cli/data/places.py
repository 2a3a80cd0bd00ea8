"""Places of token spans in the text that they were made of, in characters."""

from functools import cache

import numpy as np
import pyarrow as pa

from longnet_cli.data.documents import BLOCK, Document
from longnet_cli.data.tokenizer import Tokenizer

PLACE_FIELDS = (pa.field("char_start", pa.int64()), pa.field("char_end", pa.int64()))


class TextPlaces:
    """The places of spans in the text of one document; spans come in order.

    They are known if the document was made from text by a byte-level tokenizer whose tokens are the text's bytes.
    """

    def __init__(self, document: Document) -> None:
        self.document, self.known = document, False
        self._position = self._begun = 0
        words = document.tokenizer
        if words is not None and words.token_bytes is not None:
            sizes = (words.n_bytes(document.read(i, i + BLOCK)) or 0 for i in range(0, len(document), BLOCK))
            self.known = sum(sizes) == document.n_bytes  # otherwise the tokenizer changed the text
            self._begin, self._inside = _characters(words)

    def of(self, start: int, end: int) -> tuple[int | None, int | None]:
        """Return the first character of the tokens [start, end), and the one after their last; None if not known.

        A character of which the span has only some bytes counts as its own.
        """
        if not self.known:
            return None, None
        self._count(start)
        first = self._begun - int(self._inside[self.document.read(start, start + 1)].sum())
        self._count(end)
        return first, self._begun

    def _count(self, stop: int) -> None:
        """Count the characters that begin before token `stop`."""
        while self._position < stop:
            ids = self.document.read(self._position, min(stop, self._position + BLOCK))
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
