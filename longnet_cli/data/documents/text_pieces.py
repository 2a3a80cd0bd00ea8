"""Cut a long text into pieces whose tokens, put together, are the tokens of the whole text.

One call of `tokenizers` takes more than linear time: 4 MB cost 8 times as much as 1 MB. So a text is encoded in pieces
of PIECE characters. A text is cut where its tokenizer starts a new word, which is tried at each cut.

For `encode --span` and for `ask`, a text is cut into units: sentences, paragraphs, or passages of some of them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence
from functools import partial
from itertools import chain, product
from typing import Any, Literal

import tokenizers
from tokenizers import pre_tokenizers

PIECE = 1 << 16
LONGEST_PIECE = 1 << 20

# Between a letter and one of these signs every byte-level pre-tokenizer starts a new word (GPT-2, cl100k, o200k,
# Llama 3). No apostrophe: o200k keeps the 't of don't with its word. Python's \w also has signs such as
# \u00bd and \u2167, which pre-tokenizers count as numbers (\p{N} is Nd, Nl and No), and a special token may have any
# characters: see REACH.
CUT_BEFORE = ' \t\n\r,.;:!?()[]{}<>="0123456789\u3001\u3002\uff0c'
AT_SIGN = re.compile(f"(?<=[^\\W\\d_])(?=[{re.escape(CUT_BEFORE)}])")
# Tokenizers of words, and SentencePiece, start a word at a single space between letters, if their normalizer works
# character by character.
AT_SPACE = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")
LOCAL = {
    "BertNormalizer",
    "Lowercase",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Nmt",
    "Precompiled",
    "Replace",
    "StripAccents",
}
SPACES = " {2,}"  # the regular expression of SentencePiece's own `Replace`: no cut is beside several spaces
# Characters on each side of a cut whose tokens must be the same with and without it. So many are enough: what could
# join the two sides is a rule about a few characters beside the cut, or a special token, which is no longer than this.
REACH = 512


class TextCutter:
    """A text that comes in parts, cut into pieces that do not depend on the parts.

    `end_of(text, start)` returns where the piece that begins at `start` ends. It may look `ahead` characters further,
    or up to the end of the text.
    """

    def __init__(
        self,
        parts: Iterable[str],
        end_of: Callable[[str, int], int],
        ahead: int = 0,
    ) -> None:
        self._parts = iter(parts)
        self._end_of = end_of
        self._ahead = ahead
        self._text = ""
        self._start = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._next, "")

    def take(self, size: int = 1) -> list[str]:
        """Return the next pieces, which together have `size` characters or more; fewer at the end, and then none."""
        pieces: list[str] = []
        while size > 0 and (piece := self._next()):
            pieces.append(piece)
            size -= len(piece)
        return pieces

    def _next(self) -> str:
        while len(self._text) - self._start <= self._ahead:
            part = next(self._parts, None)
            if part is None:
                break
            self._text = self._text[self._start :] + part
            self._start = 0
        start = self._start
        self._start = self._end_of(self._text, self._start)
        return self._text[start : self._start]


def cut_text(
    parts: Iterable[str],
    split: Callable[[str], list[Any]],
    cut: re.Pattern[str] = AT_SIGN,
) -> TextCutter:
    """Cut a text, which comes in parts, where words start anyway, about every PIECE characters.

    `split` returns the tokens of a text. A run of letters longer than LONGEST_PIECE is cut too, because it would take
    quadratic time.
    """

    def end_of(text: str, start: int) -> int:
        place = start + PIECE
        limit = min(start + LONGEST_PIECE, len(text))
        tries = 0
        while match := cut.search(text, place, limit):
            end = match.start()
            before = text[max(start, end - REACH) : end]
            after = text[end : end + REACH]
            if split(before + after) == split(before) + split(after):
                return end
            tries += 1
            place = end + tries  # further and further: a text may have a million such places
        return limit

    return TextCutter(parts, end_of, LONGEST_PIECE + REACH)


def find_cut(inner: tokenizers.Tokenizer, description: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Return the places where a text may be cut, because a new word starts there; None if `inner` needs all of it.

    They are tried on a few words. `description` is the data of its tokenizer.json.
    """
    if inner.pre_tokenizer is None:
        return None
    for added in description["added_tokens"]:
        if not added["special"] or len(added["content"]) > REACH:
            return None  # an added word may straddle a cut
    if description["normalizer"] is not None or not decodes_bytes(description):
        return _cut_of_words(inner, description)
    words = partial(words_of, inner.pre_tokenizer)
    cuts = (words(f"a{sign}b") == words("a") + words(f"{sign}b") for sign in CUT_BEFORE)
    return AT_SIGN if all(cuts) else None


def words_of(pre: pre_tokenizers.PreTokenizer, text: str) -> list[str]:
    """Return the words that a pre-tokenizer makes of a text."""
    return [word for word, _ in pre.pre_tokenize_str(text)]


def decodes_bytes(description: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer with this tokenizer.json is byte-level: its tokens are UTF-8 bytes."""
    decoder = description.get("decoder") or {}
    return bool(decoder.get("type") == "ByteLevel")


def _cut_of_words(
    inner: tokenizers.Tokenizer, description: Mapping[str, Any]
) -> re.Pattern[str] | None:
    """Return where a tokenizer of words, or SentencePiece, starts a new word."""
    kinds = {*map(_step_type, plain_steps(description["normalizer"]))}
    if kinds - LOCAL or len(words_of(inner.pre_tokenizer, "a b")) < 2:
        return None
    vocabulary = inner.get_vocab(with_added_tokens=False)
    space_inside = re.compile("[^\u2581 ][\u2581 ]")
    if any(map(space_inside.search, vocabulary)):
        return None  # a token holds a space between letters

    def ids(text: str) -> list[int]:
        return list(inner.encode(text, add_special_tokens=False).ids)

    pairs = product(
        ("a", "word", "\u00c9t\u00e9", "\u6f22"), (" b", " Word", " \u00e9", " \u6f22\u5b57")
    )
    return AT_SPACE if all(ids(x + y) == ids(x) + ids(y) for x, y in pairs) else None


def plain_steps(step: Any) -> list[dict[str, Any]]:
    """Return the steps of a `normalizer` or a `decoder` of a tokenizer.json, also those within a sequence."""
    if not isinstance(step, dict):
        return []
    if step.get("type") != "Sequence":
        return [step]
    inner = chain(step.get("normalizers", ()), step.get("decoders", ()))
    return [*chain.from_iterable(map(plain_steps, inner))]


def _step_type(step: Mapping[str, Any]) -> str:
    """Return the type of a step of a normalizer; for an unbounded `Replace`, its pattern."""
    pattern = step.get("pattern", {})
    unbounded = pattern.get("Regex", SPACES) != SPACES or len(pattern.get("String", "")) > REACH
    return str(pattern if unbounded else step.get("type"))


PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n\s*")
# A full stop after an initial or one of these, as regular expressions, ends no sentence.
ABBREVIATIONS = (
    "Dr",
    "Mr",
    "Mrs",
    "Ms",
    "Prof",
    "Sr",
    "St",
    "Fig",
    "vs",
    r"[Ee]\.g",
    r"[Ii]\.e",
    r"No(?=\.\s+\d)",
)
_NO_END = "".join(rf"(?<!\b{word}\.)" for word in ("[A-Z]", *ABBREVIATIONS))
# No sentence ends before a small letter, or within white space. Some writing has no spaces.
SENTENCE_END = re.compile(
    PARAGRAPH_END.pattern
    + rf"|[.!?\u2026]{_NO_END}[.!?\u2026]*[)\]\"'\u201d\u2019\u00bb]*"
    + r"\s+(?![\sa-z\u00df-\u00f6\u00f8-\u00ff\u0430-\u044f])"
    + r"|[\u3002\uff01\uff1f]+[\u300d\u300f\uff09\u201d]*\s*"
)
# A passage ends at the last match of the first of these that matches in its second half
PASSAGE_ENDS = (PARAGRAPH_END, SENTENCE_END, re.compile(r"\n\s*"), re.compile(r"\s+"))

Unit = Literal["sentence", "paragraph", "passage"]
ENDS = {"sentence": SENTENCE_END, "paragraph": PARAGRAPH_END}
# bytes at most; 800 are about 200 tokens of prose
SIZES = {"sentence": 1 << 14, "paragraph": 1 << 14, "passage": 800}
PART = 1 << 16  # characters


def cut(parts: Iterable[str], unit: Unit) -> TextCutter:
    """Cut a text that comes in parts into sentences, paragraphs or passages. Together they are the text.

    White space belongs to what stands before it. None has more than `SIZES[unit]` bytes: a longer sentence or paragraph
    is cut there. A passage ends in the second half of what fits: with the last paragraph there, otherwise with the last
    sentence, line or word.
    """
    size = SIZES[unit]

    def end_of(text: str, start: int) -> int:
        window = text[start : start + size].encode()[:size].decode(errors="ignore")
        if unit != "passage":
            end = ENDS[unit].search(window)
            return start + (end.end() if end else len(window))
        if start + len(window) < len(text):
            for kind in PASSAGE_ENDS:
                if ends := list(kind.finditer(window, len(window) // 2)):
                    return start + ends[-1].end()
        return start + len(window)

    return TextCutter(parts, end_of, size)


def note_ends(parts: Iterable[str], unit: Unit, ends: MutableSequence[int]) -> Iterator[str]:
    """Yield a text in parts, and note in `ends` the characters after its units."""
    cutter = cut(parts, unit)
    end = 0
    while pieces := cutter.take(PART):
        for piece in pieces:
            end += len(piece)
            ends.append(end)
        yield "".join(pieces)
