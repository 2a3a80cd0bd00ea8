"""Proves that a text is cut at its own ends, whatever parts it comes in, and that an index finds what its words say."""

from __future__ import annotations

import os
import re
import sqlite3
from itertools import pairwise
from pathlib import Path

import pytest
from files import write_lines
from hypothesis import example, given
from hypothesis import strategies as st

from longnet_cli.basics.errors import ConfigError
from longnet_cli.data.inputs import Inputs
from longnet_cli.data.passages import PassageIndex
from longnet_cli.data.tables import Text
from longnet_cli.data.text_pieces import SIZES, Unit, cut

PROSE = st.lists(
    st.sampled_from(
        ["A word. ", "Who? ", "說。", "no end ", "x" * 300, "\n", "\n \n", "é", "Mr. J. Ox "]
    )
)


@pytest.mark.parametrize("unit", SIZES)
@given(words=PROSE, cuts=st.lists(st.integers(0, 99_999), max_size=4))
@example(words=["x" * 300] * 99, cuts=[5])
@example(words=["\n"] * 2000 + ["Who? "], cuts=[])
@example(
    words=["x" * 300, "x" * 300, "A word. ", "no end ", "x" * 300], cuts=[]
)  # a small letter begins no sentence
def test_pieces_are_the_text_and_end_where_it_ends(
    unit: Unit, words: list[str], cuts: list[int]
) -> None:
    """None is too long. One that could go on ends with a sentence or paragraph, unless none ends (late) in it."""
    text = "".join(words)
    places = sorted({0, len(text), *(place % (len(text) + 1) for place in cuts)})
    pieces = [*cut([text], unit)]
    parts = [text[begin:end] for begin, end in pairwise(places)]
    assert [*cut(parts, unit)] == pieces
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= SIZES[unit] for piece in pieces)
    paragraph = r"\n\s*\n\s*"
    end = (
        paragraph
        if unit == "paragraph"
        else rf"(?<!\bMr)(?<!\bJ)[.?]\s+(?![a-zé])|。\s*|{paragraph}"
    )
    for piece, following in pairwise(pieces):
        longer = len((piece + following).encode()) > SIZES[unit]
        ended = re.search(rf"({end})\Z", piece)
        late = (
            piece.encode()[SIZES[unit] // 2 + 3 :].decode(errors="ignore")
            if unit == "passage"
            else piece
        )
        assert ended or (longer and not re.search(rf"({end})\S", late))


def test_sentences_and_paragraphs_of_prose() -> None:
    text = (
        'Mr. J. Doe left, e.g. by boat. "Why?" He did not say!\n\nChapter 2\n\n'
        "北京。上海。 Écrit par St. Exupéry... Fin"
    )
    assert [*cut([text], "sentence")] == [
        "Mr. J. Doe left, e.g. by boat. ", '"Why?" ', "He did not say!\n\n", "Chapter 2\n\n", "北京。", "上海。 ",
        "Écrit par St. Exupéry... ", "Fin",
    ]  # fmt: skip
    assert [*cut([text], "paragraph")] == [text[:55], "Chapter 2\n\n", text[66:]]
    filler = "This is a sentence of prose. " * 15
    first, second, _ = cut(
        [f"{filler}\n\n{filler}And one more. {filler}"], "passage"
    )  # 435 bytes, then 884
    assert (first.rstrip(), second[-10:]) == (filler.rstrip(), "of prose. ")


def found(texts: dict[str, str], question: str, most: int = 1) -> list[str]:
    index = PassageIndex()
    for name, text in texts.items():
        index.add(Text(name, text, name))
    return [passage.doc_id for passage in index.find(question, most)]


TEXTS = {
    "en": "The ferries of Marlow close the lockers on Wednesday.",
    "fr": "L'été, les élèves lisent.",
    "zh": "北京的人口超过两千万。",
    "th": "เมืองหลวงของประเทศไทยคือกรุงเทพมหานคร",
    "hi": "हिन्दी भाषा",
    "code": "call foo_bar(NEAR, x*) or AND",
}


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("Which ferry has a locker closing?", "en"),  # stems
        ("eleve e\u0301te\u0301", "fr"),
        ("北京的人口是多少?", "zh"),
        ("กรุงเทพมหานครอยู่ที่ไหน", "th"),
        ("हिन्दी", "hi"),
        *(
            (f"foo_bar {syntax}", "code")
            for syntax in ('"', "NEAR(", "x*", "text:", "^a", "-b", "{a} +", "' OR", ")")
        ),
        ("zzz " * 9 + " ".join(f"w{i}" for i in range(3000)) + " lockers", "en"),
    ],
)
def test_words_find_their_passage_and_syntax_is_words(question: str, name: str) -> None:
    assert found(TEXTS, question) == [name]


def test_nothing_is_found_without_a_shared_word() -> None:
    assert found(TEXTS, "xyzzy ?!\0 *") == found(TEXTS, '"" ""') == found({"a": " \n "}, "a") == []


def test_passages_come_in_the_order_of_the_texts_with_their_places(tmp_path: Path) -> None:
    other = "Nothing to see in this sentence. " * 60
    text = f"\n {other}The key is 1. The key. The key.\n\n{other}北京 key. {other}The key is 2."
    (tmp_path / "b.txt").write_text(text)
    write_lines(tmp_path / "a.jsonl", [{"id": 7, "text": "A key."}, {"id": 9, "text": "No lock."}])
    index = PassageIndex()
    index.update(Inputs([tmp_path / "b.txt", tmp_path / "a.jsonl"]))
    passages = index.find("the key", 9)
    assert [passage.doc_id for passage in passages] == ["b.txt"] * 3 + ["7"]
    assert all(
        text[each.char_start : each.char_end] == each.text == each.text.strip()
        for each in passages[:3]
    )
    assert [each.char_start for each in passages[:3]] == sorted(
        each.char_start for each in passages[:3]
    )
    assert (
        max(passages, key=lambda passage: passage.score)
        == index.find("the key", 1)[0]
        == passages[0]
    )


def test_an_index_in_a_file_follows_its_inputs(tmp_path: Path) -> None:
    """After any change it finds what a new one finds, and without one it is only read."""
    path, names = tmp_path / "i.sqlite", [tmp_path / f"{name}.txt" for name in "abc"]
    rows = tmp_path / "r.jsonl"
    write_lines(rows, [{"text": "one cat", "other": "one horse"}])
    for name, text in zip(names, ("one dog", "two cats", "three dogs"), strict=True):
        name.write_text(text)

    def update(inputs: list[Path], **options: str) -> tuple[list[object], int]:
        fresh, kept, read = PassageIndex(), PassageIndex(str(path)), []
        fresh.update(Inputs(inputs, **options))
        kept.update(Inputs(inputs, **options), read.append)
        found = [kept.find(word, 9) for word in ("dog", "cat", "horse", "one")]
        kept.close()
        assert found == [fresh.find(word, 9) for word in ("dog", "cat", "horse", "one")]
        return found, sum(read)

    assert update(names)[1] == 25
    before = path.read_bytes()
    os.chmod(path, 0o400)
    assert update(names)[1] == 0
    assert path.read_bytes() == before
    os.chmod(path, 0o600)
    names[0].write_text("one cat, one dog")
    assert update(names)[1] == 16
    assert update(names[::-1])[1] == 0  # another order of the same
    assert update(names[1:])[1] == 0  # one less
    assert update([*names[1:], rows]) == (update([*names[1:], rows])[0], 7)
    assert update([rows], column="other")[1] == 9
    assert update([rows], column="other")[1] == 0
    before = path.read_bytes()
    names[1].write_bytes(b"\xff")
    with pytest.raises(Exception, match="neither Arrow"):
        update([names[2], names[1]])
    assert path.read_bytes() == before


def test_a_file_that_is_no_index_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("some text " * 200)
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE mine (x)")
    for name, why in (
        ("x.txt", "file is not a database"),
        ("other.sqlite", "no index"),
        (".", "unable to open"),
    ):
        before = (tmp_path / name).read_bytes() if name != "." else b""
        with pytest.raises(ConfigError, match=f"{name}: .*{why}"):
            PassageIndex(str(tmp_path / name))
        assert name == "." or (tmp_path / name).read_bytes() == before


def test_a_python_without_full_text_search_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longnet_cli.data.passages.TABLES", {"words": "no_such_tokenizer"})
    with pytest.raises(
        ConfigError, match="ask needs FTS5 and trigram, which this Python's SQLite lacks"
    ):
        PassageIndex()
