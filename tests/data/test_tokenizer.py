"""Proves that the tokenizer is lossless and counts bytes exactly, and that cutting long texts does not change tokens.

Each token has its place in its text, for every kind of tokenizer, as its own offsets or its own bytes say.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pyarrow.ipc as ipc
import pytest
import tokenizers
from builders import tiny_net
from hypothesis import example, given
from hypothesis import strategies as st
from processes import invoke
from sentence_models import byte_level, sentence_pieces, word_pieces
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.documents import text_pieces
from longnet_cli.data.documents import tokenizer as module
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.token_documents import Document, TextPlaces
from longnet_cli.data.documents.tokenizer import END_OF_TEXT, Tokenizer, end_of_text
from longnet_cli.data.files.opened_inputs import Text
from longnet_cli.models.folder import ModelFolder

CORPUS = [
    "the cat sat on the mat, and the dog ate the hat.\n" * 20,
    "def f(x):\n    return x + 1\n" * 20,
    "naïve 漢字。",
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train([CORPUS], 300)


def test_byte_ids_are_the_bytes_themselves():
    tokenizer = Tokenizer.bytes()
    text = "aé漢\n\t🙂" + "".join(map(chr, range(1, 256)))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert bytes(ids.tolist()) == text.encode()
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    assert tokenizer.token_bytes.tolist() == [1] * 256 + [0]
    # The library, asked itself, agrees with the shortcut.
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert library.encode(text, add_special_tokens=False).ids == ids.tolist()


@given(text=st.text(max_size=200))
def test_encoding_round_trips_and_counts_bytes(trained, text):
    for tokenizer in (Tokenizer.bytes(), trained):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        for stored in (ids, ids.astype(np.uint16)):
            assert tokenizer.n_bytes(stored) == len(text.encode())


def test_end_of_text_inside_a_document_is_text(trained):
    for tokenizer in (Tokenizer.bytes(), trained):
        ids = tokenizer.encode(f"a{END_OF_TEXT}b")
        assert tokenizer.eos_id not in ids
        assert tokenizer.n_bytes(ids) == 2 + len(END_OF_TEXT)
        assert (
            tokenizer.n_bytes(np.array([tokenizer.eos_id]))
            == tokenizer.n_bytes(np.array([], np.int32))
            == 0
        )
        assert tokenizer.n_bytes(np.array([97, 300])) is None  # an id outside the vocabulary


@pytest.mark.parametrize("pattern", [None, r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"])
@pytest.mark.parametrize("splits_special", [True, False])
def test_no_cut_is_in_a_number_or_in_a_special_token(monkeypatch, pattern, splits_special):
    """To a tokenizer, but not to Python's regular expressions, a half or a Roman number is a number as 1 is."""
    monkeypatch.setattr(text_pieces, "PIECE", 20)
    signs, special = (
        ["½1", "²3", "Ⅷ4", "①5", "x²", "word", " ", "漢字", "a1", "٣4", ".\n", "é"],
        "<|im a(b start|>",
    )
    chosen = random.Random(0)
    texts = ["".join(chosen.choices([*signs, special], k=200)) for _ in range(20)]
    inner = tokenizers.Tokenizer(models.BPE())
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    words = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") if pattern else None
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of]) if words else bytes_of
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([text.replace(special, "") for text in texts] * 9, trainer)
    inner.add_special_tokens([special])
    tokenizer = Tokenizer(inner)
    tokenizer.splits_special = inner.encode_special_tokens = splits_special
    for text in texts:
        assert len(tokenizer.cutter([text]).take(len(text))) > 10
        assert tokenizer.encode(text).tolist() == inner.encode(text).ids
    inner.add_special_tokens([f"<{'a b ' * 200}>"])
    # nobody looks as far as this token is long
    assert Tokenizer(inner).cutter(texts).take(9999) == ["".join(texts)]


def test_a_tokenizer_whose_words_cross_the_cuts_is_not_cut(monkeypatch):
    monkeypatch.setattr(text_pieces, "PIECE", 4)
    words = {"a": 0, "b": 1, " ": 2, "a b": 3, "▁": 4}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={**words, "a ": 5}, merges=[("a", " "), ("a ", "b")])
    )
    assert Tokenizer(inner).encode("bbbba b").tolist() == [1, 1, 1, 1, 3]
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    text = "a b" * 9
    assert Tokenizer(inner).encode(text).tolist() == inner.encode(text).ids
    assert not Tokenizer(inner).token_bytes.size
    assert Tokenizer(inner).n_bytes(np.array([0])) is None
    inner = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "▁": 2}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    # before all that it is given: each piece would get one
    inner.normalizer = normalizers.Prepend("b")
    assert Tokenizer(inner).encode(text).tolist() == inner.encode(text).ids
    comment = "a <" + " a b" * text_pieces.REACH + "> b"
    # it may be longer than what is seen of it beside a cut
    for pattern in (tokenizers.Regex("<.*>"), comment[2:-2]):
        inner.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(pattern, "b")]
        )
        assert Tokenizer(inner).encode(comment).tolist() == inner.encode(comment).ids
    # as most of SentencePiece's kind have
    inner.normalizer = normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    assert len(Tokenizer(inner).cutter([comment]).take(len(comment))) > 100


@pytest.mark.parametrize(
    "text", ["the cat sat " * 100_000, "漢" * 3_000_000, "ACGT" * 700_000 + " end", "a1" * 99_999]
)
def test_pieces_are_bounded_whatever_the_text(text):
    # Encoding one piece takes more than linear time, so bounded pieces are what keeps a long text linear.
    pieces = text_pieces.cut_text([text], list).take(len(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= (
        text_pieces.LONGEST_PIECE if " " not in text[:9] and "1" not in text else 70_000
    )


def test_saved_is_loaded(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    for spec in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = Tokenizer.load(spec)
        assert loaded.sha256 == trained.sha256
        assert loaded.encode(CORPUS[0]).tolist() == trained.encode(CORPUS[0]).tolist()
    assert Tokenizer.load("longnet-tiny").vocab_size == 4096
    assert Tokenizer.load("bytes").sha256 == Tokenizer.bytes().sha256 != trained.sha256


def test_truncation_padding_and_dropout_in_the_file_are_ignored(trained, tmp_path):
    description = json.loads(trained.to_json())
    description["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    description["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    assert Tokenizer.load(tmp_path).encode(CORPUS[0]).tolist() == trained.encode(CORPUS[0]).tolist()


def test_training_keeps_every_byte_and_the_size_asked_for():
    tokenizer = Tokenizer.train([CORPUS], 280)
    assert tokenizer.vocab_size == 280
    assert tokenizer.eos_id is not None
    assert len(tokenizer.encode(CORPUS[0])) < len(CORPUS[0])
    with pytest.raises(ConfigError, match="257"):
        Tokenizer.train([CORPUS], 200)
    with pytest.raises(
        ConfigError,
        match="a vocabulary of 1000000000000000000 ids cannot be trained: 16,777,216 are",
    ):
        Tokenizer.train([CORPUS], 10**18)


@pytest.mark.parametrize("content", [None, b"not json", b'{"a": 1}', b"\xff\xfe"])
def test_a_bad_tokenizer_file_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_end_of_text_is_named_by_token_or_id(trained):
    own = trained.eos_id
    assert [
        end_of_text(name, trained) for name in (None, False, True, END_OF_TEXT, str(own), own)
    ] == [
        None,
        None,
        *[own] * 4,
    ]
    assert end_of_text("0", None) == end_of_text("+0", trained) == 0
    assert end_of_text("a", trained) == trained.id_of("a") != trained.id_of("b")
    bare = Tokenizer(tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    for name, tokenizer, message in (
        ("</s>", trained, "--eos </s>: the tokenizer has no such token"),
        ("a", None, "--eos a is no id, and there is no tokenizer"),
        ("-1", None, "does not fit 64 bits"),
        ("9" * 5000, None, "does not fit 64 bits"),
        (str(trained.vocab_size), trained, f"does not fit a vocabulary of {trained.vocab_size}"),
        (
            True,
            bare,
            r"no end-of-text token: neither tokenizer_config\.json \(eos_token or sep_token\).*\[SEP\]",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            end_of_text(name, tokenizer)


def test_a_token_of_no_characters_is_no_end_of_text():
    """Where tokenizer_config.json names no token, its name is as empty."""
    words = Tokenizer(sentence_pieces(open=""))
    assert "" in words._inner.get_vocab()
    assert (words.eos_id, words.id_of("")) == (words.id_of("</s>"), None)


def test_the_end_of_text_is_what_tokenizer_config_says(tmp_path):
    inner = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    names = [
        "<|im_end|>",
        "<|endoftext|>",
        "[SEP]",
        "<|eot_id|>",
        "<|end\u2581of\u2581sentence|>",
        "STOP",
    ]
    inner.add_special_tokens(names)
    inner.save(str(tmp_path / "tokenizer.json"))

    def end(settings: object) -> str:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        words = Tokenizer.load(tmp_path)
        assert words.sha256 == Tokenizer.from_file(tmp_path / "tokenizer.json").sha256
        return words.token_of(words.eos_id)

    for name in names:
        one = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
        one.add_special_tokens([name])
        # the others are usual names
        assert Tokenizer(one).eos_id == (None if name == "STOP" else 1)
        assert (
            end({"eos_token": name})
            == end({"eos_token": {"content": name, "lstrip": False}})
            == name
        )
    assert end({"eos_token": None, "sep_token": "[SEP]"}) == "[SEP]"
    # the first known one that is there
    assert end({"eos_token": "</s>"}) == end({}) == end([]) == "<|endoftext|>"
    copy = tmp_path / "copy.json"
    inner.save(str(copy))
    assert end({"eos_token": "STOP"}) == "STOP"
    # equal: the model's own
    assert ModelFolder(tmp_path).tokenizer(str(copy)).eos_id == inner.token_to_id("STOP")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: cannot be read"):
        Tokenizer.load(tmp_path)


@given(
    st.text(alphabet="ab ,\u6f22", max_size=400),
    st.lists(st.integers(1, 90), min_size=1, max_size=5),
)
def test_a_text_that_comes_in_parts_is_cut_as_the_whole(text, sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_pieces, "PIECE", 7)
        patch.setattr(text_pieces, "LONGEST_PIECE", 30)
        patch.setattr(text_pieces, "REACH", 3)
        patch.setattr(module, "GROUP", 50)
        parts, start = [], 0
        while start < len(text):
            size = sizes[len(parts) % len(sizes)]
            parts.append(text[start : start + size])
            start += size
        assert text_pieces.cut_text(parts, str.split).take(999) == text_pieces.cut_text(
            [text], str.split
        ).take(999)
        for words in (Tokenizer.bytes(), Tokenizer.load("longnet-tiny")):
            found = list(words.encode_long(parts))
            assert [x for part in found for x in part.ids.tolist()] == words.encode(text).tolist()
            assert sum(part.n_bytes for part in found) == len(text.encode())


def byte_fallback() -> tokenizers.Tokenizer:
    """Of Llama's older kind: no pre-tokenizer, unknown characters as bytes."""
    pieces = ["<unk>", "\u2581", *"abcdehnt", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(
        {piece: i for i, piece in enumerate(pieces)},
        [],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    found = tokenizers.Tokenizer(model)
    found.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    found.decoder = decoders.ByteFallback()
    return found


def normalized(
    words: tokenizers.Tokenizer, normalizer: normalizers.Normalizer
) -> tokenizers.Tokenizer:
    words.normalizer = normalizer
    return words


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "WordPiece": word_pieces,
    "Unigram": sentence_pieces,
    "byte fallback": byte_fallback,
    "bytes with NFC": byte_level,
    "bytes with Strip": lambda: normalized(byte_level(prefix_space=True), normalizers.Strip()),
    "bytes with Lowercase": lambda: normalized(byte_level(), normalizers.Lowercase()),
}
ODD = st.sampled_from([*"aehntx .,\n\t", "the ", "\r\n", "\ufeff", "\u00e9", "e\u0301", "\ufb1d", "\u1e9e", "\u0130",
                       "\U0001f600", "\U0001f468\u200d\U0001f469", "\u6f22", "\uff21", "\u00bd", "\ufb01"])  # fmt: skip
CHANGED = "e\u0301 and then some \ufb1d"  # NFC makes it shorter, then longer, by as many bytes
CASES = "\u1e9e is one and \u0130 is another"


@cache
def made(kind: str) -> tokenizers.Tokenizer:
    return KINDS[kind]()


def document(inner: tokenizers.Tokenizer, text: str) -> Document:
    return next(
        iter(
            Inputs((), tokenizer=Tokenizer(inner).for_documents()).documents_of(
                Text("a", text, "a", {})
            )
        )
    )


@pytest.mark.parametrize("kind", KINDS)
@example(pieces=[CHANGED])
@example(pieces=[CASES])
@example(pieces=["the net reads a text\n"])
@example(pieces=["  the net  "])
@example(pieces=["the net, the text. \u00e9the ab hen "] * 9)
@given(pieces=st.lists(ODD, max_size=30))
def test_places_are_the_tokenizers_offsets(kind, pieces):
    """A text is read in pieces."""
    text, inner = "".join(pieces), made(kind)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(text_pieces, "PIECE", 20)
        found, encoding = document(inner, text), inner.encode(text, add_special_tokens=False)
    assert found.read().tolist() == encoding.ids
    if not len(found):
        return
    places = TextPlaces(found)
    spoken = [places.of(i, i + 1) for i in range(len(found))]
    halves = (
        TextPlaces(found).of_tokens(0, len(found) // 2),
        TextPlaces(found).of_tokens(len(found) // 2, len(found)),
    )
    assert [
        place for half in halves for place in zip(*(x.tolist() for x in half), strict=True)
    ] == spoken
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


@pytest.mark.parametrize("kind", KINDS)
def test_places_past_two_billion_characters_are_exact(kind):
    tokenizer = Tokenizer(made(kind))
    _, places = tokenizer._placed(["the net", " reads"], 0)
    _, later = tokenizer._placed(["the net", " reads"], 1 << 31)
    assert np.array_equal(later, places.astype(np.int64) + (1 << 31))


def test_score_writes_the_place_of_each_token(tmp_path):
    """Not counted from ids because the normalizer made the text longer and then shorter by as much."""
    inner, texts = made("bytes with NFC"), [CHANGED, CASES, "the net  reads"]
    tiny_net(vocab_size=400).save_pretrained(tmp_path / "model", inner.to_str())
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text(text)
    words = ["-m", tmp_path / "model", "--chunk", "5", "--token-logprobs", tmp_path / "t.arrow"]
    invoke("score", *sorted(tmp_path.glob("*.txt")), *words, code=0)
    for row in ipc.open_file(tmp_path / "t.arrow").read_all().to_pylist():
        places = TextPlaces(document(inner, texts[int(row["doc_id"][0])]))
        wanted = [
            places.of(row["start"] + i, row["start"] + i + 1) for i in range(len(row["input_ids"]))
        ]
        assert [*zip(row["char_start"], row["char_end"], strict=True)] == wanted
