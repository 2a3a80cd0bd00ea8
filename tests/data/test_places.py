"""Each token's place in its text, for every kind of tokenizer, against the tokenizer's own offsets or its own bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from longnet_cli.data.documents import Document, TextPlaces
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.tables import Text
from longnet_cli.data.tokenizer import Tokenizer


def byte_level(normalizer: normalizers.Normalizer | None, prefix_space: bool = False) -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer(models.BPE())
    found.normalizer = normalizer
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    found.decoder = decoders.ByteLevel()
    found.post_processor = processors.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator(["the long net reads a text, and the text is long"] * 3, trainer)
    return found


def word_pieces() -> tokenizers.Tokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!?"
    pieces = ["[UNK]", "[CLS]", "[SEP]", "the", "net", *letters, *(f"##{each}" for each in letters)]
    found = tokenizers.Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    found.normalizer = normalizers.BertNormalizer(lowercase=True)  # removes accents, too
    found.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    return found


def unigram(**normal: normalizers.Normalizer) -> tokenizers.Tokenizer:
    vocab = [("<unk>", 0.0), ("\u2581the", -3.0), ("\u2581", -4.0), *((each, -5.0) for each in "abcdehnrtx\u00e9,.")]
    found = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0))
    found.normalizer = normalizers.NFKC()
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.decoder = decoders.Metaspace()
    return found


def byte_fallback() -> tokenizers.Tokenizer:
    """Of Llama's older kind: no pre-tokenizer, unknown characters as bytes."""
    pieces = ["<unk>", "\u2581", *"abcdehnt", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    found = tokenizers.Tokenizer(model)
    found.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    found.decoder = decoders.ByteFallback()
    return found


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "WordPiece": word_pieces,
    "Unigram": unigram,
    "byte fallback": byte_fallback,
    "bytes with NFC": lambda: byte_level(normalizers.NFC()),
    "bytes with Strip": lambda: byte_level(normalizers.Strip(), prefix_space=True),
    "bytes with Lowercase": lambda: byte_level(normalizers.Lowercase()),
}
ODD = st.sampled_from([*"aehntx .,\n\t", "the ", "\r\n", "\ufeff", "\u00e9", "e\u0301", "\ufb1d", "\u1e9e", "\u0130",
                       "\U0001f600", "\U0001f468\u200d\U0001f469", "\u6f22", "\uff21", "\u00bd", "\ufb01"])  # fmt: skip
CHANGED = "e\u0301 and then some \ufb1d"  # NFC makes it shorter, then longer, by as many bytes
CASES = "\u1e9e is one and \u0130 is another"


@cache
def made(kind: str) -> tokenizers.Tokenizer:
    return KINDS[kind]()


def document(inner: tokenizers.Tokenizer, text: str) -> Document:
    return next(iter(Inputs((), tokenizer=Tokenizer(inner).for_documents()).documents_of(Text("a", text, "a", {}))))


@pytest.mark.parametrize("kind", KINDS)
@example(pieces=[CHANGED])
@example(pieces=[CASES])
@example(pieces=["the net reads a text\n"])
@example(pieces=["  the net  "])
@given(pieces=st.lists(ODD, max_size=30))
def test_places_are_the_tokenizers_offsets(kind: str, pieces: list[str]) -> None:
    text, inner = "".join(pieces), made(kind)
    found, encoding = document(inner, text), inner.encode(text, add_special_tokens=False)
    assert found.read().tolist() == encoding.ids
    if not len(found):
        return
    places = TextPlaces(found)
    spoken = [places.of(i, i + 1) for i in range(len(found))]
    halves = (TextPlaces(found).each(0, len(found) // 2), TextPlaces(found).each(len(found) // 2, len(found)))
    assert [place for half in halves for place in zip(*(x.tolist() for x in half), strict=True)] == spoken
    known = Tokenizer(inner).bytes_of
    whole = known and b"".join(known[each] for each in encoding.ids)
    if whole == text.encode():  # spans tile the text
        assert "".join(text[start:end] for start, end in spoken if start is not None) or not text
        assert spoken[0][0] == 0
        assert spoken[-1][1] == len(text)
        for (_, end), (start, _) in pairwise(spoken):
            assert start in (end, end - 1)  # a character of several tokens belongs to all of them
    else:
        for place, offset in zip(spoken, encoding.offsets, strict=True):
            if offset[0] < offset[1]:
                assert place == offset
            else:
                assert place[0] == place[1]
    assert places.of(0, len(found)) == (min(s for s, _ in spoken), max(e for _, e in spoken))


@pytest.mark.parametrize(
    "kind", ["bytes with NFC", *(pytest.param(kind, marks=pytest.mark.ci) for kind in ("WordPiece", "Unigram"))]
)
def test_a_long_text_is_read_in_pieces_with_the_same_places(kind: str) -> None:
    text = "the net, the text. \u00e9the ab hen\n" * 3000
    inner = made(kind)
    found, encoding = document(inner, text), inner.encode(text, add_special_tokens=False)
    assert np.array_equal(found.read(), encoding.ids)
    places, steps = TextPlaces(found), range(0, len(found) - 1, 997)
    for i in steps:
        start, end = places.of(i, i + 1)
        assert abs(start - encoding.offsets[i][0]) <= 1  # a leading space is a token's own if bytes are counted
        assert end == encoding.offsets[i][1]
