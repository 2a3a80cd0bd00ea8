"""Units of a text: sentences, paragraphs, or passages of some of them, for `encode --span` and for `ask`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, MutableSequence
from typing import Literal

from longnet_cli.data.text_pieces import TextCutter

PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n\s*")
# No sentence ends before a small letter, or after an initial or a usual abbreviation. Some writing has no spaces.
SENTENCE_END = re.compile(
    PARAGRAPH_END.pattern
    + r"|(?<!\b[A-Z])(?<!\b[DMS]r)(?<!\bM[rs]s)(?<!\bMs)(?<!\bSt)(?<!\bvs)[.!?\u2026]+[)\]\"'\u201d\u2019\u00bb]*"
    + r"\s+(?![a-z\u00df-\u00f6\u00f8-\u00ff\u0430-\u044f])"
    + r"|[\u3002\uff01\uff1f]+[\u300d\u300f\uff09\u201d]*\s*"
)
PASSAGE_ENDS = (PARAGRAPH_END, SENTENCE_END, re.compile(r"\n\s*"), re.compile(r"\s+"))  # the first that there is

Unit = Literal["sentence", "paragraph", "passage"]
ENDS = {"sentence": SENTENCE_END, "paragraph": PARAGRAPH_END}
SIZES = {"sentence": 1 << 14, "paragraph": 1 << 14, "passage": 800}  # bytes at most; 800 are about 200 tokens of prose
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
            found = ENDS[unit].search(window)
            return start + (found.end() if found else len(window))
        late = ([found.end() for found in kind.finditer(window, len(window) // 2)] for kind in PASSAGE_ENDS)
        ends = next(filter(None, late), [len(window)])
        return start + (ends[-1] if start + len(window) < len(text) else len(window))

    return TextCutter(parts, end_of, size)


def note_ends(parts: Iterable[str], unit: Unit, ends: MutableSequence[int]) -> Iterator[str]:
    """Yield a text in parts, and note in `ends` the characters after its units."""
    cutter, end = cut(parts, unit), 0
    while pieces := cutter.take(PART):
        for piece in pieces:
            end += len(piece)
            ends.append(end)
        yield "".join(pieces)
