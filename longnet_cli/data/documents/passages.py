"""Passages of texts, and an index that finds those with a question's words.

    texts --text_pieces.cut--> passages --PassageIndex--> SQLite's full-text search --find--> the best passages by BM25

The index is in memory, or a file that knows its inputs by their sizes, times of change and contents. With `--vectors`,
`jobs.passage_vectors` also finds passages by their meaning.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from typing import Any, NamedTuple

from longnet_cli.basics.atomic import atomic_write
from longnet_cli.basics.digests import file_sha256
from longnet_cli.basics.errors import ConfigError, DataError, LongNetError, is_utf8
from longnet_cli.basics.events import Events
from longnet_cli.data.files.column_choice import TokenTypes
from longnet_cli.data.files.input_files import InputFile
from longnet_cli.data.files.opened_inputs import Table, Text, reading

from .input_documents import DocumentPass, Inputs, content_digest
from .text_pieces import cut
from .token_documents import Unread

# Writing in which no space ends a word: Thai, Lao, Burmese and Khmer; kana, Chinese characters and hangul
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]+"
)
# From this sign on, two neighbouring signs are taken for a word; before it, three
FIRST_OF_PAIRS = "\u3040"


class Passage(NamedTuple):
    """The characters [char_start, char_end) of a document, `text`. A higher `score` is better.

    It is BM25's or, for passages that were also found by vectors, a sum of reciprocal places.
    """

    doc_id: str
    char_start: int
    char_end: int
    score: float
    text: str


# Words are compared by their stems. `text` is the passage where its `compared` text is another, otherwise null.
WORDS = "porter unicode61 remove_diacritics 0 categories 'L* N* Co M*'"
TABLES = (
    "CREATE TABLE files (file PRIMARY KEY, state, digest, left_out)",
    "CREATE VIRTUAL TABLE passages USING fts5(file UNINDEXED, doc_id UNINDEXED, char_start UNINDEXED, "
    f'char_end UNINDEXED, text UNINDEXED, compared, tokenize="{WORDS}")',
)
MARK = 0x6C6E7004  # in the file's header: "lnp" and the version of the tables, of the cut and of `compared`
SOFT_HYPHEN = "\u00ad"  # where a word may be broken: web pages and PDFs have it within words
WAIT = 60  # seconds for which a process waits for another one
IN_WORDS = re.compile("[LNM]|Co")  # the Unicode categories that WORDS names
STEM = 4  # letters by which an excerpt compares words
NO_INDEX = "no index of passages that this version has made: name another file, or remove it"
JUST_NOW = 2  # seconds in which a file may change twice and have one time of change
NO_EVENTS = Events()  # for an index that tells nobody


class KnownFile(NamedTuple):
    """The record of a file in an index: its size and times, its digest, and its errors, as JSON.

    `state` and `digest` begin with the file's name and columns. They are None where they do not tell whether it is
    still the same.
    """

    state: str | None
    digest: str | None
    left_out: str = "[]"


UNKNOWN = KnownFile(None, None)  # a file that an index has not read


@contextmanager
def open_index(path: str | None) -> Iterator[PassageIndex]:
    """Yield the index in a file, which this process alone uses, or one in memory.

    What is done to it is kept unless an error ends the block. A new file is there when the block has ended. Raises
    ConfigError for a file that is no such index.
    """
    with ExitStack() as stack:
        place = path or ":memory:"
        if path is not None and not os.path.exists(path):
            place = stack.enter_context(atomic_write(path)).name
        index = stack.enter_context(closing(PassageIndex(place, path)))
        yield index
        index.commit()


class PassageIndex:
    """An index of passages in the file `place`, or in memory.

    Errors name the file `path`. If the index is new, `place` is a temporary file, which `path` replaces at the end.

    All up to `commit` is one transaction. Raises ConfigError if another process does not end its own, for a damaged
    file, and for a Python whose SQLite has no full-text search; LongNetError for a full disk.
    """

    def __init__(self, place: str = ":memory:", path: str | None = None) -> None:
        self._path = path or place
        self._places = dict[str, int]()  # of each file among the inputs
        with self._errors():
            self._base = sqlite3.connect(place, timeout=1, isolation_level=None)
        self._base.create_function("place", 1, self._places.get)
        self._begin(may_write=os.access(place, os.W_OK))
        if place != path:
            for query in (*TABLES, f"PRAGMA application_id = {MARK}"):
                self._run(query)
        elif self._run("PRAGMA application_id") != [(MARK,)]:
            raise ConfigError(f"{path}: {NO_INDEX}")

    def _begin(self, may_write: bool) -> None:
        """Begin the transaction. Each try waits for a second, after which Ctrl-C is noticed."""
        for _ in range(WAIT):
            with self._errors():
                try:
                    self._base.execute("BEGIN IMMEDIATE" if may_write else "BEGIN")
                    return
                except sqlite3.OperationalError as error:
                    if "locked" not in str(error):
                        raise
        raise ConfigError(
            f"{self._path}: another process uses this index: wait until it has ended, or name another file"
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            what = f"{self._path}: {error} (SQLite {sqlite3.sqlite_version})"
            if re.search("disk is full|disk I/O", str(error)):
                raise LongNetError(f"{what}: it cannot be written: is the disk full?") from error
            if re.search("no such (module|tokenizer)", str(error)):
                what += "; ask needs FTS5, which this Python's SQLite lacks"
            if "not a database" in str(error):
                what += f": {NO_INDEX}"
            raise ConfigError(what) from error

    def _run(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._errors():
            return self._base.execute(query, values).fetchall()

    def commit(self) -> None:
        """Keep what was done."""
        self._run("COMMIT")

    def close(self) -> None:
        """Close the file. What was not committed is undone."""
        self._base.close()

    def update(
        self,
        inputs: Inputs,
        events: Events = NO_EVENTS,
    ) -> None:
        """Let the index hold the passages of the inputs' texts, and no others. A file that it knows is not read again.

        `events.progress` gets the bytes of each new passage, and `events.left_out` what cannot be read, if the inputs
        have `skip_bad`.
        Raises as `Inputs` does.
        """
        rows = self._run("SELECT file, state, digest, left_out FROM files")
        known = {file: KnownFile(*row) for file, *row in rows}
        files = dict[str, KnownFile]()
        left_out = defaultdict[str, list[str]](list)

        def read(opened: Text | Table, types: TokenTypes) -> Iterable[Any]:
            source = inputs.all_files.found[len(documents.opened) - 1]
            earlier = known.get(source.where, UNKNOWN)
            now = _known_now(source, f"{inputs.wanted} {source.name}", earlier)
            files[source.where] = now
            if now.digest is None or now.digest != earlier.digest:
                self._forget({source.where} & known.keys())
                return inputs.items(opened, types, form="text")
            return (Unread(DataError(why)) for why in json.loads(earlier.left_out))

        documents = DocumentPass(inputs, read)
        for item in documents:
            file = documents.opened[-1][0] if documents.opened else ""  # none for a missing input
            if not isinstance(item, Unread):
                self.add(item, file, events.progress)
                continue
            left_out[file].append(str(item.error))
            if item.file and file in files:  # damaged somewhere: it is read again each time
                files[file] = files[file]._replace(state=None, digest=None)
            if skip := events.left_out.skip:
                skip(item, item.error)
        for file, now in files.items():
            now = now._replace(left_out=json.dumps(left_out[file]))
            if now != known.get(file):
                self._run("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", (file, *now))
        self._places.update({file: place for place, (file, _) in enumerate(documents.opened)})
        self._forget(known.keys() - files.keys())

    def add(
        self,
        text: Text,
        file: str = "",
        on_bytes: Callable[[int], None] = lambda size: None,
    ) -> None:
        """Add the passages of a text, which is in a `file` of the inputs. `on_bytes` gets the size of each."""
        end = 0
        for piece in cut(text.parts, "passage"):
            end += len(piece)
            passage = piece.strip()
            start = end - len(piece.lstrip())
            compared = passage
            if not passage.isascii() or "\0" in passage:
                compared = UNSPACED.sub(lambda run: f" {' '.join(run[0])} ", as_compared(passage))
            row = (file, text.doc_id, start, start + len(passage), passage, compared)
            self._run("INSERT INTO passages VALUES (?1, ?2, ?3, ?4, nullif(?5, ?6), ?6)", row)
            on_bytes(len(piece.encode()))

    def _forget(self, files: Iterable[str]) -> None:
        for file in files:
            for table in ("passages", "files"):
                self._run(f"DELETE FROM {table} WHERE file = ?", [file])

    def find(self, question: str, most: int) -> list[Passage]:
        """Return the best passages that have a word of the question, `most` at most, in the order of the texts.

        Raises ConfigError for a question that is not UTF-8.
        """
        return self.passages(self.rank(question, most))

    def rank(self, question: str, most: int) -> dict[int, float]:
        """Return the numbers of the passages that `find` finds, the best first, with their scores."""
        check_number(most)
        check_question(question)
        words = as_compared(question)
        asked = UNSPACED.sub(" ", words).split()
        for run in UNSPACED.findall(words):
            size = 2 if run >= FIRST_OF_PAIRS else 3
            asked += [" ".join(run[at : at + size]) for at in range(max(1, len(run) - size + 1))]
        match = " OR ".join(f'"{word}"' for word in dict.fromkeys(asked))
        if not match:
            return {}
        query = "SELECT rowid, -rank FROM passages WHERE passages MATCH ? ORDER BY rank, place(file), rowid LIMIT ?"
        return dict(self._run(query, (match, most)))

    def passages(self, scores: Mapping[int, float]) -> list[Passage]:
        """Return the passages of these numbers, with their scores, in the order of the texts."""
        columns = "rowid, doc_id, char_start, char_end, coalesce(text, compared)"
        numbers = ", ".join(map(str, scores))
        rows = self._run(
            f"SELECT {columns} FROM passages WHERE rowid IN ({numbers}) ORDER BY place(file), rowid"
        )
        return [
            Passage(doc_id, start, end, scores[number], text)
            for number, doc_id, start, end, text in rows
        ]

    def places(self) -> list[tuple[int, str, int, int]]:
        """Return the number, the document, and the characters [start, end) of each passage, in order."""
        return self._run("SELECT rowid, doc_id, char_start, char_end FROM passages ORDER BY rowid")


def check_number(most: int) -> None:
    """Raise ConfigError for a number of passages that is below 1."""
    if most < 1:
        raise ConfigError(f"the passages must be 1 or more, not {most}")


def check_question(question: str) -> None:
    """Raise ConfigError for a question that is not UTF-8."""
    if not is_utf8(question):
        raise ConfigError(
            "the question is not UTF-8: save it as a UTF-8 file of JSON Lines, and give that with --questions"
        )


def as_compared(text: str) -> str:
    """Return a text as the search compares it: in small letters, without accents and vowel signs, in NFKC.

    What is no part of a word becomes a space, before the parts of a sign too: of a trade mark, no letters stay.
    """
    words = "".join(map(_in_word, text))
    letters = "".join(map(_in_word, unicodedata.normalize("NFKD", words)))
    return unicodedata.normalize("NFKC", letters.casefold())


def excerpt(text: str, question: str, size: int) -> str:
    """Return about `size` characters of a text, in one line, that have as many of the question's words as possible.

    They begin with such a word, or else with the text. Words are alike if their first STEM letters are.
    """
    words = text.split()
    lengths = {word[:STEM]: len(word) for word in as_compared(question).split()}

    def shown(start: int) -> str:
        return " ".join(words[start:])[:size]

    def shared(start: int) -> int:
        stems = {word[:STEM] for word in as_compared(shown(start)).split()}
        return sum(lengths[stem] for stem in stems & lengths.keys())

    stems = [as_compared(word).strip()[:STEM] for word in words]
    starts = [0, *(start for start, stem in enumerate(stems) if stem in lengths)]
    start = max(starts, key=shared)
    while start and len(" ".join(words[start - 1 :])) <= size:  # at the end of the text
        start -= 1
    return f"... {shown(start)}" if start else shown(start)


@cache
def _in_word(sign: str) -> str:
    """Return a sign, a space for one that is not in a word, nothing for an accent, vowel sign or hyphen to leave out.

    Marks of Indic and Thai writing, without which a word is another one, stay: their combining classes say so.
    """
    if sign == SOFT_HYPHEN:
        return ""
    category = unicodedata.category(sign)
    above = unicodedata.combining(sign)
    if not IN_WORDS.match(category):
        return " "
    return "" if 10 <= above <= 36 or above >= 200 else sign


def _known_now(source: InputFile, read_as: str, earlier: KnownFile) -> KnownFile:
    """Return what is known of a file now. It is read only if its size and times are not those of `earlier`.

    The digest is of all bytes of a file; of one in a store, of its version.
    """
    path = source.local_path
    if path is None:
        version = content_digest(source)
        return KnownFile(None, version and f"{read_as} {version}")
    with reading(source.where):
        status = path.stat()
        times = status.st_mtime_ns, status.st_ctime_ns
        state = f"{read_as} {status.st_ino} {status.st_size} {times[0]} {times[1]}"
        if state == earlier.state:
            return earlier
        is_settled = time.time_ns() - max(times) > JUST_NOW * 10**9
        digest = f"{read_as} {file_sha256(path)}"
    return KnownFile(state if is_settled else None, digest)
