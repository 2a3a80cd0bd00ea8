"""The text of token ids, one by one: never half a character."""

from __future__ import annotations

import codecs

import numpy as np

from longnet_cli.data.tokenizer import BYTE_OF, Tokenizer

REPLACEMENT = "\ufffd"  # stands for bytes that are no character, or not yet one
LONGEST_WAIT = 64  # tokens to wait for such bytes to become a character


# Not tokenizers.decoders.DecodeStream: as of 0.23.3 it has no end that returns bytes cut in a character, it waits for
# bytes that never become one, in quadratic time, and it raises "Invalid prefix" when a token changes the bytes before
# it into U+FFFD, which SentencePiece's byte fallback does (vLLM's pull request #19449 works around that).
class TextStream:
    """A decoder of ids, one by one: the parts together are the text of all ids, without special tokens.

    Time per token does not depend on the number of tokens before. Bytes that make no character become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._bytes: dict[int, bytes] = {}  # of the ids so far
        # The last ids whose text was returned, and the ids since then: a decoder may join them.
        self._shown: list[int] = []
        self._waiting: list[int] = []

    def add(self, token_id: int) -> str:
        """Return the characters that this id completes."""
        if self._tokenizer.token_bytes is not None:
            if token_id not in self._bytes:
                self._bytes[token_id] = _bytes_of(self._tokenizer, token_id)
            return self._decoder.decode(self._bytes[token_id])
        self._waiting.append(token_id)
        text = self._text()
        return "" if text.endswith(REPLACEMENT) and len(self._waiting) < LONGEST_WAIT else self._out(text)

    def end(self) -> str:
        """Return the rest of the text when no more ids come."""
        if self._tokenizer.token_bytes is not None:
            return self._decoder.decode(b"", final=True)
        return self._out(self._text())

    def _text(self) -> str:
        def decode(ids: list[int]) -> str:
            return self._tokenizer.decode(np.array(ids, np.int64), special=False)

        return decode(self._shown + self._waiting)[len(decode(self._shown)) :]

    def _out(self, text: str) -> str:
        if text:  # otherwise only special tokens came, and these join with nothing
            self._shown = self._waiting
        self._waiting = []
        return text


def _bytes_of(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Return the UTF-8 bytes for an id of a byte-level tokenizer; none for a special token and for an unknown id."""
    added = next((x for x in tokenizer.added_tokens if x["id"] == token_id), None)
    if added:
        return b"" if added["special"] else added["content"].encode()
    token = tokenizer.token_of(token_id)
    known = all(character in BYTE_OF for character in token)
    return bytes(BYTE_OF[character] for character in token) if known else token.encode()
