"""Proves that a text is cut at its own ends, whatever parts it comes in, and that an index finds what its words say."""

from __future__ import annotations

import os
import re
import resource
import signal
import sqlite3
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from files import write_lines, write_rows
from hypothesis import example, given
from hypothesis import strategies as st

from longnet_cli.basics.errors import ConfigError, DataError, LongNetError
from longnet_cli.basics.events import Events
from longnet_cli.data.documents.input_documents import Inputs
from longnet_cli.data.documents.passages import JUST_NOW, MARK, PassageIndex, excerpt, open_index
from longnet_cli.data.documents.text_pieces import SIZES, cut
from longnet_cli.data.files.opened_inputs import Text

PROSE = st.lists(
    st.sampled_from(
        ["A word. ", "Who? ", "說。", "no end ", "x" * 300, "\n", "\n \n", "é", "Mr. J. Ox "]
    )
)


@pytest.mark.parametrize("unit", SIZES)
@given(words=PROSE, cuts=st.lists(st.integers(0, 99_999), max_size=4))
@example(words=["x" * 300] * 99, cuts=[5])
@example(words=["\n"] * 2000 + ["Who? "], cuts=[])
# a small letter begins no sentence
@example(words=["x" * 300, "x" * 300, "A word. ", "no end ", "x" * 300], cuts=[])
def test_pieces_are_the_text_and_end_where_it_ends(unit, words, cuts):
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
        else rf"(?<!\bMr)(?<!\bJ)[.?]\s+(?![\sa-zé])|。\s*|{paragraph}"
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


def test_an_abbreviation_before_a_name_or_a_number_ends_no_sentence():
    whole = [
        "So did Prof. Ox, Dr. Doe, Mrs. Poe, St. John vs. Kent, e.g. Paris, i.e. Rome, Fig. 3 of No. 5. ",
        "Was it J. Ox or plan B? ",
        "No. ",
        "I.e. Nobody knows Sr. Lee.",
    ]
    assert [*cut(["".join(whole)], "sentence")] == whole


def test_sentences_and_paragraphs_of_prose():
    text = (
        'Mr. J. Doe left, e.g. by\n  boat etc.\n  and so on. "Why?" He did not say!\n\nChapter 2\n\n'
        "北京。上海。 Écrit par St. Exupéry... Fin"
    )
    assert [*cut([text], "sentence")] == [
        "Mr. J. Doe left, e.g. by\n  boat etc.\n  and so on. ", '"Why?" ',
        "He did not say!\n\n", "Chapter 2\n\n", "北京。", "上海。 ",
        "Écrit par St. Exupéry... ", "Fin",
    ]  # fmt: skip
    assert [*cut([text], "paragraph")] == [text[:74], "Chapter 2\n\n", text[85:]]
    filler = "This is a sentence of prose. " * 15
    # 435 bytes, then 884
    first, second, _ = cut([f"{filler}\n\n{filler}And one more. {filler}"], "passage")
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
    "vi": "Việt Nam",
    "el": "ὁ Ὀδυσσεύς ἐν Ἰθάκῃ",
    "ru": "зелёная ёлка",
    "ar": "اَلْعَرَبِيَّةُ لُغَةٌ",
    "he": "בְּרֵאשִׁית בָּרָא",
    "wide": "\uff27\uff30\uff35 \uff14\uff12 ﬁnal",
    "ja": unicodedata.normalize("NFD", "がっこう ガンダム"),
    "ko": unicodedata.normalize("NFD", "한국어를 배우다"),
    "mixed": "用 AI 写 7 首诗",
    "nul": "before\0after 書\0籍",
    "soft": "an ency\u00adclo\u00adpedia",
    "marks": "the Zyzzyva™ and Straße",
    "ligature": "the o\ufb03ce",
}


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("Which ferry has a locker closing?", "en"),  # stems
        ("eleve e\u0301te\u0301", "fr"),
        ("北京的人口是多少?", "zh"),
        ("กรุงเทพมหานครอยู่ที่ไหน", "th"),
        ("हिन्दी", "hi"),
        ("北京有什么?", "zh"),
        ("Viet", "vi"),
        ("ΟΔΥΣΣΕΥΣ", "el"),
        ("ιθακη", "el"),
        ("елка", "ru"),
        ("العربية", "ar"),
        ("בראשית", "he"),
        ("gpu", "wide"),
        ("42", "wide"),
        ("final", "wide"),
        ("がっこう", "ja"),
        ("ｶﾞﾝﾀﾞﾑ", "ja"),
        ("한국어", "ko"),
        ("배우", "ko"),
        ("ai", "mixed"),
        ("7", "mixed"),
        ("after", "nul"),
        ("籍", "nul"),
        ("encyclopedia", "soft"),
        ("ency\u00adclopedia", "soft"),
        ("zyzzyva", "marks"),
        ("STRASSE", "marks"),
        ("office", "ligature"),
        *(
            (f"foo_bar {syntax}", "code")
            for syntax in ('"', "NEAR(", "x*", "text:", "^a", "-b", "{a} +", "' OR", ")")
        ),
        ("zzz " * 9 + " ".join(f"w{i}" for i in range(3000)) + " lockers", "en"),
    ],
)
def test_words_find_their_passage_and_syntax_is_words(question, name):
    assert found(TEXTS, question) == [name]


@pytest.mark.parametrize(("word", "other"), [("कुल", "कल"), ("がみ", "かみ"), ("มุม", "มม")])
def test_marks_that_make_another_word_are_compared(word, other):
    assert found({"a": word}, word) == ["a"]
    assert found({"a": word}, other) == []


def test_places_are_those_of_the_text_as_it_is():
    text = " " + "Élan vital. " * 50 + "\n\n" + "ガンダム。" * 60 + "\0" + "ﬁne \uff21\uff29. " * 90
    text = unicodedata.normalize("NFD", text)
    index = PassageIndex()
    index.add(Text("a", text, "a"))
    passages = index.find("elan ガンダム fine", 99)
    assert len(passages) > 4
    assert all(text[each.char_start : each.char_end] == each.text for each in passages)


@pytest.mark.parametrize("question", ["violet \ud800", "\udcff"])
def test_a_question_that_is_not_utf_8_is_refused(question):
    with pytest.raises(ConfigError, match="question is not UTF-8"):
        found(TEXTS, question)


@pytest.mark.parametrize(
    ("question", "shown"),
    [
        ("Which keys?", "... keys of the shed are in the e"),
        ("all?", "... are in the end, after all."),
        ("xyzzy?", "One word follows another, and"),
    ],
)
def test_an_excerpt_has_the_words_of_the_question(question, shown):
    text = "One word follows another, and\nthe keys of the shed are in the end, after all."
    assert excerpt(text, question, 29) == shown


def test_nothing_is_found_without_a_shared_word():
    assert found(TEXTS, "xyzzy ?!\0 *") == found(TEXTS, '"" ""') == found({"a": " \n "}, "a") == []


def test_passages_come_in_the_order_of_the_texts_with_their_places(tmp_path):
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


def asked(path: Path, inputs: list[Path], question: str, **options: str | bool) -> list[str]:
    """The names of the documents that an index in a file finds after it has read the inputs."""
    with open_index(str(path)) as index:
        index.update(Inputs(inputs, **options))
        return [passage.doc_id for passage in index.find(question, 9)]


def test_an_index_in_a_file_follows_its_inputs(tmp_path):
    """After any change it finds what a new one finds, and without one it is only read."""
    path, names = tmp_path / "i.sqlite", [tmp_path / f"{name}.txt" for name in "abc"]
    rows = tmp_path / "r.jsonl"
    write_lines(rows, [{"text": "one cat", "other": "one horse"}])
    for name, text in zip(names, ("one dog", "two cats", "three dogs"), strict=True):
        name.write_text(text)

    def update(inputs: list[Path], **options: str) -> tuple[list[object], int]:
        fresh, read = PassageIndex(), []
        fresh.update(Inputs(inputs, **options))
        with open_index(str(path)) as kept:
            kept.update(Inputs(inputs, **options), Events(progress=read.append))
            found = [kept.find(word, 9) for word in ("dog", "cat", "horse", "one")]
        assert found == [fresh.find(word, 9) for word in ("dog", "cat", "horse", "one")]
        return found, sum(read)

    assert update(names)[1] == 25
    time.sleep(JUST_NOW)
    assert update(names)[1] == 0  # from now on it knows their times of change
    before = path.read_bytes()
    os.chmod(path, 0o400)
    assert update(names)[1] == 0
    assert path.read_bytes() == before
    os.chmod(path, 0o600)
    names[0].write_text("one cat, one dog")
    assert update(names)[1] == 16
    assert update(names[::-1])[1] == 0  # another order of the same
    assert update(names[1:])[1] == 0  # one less
    os.utime(names[1])
    assert update(names[1:])[1] == 0  # another time of change
    assert update([*names[1:], rows]) == (update([*names[1:], rows])[0], 7)
    assert update([rows], column="other")[1] == 9
    assert update([rows], column="other")[1] == 0
    before = path.read_bytes()
    names[1].write_bytes(b"\xff")
    with pytest.raises(Exception, match="neither Arrow"):
        update([names[2], names[1]])
    assert path.read_bytes() == before


def test_an_edit_in_the_middle_of_a_large_table_is_noticed(tmp_path):
    """It changes neither the size nor, as it is set back, the time of writing."""
    table, index = tmp_path / "t.arrow", tmp_path / "i.sqlite"
    write_rows(table, [{"text": f"w{i:05}w {'x' * 5000}"} for i in range(2000)])
    assert asked(index, [table], "w01000w") == ["t.arrow:1000"]
    written = os.stat(table).st_mtime_ns
    table.write_bytes(table.read_bytes().replace(b"w01000w", b"edited!"))
    os.utime(table, ns=(written, written))
    assert asked(index, [table], "edited") == ["t.arrow:1000"]


def test_a_known_file_has_the_name_that_it_has_now(tmp_path):
    for folder in ("x", "x/sub", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(f"one {folder}")
    index = tmp_path / "i.sqlite"
    assert asked(index, [tmp_path / "x"], "one") == ["a.txt", "sub/a.txt"]
    assert asked(index, [tmp_path / "x/sub"], "one") == ["a.txt"]
    both = [tmp_path / "x/a.txt", tmp_path / "y/a.txt"]
    assert asked(index, both, "one") == [*map(str, both)]


def test_two_processes_answer_from_their_own_files(tmp_path, monkeypatch):
    """The second waits for the first, and then says that it has waited long enough."""
    index = tmp_path / "i.sqlite"
    for name in ("mine", "theirs"):
        (tmp_path / f"{name}.txt").write_text(f"the door is {name}")
    assert asked(index, [tmp_path / "mine.txt"], "door") == ["mine.txt"]
    with ThreadPoolExecutor() as pool:
        with open_index(str(index)) as first:
            first.update(Inputs([tmp_path / "mine.txt"]))
            second = pool.submit(asked, index, [tmp_path / "theirs.txt"], "door")
            time.sleep(0.3)
            assert not second.done()
            assert [each.doc_id for each in first.find("door", 9)] == ["mine.txt"]
        assert second.result() == ["theirs.txt"]
    monkeypatch.setattr("longnet_cli.data.documents.passages.WAIT", 1)
    held = open_index(str(index))
    with held, pytest.raises(ConfigError, match=r"i.sqlite: another process uses this index"):
        asked(index, [tmp_path / "mine.txt"], "door")


def test_two_first_runs_at_once_leave_each_passage_once(tmp_path):
    index, inputs = tmp_path / "i.sqlite", [tmp_path / "a.txt"]
    inputs[0].write_text("one passage")
    with open_index(str(index)) as first:
        first.update(Inputs(inputs))
        assert asked(index, inputs, "passage") == ["a.txt"]
        assert len(first.find("passage", 9)) == 1
    assert asked(index, inputs, "passage") == ["a.txt"]
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "i.sqlite"]


def test_a_call_that_is_refused_leaves_no_index_and_changes_none(tmp_path):
    index, text = tmp_path / "i.sqlite", tmp_path / "a.txt"
    text.write_text("one passage")
    for wrong in ({"inputs": [tmp_path / "missing"]}, {"inputs": [text], "column": "body"}):
        with pytest.raises((ConfigError, DataError)):
            asked(index, question="passage", **wrong)
        assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("limit", [0, 100_000])
@pytest.mark.parametrize("known", [False, True])
def test_a_full_disk_is_one_line_and_the_index_stays(tmp_path, limit, known):
    index, text = tmp_path / "i.sqlite", tmp_path / "a.txt"
    text.write_text("short")
    if known:
        asked(index, [text], "short")
    before = index.read_bytes() if known else None
    text.write_text("".join(f"word{i} " for i in range(50_000)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(
            LongNetError, match=r"i.sqlite: .*written: is the disk full\?"
        ) as failure:
            asked(index, [text], "word1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert failure.value.exit_code == 1
    assert (index.read_bytes() if index.exists() else None) == before
    assert asked(index, [text], "word1") == ["a.txt"]
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "i.sqlite"]


def test_a_file_that_is_no_index_is_refused_and_stays(tmp_path):
    (tmp_path / "x.txt").write_text("some text " * 200)
    (tmp_path / "empty").write_text("")
    (tmp_path / "folder").mkdir()
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE mine (x)")
    with sqlite3.connect(tmp_path / "marked.sqlite") as other:
        other.execute(f"PRAGMA application_id = {MARK}")
    for name, why in (
        ("x.txt", r"file is not a database \(SQLite [\d.]+\): no index of passages"),
        ("empty", "no index of passages"),
        ("other.sqlite", "no index of passages"),
        ("marked.sqlite", r"no such table: files \(SQLite [\d.]+\)"),
        ("folder", "unable to open database file"),
        ("x.txt/i", "cannot write"),
    ):
        before = (tmp_path / name).read_bytes() if (tmp_path / name).is_file() else b""
        with pytest.raises(ConfigError, match=f"{name}: .*{why}$|{name}: {why}"):
            asked(tmp_path / name, [tmp_path / "x.txt"], "text")
        assert not before or (tmp_path / name).read_bytes() == before


def test_a_python_without_full_text_search_is_told(monkeypatch):
    for lacking in ("fts5(words, tokenize='no_such_tokenizer')", "no_such_module"):
        table = f"CREATE VIRTUAL TABLE passages USING {lacking}"
        monkeypatch.setattr("longnet_cli.data.documents.passages.TABLES", [table])
        with pytest.raises(ConfigError, match="ask needs FTS5, which this Python's SQLite lacks"):
            PassageIndex()
