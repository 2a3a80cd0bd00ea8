"""Cut a long text into pieces whose tokens, put together, are the tokens of the whole text.

One call of `tokenizers` takes more than linear time: 4 MB cost 8 times as much as 1 MB. So a text is encoded in pieces
of PIECE characters. A text may be cut where its tokenizer starts a new word whatever stands there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import tokenizers

PIECE = 1 << 16
LONGEST_PIECE = 1 << 20

# Between a letter and one of these signs every byte-level pre-tokenizer starts a new word (GPT-2, cl100k, o200k,
# Llama 3), so a text cut there gives the same tokens. No apostrophe: o200k keeps the 't of don't with its word.
CUT_BEFORE = ' \t\n\r,.;:!?()[]{}<>="0123456789\u3001\u3002\uff0c'
AT_SIGN = re.compile(f"(?<=[^\\W\\d_])(?=[{re.escape(CUT_BEFORE)}])")
# Tokenizers of words, and SentencePiece, start a word at a single space between letters, if their normalizer works
# character by character.
AT_SPACE = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")
LOCAL = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Replace", "StripAccents"}


def cut_text(parts: Iterable[str], cut: re.Pattern[str] = AT_SIGN) -> Iterator[str]:
    """Cut a text, which comes in parts, where words start anyway, about every PIECE characters.

    A run of letters longer than LONGEST_PIECE is cut too, because it would take quadratic time. The pieces do not
    depend on the parts.
    """
    text, start = "", 0
    for part in chain(parts, (None,)):
        if part is not None:
            text, start = text[start:] + part, 0
        # the end of the next piece is known once there are LONGEST_PIECE characters, or the rest of the text
        while len(text) - start > (PIECE if part is None else LONGEST_PIECE):
            limit = start + LONGEST_PIECE
            # no cut after a sign such as a half or a Roman number, to which a tokenizer may join a digit
            places = (x.start() for x in cut.finditer(text, start + PIECE, limit))
            end = next((x for x in places if not text[x - 1].isnumeric()), min(limit, len(text)))
            yield text[start:end]
            start = end
    if start < len(text):
        yield text[start:]


def find_cut(
    inner: tokenizers.Tokenizer, description: Mapping[str, Any], splits_special: bool
) -> re.Pattern[str] | None:
    """Return the places where a text may be cut, because a new word starts there; None if `inner` needs all of it.

    They are tried on a few words. `description` is the data of its tokenizer.json. Without `splits_special`, a special
    token that is written in a text is that token.
    """
    if inner.pre_tokenizer is None or any(not added["special"] for added in description["added_tokens"]):
        return None  # an added word may straddle a cut
    if description["normalizer"] is None and decodes_bytes(description):
        return _cut_of_bytes(inner, description, splits_special)
    return _cut_of_words(inner, description)


def decodes_bytes(description: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer with this tokenizer.json is byte-level: its tokens are UTF-8 bytes."""
    return bool((description.get("decoder") or {}).get("type") == "ByteLevel")


def _cut_of_bytes(
    inner: tokenizers.Tokenizer, description: Mapping[str, Any], splits_special: bool
) -> re.Pattern[str] | None:
    """Return where a byte-level tokenizer without a normalizer starts a new word."""

    def split(text: str) -> list[str]:
        return [word for word, _ in inner.pre_tokenizer.pre_tokenize_str(text)]

    if not all(split(f"a{sign}b") == split("a") + split(f"{sign}b") for sign in CUT_BEFORE):
        return None
    within = not splits_special and any(AT_SIGN.search(added["content"]) for added in description["added_tokens"])
    return AT_SPACE if within else AT_SIGN  # no token that a text may have is cut


def _cut_of_words(inner: tokenizers.Tokenizer, description: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Return where a tokenizer of words, or SentencePiece, starts a new word."""
    if _steps(description["normalizer"]) - LOCAL or len(inner.pre_tokenizer.pre_tokenize_str("a b")) < 2:
        return None
    if any(re.search("[^\u2581 ][\u2581 ]", token) for token in inner.get_vocab(with_added_tokens=False)):
        return None  # a token holds a space between letters

    def ids(text: str) -> list[int]:
        return list(inner.encode(text, add_special_tokens=False).ids)

    ends, begins = ("a", "word", "\u00c9t\u00e9", "\u6f22"), (" b", " Word", " \u00e9", " \u6f22\u5b57")
    return AT_SPACE if all(ids(x + y) == ids(x) + ids(y) for x in ends for y in begins) else None


def _steps(normalizer: Any) -> set[str]:
    """Return the types of the steps of a normalizer of a tokenizer.json."""
    if not isinstance(normalizer, dict):
        return set()
    steps = normalizer.get("normalizers")
    return set().union(*map(_steps, steps)) if isinstance(steps, list) else {str(normalizer.get("type"))}
