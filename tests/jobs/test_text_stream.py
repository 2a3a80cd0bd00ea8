"""Texts that come token by token: the parts are the whole, none is half a character, none is past a stop text."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from longnet_cli.data.tokenizer import REPLACEMENT, TextStream, Tokenizer
from longnet_cli.jobs.generating import StopTexts

TEXT = "naïve 漢字 🙂🏽 ends. "


def pieces() -> Tokenizer:
    """As of SentencePiece: words begin with a sign of their own, and characters it lacks are written in bytes."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    vocab |= {sign: len(vocab) + i for i, sign in enumerate(["▁", *"naive d.s"])}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(inner)


TOKENIZERS = {"bytes": Tokenizer.bytes(), "bpe": Tokenizer.train([[TEXT * 20]], 300), "pieces": pieces()}


def streamed(words: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(words)
    return [*(stream.add(token) for token in ids), stream.end()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_part_is_half_a_character(name: str) -> None:
    words = TOKENIZERS[name]
    ids = words.encode(TEXT * 3).tolist()
    parts = streamed(words, ids)
    assert "".join(parts) == words.decode(np.array(ids)) == TEXT * 3
    assert not any(REPLACEMENT in part for part in parts)
    assert max(map(len, parts)) <= 8
    assert streamed(words, words.encode("añ").tolist()[:-1])[-1] == REPLACEMENT  # cut in a character


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@given(data=st.data())
def test_any_ids_give_the_text_of_them_all(name: str, data: st.DataObject) -> None:
    """Bytes that are no character, special tokens and ids beyond the vocabulary too."""
    words = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, words.vocab_size + 2), max_size=30))
    assert "".join(streamed(words, ids)) == words.decode(np.array(ids, np.int64), special=False)


def test_bytes_that_are_no_text_are_not_waited_for_without_end() -> None:
    stream = TextStream(TOKENIZERS["pieces"])
    parts = [stream.add(1 + 0xFF) for _ in range(200)]
    assert sum(map(bool, parts)) == 3


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    size=st.integers(1, 3),
)
def test_a_text_ends_before_the_first_stop_text(text: str, stops: list[str], size: int) -> None:
    """However it is cut into parts, it ends where the first stop text to be complete begins; nothing is shown twice."""
    stop, shown = StopTexts(stops), ""
    for first in range(0, len(text), size):
        shown += stop.add(text[first : first + size])
        if stop.reached:
            break
    shown += stop.end()
    ends = [text.find(x) for x in stops if x in text]
    assert stop.reached == bool(ends)
    if not ends:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert any(text.startswith(x, len(shown)) for x in stops)
        complete = min(text.find(x) + len(x) for x in stops if x in text)
        assert len(shown) < complete
